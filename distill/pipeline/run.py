"""``distill run`` and ``distill train``: from a teacher, or from its soft targets, to a proved
GGUF student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from distill.base_models.base_model import Base
from distill.capture.capture import data_on_disk, describe_teacher, load_teacher
from distill.capture.ready_store import (
    find_teacher,
    open_full_store,
    require_complete,
    without_capture,
)
from distill.capture.sequences.known import StoreLocation, known_vocabulary
from distill.capture.store_setup import open_store, recipe_for
from distill.capture.teachers import gguf_of, teacher_stem, tokenizer_of, weights_of
from distill.config.schema import RunConfig
from distill.heads.prompts import SafetyPrompt, digest
from distill.heads.safety_data import labelled_prompts, safety_data
from distill.losses.hidden_states import pair_layers
from distill.pipeline.budget.budget import Budget, settle
from distill.pipeline.capture import fill
from distill.pipeline.final_table import print_results
from distill.pipeline.preflight import Inputs, check_run, check_train
from distill.pipeline.resolve import require_memory, resolve
from distill.pipeline.results import finalize, write_results
from distill.pipeline.stages import (
    Source,
    Workspace,
    evaluate_student,
    prepare,
    publish_student,
    train_student,
)
from distill.runs.audit_events import record_start
from distill.runs.decisions import Decisions
from distill.runs.folder import RUNS, RunFolder, RunPaths, choose_folder
from distill.runtime.device import training_device
from distill.runtime.environment import environment
from distill.runtime.format import human_time
from distill.runtime.launch import Launch
from distill.runtime.progress import Console
from distill.trimming.for_student import (
    fitted,
    require_same_vocabulary,
    trimmed_file,
    with_cut_base,
)
from teachers.atomic_files import exclusive
from teachers.base import TeacherInfo
from teachers.gguf.file import read_gguf
from teachers.reduced import cut_of
from teachers.store.store import SoftTargetStore
from teachers.store.teacher_record import require_teacher_record


def run(
    config: RunConfig,
    places: RunPaths,
    console: Console,
    inputs: Inputs | None = None,
    seconds: float | None = None,
) -> RunFolder:
    """Do a whole run, or what is left of it, and return its folder.

    ``inputs``: what ``check_run`` has read, if it was called. ``seconds``: what it may take since
    the ``console``'s command began, which then decides samples, epochs and steps.

    Raises:
        UserError, StoreError, TeacherFileError, TeacherError: the input cannot be used.
        TrainingAborted, ProofFailed: training or export went wrong.
        OSError: the disk refuses.
    """
    inputs = inputs or check_run(config, places, budget=seconds)
    config, decisions, budget = _decide(config, inputs, seconds, console)
    prompts = inputs.prompts
    launch = Launch.join()
    data, beside = inputs.take_data(), places.out.parent if places.out is not None else RUNS
    kept = beside / "stores" if places.store is None else places.store.parent
    stem = teacher_stem(config.teacher)
    place = StoreLocation(places.store, beside, stem)
    known = known_vocabulary(place, config)
    with (
        load_teacher(config, console) as whole,
        fitted(whole, config, data, kept, console, known) as teacher,
        data_on_disk(config, teacher, place, console, data) as corpus,
    ):
        del data
        info, gguf = teacher.info, gguf_of(teacher)
        assert gguf is not None, "see require_gguf"
        tokenizer = tokenizer_of(config.teacher, gguf)
        weights = weights_of(teacher)
        config = with_cut_base(config, cut_of(teacher), kept)
        resolved = resolve(config, info, tokenizer, weights, console)
        longest = corpus.sampling.max_length
        resolved = resolved.with_length(longest)
        config = resolved.config
        require_memory(resolved, info, longest, console)
        folder = _choose(places.out, config, stem, launch)
        work = Workspace(folder, launch, console, decisions, budget)
        recipe = recipe_for(config.targets, teacher, corpus, console)
        pair_layers(config.loss.layer_map, recipe.layers, resolved.layers, info.layers)
        store = open_store(teacher, corpus, recipe, place)

        def capture() -> Source:
            # Now, not after hours, a prompt turns out to be too long.
            safety = safety_data(config, prompts, tokenizer, info)
            reused = fill(store, teacher, corpus, config, prompts, console)
            launch.wait()
            if not config.train.on_policy:
                teacher.close()  # it is out of memory while the student trains
            labelled = labelled_prompts(config, prompts, None, store, console)
            if labelled is not prompts:
                safety = safety_data(config, labelled, tokenizer, info)
            return Source(
                resolved, store, require_teacher_record(store), reused, safety, weights, teacher
            )

        _work_in(work, config, _identity(info, store, prompts, resolved.base), capture)
    if budget is not None and inputs.decided is None:
        console.note(f"took {human_time(console.elapsed())} of {human_time(budget.seconds)}")
    return work.folder


def _decide(
    config: RunConfig, inputs: Inputs, seconds: float | None, console: Console
) -> tuple[RunConfig, Decisions, Budget | None]:
    """The settings with what ``seconds`` decide, by what was decided before or by measuring."""
    if inputs.decided is not None:
        config, decisions = inputs.decided
        found = decisions.budget
        return config, decisions, None if found is None else Budget.from_json(found)
    if seconds is None:
        return config, Decisions(config.model_dump(mode="json")), None
    settled, budget = settle(config, seconds, inputs.data, inputs.prompts, console)
    return settled, Decisions(config.model_dump(mode="json"), budget.to_json()), budget


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
    store, teacher_record = open_full_store(Path(config.store))
    info, tokenizer = teacher_record.info, teacher_record.tokenizer
    config = without_capture(config, store.manifest.recipe, console)
    gguf, cut = find_teacher(config.teacher.path, info), teacher_record.cut
    require_same_vocabulary(config, cut, store)
    kept = (out.parent if out is not None else RUNS) / "stores"
    config = with_cut_base(config, cut, kept)
    if gguf is not None and cut is not None:
        gguf = trimmed_file(read_gguf(gguf), cut, kept, teacher_stem(config.teacher))
    console.note(f"soft targets of {describe_teacher(info)}")
    resolved = resolve(config, info, tokenizer, gguf, console)
    config = resolved.config
    # Of a new student on the processor no length is needed; the store may yet prove damaged.
    sized = resolved.base is not None or training_device().type != "cpu"
    longest = int(store.lengths().max()) if sized else 0
    require_memory(resolved, info, longest, console)
    folder = _choose(out, config, store.folder.resolve().name, launch)
    if not folder.finished:
        require_complete(store, console)

    def reuse() -> Source:
        labelled = labelled_prompts(config, prompts, None, store, console)
        safety = safety_data(config, labelled, tokenizer, info)
        return Source(resolved, store, teacher_record, True, safety, gguf)

    work = Workspace(folder, launch, console)
    _work_in(work, config, _identity(info, store, prompts, resolved.base), reuse)
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
    of_base = {}
    if base is not None:
        of_base = {"base_name": base.path.resolve().name, "base_sha256": base.sha256}
    return of_base | {
        "teacher_name": info.name,
        "teacher_sha256": info.sha256,
        "soft_targets": store.manifest.key,
        "safety_prompts": "none" if prompts is None else digest(prompts),
    }


def _work_in(
    work: Workspace, config: RunConfig, identity: dict[str, str], source: Callable[[], Source]
) -> None:
    """Make the student in the run's folder unless it is there already, and print the results."""
    folder, launch = work.folder, work.launch
    with exclusive(folder.path, launch.share.rank):
        if launch.first:
            folder.claim(config, identity)
            if work.decisions is not None and work.decisions.any:
                work.decisions.keep_in(folder)
            record_start(folder, config.model_dump(mode="json"), identity, environment())
        launch.wait()
        if not folder.finished:
            _make_student(source(), work)
        else:
            work.console.note(
                f"{folder.path} already holds this run, finished; nothing was done again"
            )
            if launch.first:
                finalize(work)
    if launch.first:
        print_results(folder, work.console)


def _make_student(source: Source, work: Workspace) -> None:
    """Train in all processes; export, prove, evaluate and write results in the first."""
    trained = train_student(prepare(source, work), work)
    if work.launch.first:
        published = publish_student(trained, work)
        write_results(evaluate_student(published, work), work)
