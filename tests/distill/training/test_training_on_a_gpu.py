"""Training on a GPU, held with one that is pretended: the results are a processor's, also of what
follows, a step waits little, and nothing crosses the bus twice."""

from __future__ import annotations

import copy
import math
import threading
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.capture.temporary_files.tokenizer_only import tokenizer_entries
from distill.config.schema import LossConfig, TrainConfig
from distill.evaluation.scorers import student_scorer
from distill.heads.fitting import calibrate
from distill.heads.safety_data import SafetyData
from distill.heads.safety_fitting import SafetyFit, fit_safety_head
from distill.losses import chunked_lm_head
from distill.losses.objective import build_objective
from distill.training.data import TrainingData, load_batch, split
from distill.training.engine import TrainingJob, train
from distill.training.gradient_check import check_gradients
from distill.training.on_policy import OnPolicyBatches
from students.gguf.metadata import ExportNames
from students.gguf.writer import write_gguf
from students.model.decoder import SO8TForCausalLM
from students.model.fold import to_llama
from teachers import example_teacher
from teachers.gguf.file import read_gguf
from teachers.targets.distributions import tensors_of
from teachers.targets.recipe import Recipe
from tests.support.pretended_gpu import DEVICE, to_gpu, training_on_gpu, watch
from tests.support.pretended_gpu import training as counting
from tests.support.stores import write_store
from tests.support.students import loss_of, make_adapted, make_student
from tests.support.teachers import BigramTeacher
from tests.support.training import (
    TRAIN,
    VOCAB,
    WIDTH,
    Killed,
    killer,
    read_metrics,
    save_all_the_time,
    weights,
)

TEACHER = BigramTeacher(VOCAB, WIDTH)
EVERY_TERM = LossConfig(
    temperature=1.5, gamma=0.5, pet=(0.1, 0.1, 0.1), divergence="jensen_shannon"
)
CONFIG = TRAIN.model_copy(update={"accumulation": 2, "epochs": 1, "evaluations": 2})
NAMES = ExportNames("tiny", {})
WAITS = 5  # of the processor for the GPU in a step; 40 were asked for


