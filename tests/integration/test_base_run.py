"""A student made of an existing model, the whole way: adapted, trained, exported, continued."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from gguf import GGUFValueType
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from distill.base_models.base_model import load_base_student, open_base
from distill.base_models.memory_check import describe_base
from distill.config.loading import load_config
from distill.config.schema import RunConfig
from distill.errors import UserError
from distill.export.export_again import export_run
from distill.export.student_folder import load_student
from distill.export.transformers_folder import save_plain
from distill.inference.judge import Judge
from distill.pipeline.run import run
from distill.runs.folder import RunFolder, RunPaths
from distill.runtime.progress import Console
from students.adapter.adapter import BASE, AdaptedStudent
from students.adapter.merge import merge
from teachers.gguf.file import Field, read_gguf, tokenizer_fields
from teachers.llama_cpp.teacher import GGUFTeacher
from tests.conftest import command, not_refused
from tests.support.runs import PLAIN_PROMPTS, SMALL, interrupted
from tests.support.tiny_models import Tiny, make_base, write_tiny

pytestmark = pytest.mark.usefixtures("llama_here")
SETTINGS = [one for one in SMALL if not one.startswith("student.init")]
SETTINGS.append(f"safety.labels={PLAIN_PROMPTS}")
SETTINGS.append("train.learning_rate=0.01")


def base_config(teacher: Path, base: Path, *settings: str, four_bits: bool = True) -> RunConfig:
    overrides = {"teacher.path": str(teacher), "student.base": str(base)}
    overrides |= {"student.load_in_4bit": four_bits, "student.lora_rank": 8, "data.samples": 40}
    return load_config(None, overrides, [*SETTINGS, *settings])


@pytest.fixture(scope="module")
def base(tiny_teacher_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "small-qwen"
    return make_base(folder, tiny_teacher_path, extra_rows=6)


@pytest.fixture(scope="module")
def finished(
    tiny_teacher_path: Path, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    """One finished run in NF4."""
    out = tmp_path_factory.mktemp("runs") / "first"
    return run(base_config(tiny_teacher_path, base), RunPaths(out=out), Console())


def improved(run: RunFolder) -> bool:
    """Whether its student has less KL than the base had."""
    scores = run.read_results()["evaluation"]
    return bool(scores["after"]["kl"] < scores["before"]["kl"])


def test_the_run_says_what_was_trained(finished: RunFolder) -> None:
    """Less KL, a proof, the probe's gradients, and that nothing of the base got one."""
    results = finished.read_results()
    student = results["student"]
    assert improved(finished) and results["proof"]["mean_kl"] <= 5e-3
    assert student["size"] == "small-qwen-lora8" and student["architecture"] == "qwen2"
    assert student["load_in_4bit"] and student["lora"]["rank"] == 8
    assert 0 < student["trained_parameters"] < student["parameters"]
    gradients = student["gradients"]
    assert gradients["base"]["with_gradient"] == 0
    for kind in ("LoRA A", "LoRA B", "gates", "safety head", "verification head"):
        assert gradients[kind]["with_gradient"] == gradients[kind]["tensors"] > 0
    assert results["rotations"]["max_orthogonality_error"] <= 1e-5
    assert results["rotations"]["min_commutator_norm"] > 0
    # Checkpoints and student/ hold LoRA, gates and heads, and no weight of the base.
    newest = sorted((finished.path / "checkpoints").glob("step-*"))[-1]
    for file in (newest / "model.safetensors", finished.student / "model.safetensors"):
        names = set(safetensors.torch.load_file(file))
        kinds = ("lora_A", "lora_B", "gate.", "safety_head.", "verification_head.")
        assert names and all(any(kind in name for kind in kinds) for name in names)


