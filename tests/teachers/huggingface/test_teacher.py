"""A transformers folder as a teacher: right positions, right numbers, and clear errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from students.model.decoder import SO8TForCausalLM
from students.model.fold import to_llama
from teachers.base import GenerationRequest, LogitRule, Sampling, Teacher, Tokens
from teachers.errors import TeacherError
from teachers.huggingface import device
from teachers.huggingface.model import FloatHead, batches
from teachers.huggingface.teacher import HuggingFaceTeacher
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.store.capture import CaptureError, logit_rule
from teachers.targets.fit_codec import fit_basis, tail_metric
from teachers.targets.recipe import Recipe
from teachers.targets.stored_arrays import typed
from teachers.tokenizer.chat_template import render_chat
from teachers.tokenizer.conversation import conversation_tokens, opening_segments
from tests.support.tiny_checkpoint import BOS, END, EOS, edit, make_folder, save_tokenizer, texts

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


@pytest.fixture(scope="module")
def reference(folder: Path) -> Callable[[list[Tokens]], tuple[np.ndarray, list[np.ndarray]]]:
    """Logits and hidden states of sequences from transformers itself, one by one, unpadded."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def ask(sequences: list[Tokens]) -> tuple[np.ndarray, list[np.ndarray]]:
        said = [
            model(torch.tensor(tokens[None, :-1].astype(np.int64)), output_hidden_states=True)
            for tokens in sequences
        ]
        states = zip(*(one.hidden_states for one in said), strict=True)
        logits = torch.cat([one.logits[0] for one in said])
        return logits.numpy(), [torch.cat(layer, dim=1)[0].numpy() for layer in states]

    return ask


def test_answers_equal_the_models_own_without_padding(
    teacher: HuggingFaceTeacher, reference: Callable[..., tuple[np.ndarray, list[np.ndarray]]]
) -> None:
    """Sequences of different lengths, in order, n − 1 rows each.

    ``final`` is what the output layer gets; ``layer<i>`` what layer i hands on, unnormed.
    """
    sequences = texts(7)
    expected, hidden = reference(sequences)
    found, states = teacher.logits(sequences), teacher.states(sequences, layers=(0, 2))
    assert found.dtype == np.float32 and found.shape == (sum(len(t) - 1 for t in sequences), VOCAB)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert set(states) == {"final", "layer0", "layer2"}
    assert np.allclose(states["final"], hidden[-1], atol=1e-4)
    assert np.allclose(states["layer0"], hidden[1], atol=1e-4)
    last = torch.from_numpy(states["layer2"])
    normed = last * torch.rsqrt(last.pow(2).mean(-1, keepdim=True) + 1e-6)  # the norm's weight is 1
    assert np.abs(states["layer2"] - states["final"]).max() > 0.1
    assert np.allclose(normed.numpy(), states["final"], atol=1e-3)
    # What makes targets of kind ``hidden`` exact.
    rows = np.concatenate([teacher.output_rows(0, 100), teacher.output_rows(100, VOCAB)])
    assert np.allclose(states["final"] @ rows.T, found, atol=1e-3)


