"""A transformers folder as a teacher: right positions, right numbers, and clear words about bad folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from students.fold import to_llama
from teachers import huggingface
from teachers.base import Sampling, Teacher, Tokens
from teachers.chat_template import render_chat
from teachers.conversation import conversation_tokens, opening_segments
from teachers.errors import TeacherError
from teachers.gguf_teacher import GGUFTeacher
from teachers.huggingface import HuggingFaceTeacher
from teachers.huggingface_model import FloatHead, batches
from teachers.recipe import Recipe
from teachers.records import typed
from teachers.sketch import fit_basis, tail_metric
from tests.conftest import make_student
from tests.tiny_checkpoint import BOS, END, EOS, edit, make_folder, save_tokenizer, texts

VOCAB = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound checkpoint folder."""
    return make_folder(tmp_path_factory.mktemp("huggingface") / "tiny", vocab_size=VOCAB)


@pytest.fixture(scope="module")
def teacher(folder: Path) -> HuggingFaceTeacher:
    """The checkpoint, loaded."""
    return HuggingFaceTeacher(folder)


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder to damage."""
    return Path(shutil.copytree(folder, tmp_path / "broken"))


def reference(folder: Path, tokens: Tokens) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits and hidden states of one sequence from transformers itself, without any padding."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        said = model(torch.tensor(tokens[None, :-1].astype(np.int64)), output_hidden_states=True)
    return said.logits[0].numpy(), [state[0].numpy() for state in said.hidden_states]


# -- answers ------------------------------------------------------------------------------------------------


def test_logits_equal_the_models_own_without_padding(folder: Path, teacher: HuggingFaceTeacher) -> None:
    """Sequences of different lengths, in their own order, n − 1 rows each."""
    sequences = texts(7)
    found = teacher.logits(sequences)
    expected = np.concatenate([reference(folder, tokens)[0] for tokens in sequences])
    assert found.dtype == np.float32 and found.shape == (sum(len(t) - 1 for t in sequences), VOCAB)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_states_are_those_before_and_after_the_last_norm(folder: Path, teacher: HuggingFaceTeacher) -> None:
    """``final`` is what the output layer gets; ``layer<i>`` what layer i hands on, the last one unnormed."""
    sequences = texts(5, seed=1)
    found = teacher.states(sequences, layers=(0, 2))
    hidden = [reference(folder, tokens)[1] for tokens in sequences]
    assert set(found) == {"final", "layer0", "layer2"}
    assert np.allclose(found["final"], np.concatenate([h[-1] for h in hidden]), atol=1e-4)
    assert np.allclose(found["layer0"], np.concatenate([h[1] for h in hidden]), atol=1e-4)
    last = torch.from_numpy(found["layer2"])
    normed = last * torch.rsqrt(last.pow(2).mean(-1, keepdim=True) + 1e-6)  # the fresh norm's weight is 1
    assert np.abs(found["layer2"] - found["final"]).max() > 0.1
    assert np.allclose(normed.numpy(), found["final"], atol=1e-3)


def test_states_times_output_rows_are_the_logits(teacher: HuggingFaceTeacher) -> None:
    """What makes targets of kind ``hidden`` exact."""
    sequences = texts(4, seed=2)
    rows = np.concatenate([teacher.output_rows(0, 100), teacher.output_rows(100, VOCAB)])
    product = teacher.states(sequences)["final"] @ rows.T
    assert np.allclose(product, teacher.logits(sequences), atol=1e-3)


def test_batch_equals_one_by_one(teacher: HuggingFaceTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding and company change nothing; neither does how the sequences are grouped."""
    sequences = texts(9, seed=3)
    recipe = Recipe("dense")
    together = teacher.score(sequences, recipe, {})["logits"]
    alone = np.concatenate([teacher.score([tokens], recipe, {})["logits"] for tokens in sequences])
    assert np.allclose(together, alone, atol=1e-4)
    monkeypatch.setattr(huggingface, "BATCH_TOKENS", 50)
    reports: list[int] = []
    assert np.allclose(teacher.score(sequences, recipe, {}, reports.append)["logits"], alone, atol=1e-4)
    assert len(reports) > 3 and reports == sorted(reports) and reports[-1] == len(alone)