def test_the_export_is_the_merged_model(
    finished: RunFolder, tiny_teacher_path: Path, tmp_path: Path
) -> None:
    """In F32 within 1e-3 of it, of the base's architecture, with the teacher's tokens."""
    path = tmp_path / "student.gguf"
    [exported] = export_run(finished, ["f32"], path, Console())
    assert exported.max_logit_difference <= 1e-3
    file, teacher = read_gguf(path), read_gguf(tiny_teacher_path)
    assert file.value("general.architecture") == "qwen2"
    first = read_gguf(finished.gguf)
    for key in ("so8t.verification.output.weight", "so8t.verification.trust"):
        assert file.value(key) == first.value(key) is not None  # also what was fitted
    assert file.value("tokenizer.ggml.tokens") == teacher.value("tokenizer.ggml.tokens")
    tokens = finished.read_held_out(len(file.value("tokenizer.ggml.tokens"))).sequences[0]
    student = load_student(finished)
    assert isinstance(student, AdaptedStudent)
    plain = merge(student)
    ids = torch.tensor([tokens[:-1].tolist()])
    with torch.no_grad(), GGUFTeacher(path, threads=1) as llama:
        expected, near = plain(ids).logits[0], student(ids).logits[0].float()
        found = torch.from_numpy(llama.logits([tokens], exact=True))
    assert float((expected - found).abs().max()) <= 1e-3
    far = float((expected - near).abs().max())  # bfloat16 against float32
    assert far < 0.05 * float(expected.abs().max())
    with Judge(finished.gguf) as judge:  # the heads are in the file, whatever its architecture
        assert judge.judge(["Hello there"])[0].decision in ("ALLOW", "ESCALATE", "REFUSE")


def test_transformers_loads_the_merged_folder(finished: RunFolder, tiny_teacher_path: Path) -> None:
    """Without anything of this project in it, and with the teacher's own ids."""
    assert not (finished.plain / "adapter.json").exists()
    model = AutoModelForCausalLM.from_pretrained(finished.plain)
    assert model.config.model_type == "qwen2" and not hasattr(model.config, "quantization_config")
    plain = merge(load_student(finished))  # type: ignore[arg-type]
    tokens = torch.tensor([finished.read_held_out(model.config.vocab_size).sequences[0].tolist()])
    with torch.no_grad():
        assert (model(tokens).logits - plain(tokens).logits).abs().max() <= 1e-5
    tokenizer = PreTrainedTokenizerFast.from_pretrained(finished.plain)
    teachers_end = read_gguf(tiny_teacher_path).value("tokenizer.ggml.eos_token_id")
    assert model.config.eos_token_id == teachers_end in model.generation_config.eos_token_id
    assert tokenizer.eos_token_id == teachers_end
    with GGUFTeacher(tiny_teacher_path, threads=1) as teacher:
        text = "What is 12 + 7? The answer: 19.\n  Naïve café 東京"
        (expected,) = teacher.tokenize([text], add_special=True, parse_special=True)
    assert tokenizer(text)["input_ids"] == expected.tolist()


def test_continued_training_ends_at_the_same_bytes(
    finished: RunFolder, tiny_teacher_path: Path, base: Path
) -> None:
    """Stopped after a few steps and started again: adapters, gates and heads come back."""
    out = finished.path.parent / "stopped"
    config = base_config(tiny_teacher_path, base)
    with interrupted(at=5):
        run(config, RunPaths(out=out), Console())
    again = run(config, RunPaths(out=out), Console())
    weights = "student/model.safetensors"
    assert (again.path / weights).read_bytes() == (finished.path / weights).read_bytes()
    assert again.gguf.read_bytes() == finished.gguf.read_bytes()


PARTS = ["targets.layers=[1]", "train.accumulation=4", "train.precision=bf16"]


@pytest.mark.parametrize("settings", [["train.on_policy=0.5"], PARTS])
def test_other_ways_of_training(
    tiny_teacher_path: Path, base: Path, tmp_path: Path, settings: list[str]
) -> None:
    """In NF4: on text of the student's own; in parts, with the teacher's hidden states."""
    config = base_config(tiny_teacher_path, base, *settings, "train.epochs=1", "safety.labels=none")
    assert improved(run(config, RunPaths(out=tmp_path / "run"), Console()))


