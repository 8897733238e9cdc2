"""``distill run`` and ``distill train``: from a teacher, or from its soft targets, to a proved
GGUF student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from distill.base_models.base_model import Base
from distill.capture.capture import fill_store, keep_inheritance, load_teacher, read_data, text_of
from distill.capture.ready_store import (
    find_teacher,
    open_full_store,
    require_complete,
    without_capture,
)
from distill.capture.store_setup import StorePlace, open_store, recipe_for
from distill.capture.teachers import find_gguf, teacher_stem, tokenizer_of
from distill.config.schema import RunConfig
from distill.heads.prompts import SafetyPrompt, digest
from distill.heads.safety_data import labelled_prompts, safety_data
from distill.initialization.shape import student_shape
from distill.losses.hidden_states import pair_layers
from distill.pipeline.final_table import print_results
from distill.pipeline.preflight import Inputs, check_run, check_train
from distill.pipeline.resolve import _settle
from distill.pipeline.stages import Source, _make_student, _round_off
from distill.runs.audit_events import record_start
from distill.runs.folder import Places, RunFolder, choose_folder
from distill.runtime.environment import environment
from distill.runtime.format import human_count
from distill.runtime.launch import Launch
from distill.runtime.progress import Console
from teachers.atomic_files import exclusive
from teachers.base import TeacherInfo
from teachers.store.store import SoftTargetStore
from teachers.store.teacher_record import need_inheritance


def run(
    config: RunConfig,
    places: Places,
    console: Console,
    inputs: Inputs | None = None,
) -> RunFolder:
    """Do a whole run, or what is left of it, and return its folder.

    ``inputs``: what ``check_run`` has read, if it was called.

    Raises:
        UserError, StoreError, TeacherFileError, TeacherError: the input cannot be used.
        TrainingAborted, ProofFailed: training or export went wrong.
        OSError: the disk refuses.
    """
    inputs = inputs or check_run(config, places)
    prompts = inputs.prompts
    launch = Launch.join()
    with load_teacher(config, console) as teacher:
        gguf = find_gguf(config.teacher)
        config, base = _settle(config, tokenizer_of(config.teacher), teacher.info, gguf, console)
        stem = teacher_stem(config.teacher)
        folder = _choose(places.out, config, stem, launch)
        corpus = read_data(config, teacher, console, inputs.take_entries())
        recipe = recipe_for(config.targets, teacher, console)
        layers = base.layers if base else student_shape(config, teacher.info).num_hidden_layers
        pair_layers(config.loss.layer_map, recipe.layers, layers, teacher.info.layers)
        store = open_store(
            teacher, corpus, recipe, StorePlace(places.store, folder.path.parent, stem)
        )

        def capture() -> Source:
            words, info = tokenizer_of(config.teacher), teacher.info
            # Now, not after hours, a prompt is found to be too long.
            safety = safety_data(config, prompts, words, info)
            with exclusive(store.folder, launch.share.rank):
                reused = fill_store(teacher, corpus, store, console, launch.share)
                if launch.first:
                    text = text_of(config, info)
                    keep_inheritance(teacher, gguf, store, console, launch.share, text)
                    labelled_prompts(config, prompts, teacher, store, console)
                launch.wait()
            if not config.train.on_policy:
                teacher.close()  # it is out of memory while the student trains
            labelled = labelled_prompts(config, prompts, None, store, console)
            if labelled is not prompts:
                safety = safety_data(config, labelled, words, info)
            return Source(
                config, store, need_inheritance(store), reused, safety, gguf, teacher, base
            )

        _work_in(
            folder, config, _identity(teacher.info, store, prompts, base), capture, launch, console
        )
    return folder


def train_from_store(
    config: RunConfig, out: Path | None, console: Console, inputs: Inputs | None = None
) -> RunFolder:
    """Make a student from the store that ``config`` names, or what is left to do of it; no teacher
    is needed.

    ``inputs``: what ``check_train`` has read, if it was called.

    Raises:
        UserError, StoreError: the input cannot be used.
        TrainingAborted, ProofFailed: training or export went wrong.
        OSError: the disk refuses.
    """
    assert config.store is not None
    prompts = (inputs or check_train(config, out)).prompts
    launch = Launch.join()
    store, inheritance = open_full_store(Path(config.store))
    info = inheritance.info
    config = without_capture(config, store.manifest.recipe, console)
    gguf = find_teacher(config.teacher.path, info)
    console.note(
        f"soft targets of {info.name}: {info.architecture}, {human_count(info.parameters)} "
        "parameters"
    )
    longest = None if config.student.base is None else int(store.lengths().max())
    config, base = _settle(config, inheritance.tokenizer, info, gguf, console, longest)
    folder = _choose(out, config, store.folder.resolve().name, launch)
    if not folder.finished:
        require_complete(store, console)

    def prepare() -> Source:
        labelled = labelled_prompts(config, prompts, None, store, console)
        safety = safety_data(config, labelled, inheritance.tokenizer, info)
        return Source(config, store, inheritance, True, safety, gguf, base=base)

    _work_in(folder, config, _identity(info, store, prompts, base), prepare, launch, console)
    return folder


def _choose(out: Path | None, config: RunConfig, stem: str, launch: Launch) -> RunFolder:
    """The run's folder, which is or can become its own; nothing in it is touched."""
    folder = RunFolder(out or launch.agreed(choose_folder(config, stem).path))
    folder.check(config)
    return folder


def _identity(
    info: TeacherInfo,
    store: SoftTargetStore,
    prompts: list[SafetyPrompt] | None,
    base: Base | None,
) -> dict[str, str]:
    """What a run's folder must not be continued without."""
    of_base = (
        {}
        if base is None
        else {"base_name": base.folder.path.resolve().name, "base_sha256": base.sha256}
    )
    return of_base | {
        "teacher_name": info.name,
        "teacher_sha256": info.sha256,
        "soft_targets": store.manifest.key,
        "safety_prompts": "none" if prompts is None else digest(prompts),
    }


def _work_in(
    folder: RunFolder,
    config: RunConfig,
    identity: dict[str, str],
    prepare: Callable[[], Source],
    launch: Launch,
    console: Console,
) -> None:
    """Make the student in ``folder`` unless it is there already, and show what came of it."""
    with exclusive(folder.path, launch.share.rank):
        if launch.first:
            folder.claim(config, identity)
            record_start(folder, config.model_dump(mode="json"), identity, environment())
        launch.wait()
        if folder.finished:
            console.note(f"{folder.path} already holds this run, finished; nothing was done again")
            if launch.first:
                _round_off(folder, console)
        else:
            _make_student(prepare(), folder, launch, console)
    if launch.first:
        print_results(folder, console)