def test_batches_hold_every_sequence_once_within_the_room() -> None:
    """Padded size at most the room, unless one sequence alone exceeds it."""
    lengths = [3, 50, 7, 7, 1, 20, 100]
    groups = batches(lengths, 40)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[index] for index in group) <= 40


def test_all_kinds_of_targets_say_what_the_logits_say(teacher: HuggingFaceTeacher) -> None:
    """compact (with and without a sketch), hidden, dense, and layers beside them."""
    sequences = texts(12, seed=4)
    logits = torch.from_numpy(teacher.logits(sequences)).double()
    expected = logits.log_softmax(-1)
    states = {name: torch.from_numpy(np.array(x)) for name, x in teacher.states(sequences, (1,)).items()}
    metric = tail_metric(states["final"], teacher.output_rows, VOCAB)
    bases = {
        "final": fit_basis(states["final"], metric, 64),
        "layer1": fit_basis(states["layer1"], None, 64),
    }
    head = bases["final"].head(teacher.output_rows, VOCAB)
    whole = type(head)(torch.from_numpy(teacher.output_rows(0, VOCAB)), torch.zeros(VOCAB))
    for recipe, head_used, tolerance in (
        (Recipe("compact", num_topk=VOCAB), None, 0.02),
        (Recipe("compact", num_topk=16, sketch_bytes=64), head, 0.3),
        (Recipe("hidden", layers=(1,), layer_bytes=64), whole, 0.5),
        (Recipe("dense"), None, 1e-4),
    ):
        arrays = teacher.score(sequences, recipe, bases)
        assert all(len(rows) == len(expected) for rows in arrays.values())
        assert ("layer1" in arrays) == bool(recipe.layers)
        found = typed(arrays, recipe, VOCAB, bases["final"], head_used).log_probs(1.0)
        likely = expected > -8.0
        assert (found - expected)[likely].abs().max() < tolerance, recipe
        divergence = (expected.exp() * (expected - found)).sum(-1)
        assert divergence.abs().max() < tolerance, recipe


def test_layer_states_come_back_from_the_store(teacher: HuggingFaceTeacher) -> None:
    """What is encoded of a layer is that layer, up to rounding."""
    sequences = texts(12, seed=5)
    states = torch.from_numpy(np.array(teacher.states(sequences, (0,))["layer0"]))
    basis = fit_basis(states, None, 64)
    arrays = teacher.score(sequences, Recipe("compact", layers=(0,), layer_bytes=64), {"layer0": basis})
    back = basis.coordinates(arrays["layer0"], arrays["layer0_scale"]) @ basis.decode + basis.mean
    assert float((back - states).norm() / states.norm()) < 0.05