@pytest.mark.parametrize(
    ("kind", "tied", "checkpointing"), [("llama", True, "false"), ("phi3", False, "true")]
)
def test_other_architectures_unquantized(
    tiny_teacher_path: Path, tmp_path: Path, kind: str, tied: bool, checkpointing: str
) -> None:
    """llama with tied embeddings and without checkpointing; phi3 with its fused matrices."""
    base = make_base(tmp_path / kind, tiny_teacher_path, kind, tie_word_embeddings=tied)
    settings = ["export.quant=f32", "train.epochs=1"]
    settings += [f"train.gradient_checkpointing={checkpointing}"]
    config = base_config(tiny_teacher_path, base, *settings, four_bits=False)
    folder = run(config, RunPaths(out=tmp_path / "run"), Console())
    assert folder.read_results()["proof"]["max_logit_difference"] <= 1e-3
    assert read_gguf(folder.gguf).value("general.architecture") == kind
    assert improved(folder)


def test_a_changed_base_is_noticed(
    finished: RunFolder, tiny_teacher_path: Path, base: Path, tmp_path: Path
) -> None:
    """Exporting again, or continuing, with other weights in the base's folder is refused."""
    copy = tmp_path / "run"
    shutil.copytree(finished.path, copy)
    moved = tmp_path / "base"
    shutil.copytree(base, moved)
    config = json.loads((copy / "config.json").read_text())
    config["student"]["base"] = str(moved)
    (copy / "config.json").write_text(json.dumps(config))
    make_base(moved, tiny_teacher_path, extra_rows=6, seed=1)
    with pytest.raises(UserError, match="has changed since this run"):
        export_run(RunFolder(copy), ["f16"], None, Console())
    shutil.rmtree(moved)
    with pytest.raises(UserError, match="does not exist"):
        export_run(RunFolder(copy), ["f16"], None, Console())


