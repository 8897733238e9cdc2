"""Which teacher the settings mean, and the commands on teachers that are not one GGUF file."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from distill.capture.store_setup import recipe_for
from distill.capture.teachers import gguf_of, open_teacher, require_gguf, teacher_stem
from distill.config.loading import load_config
from distill.config.schema import TargetsConfig
from distill.config.sources import TeacherConfig
from distill.errors import UserError
from distill.pipeline.budget import measure
from distill.pipeline.plan import plan_run
from distill.runtime.format import human_time
from distill.runtime.progress import Console
from students.gguf.quantize import quantize_gguf
from teachers import example_teacher
from teachers.ensemble import EnsembleError, EnsembleTeacher
from teachers.errors import TeacherError
from teachers.gguf.file import read_gguf
from teachers.huggingface.teacher import HuggingFaceTeacher
from teachers.llama_cpp.first_decode import LEAST_ALLOWED_KL, mean_kl
from teachers.llama_cpp.library.kernels import LoadOptions
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.llama_cpp.worker import Worker
from teachers.targets.recipe import Recipe
from tests.support.children.capture_child import Source
from tests.support.tiny_checkpoint import make_folder


def test_one_file_is_itself(tiny_teacher_path: Path) -> None:
    """A path is a GGUF teacher; none is the example teacher."""
    with open_teacher(TeacherConfig(path=str(tiny_teacher_path))) as teacher:
        assert isinstance(teacher, GGUFTeacher) and teacher.info.vocab_size == 1024
        assert teacher.memory() > 1 << 20 and "llama-cpp-python" in teacher.runtime
        assert gguf_of(teacher) == tiny_teacher_path
    assert teacher_stem(TeacherConfig()) == "example"
    assert teacher_stem(TeacherConfig(path="a/b/c.Q4_K_M.gguf")) == "c.Q4_K_M"
    assert teacher_stem(TeacherConfig(path="http://[::1]:80")) == "1-80"


def test_a_folder_is_a_transformers_teacher(tmp_path: Path) -> None:
    """It opens, but a run has no GGUF tokenizer then; in a mixture one file is enough."""
    make_folder(tmp_path / "model")
    config = TeacherConfig(path=str(tmp_path / "model"))
    with open_teacher(config) as teacher:
        assert isinstance(teacher, HuggingFaceTeacher) and "transformers" in teacher.runtime
        assert gguf_of(teacher) is None
    files_only = {"tensor_split": (1.0, 1.0), "cache_type": "q8_0", "weights_as": "f16"}
    for setting in ({name: value} for name, value in files_only.items()):
        with pytest.raises(UserError, match=f"{next(iter(setting))} is for GGUF files"):
            open_teacher(config.model_copy(update=setting))
    with pytest.raises(UserError, match="distill capture"):
        require_gguf(config)
    mixed = TeacherConfig(path=str(tmp_path / "model"), mix_with=("other.gguf",))
    require_gguf(mixed)


def test_a_quantised_file_computed_as_floating_point(tmp_path: Path) -> None:
    """The same weights and facts, other products: nearly the file's logits, and soft targets of
    their own name; the copy goes with the teacher."""
    path, config = example_teacher(), TeacherConfig(weights_as="f16")
    tokens = np.arange(300, 340, dtype=np.int32)
    with GGUFTeacher(path) as teacher, open_teacher(config) as other:
        assert isinstance(other, GGUFTeacher) and other.info == teacher.info
        assert gguf_of(other) == path and other.file.path == path
        assert other.runtime == f"{teacher.runtime}, weights as f16"
        copy = read_gguf(other.computed.path)
        matrices = [name for name, one in teacher.file.tensors.items() if len(one.shape) == 2]
        assert len(matrices) > 10
        for name in matrices:
            rows = teacher.file.rows(name, 0, 8)
            assert copy.tensors[name].type.name == "F16", name
            np.testing.assert_array_equal(copy.rows(name, 0, 8), rows.astype(np.float16), name)
        file, floating = (one.logits([tokens]) for one in (teacher, other))
        assert 0.0 < mean_kl(file, floating) < LEAST_ALLOWED_KL
        states = other.states([tokens], exact=True)["final"]
        product = states @ other.output_rows(0, other.info.vocab_size).T
        np.testing.assert_allclose(other.logits([tokens], exact=True), product, atol=0.02)
        assert copy.path.exists()
    assert not copy.path.parent.exists()
    with pytest.raises(UserError, match="weights_as = f16 is for quantised teachers"):
        open_teacher(TeacherConfig(path=str(copy_as(path, "f32", tmp_path)), weights_as="f16"))
    assert not list(Path(tempfile.gettempdir()).glob("distill-teacher-*/*-f32-f16.gguf"))


def test_numbers_too_large_for_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the copy's first decode fails, the setting is named, not the file; no copy stays."""
    made: list[Path] = []

    def fails(worker: Worker) -> LoadOptions:
        made.append(worker.path)
        raise TeacherError("llama.cpp computes logits that are not finite")

    monkeypatch.setattr(Worker, "options", fails)
    with pytest.raises(UserError, match=r"weights_as = f16: .* not finite\); .* take bf16"):
        open_teacher(TeacherConfig(weights_as="f16"))
    assert len(made) == 1 and made[0].name == "teacher-f16.gguf" and not made[0].exists()


