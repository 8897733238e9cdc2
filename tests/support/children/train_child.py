"""What ``tests/integration/test_distributed.py`` starts in several processes: trainings on stores
that exist.

python -m tests.support.children.train_child STORE GUARDED_STORE FOLDER SETTINGS.json

SETTINGS.json holds the settings of each run on STORE by name; then come the trainings of
``tests/integration/test_guard_distributed.py`` on GUARDED_STORE. All of them are done twice: in
FOLDER/ddp with the variables of ``torchrun`` alone, and in FOLDER/fsdp with those that
``accelerate launch --use_fsdp`` adds. The processes are forks, so that PyTorch is imported once.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import safetensors.torch
from accelerate import PartialState
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from distill.config.schema import LossConfig, TrainConfig
from distill.heads.prompt_set import PromptSet
from distill.heads.prompts import SafetyPrompt
from distill.losses.objective import build_objective
from distill.runtime import device
from distill.training import checkpoint_timer
from distill.training.data import TrainingData, split
from distill.training.engine import TrainingJob, train
from students.weights import plain_weights
from teachers.store.manifest import read_manifest
from teachers.store.store import SoftTargetStore
from teachers.targets.stored_arrays import Targets
from tests.integration import test_guard_distributed as guarded
from tests.support import training
from tests.support.students import make_student

LOSS = LossConfig(temperature=2.0, gamma=1.0)
OURS = ("stop_at", "untied", "heads", "store", "sample")  # not settings of a training
PATIENCE = 60  # seconds that one process waits for the other before it says so
LAUNCH = "--num_processes 2 --num_machines 1 --main_process_port 0 --mixed_precision no "
LAUNCH += "--dynamo_backend no --use_fsdp --fsdp_version 2"


class Stopped(Exception):
    """Stands for the end of all processes of a launch."""


def make_prompts(vocab_size: int) -> PromptSet:
    """Seven prompts of different lengths, labelled in turn."""
    labels = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.1, 0.2, 0.7)]
    tokens = [np.arange(3, 5 + n, dtype=np.int32) * (n + 1) % vocab_size for n in range(7)]
    return PromptSet([SafetyPrompt(str(n), str(n), "", labels[n % 3]) for n in range(7)], tokens, 1)


def run(store_folder: Path, folder: Path, settings: dict[str, Any]) -> None:
    """Train a student that is 16 wide, and let the first process write what came of it.

    ``stop_at`` among the settings: only until after that step, with a checkpoint before every one;
    ``untied``: a student with an output matrix of its own; ``heads``: one with both heads, and
    prompts in every step; ``store``: another folder than the usual one, relative to it; ``sample``:
    tokens that stand for the vocabulary.
    """
    stop_at, untied, heads, other, sample = (settings.get(name) for name in OURS)
    store_folder = store_folder / (other or "")
    store = SoftTargetStore(store_folder, read_manifest(store_folder))
    vocab_size = int(store.manifest.identity["vocab_size"])
    prompts = make_prompts(vocab_size) if heads else None
    data = TrainingData(store, split(store, 0.2, 0), 0, prompts, 1, 3)
    student = make_student(16, 2, vocab_size, tied=not untied, heads=bool(heads))
    loss = LOSS.model_copy(update={"vocabulary_sample": sample})
    objective = build_objective(loss, store, student, teacher_layers=2)
    config = TrainConfig.model_validate({k: v for k, v in settings.items() if k not in OURS})

    def report(step: int, text: str) -> None:
        if step == stop_at:
            raise Stopped

    read: set[int] = set()
    targets = SoftTargetStore.targets

    def reading(self: SoftTargetStore, index: int) -> Targets:
        read.add(int(index))
        return targets(self, index)

    first = PartialState().is_main_process
    folder.mkdir(parents=True, exist_ok=True)
    seconds, share = (
        (0.0, float("inf"))
        if stop_at
        else (checkpoint_timer.CHECKPOINT_SECONDS, checkpoint_timer.SAVING_SHARE)
    )
    try:
        with (
            patch.multiple(checkpoint_timer, CHECKPOINT_SECONDS=seconds, SAVING_SHARE=share),
            patch.object(SoftTargetStore, "targets", reading),
            # Machines of two kinds: what ``auto`` measures is faster for the first process alone.
            patch.object(device, "is_faster_in_bfloat16", lambda width: first),
        ):
            summary = train(TrainingJob(student, data, objective, config, folder), report)
    except Stopped:
        return
    trained = sorted(read.difference(data.split.held_out.tolist()))
    (folder / f"read-{PartialState().process_index}.json").write_text(json.dumps(trained))
    (folder / f"precision-{PartialState().process_index}.txt").write_text(summary.precision)
    if first:
        safetensors.torch.save_file(plain_weights(student), folder / "final.safetensors")
        content = {name: getattr(summary, name) for name in ("best", "steps", "continued_from")}
        (folder / "summary.json").write_text(json.dumps(content))


def train_all(place: Path, store: Path, guarded_store: Path, settings: Path) -> None:
    """All trainings, one after another."""
    for name, values in json.loads(settings.read_text()).items():
        run(store, place / name, values)
    for name, faults in training.TRAININGS.items():
        guarded.run(guarded_store, place / name, faults)
    guarded.leave_out(place)


def main() -> None:
    """Fork a process for each rank, and end the other one where one fails."""
    store, guarded_store, folder, settings = (Path(argument) for argument in sys.argv[1:])
    launch = launch_command_parser().parse_args([*LAUNCH.split(), "script"])
    variables = prepare_multi_gpu_env(launch)
    ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": launch.master_port}
    children = []
    for rank in ("0", "1"):
        child = os.fork()
        if child:
            children.append(child)
            continue
        status = 1
        try:
            os.environ |= ranks | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
            PartialState(cpu=True, timeout=timedelta(seconds=PATIENCE))
            train_all(folder / "ddp", store, guarded_store, settings)
            os.environ |= variables | ranks
            train_all(folder / "fsdp", store, guarded_store, settings)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    ends = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in children]
    sys.exit(max(map(abs, ends)))


if __name__ == "__main__":
    main()