def test_a_run_is_exported_from_anywhere(
    tiny_teacher_path: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base may be given by a relative path; the run remembers the whole one."""
    monkeypatch.chdir(base.parent)
    config = base_config(tiny_teacher_path, Path(base.name))
    assert config.student.base == str(base) and config.student.label == f"{base.name}-lora8"
    assert load_config(None, {"student.base": base.name}, []).student.base == str(base)


@pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("qwen3", True)])
def test_rows_that_the_base_lacks_are_added(
    tiny_teacher_path: Path, tmp_path: Path, kind: str, tied: bool
) -> None:
    """As the mean of all others, in embedding and output, of the merged model too."""
    base = make_base(tmp_path / kind, tiny_teacher_path, kind, tie_word_embeddings=tied)
    fields = tokenizer_fields(read_gguf(tiny_teacher_path))
    tokens, ids = len(fields["tokenizer.ggml.tokens"].value), torch.arange(1, 9)[None]
    for four_bits, allowed in ((False, 1e-4), (True, 0.2)):
        config = base_config(tiny_teacher_path, base, four_bits=four_bits)
        opened = open_base(config, fields, tokens)
        wider = replace(opened, match=replace(opened.match, rows_to_add=7))
        student = load_base_student(wider, config, tokens + 7)
        matrix = student.output_matrix().detach().float()
        assert matrix.shape[0] == tokens + 7
        mean = matrix[:tokens].mean(dim=0).expand(7, -1)
        assert torch.allclose(matrix[tokens:], mean, atol=1e-2), allowed
        assert not any(one.requires_grad for one in student.parameters_by_kind()[BASE].values())
        plain = merge(student)
        assert plain.get_output_embeddings().weight.shape[0] == tokens + 7
        assert plain.config.vocab_size == tokens + 7
        with torch.no_grad():
            difference = (plain(ids).logits - student(ids).logits.float()).abs().max()
        assert float(difference) < allowed


def test_what_cannot_be_computed_or_written_is_reported_first(
    tiny_teacher_path: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A phi3 window shorter than the text is refused, as llama.cpp has none; a tokenizer that
    transformers cannot have is left out of the merged folder."""
    phi = make_base(tmp_path / "phi", tiny_teacher_path, "phi3", sliding_window=12)
    with pytest.raises(UserError, match=r"data\.max_length=12"):
        run(base_config(tiny_teacher_path, phi), RunPaths(out=tmp_path / "run"), Console())
    config = base_config(tiny_teacher_path, base)
    fields = tokenizer_fields(read_gguf(tiny_teacher_path))
    odd = fields | {"tokenizer.ggml.pre": Field("unheard-of", GGUFValueType.STRING, None)}
    opened = open_base(config, odd, len(fields["tokenizer.ggml.tokens"].value))
    assert opened.no_tokenizer is not None and "unheard-of" in opened.no_tokenizer
    describe_base(opened, config, 1024, Console())
    assert "will have no tokenizer" in capsys.readouterr().out
    plain = merge(load_base_student(opened, config, 1024))
    save_plain(plain, torch.float32, None, tmp_path / "plain")
    assert (tmp_path / "plain/model.safetensors").exists()
    assert not (tmp_path / "plain/tokenizer.json").exists()


def cut_facts(student: Path) -> None:
    content = json.loads((student / "adapter.json").read_text())
    del content["config"]["trust"]
    (student / "adapter.json").write_text(json.dumps(content))


def cut_weights(student: Path) -> None:
    file = student / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def shorten(student: Path) -> None:
    weights = safetensors.torch.load_file(student / "model.safetensors")
    weights.pop(sorted(weights)[0])
    safetensors.torch.save_file(weights, student / "model.safetensors")


def test_a_damaged_adapter_is_refused(finished: RunFolder, tmp_path: Path) -> None:
    """Facts or weights that are not those of this student: one line that says so."""
    for change in (cut_facts, cut_weights, shorten):
        copy = tmp_path / change.__name__
        shutil.copytree(finished.path, copy)
        change(copy / "student")
        with pytest.raises(UserError, match="damaged"):
            export_run(RunFolder(copy), ["f16"], None, Console())
            pytest.fail(change.__name__)


def test_the_teachers_own_file_is_a_base_and_loses_the_same_tokens(
    tiny_teacher_path: Path, tmp_path: Path
) -> None:
    """It begins at its teacher, but for what became of dropped tokens; it is exported again, too,
    from the file that is kept."""
    settings = ["student.vocab=75%", "train.learning_rate=0.001"]
    config = base_config(tiny_teacher_path, tiny_teacher_path, *settings, four_bits=False)
    done = run(config, RunPaths(out=tmp_path / "run"), Console())
    results = done.read_results()
    assert results["student"]["architecture"] == "llama"
    assert results["student"]["size"].startswith("tiny-")
    scores = [results["evaluation"][when]["kl"] for when in ("before", "after", "exported")]
    assert 0 < min(scores) <= max(scores) < 0.3, scores
    kept = Path(done.read_config().student.base or "")
    assert kept.parent == tmp_path / "stores" and kept.exists()
    [proof] = export_run(done, ["f32"], tmp_path / "again.gguf", Console())
    file, base = read_gguf(tmp_path / "again.gguf"), read_gguf(kept)
    assert proof.max_logit_difference <= 1e-3
    tokens = file.value("tokenizer.ggml.tokens")
    assert len(tokens) == 768 and tokens == base.value("tokenizer.ggml.tokens")
    with GGUFTeacher(done.gguf, threads=1) as student:
        assert student.info.vocab_size == 768
    # The same command goes on where it is, and finds the file again.
    assert run(config, RunPaths(out=tmp_path / "run"), Console()).finished


def change_config(base: Path, copy: Path, **changes: object) -> Path:
    shutil.copytree(base, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return copy


def swap_tokens(base: Path, copy: Path) -> Path:
    """Tokens 300 and 301 exchanged."""
    shutil.copytree(base, copy)
    content = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    names = {number: token for token, number in vocabulary.items()}
    vocabulary[names[300]], vocabulary[names[301]] = 301, 300
    (copy / "tokenizer.json").write_text(json.dumps(content))
    return copy


def test_bad_input_is_one_line_and_exit_2(
    tiny_teacher_path: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before anything is captured: exit code 2, one line that names what is wrong."""
    monkeypatch.chdir(tmp_path)
    other = change_config(base, tmp_path / "other", model_type="gpt_neox")
    scaled = change_config(base, tmp_path / "scaled", hidden_act="gelu")
    odd = {"hidden_size": 60, "num_attention_heads": 5, "num_key_value_heads": 1}
    narrow = change_config(base, tmp_path / "narrow", **odd)
    typed = change_config(base, tmp_path / "typed", num_hidden_layers="two")
    gptq = {"quantization_config": {"quant_method": "gptq"}}
    quantized = change_config(base, tmp_path / "quantized", **gptq)
    foreign = swap_tokens(base, tmp_path / "foreign")
    odd_heads = Tiny(heads=3, kv_heads=1, head_width=12)
    start = ["run", "--teacher", str(tiny_teacher_path)]
    plan = ["plan", "--teacher", str(tiny_teacher_path)]
    cases: list[tuple[list[str], Path | str | None, list[str]]] = [
        (start, "nowhere", ["nowhere", "does not exist"]),
        ([*start, "--load-in-4bit"], tiny_teacher_path, ["--load-in-4bit", "GGUF file"]),
        (start, write_tiny(tmp_path / "gemma.gguf", Tiny("gemma")), ["is a gemma", "qwen3"]),
        (start, write_tiny(tmp_path / "odd.gguf", odd_heads), ["36", "divisible by 8"]),
        (start, other, ["gpt_neox", "llama, phi3, qwen2"]),
        (start, scaled, ["gelu"]),
        (start, typed, ["num_hidden_layers", "cannot be used"]),
        (start, narrow, ["60", "divisible by 8"]),
        (start, quantized, ["quantized already", "--load-in-4bit"]),
        (start, foreign, ["2 of 1,024 tokens differ", "first token 300"]),
        ([*start, "--student-size", "64x2"], base, ["size", "base"]),
        ([*start, "--init", "random"], base, ["init"]),
        ([*start, "--lora-r", "0"], base, ["lora_rank"]),
        ([*start, "--lora-r", "4"], None, ["--lora-r", "--student-base"]),
        ([*start, "--load-in-4bit"], None, ["--load-in-4bit", "--student-base"]),
        ([*plan, "--memory", "much"], base, ["--memory", "much", "12GiB"]),
    ]
    given = [(["--student-base", one] if one else [], start, words) for start, one, words in cases]
    assert not_refused([([*start, *more], words) for more, start, words in given]) == []
    assert not (tmp_path / "runs").exists()


def test_plan_says_what_would_fit(tiny_teacher_path: Path, base: Path) -> None:
    """Memory by what it is for, and what helps where it is too much."""
    arguments = ["plan", "--teacher", str(tiny_teacher_path), "--student-base", str(base)]
    arguments += ["--load-in-4bit", "--samples", "40", "--memory", "3MB"]
    arguments += [word for setting in SETTINGS for word in ("--set", setting)]
    ended = command(*arguments)
    assert ended.code == 0
    parts = ("base weights", "LoRA, gates and heads", "optimizer's moments", "activations", "loss")
    for words in (*parts, "what would help", "train.accumulation"):
        assert words in ended.said, words
