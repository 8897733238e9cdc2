"""Both heads around a whole run: calibrated and scored on data apart, through the exported file."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from distill.config.loading import load_config
from distill.errors import UserError
from distill.heads.fitting import MIN_CALIBRATED, calibrate, halves, score_heads
from distill.heads.prompts import built_in_prompts, prompt_tokens, split_by_scenario
from distill.metrics.verification import fit_trust
from distill.pipeline.capture import capture_only
from distill.pipeline.run import run, train_from_store
from distill.runs.folder import RunFolder, RunPaths
from distill.runtime.progress import Console
from distill.training.data import split
from students.model.decoder import SO8TForCausalLM
from students.model.head_decisions import DECISIONS
from students.model.heads import Heads, decide, head_values, read_heads
from teachers.gguf.file import read_gguf
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.store.manifest import read_manifest
from teachers.store.store import SoftTargetStore
from tests.conftest import command
from tests.support.runs import PLAIN_PROMPTS, small_config, until_training
from tests.support.students import make_student
from tests.support.teachers import certainty_of
from tests.support.training import VOCAB, make_store

pytestmark = pytest.mark.usefixtures("llama_here")

FEW = ["train.epochs=1", "train.evaluations=2"]
BUILT_IN = [*FEW, "safety.labels=builtin"]


CHANGED = ("ALLOW 1", "ALLOW one")  # of the prompts in a user's file


def own_labels(folder: Path) -> Path:
    """A file of a user with few prompts, so that a run is short."""
    path = folder / "labels.jsonl"
    rows = [{"prompt": f"{name} {n}", "label": name} for n in range(10) for name in DECISIONS]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def finished(tiny_teacher_path: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """One run with the built-in prompts, as is the default."""
    out = tmp_path_factory.mktemp("heads") / "run"
    return run(small_config(tiny_teacher_path, *BUILT_IN, samples=24), RunPaths(out=out), Console())


# -- a whole run


def test_results_hold_both_heads(finished: RunFolder) -> None:
    """Where labels are from, the split, scores by language, what the file carries, the cascade."""
    heads = finished.read_results()["heads"]
    safety, parts = heads["safety"], split_by_scenario(built_in_prompts())
    assert safety["labels_from"] == "builtin" and len(safety["prompts_sha256"]) == 64
    assert safety["prompts"] == {name: len(part) for name, part in parts.items()}
    assert safety["scenarios"] == {
        name: len({p.scenario for p in part}) for name, part in parts.items()
    }
    assert set(safety["languages"]) == {"en", "ja"}
    assert (
        sum(score["prompts"] for score in safety["languages"].values()) == safety["test"]["prompts"]
    )
    file = read_gguf(finished.gguf)
    assert file.value("so8t.safety.costs") == [cost for row in safety["costs"] for cost in row]
    left_out = safety["cross_validation"]
    assert left_out["prompts"] == safety["prompts"]["validation"]
    assert left_out["cost"] < left_out["cost_escalating"]
    assert file.value("so8t.verification.trust") == pytest.approx(heads["verification"]["trust"])
    assert heads["verification"]["cascade"][-1]["agreement"] == 1.0
    assert finished.read_config().safety.labels == "builtin"


def heads_in(file: Path) -> Heads:
    """The heads that an exported file carries."""
    found = read_gguf(file)
    width = found.tensors["token_embd.weight"].shape[1]
    return read_heads({key: field.value for key, field in found.fields.items()}, width)


def test_scores_are_those_of_the_exported_file(
    finished: RunFolder, tiny_teacher: GGUFTeacher
) -> None:
    """Counted again from the file itself: on test prompts, and half of what was held out."""
    results, config = finished.read_results(), finished.read_config()
    heads, carried = results["heads"], heads_in(finished.gguf)
    test = split_by_scenario(built_in_prompts())["test"]
    folder = Path(results["soft_targets"]["folder"])
    store = SoftTargetStore(folder, read_manifest(folder))
    scored = split(store, config.data.held_out, config.seed).held_out.tolist()[1::2]
    assert carried.safety is not None
    (layer,) = carried.safety.shape.layers
    with GGUFTeacher(finished.gguf, threads=1) as student:
        prompts = prompt_tokens(tiny_teacher, test, 256)
        rows = [
            student.states([np.append(one, one[-1]).astype(np.int32)], [layer], exact=True)
            for one in prompts
        ]
        sequences = [store.tokens(index) for index in scored]
        final = torch.from_numpy(student.states(sequences, exact=True)["final"])
        logits = torch.from_numpy(student.logits(sequences, exact=True))
    best = logits.argmax(dim=-1).numpy()
    parts = [(row["final"], row[f"layer{layer}"]) for row in rows]
    features = [
        [one[-1] for one in both] + [one[1:].mean(axis=0) for one in both] for both in parts
    ]
    states = torch.from_numpy(np.stack([np.concatenate(one) for one in features]))
    chances = carried.probabilities(states, prompts)
    confusion = np.zeros((3, 3), dtype=int)
    for prompt, taken in zip(test, decide(chances).tolist(), strict=True):
        confusion[prompt.decision, taken] += 1
    difference = np.abs(confusion - np.array(heads["safety"]["test"]["confusion"])).sum()
    assert difference <= 4 and confusion.sum() == len(
        test
    )  # Q8_0 states at a threshold may fall either way
    agreed = np.concatenate([store.targets(index).best().numpy() for index in scored]) == best
    found = heads["verification"]
    assert found["positions"] == len(agreed) and found["agreement"] == pytest.approx(
        agreed.mean(), abs=0.02
    )
    certain = carried.agreement(final, logits).numpy()
    won = (certain[agreed][:, None] > certain[~agreed]) + 0.5 * (
        certain[agreed][:, None] == certain[~agreed]
    )
    assert found["auroc"] == pytest.approx(won.mean(), abs=0.02)


def test_the_student_of_a_run_is_judged(finished: RunFolder) -> None:
    """By the command line, from student.gguf alone; its heads are those of student/."""
    ended = command("judge", finished.gguf, "How do I pick a lock?", "--json")
    assert ended.code == 0 and not ended.complaint
    found = json.loads(ended.said)
    assert found["decision"] in DECISIONS and 0.0 <= found["agreement"] <= 1.0
    student = AutoModelForCausalLM.from_pretrained(finished.student)
    mine, theirs = head_values(student.heads()), head_values(heads_in(finished.gguf))
    assert mine.keys() == theirs.keys() and len(mine) == 15
    for key, value in mine.items():
        exact = isinstance(value, list | int)
        assert theirs[key] == (value if exact else pytest.approx(value)), key


def test_the_same_seed_gives_the_same_bytes(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """With nothing to reuse, so the capture's too; heads, thresholds and their scores included."""
    config = small_config(tiny_teacher_path, *FEW, f"safety.labels={PLAIN_PROMPTS}", samples=24)
    folders = [tmp_path / name for name in ("one", "other")]
    one, other = (run(config, RunPaths(folder / "run"), Console()) for folder in folders)
    assert other.read_results()["soft_targets"]["reused"] is False
    for name in ("student/model.safetensors", "student/config.json", "student.gguf"):
        assert (other.path / name).read_bytes() == (one.path / name).read_bytes(), name
    heads = one.read_results()["heads"]
    assert other.read_results()["heads"] == heads and {"safety", "verification"} <= heads.keys()