def copy_as(path: Path, kind: str, folder: Path) -> Path:
    """A file's matrices as another type, in a file that stays."""
    target = folder / f"{path.stem}-{kind}.gguf"
    quantize_gguf(path, target, kind, requantize=True)
    return target


@pytest.mark.parametrize("what", ["memory", "disk"])
def test_no_room_for_the_copy(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says how much it takes, before anything is written."""
    if what == "memory":
        little = SimpleNamespace(available=1000)
        monkeypatch.setattr(
            "distill.capture.temporary_files.widened.psutil.virtual_memory", lambda: little
        )
    else:
        little = SimpleNamespace(free=1000)
        monkeypatch.setattr(
            "distill.capture.temporary_files.widened.shutil.disk_usage", lambda folder: little
        )
    with pytest.raises(UserError, match=r"weights_as = f32 takes about 19.* MB.*1.0 kB are free"):
        open_teacher(TeacherConfig(weights_as="f32"))


def test_several_are_mixed(tiny_teacher_path: Path) -> None:
    """Equal weights unless said otherwise; each has its weight."""
    config = TeacherConfig(path=str(tiny_teacher_path), mix_with=(str(example_teacher()),))
    with open_teacher(config) as teacher:
        assert isinstance(teacher, EnsembleTeacher) and len(teacher.teachers) == 2
        assert gguf_of(teacher) == tiny_teacher_path
    with pytest.raises(EnsembleError, match="2 teachers have 1 weights"):
        open_teacher(config.model_copy(update={"weights": (1.0,)}))
    with pytest.raises(UserError, match="mix_with"):
        open_teacher(TeacherConfig(path=str(tiny_teacher_path), weights=(1.0,)))


def test_4bit_is_for_folders(tiny_teacher_path: Path) -> None:
    """A GGUF file is already quantized."""
    with pytest.raises(UserError, match="load_in_4bit"):
        open_teacher(TeacherConfig(path=str(tiny_teacher_path), load_in_4bit=True))


def test_a_plan_says_what_a_run_takes(
    tiny_teacher: GGUFTeacher,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Counts that can be known are exact; what is measured is positive; nothing is written."""
    data = tmp_path / "data.jsonl"
    texts = ["order four boxes of gloves " * 3 + str(number) for number in range(70)]
    data.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    tokens = tiny_teacher.tokenize(texts, add_special=False, parse_special=False)
    total = sum(map(len, tokens)) + 70 * int(tiny_teacher.info.add_bos)
    overrides: dict[str, object] = {
        "teacher.path": str(tiny_teacher.file.path),
        "student.size": "32x2",
        "data.path": str(data),
        "train.epochs": 3,
    }
    for kind, per_token in (
        ("compact", 16 * 4 + 24 + 64 + 2 + 4),
        ("hidden", 64 + 4 + 4),
        ("dense", 4 * 1024 + 4),
    ):
        plan = plan_run(load_config(None, overrides | {"targets.kind": kind}, []), Console())
        assert plan.tokens == total, kind
        assert plan.steps == 3 * -(-68 // 16), kind
        assert plan.store_limit == plan.tokens * per_token, kind
        # Of the sketch that may take 64 bytes a token only what helps is kept.
        least = plan.store_limit - 64 * plan.tokens * (kind == "compact")
        assert least <= plan.store_bytes <= plan.store_limit, kind
        assert plan.train_seconds is not None and plan.train_seconds > 0, kind
        assert min(plan.capture_seconds, *(one.main for one in plan.peaks.values())) > 0, kind
        assert sorted(tmp_path.iterdir()) == before, kind
        assert "what a run takes" in capsys.readouterr().out, kind
        # The one that runs already stands for the teacher that the other plans would start.
        monkeypatch.setattr(measure, "load_teacher", lambda config, console: tiny_teacher)
        monkeypatch.setattr(GGUFTeacher, "__exit__", lambda *_: None)


def test_a_plan_describes_the_student(
    tiny_teacher: GGUFTeacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The size that a share comes to, and every width, in words, as the model has it."""
    (tmp_path / "data.txt").write_text("order four boxes of gloves " * 200, encoding="utf-8")
    paths = {"teacher.path": tiny_teacher.file.path, "data.path": tmp_path / "data.txt"}
    overrides = {name: str(path) for name, path in paths.items()}
    settings = ["student.kv_heads=1", "student.ffn_width=72", "data.max_length=32"]
    plan = plan_run(load_config(None, overrides | {"student.size": "50%"}, settings), Console())
    lines = capsys.readouterr().out.replace("│", " ").splitlines()
    said = [" ".join(line.split()) for line in lines]
    title = next(line for line in said if "→" in line)
    width, layers = map(int, title.split("→ ")[1].split(" ")[0].split("x"))
    share = plan.parameters / tiny_teacher.info.parameters
    assert 0.45 < share < 0.55
    per_head = width // 16  # the teacher's heads are 16 wide
    for row in (
        f"width, layers {width}, {layers}",
        f"heads {per_head}",
        "key/value heads 1",
        "head width 16",
        "feed-forward width 72",
        "context 256 tokens",
        "embedding and output one matrix, 1,024 tokens",
    ):
        assert row in said, (row, said)
    assert any(f"{share:.1%} of the teacher's" in line for line in said), said
    layer = width * 16 * (2 * per_head + 2) + 3 * width * 72 + 2 * width
    assert plan.parameters == 1024 * width + layers * layer + width


def test_times_are_readable() -> None:
    """Seconds, minutes, hours."""
    assert [human_time(value) for value in (3.2, 600.0, 7200.0)] == ["3 s", "10 min", "2.0 h"]


def test_a_mixture_has_no_sketch(
    tiny_teacher_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no hidden state: the default does without and says so; asking for one is refused."""
    config = TeacherConfig(path=str(tiny_teacher_path), mix_with=(str(tiny_teacher_path),))
    tokens = [np.arange(3, 12, dtype=np.int32)]
    with open_teacher(config) as teacher:
        recipe = recipe_for(TargetsConfig(), teacher, Source(), Console())
        said = " ".join(capsys.readouterr().out.split())
        assert recipe.sketch_bytes == 0 and "no sketch" in said
        assert len(teacher.score(tokens, recipe, {})["topk_ids"]) == 8
        with pytest.raises(EnsembleError, match="no hidden state"):
            teacher.score(tokens, Recipe("hidden"), {})