def make_data(folder: Path) -> TrainingData:
    """Sequences of many lengths with everything that a store can keep, and prompts."""
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, VOCAB, size=n).astype(np.int32) for n in draw.integers(4, 40, size=15)]
    recipe = Recipe(num_topk=8, sketch_bytes=10, layers=(0, 1), layer_bytes=12)
    store = write_store(folder, TEACHER, rows, recipe, 10)
    prompts = counting.make_prompts()
    return TrainingData(store, split(store, 0.2, 0), 0, prompts, 2, 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return make_data(tmp_path_factory.mktemp("data") / "store")


def job(data: TrainingData, folder: Path, config: TrainConfig = CONFIG) -> TrainingJob:
    student = make_student(16, 2, VOCAB, heads=True)
    objective = build_objective(EVERY_TERM, data.store, student, 2)
    folder.mkdir(exist_ok=True)
    return TrainingJob(student, data, objective, config, folder)


def losses(folder: Path) -> list[float]:
    """Of the steps in a run's log."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [line["loss"] for line in lines if line["kind"] == "train"]


def trained(one: TrainingJob, kill_at: int = -1) -> dict[str, bytes]:
    train(one, killer(kill_at))
    return weights(one.student.to("cpu"))


def own_bytes(data: TrainingData, step: int, sequences: list[int]) -> int:
    """Of what a step's computation is given, and of what is read for the log and the guard."""
    batch = load_batch(data.store, sequences, pack=True)
    parts = [batch.targets, batch.layout]
    if data.prompts is not None and step % data.prompts_every == 0:
        parts.append(data.prompts.batch(step // data.prompts_every, data.prompts_together, 0, 1))
    given = [batch.tokens, *(one for part in parts for one in tensors_of(part).values())]
    return sum(one.numel() * one.element_size() for one in given) + 1024


def test_a_step_waits_little_and_moves_its_own_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the vocabulary, and for four chunks of the LM head as for one; with prompts too."""
    seen = []
    for vocab, positions in ((512, 128), *((one, 16) for one in counting.VOCABULARIES)):
        for limit in ("LEAST_LOGITS_BYTES", "MOST_LOGITS_BYTES"):
            monkeypatch.setattr(chunked_lm_head, limit, 4 * vocab * positions)
        one = counting.job(tmp_path / f"{vocab}-{positions}", vocab, 4, (12, 4))
        steps = counting.counted(one)
        plan = one.data.batches(1, counting.BATCH)
        for number, step in enumerate(steps, 1):
            assert 0 < step.syncs.total() <= WAITS, (vocab, positions, step.syncs)
            own = own_bytes(one.data, number, plan[number])
            assert own / 2 < step.bytes.total() <= own, (vocab, positions, step.bytes)
        seen.append([step.syncs.total() for step in steps])
    assert len(seen[0]) == 2 and all(waits == seen[0] for waits in seen)


def test_chunks_are_as_large_as_the_gpu_allows() -> None:
    """A share of its memory, within bounds; as always on a processor."""
    for memory, expected in ((1 << 30, 32 << 20), (12 << 30, 192 << 20), (80 << 30, 512 << 20)):
        with pytest.MonkeyPatch.context() as changed:
            changed.setattr("tests.support.pretended_gpu.MEMORY", memory)
            assert chunked_lm_head.logits_bytes(DEVICE) == expected
    assert chunked_lm_head.logits_bytes(torch.device("cpu")) == chunked_lm_head.LOGITS_BYTES


def test_training_is_that_of_a_processor(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, scores and log; interrupted and continued the same to the last byte there."""
    on_cpu, on_gpu = job(data, tmp_path / "cpu"), job(data, tmp_path / "gpu")
    expected = train(on_cpu, killer())
    with training_on_gpu():
        found = train(on_gpu, killer())
        assert on_gpu.student.device == DEVICE
    assert found.best == expected.best and found.steps == expected.steps == 3
    for (_, mine), (_, theirs) in zip(found.scores, expected.scores, strict=True):
        assert vars(mine) == pytest.approx(vars(theirs), rel=1e-3)
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)
    whole = weights(on_gpu.student.to("cpu"))
    save_all_the_time(monkeypatch)
    again = job(data, tmp_path / "again")
    with training_on_gpu(), pytest.raises(Killed):
        trained(again, kill_at=2)
    with training_on_gpu():
        continued = job(data, tmp_path / "again")
        assert trained(continued) == whole


def test_a_spoilt_weight_is_rolled_back(data: TrainingData, tmp_path: Path) -> None:
    """To a snapshot that the GPU has copied by itself."""
    guard = CONFIG.guard.model_copy(update={"snapshot_every": 2, "probe_every": 2})
    one = job(data, tmp_path, CONFIG.model_copy(update={"guard": guard, "epochs": 2}))

    def report(step: int, words: str) -> None:
        if step == 4 and not said:
            with torch.no_grad():
                one.student.model.layers[1].mlp.up_proj.weight.mul_(math.nan)

    said: list[str] = []
    with training_on_gpu():
        train(one, report, warn=said.append)
    assert len(said) == 1 and "model.layers.1.mlp.up_proj.weight" in said[0]
    assert all(bool(value.isfinite().all()) for value in one.student.to("cpu").parameters())


@pytest.mark.parametrize(
    "changes", [{"gradient_checkpointing": True, "guard": {"enabled": False}}, {"on_policy": 0.5}]
)
def test_other_ways_to_train(
    data: TrainingData, tmp_path: Path, changes: dict[str, object]
) -> None:
    """Each step as on a processor, as far as it goes the same way."""
    config = TrainConfig.model_validate({**CONFIG.model_dump(), **changes})
    writes = OnPolicyBatches(TEACHER, data.store, config.on_policy, 1.0, 0, None)
    for name in ("cpu", "gpu"):
        one = job(data, tmp_path / name, config)
        with training_on_gpu() if name == "gpu" else watch():
            train(one, killer(), writes if config.on_policy else None)
    mine, theirs = losses(tmp_path / "gpu"), losses(tmp_path / "cpu")
    assert mine[:2] == pytest.approx(theirs[:2], rel=1e-3) and len(mine) == len(theirs) == 3


def test_an_error_of_the_loader_reaches_the_caller(tmp_path: Path) -> None:
    """With the line that it comes from; neither it nor an end from outside leaves a thread."""
    data = make_data(tmp_path / "store")
    last = data.batches(CONFIG.epochs, CONFIG.batch_size)[2][0]
    good = data.store.targets

    def targets(index: int) -> object:
        if index == last and threading.current_thread() is not threading.main_thread():
            raise OSError("the disk is gone")
        return good(index)

    with training_on_gpu(), pytest.raises(Killed):
        train(job(data, tmp_path / "killed"), killer(1))
    data.store.targets = targets  # type: ignore[assignment, method-assign]
    with training_on_gpu(), pytest.raises(OSError, match="the disk is gone") as caught:
        train(job(data, tmp_path / "broken"), killer())
    assert "load_batch" in "".join(traceback.format_tb(caught.tb))
    assert not [one for one in threading.enumerate() if one.name.startswith("loader")]


def test_what_follows_training(data: TrainingData, tmp_path: Path) -> None:
    """Calibrated heads, scores, the folded model and the exported file of a student on a GPU."""
    prompts = counting.make_prompts()
    safety = SafetyData("", "", prompts, prompts, prompts)
    students: list[SO8TForCausalLM] = []
    fits: list[SafetyFit] = []
    for name in ("cpu", "gpu"):
        student = make_student(16, 2, VOCAB, heads=True)
        with watch():
            if name == "gpu":
                to_gpu(student)
            calibrate(student, data.store, [0, 1, 2])
            fits.append(fit_safety_head(student, safety))
        students.append(student)
    here, there = students
    assert there.config.trust == pytest.approx(here.config.trust, rel=1e-4)
    costs = [fit.cross_validation.cost for fit in fits]
    assert costs[1] == pytest.approx(costs[0], abs=1e-3)
    rows = [data.store.tokens(index) for index in range(3)]
    torch.testing.assert_close(student_scorer(there)(rows).cpu(), student_scorer(here)(rows))
    for mine, theirs in zip(
        to_llama(there).state_dict().values(), to_llama(here).state_dict().values(), strict=True
    ):
        torch.testing.assert_close(mine.cpu(), theirs)
    example = read_gguf(example_teacher())
    large = make_student(16, 2, len(example.value("tokenizer.ggml.tokens")))
    for name, one in (("cpu", large), ("gpu", to_gpu(copy.deepcopy(large)))):
        with watch():
            write_gguf(one, tmp_path / name, "f32", tokenizer_entries(example), NAMES)
    sizes = [(tmp_path / name).stat().st_size for name in ("cpu", "gpu")]
    assert sizes[0] == sizes[1] > 4 * large.parameter_count() / 2


def test_gradients_of_an_adapted_student_are_checked_there() -> None:
    student = to_gpu(make_adapted())
    with watch():
        report = check_gradients(student, lambda: loss_of(student))
    expected = check_gradients(other := make_adapted(), lambda: loss_of(other))
    assert [replace(one, least=0, largest=0) for one in report] == [
        replace(one, least=0, largest=0) for one in expected
    ]
    for mine, theirs in zip(report, expected, strict=True):
        assert mine.largest == pytest.approx(theirs.largest, rel=1e-3, nan_ok=True)