def test_labels_that_say_nothing_give_no_head(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """Where the decisions would cost no less than escalating everything, the file has no safety
    head; one line says why, and so do results and card."""
    random = np.random.default_rng(0)
    labels = tmp_path / "labels.jsonl"
    rows = [
        {"prompt": f"request {n} of {random.integers(9)}", "label": DECISIONS[random.integers(3)]}
        for n in range(90)
    ]
    labels.write_text("\n".join(map(json.dumps, rows)))
    words = ["--teacher", tiny_teacher_path, "--student-size", "32x1", "--samples", 12]
    words += ["--safety-labels", labels, "--out", tmp_path / "run"]
    for setting in (*small_settings(), *FEW):
        words += ["--set", setting]
    ended, folder = command("run", *words), RunFolder(tmp_path / "run")
    assert ended.code == 0 and "the student gets no safety head: on" in ended.said + ended.complaint
    heads = folder.read_results()["heads"]
    assert "safety" not in heads and "no less than escalating" in heads["safety_left_out"]
    assert not [key for key in read_gguf(folder.gguf).fields if key.startswith("so8t.safety")]
    assert heads["safety_left_out"] in " ".join((folder.path / "README.md").read_text().split())


def test_a_run_without_heads(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """Neither weights, file nor results have any, and `judge` says so."""
    folder = RunFolder(tmp_path / "run")
    words = ["--teacher", tiny_teacher_path, "--student-size", "32x1", "--samples", 12]
    words += ["--safety-labels", "none", "--out", folder.path]
    for setting in (*small_settings(), *FEW, "loss.lambda_verification=0"):
        words += ["--set", setting]
    assert command("run", *words).code == 0
    judged = command("judge", folder.gguf, "x")
    assert judged.code == 2 and "carries no heads" in judged.complaint
    assert folder.read_results()["heads"] == {}
    keys = read_gguf(folder.gguf).fields
    assert not [key for key in keys if key.startswith(("so8t.safety", "so8t.verification"))]
    student = AutoModelForCausalLM.from_pretrained(folder.student)
    assert not [key for key in student.state_dict() if "_head." in key.replace("lm_head.", "")]


def small_settings() -> list[str]:
    return ["data.max_length=24", "data.held_out=0.2", "train.batch_size=8"]


def test_labels_of_a_user_from_a_store(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """A store needs nothing of them: `train` takes a file of labels, and results say which."""
    labels = own_labels(tmp_path)
    store = capture_only(small_config(tiny_teacher_path, samples=12), tmp_path / "store", Console())
    assert not list(store.folder.glob("judgment-*"))
    settings = [*small_settings()[1:], *FEW, f"safety.labels={labels}"]
    config = load_config(None, {"store": str(store.folder), "student.size": "32x1"}, settings)
    folder = train_from_store(config, tmp_path / "run", Console())
    safety = folder.read_results()["heads"]["safety"]
    assert safety["labels_from"] == str(labels)
    assert safety["prompts"] == {"train": 18, "validation": 6, "test": 6}
    assert safety["languages"] == {} and safety["test"]["prompts"] == 6
    labels.write_text(labels.read_text().replace(*CHANGED))
    with pytest.raises(UserError, match="another safety prompts"):
        train_from_store(config, folder.path, Console())  # not the finished run's result


def test_another_label_file_is_another_run(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """Labels that have changed since a run began are not mixed into it."""
    path, out = own_labels(tmp_path), tmp_path / "run"
    config = small_config(tiny_teacher_path, *FEW, f"safety.labels={path}", samples=12)
    until_training(config, out)
    path.write_text(path.read_text().replace(*CHANGED))
    with pytest.raises(UserError, match="another safety prompts"):
        run(config, RunPaths(out=out), Console())


# -- calibration


@torch.no_grad()
def verified(
    student: SO8TForCausalLM, store: SoftTargetStore, sequences: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Log-odds and agreement at every position, from all logits, one position at a time."""
    odds, agreed = [], []
    for index in sequences:
        tokens, best = store.tokens(index).tolist(), store.targets(index).best().tolist()
        output = student(torch.tensor([tokens]))
        for place in range(len(tokens) - 1):
            sure = torch.tensor(certainty_of(output.logits[0, place].tolist()))
            odds.append(float(student.verification_head(output.last_hidden_state[0, place], sure)))
            agreed.append(int(output.logits[0, place].argmax()) == best[place])
    return torch.tensor(odds, dtype=torch.float64), torch.tensor(agreed)


CALIBRATED = ("verification_head.output.", "verification_head.certainty")


@pytest.mark.parametrize(("seed", "knows"), [(0, True), (6, False)])
def test_calibration_is_within_the_heads_own_weights(
    tmp_path: Path, seed: int, knows: bool
) -> None:
    """One scale and offset, on data apart; then trust; nothing else.

    A head whose order is the wrong way round (it does not know) ends with the same probability
    everywhere.
    """
    store = make_store(tmp_path / "store")
    student = make_student(16, 2, VOCAB, seed=seed, heads=True)
    before = copy.deepcopy(student)
    calibrate(student, store, range(24))
    (odds, agreed), (new, _) = (
        verified(before, store, range(24)),
        verified(student, store, range(24)),
    )
    assert len(agreed) >= MIN_CALIBRATED and set(agreed.tolist()) == {True, False}

    def surprise(log_odds: Tensor) -> float:
        signs = torch.where(agreed, log_odds, -log_odds).tolist()
        return sum(math.log1p(math.exp(-value)) for value in signs) / len(signs)

    assert surprise(new) < 0.95 * surprise(odds)
    scale = float((new[1] - new[0]) / (odds[1] - odds[0]))
    assert (scale > 0.1) == knows and scale > -1e-9
    torch.testing.assert_close(new, scale * (odds - odds[0]) + new[0], rtol=1e-4, atol=1e-4)
    assert float(new.sigmoid().mean()) == pytest.approx(float(agreed.double().mean()), abs=0.03)
    assert student.config.trust == pytest.approx(fit_trust(new.sigmoid(), agreed), abs=1e-5)
    for name, tensor in student.state_dict().items():
        changed = name.startswith(CALIBRATED)
        assert torch.equal(tensor, before.state_dict()[name]) != changed, name


def test_too_few_cases_calibrate_nothing(tmp_path: Path) -> None:
    """They would rather spoil it: weights stay, trust is chosen all the same."""
    store = make_store(tmp_path / "store")
    student = make_student(16, 2, VOCAB, heads=True)
    before = copy.deepcopy(student)
    calibrate(student, store, [0, 1])
    old = before.state_dict()
    assert all(torch.equal(tensor, old[name]) for name, tensor in student.state_dict().items())
    odds, agreed = verified(student, store, [0, 1])
    assert student.config.trust == pytest.approx(fit_trust(odds.sigmoid(), agreed), abs=1e-5)


def test_a_student_without_heads_is_left_alone(tmp_path: Path, tiny_teacher: GGUFTeacher) -> None:
    """Nothing is calibrated, nothing scored."""
    store, student = make_store(tmp_path / "store"), make_student(16, 2, VOCAB)
    calibrate(student, store, [0, 1])
    assert student.config.trust == 0.5
    scores = score_heads(tiny_teacher, student.heads(), None, store, [0, 1])
    assert (scores.safety, scores.languages, scores.verification) == (None, {}, None)


def test_halves() -> None:
    """What calibrates does not score, unless there is a single sequence."""
    assert halves([4, 5, 6, 7, 8]) == ([4, 6, 8], [5, 7])
    assert halves([4]) == ([4], [4])