def test_hidden_targets_skip_the_output_layer(
    teacher: HuggingFaceTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing calls the output layer where the recipe needs no logits."""
    calls: list[int] = []
    handle = teacher._model.head.register_forward_hook(lambda *_: calls.append(1))
    teacher.score(texts(3), Recipe("hidden"), {})
    teacher.states(texts(3))
    assert not calls
    teacher.score(texts(3), Recipe("dense"), {})
    handle.remove()
    assert calls


def test_unknown_layers_and_sequences_are_refused(teacher: HuggingFaceTeacher) -> None:
    """Each error names the folder and the value."""
    with pytest.raises(TeacherError, match=r"tiny: layer 3 does not exist; the teacher's are 0 to 2"):
        teacher.states(texts(2), (3,))
    with pytest.raises(TeacherError, match="tokens from 5 to 300, the vocabulary is 0 to 299"):
        teacher.logits([np.array([5, VOCAB], np.int32)])
    with pytest.raises(TeacherError, match="sequence 1 has 1 tokens"):
        teacher.logits([np.array([5, 6], np.int32), np.array([5], np.int32)])
    with pytest.raises(TeacherError, match="has 300 tokens, more than the context of 256"):
        teacher.logits([np.zeros(300, np.int32)])


def test_damaged_weights_are_named(broken: Path) -> None:
    """A NaN in a weight ends in an error with the folder's name, whatever is asked."""
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    teacher = HuggingFaceTeacher(broken)
    for recipe in (Recipe("compact"), Recipe("hidden"), Recipe("dense")):
        with pytest.raises(TeacherError, match=r"broken: the teacher's .* not finite"):
            teacher.score(texts(3), recipe, {})
    with pytest.raises(TeacherError, match=r"broken: .*not finite"):
        teacher.logits(texts(2))
    with pytest.raises(TeacherError, match=r"broken: .*not finite"):
        teacher.states(texts(2))
    with pytest.raises(TeacherError, match=r"broken: .*not finite"):
        teacher.speak([[np.array([BOS], np.int32)]], Sampling(max_length=4))


def test_output_that_is_no_matrix_is_refused(folder: Path, broken: Path) -> None:
    """A bias, a soft cap or a scale on the logits, and one that no setting announces."""
    for name, value in (("final_logit_softcapping", 30.0), ("logit_scale", 0.5)):
        teacher = HuggingFaceTeacher(folder)
        setattr(teacher._model.config, name, value)
        with pytest.raises(
            ValueError, match=rf"tiny: its logits are more .*\({name} {value}\).*sketch_bytes=0"
        ):
            teacher.output_rows(0, 2)
    teacher = HuggingFaceTeacher(folder)
    teacher._model.head.bias = torch.nn.Parameter(torch.ones(VOCAB))
    with pytest.raises(ValueError, match="bias of the output layer"):
        teacher.output_rows(0, 2)
    teacher = HuggingFaceTeacher(folder)
    teacher._model.head.register_forward_hook(lambda module, given, output: output * 1.1)
    with pytest.raises(ValueError, match="relative difference"):
        teacher.output_rows(0, 2)


def test_float_head_does_not_round_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bfloat16 output layer gives float32 logits, chunk by chunk, with and without a bias."""
    monkeypatch.setattr("teachers.huggingface_model.HEAD_ROWS", 7)
    for bias in (False, True):
        linear = torch.nn.Linear(16, 50, bias=bias).bfloat16().requires_grad_(False)
        states = torch.randn(3, 4, 16).bfloat16()
        expected = states.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0.0)
        found = FloatHead(linear)(states)
        assert found.dtype == torch.float32 and torch.allclose(found.double(), expected, atol=1e-5)


def test_agrees_with_llama_cpp_on_the_same_weights(tiny_teacher: GGUFTeacher, tmp_path: Path) -> None:
    """The folder and the GGUF file of one model give the same logits and final states."""
    student = make_student(64, 2, tiny_teacher.info.vocab_size)  # as the fixture makes it
    to_llama(student).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with HuggingFaceTeacher(tmp_path) as teacher:
        sequences = texts(4, seed=6)
        mine, theirs = teacher.logits(sequences), tiny_teacher.logits(sequences, exact=True)
        assert np.abs(mine - theirs).max() < 1e-3
        assert (
            np.abs(teacher.states(sequences)["final"] - tiny_teacher.states(sequences)["final"]).max() < 1e-2
        )
        assert np.allclose(teacher.output_rows(3, 9), tiny_teacher.output_rows(3, 9))
        assert (teacher.info.width, teacher.info.layers) == (
            tiny_teacher.info.width,
            tiny_teacher.info.layers,
        )


# -- text ---------------------------------------------------------------------------------------------------


def test_info(folder: Path, teacher: HuggingFaceTeacher) -> None:
    """Facts come from configuration, generation configuration and tokenizer."""
    info = teacher.info
    weights = load_file(folder / "model.safetensors")
    assert (info.name, info.architecture) == ("tiny", "llama")
    assert info.parameters == sum(weight.numel() for weight in weights.values())
    assert info.file_bytes == (folder / "model.safetensors").stat().st_size
    assert (info.vocab_size, info.width, info.layers, info.context_length) == (VOCAB, 64, 3, 256)
    assert (info.bos, info.eos, info.end_tokens, info.add_bos) == (BOS, EOS, (EOS, END), True)
    assert info.chat_template is not None
    as_teacher: Teacher = teacher
    assert as_teacher.info is info


def test_digests_follow_weights_configuration_and_tokenizer(folder: Path, broken: Path) -> None:
    """Equal for a copy under another name; another for any change that changes answers or tokens."""
    original, copied = HuggingFaceTeacher(folder).info, HuggingFaceTeacher(broken).info
    assert (original.sha256, original.tokenizer_sha256) == (copied.sha256, copied.tokenizer_sha256)
    edit(broken / "config.json", rms_norm_eps=1e-3)
    (broken / "chat_template.jinja").write_text("{{ messages }}")
    changed = HuggingFaceTeacher(broken).info
    assert changed.sha256 != original.sha256 and changed.tokenizer_sha256 != original.tokenizer_sha256
    save_tokenizer(broken, add_bos=False)
    assert not HuggingFaceTeacher(broken).info.add_bos


def test_tokens_and_text(teacher: HuggingFaceTeacher) -> None:
    """There and back; control tokens are read or left as text, BOS is added or not, as asked."""
    line = " the cat</s> sat, さん."
    plain, parsed = (
        teacher.tokenize([line], add_special=False, parse_special=special)[0] for special in (False, True)
    )
    assert EOS not in plain.tolist() and EOS in parsed.tolist()
    assert teacher.detokenize([plain, parsed]) == [line, line]
    assert teacher.tokenize([line], add_special=True, parse_special=True)[0].tolist() == [
        BOS,
        *parsed.tolist(),
    ]
    assert teacher.tokenize([line], add_special=False, parse_special=False)[0].tolist() == plain.tolist()
    assert teacher.detokenize([np.array([BOS, END], np.int32), np.array([], np.int32)]) == ["<s><|end|>", ""]
    many = teacher.tokenize(["a", "", "\udce4"], add_special=False, parse_special=False)
    assert [len(tokens) for tokens in many] == [1, 0, 1] and teacher.detokenize(many[2:]) == ["?"]


def test_a_tokens_own_space_is_kept(folder: Path, broken: Path) -> None:
    """Decoders that strip a text's first space must not strip a token's."""
    content = json.loads((broken / "tokenizer.json").read_text())
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    content["decoder"] = {"type": "Sequence", "decoders": [content["decoder"], strip]}
    (broken / "tokenizer.json").write_text(json.dumps(content))
    teacher = HuggingFaceTeacher(broken)
    (tokens,) = teacher.tokenize([" the"], add_special=False, parse_special=False)
    assert teacher.detokenize([tokens, tokens]) == [" the", " the"]


def test_conversations_work(teacher: HuggingFaceTeacher) -> None:
    """The chat template and one BOS, as for any teacher."""
    tokens = conversation_tokens(teacher, [{"role": "user", "content": "the cat"}], answer=True)
    assert tokens.tolist().count(BOS) == 1
    assert teacher.detokenize([tokens]) == ["<s>[user] the cat<|end|>[assistant] "]
    segments = opening_segments(teacher)
    assert segments is not None
    assert teacher.detokenize(segments) == ["<s>[user] ", "<|end|>[assistant] "]
    assert teacher.info.chat_template is not None
    assert render_chat(teacher.info.chat_template, [], add_generation_prompt=True) == "[assistant] "


def test_close_twice(folder: Path) -> None:
    """Closing is safe to repeat; a closed teacher says so."""
    with HuggingFaceTeacher(folder) as teacher:
        teacher.close()
    teacher.close()
    with pytest.raises(TeacherError, match="was closed"):
        teacher.logits(texts(1))