def test_batch_equals_one_by_one(
    teacher: HuggingFaceTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding and company change nothing; neither does how the sequences are grouped."""
    sequences, reports = texts(9, seed=3), list[int]()

    def logits(given: list[Tokens]) -> np.ndarray:
        return teacher.score(given, Recipe("dense"), {}, reports.append)["logits"]

    together = logits(sequences)
    alone = np.concatenate([logits([tokens]) for tokens in sequences])
    assert np.allclose(together, alone, atol=1e-4)
    monkeypatch.setattr(device, "BATCH_TOKENS", 50)
    reports.clear()
    assert np.allclose(logits(sequences), alone, atol=1e-4)
    assert len(reports) > 3 and reports == sorted(reports) and reports[-1] == len(alone)


def test_batches_hold_every_sequence_once_within_the_room() -> None:
    """Padded size at most the room, unless one sequence alone exceeds it."""
    lengths = np.array([3, 50, 7, 7, 1, 20, 100])
    groups = batches(lengths.tolist(), 40)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or len(group) * lengths[group].max() <= 40 for group in groups)


def test_all_kinds_of_targets_say_what_the_logits_say(teacher: HuggingFaceTeacher) -> None:
    """compact (with and without a sketch), hidden, dense, and layers beside them."""
    sequences = texts(12, seed=4)
    expected = torch.from_numpy(teacher.logits(sequences)).double().log_softmax(-1)
    likely = expected > -8.0
    states = teacher.states(sequences, (1,))
    final, layer1 = (torch.from_numpy(np.array(states[name])) for name in ("final", "layer1"))
    metric = tail_metric(final, teacher.output_rows, VOCAB)
    bases = {"final": fit_basis(final, metric, 64), "layer1": fit_basis(layer1, None, 64)}
    head = bases["final"].head(teacher.output_rows, VOCAB)
    whole = type(head)(torch.from_numpy(teacher.output_rows(0, VOCAB)), torch.zeros(VOCAB))
    for recipe, head_used, tolerance in (
        (Recipe("compact", num_topk=VOCAB), None, 0.02),
        (Recipe("compact", num_topk=16, sketch_bytes=64), head, 0.3),
        (Recipe("hidden", layers=(1,), layer_bytes=64), whole, 0.5),
        (Recipe("dense"), None, 1e-4),
    ):
        arrays = teacher.score(sequences, recipe, bases)
        assert all(len(rows) == len(expected) for rows in arrays.values()), recipe
        assert ("layer1" in arrays) == bool(recipe.layers), recipe
        found = typed(arrays, recipe, VOCAB, bases["final"], head_used).log_probs(1.0)
        assert (found - expected)[likely].abs().max() < tolerance, recipe
        divergence = (expected.exp() * (expected - found)).sum(-1)
        assert divergence.abs().max() < tolerance, recipe
        if recipe.layers:  # what is encoded of a layer is that layer, up to rounding
            basis = bases["layer1"]
            codes = basis.coordinates(arrays["layer1"], arrays["layer1_scale"])
            back = codes @ basis.decode + basis.mean
            assert float((back - layer1).norm() / layer1.norm()) < 0.05


def test_hidden_targets_skip_the_output_layer(teacher: HuggingFaceTeacher) -> None:
    """Nothing calls the output layer where the recipe needs no logits."""
    calls: list[int] = []
    handle = teacher.model.head.register_forward_hook(lambda *_: calls.append(1))
    teacher.score(texts(3), Recipe("hidden"), {})
    teacher.states(texts(3))
    assert not calls
    teacher.score(texts(3), Recipe("dense"), {})
    handle.remove()
    assert calls


def test_unknown_layers_and_sequences_are_refused(teacher: HuggingFaceTeacher) -> None:
    """Each error names the folder and the value."""
    with pytest.raises(TeacherError, match=r"tiny: layer 3 does not exist; .* are 0 to 2"):
        teacher.states(texts(2), (3,))
    for sequences, words in (
        ([[5, VOCAB]], "tokens from 5 to 300, the vocabulary is 0 to 299"),
        ([[5, 6], [5]], "sequence 1 has 1 tokens"),
        ([[0] * 300], "has 300 tokens, more than the context of 256"),
    ):
        with pytest.raises(TeacherError, match=words):
            teacher.logits([np.array(tokens, np.int32) for tokens in sequences])
            pytest.fail(f"not refused: {words}")


def test_damaged_weights_are_named(broken: Path) -> None:
    """A NaN in a weight ends in an error with the folder's name, whatever is asked."""
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    teacher = HuggingFaceTeacher(broken)
    start = [np.array([BOS], np.int32)]
    asked: dict[str, Callable[[], object]] = {
        "compact": lambda: teacher.score(texts(3), Recipe("compact"), {}),
        "hidden": lambda: teacher.score(texts(3), Recipe("hidden"), {}),
        "dense": lambda: teacher.score(texts(3), Recipe("dense"), {}),
        "logits": lambda: teacher.logits(texts(2)),
        "states": lambda: teacher.states(texts(2)),
        "speak": lambda: teacher.generate(GenerationRequest([start], Sampling(max_length=4))),
    }
    for name, ask in asked.items():
        with pytest.raises(TeacherError, match=r"broken: the teacher's .* not finite"):
            ask()
            pytest.fail(f"{name} is answered")


def test_output_that_is_no_matrix_is_refused(folder: Path) -> None:
    """A bias, and a change of the logits that no setting announces; announced ones are followed."""
    bias, text = torch.nn.Parameter(torch.ones(VOCAB)), np.arange(3, 40, dtype=np.int32)
    cases: dict[str, tuple[dict[str, float], Callable[[Tensor], Tensor]]] = {
        "cap": ({"final_logit_softcapping": 2.0}, lambda logits: 2.0 * (logits / 2.0).tanh()),
        "scale": ({"logit_scale": 0.5}, lambda logits: logits * 0.5),
        "divisor": ({"logits_scaling": 8.0}, lambda logits: logits / 8.0),
        "unannounced": ({}, lambda logits: logits * 1.2),
    }
    for name, (settings, change) in cases.items():
        teacher = HuggingFaceTeacher(folder)
        vars(teacher.model.config).update(settings)
        teacher.model.head.register_forward_hook(
            lambda module, given, output, change=change: change(output)
        )
        if settings:
            assert logit_rule(teacher, text) != LogitRule(), name
            continue
        with pytest.raises(CaptureError, match=r"by 1\d%"):
            logit_rule(teacher, text)
    teacher = HuggingFaceTeacher(folder)
    teacher.model.head.bias = bias
    with pytest.raises(ValueError, match=r"bias: True.*sketch_bytes=0"):
        teacher.output_rows(0, 2)


def test_float_head_does_not_round_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bfloat16 output layer gives float32 logits, chunk by chunk, with and without a bias."""
    monkeypatch.setattr("teachers.huggingface.model.HEAD_ROWS", 7)
    for bias in (False, True):
        linear = torch.nn.Linear(16, 50, bias=bias).bfloat16().requires_grad_(False)
        states = torch.randn(3, 4, 16).bfloat16()
        expected = states.double() @ linear.weight.double().T + (
            linear.bias.double() if bias else 0.0
        )
        found = FloatHead(linear)(states)
        assert found.dtype == torch.float32 and torch.allclose(found.double(), expected, atol=1e-5)


def test_agrees_with_llama_cpp_on_the_same_weights(
    tiny_teacher: GGUFTeacher, tiny_student: SO8TForCausalLM, tmp_path: Path
) -> None:
    """The folder and the GGUF file of one model give the same logits and final states."""
    to_llama(tiny_student).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    sequences = texts(4, seed=6)
    with HuggingFaceTeacher(tmp_path) as teacher:
        one, other = teacher.logits(sequences), tiny_teacher.logits(sequences, exact=True)
        assert np.abs(one - other).max() < 1e-3
        one, other = (asked.states(sequences)["final"] for asked in (teacher, tiny_teacher))
        assert np.abs(one - other).max() < 1e-2
        assert np.allclose(teacher.output_rows(3, 9), tiny_teacher.output_rows(3, 9))
        assert teacher.info.width == tiny_teacher.info.width
        assert teacher.info.layers == tiny_teacher.info.layers


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
    """Equal for a copy under another name; another for a change that changes answers or tokens."""
    original, copied = HuggingFaceTeacher(folder).info, HuggingFaceTeacher(broken).info
    assert (original.sha256, original.tokenizer_sha256) == (copied.sha256, copied.tokenizer_sha256)
    edit(broken / "config.json", rms_norm_eps=1e-3)
    (broken / "chat_template.jinja").write_text("{{ messages }}")
    changed = HuggingFaceTeacher(broken).info
    assert changed.sha256 != original.sha256
    assert changed.tokenizer_sha256 != original.tokenizer_sha256
    save_tokenizer(broken, add_bos=False)
    assert not HuggingFaceTeacher(broken).info.add_bos


def test_tokens_and_text(teacher: HuggingFaceTeacher) -> None:
    """There and back; control tokens are read or left as text, BOS is added or not, as asked."""
    line = " the cat</s> sat, さん."

    def tokens(text: str, special: bool, parse: bool) -> list[int]:
        return teacher.tokenize([text], add_special=special, parse_special=parse)[0].tolist()

    plain, parsed = tokens(line, False, False), tokens(line, False, True)
    assert EOS not in plain and EOS in parsed
    both = [np.array(found, np.int32) for found in (plain, parsed)]
    assert teacher.detokenize(both) == [line] * 2
    assert tokens(line, True, True) == [BOS, *parsed]
    end = [np.array([BOS, END], np.int32), np.array([], np.int32)]
    assert teacher.detokenize(end) == ["<s><|end|>", ""]
    many = teacher.tokenize(["a", "", "\udce4"], add_special=False, parse_special=False)
    assert [len(found) for found in many] == [1, 0, 1] and teacher.detokenize(many[2:]) == ["?"]


def test_a_tokens_own_space_is_kept(broken: Path) -> None:
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
    assert (
        render_chat(teacher.info.chat_template, [], add_generation_prompt=True).text
        == "[assistant] "
    )


def test_close_twice(folder: Path) -> None:
    """Closing is safe to repeat; a closed teacher says so."""
    with HuggingFaceTeacher(folder) as teacher:
        teacher.close()
    teacher.close()
    with pytest.raises(TeacherError, match="was closed"):
        teacher.logits(texts(1))
