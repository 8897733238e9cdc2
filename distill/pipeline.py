"""``distill run``: from a GGUF teacher to a proved GGUF student, stage by stage."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from distill.batches import MAX_HELD_OUT, split
from distill.config import RunConfig
from distill.console import Console, human_bytes, human_count
from distill.corpus import Corpus, build_corpus
from distill.engine import TrainingData, TrainingSummary, train
from distill.errors import UserError
from distill.evaluate import Evaluation, evaluate, llama_scorer, student_scorer
from distill.exporting import export_proved, tokenizer_entries
from distill.objective import Objective
from distill.prove import tokenized_lines
from distill.results import Outcome, build_results, print_table
from distill.run_folder import HeldOut, RunFolder, choose_folder
from students.builder import build_student, default_size, parse_size, student_config
from students.export import ExportNames, write_tokenizer
from students.initialise import initialise_embeddings
from students.model import SO8TForCausalLM
from teachers import example_teacher
from teachers.base import TeacherInfo
from teachers.capture import capture
from teachers.gguf_file import GGUFFile
from teachers.gguf_teacher import GGUFTeacher
from teachers.soft_targets import nodes_for
from teachers.store import Manifest, SoftTargetStore

SEQUENCES_PER_SHARD = 256
SPEED_PROMPT_TOKENS = 128
SPEED_NEW_TOKENS = 64


@dataclass(frozen=True)
class Places:
    """Where a run keeps its things, as the user asked: none means the default."""

    out: Path | None = None
    store: Path | None = None


def run(config: RunConfig, places: Places, console: Console) -> RunFolder:
    """Do a whole run, or what is left of it, and return its folder.

    Raises:
        UserError, StoreError, TeacherFileError, TeacherError: the input cannot be used.
        TrainingAborted, ProofFailed: training or export went wrong.
        OSError: the disk refuses.
    """
    path = Path(config.teacher.path) if config.teacher.path else example_teacher()
    with console.stage("Load teacher") as stage:
        teacher = GGUFTeacher(path, gpu_layers=config.teacher.gpu_layers)
        info = teacher.info
        stage.finish(f"{info.name}: {info.architecture}, {human_count(info.parameters)} parameters")
    with teacher:
        config = _resolve(config, info)
        student = _build(config, teacher.file, info, console)
        stem = path.stem if config.teacher.path else "example"
        folder = RunFolder(places.out) if places.out else choose_folder(config, stem)
        folder.begin(config)
        with console.stage("Read data") as stage:
            corpus = build_corpus(config.data, teacher, config.seed)
            stage.finish(f"{len(corpus)} sequences, the teacher writes in {corpus.spoken}")
        for note in corpus.notes:
            console.note(note)
        store = _open_store(config, places, folder, teacher, corpus, stem)
        folder.claim(
            {"teacher_name": info.name, "teacher_sha256": info.sha256, "soft_targets": store.manifest.key}
        )
        if folder.finished:
            console.note(f"{folder.path} already holds this run, finished; nothing was done again")
            print_table(folder, console)
            return folder
        reused = _capture(teacher, corpus, store, console)
        data = TrainingData(store, split(store, config.data.held_out, config.seed), config.seed)
        sequences = [store.tokens(int(index)) for index in data.split.held_out[:MAX_HELD_OUT]]
        held_out = HeldOut(sequences, tokenized_lines(teacher, sequences))
        folder.write_held_out(held_out)
        tokenizer = tokenizer_entries(teacher.file)

    # The teacher is out of memory while the student trains.
    summary = _train(config, student, data, folder, console)
    name = f"{info.name} distilled {config.student.size} SO8T"
    _save_student(student, folder, tokenizer, name)
    with console.stage("Export and prove") as stage:
        names = ExportNames(name, {"teacher_name": info.name, "teacher_sha256": info.sha256})
        proof = export_proved(student, folder.gguf, config.export.quant, tokenizer, names, held_out)
        stage.finish(
            f"{proof.quant}, {human_bytes(folder.gguf.stat().st_size)}; KL {proof.mean_kl:.1e} from PyTorch "
            f"over {proof.positions} positions"
        )
    evaluation, speeds = _evaluate(config, path, folder, student, held_out, console)
    outcome = Outcome(config, info, student, store, reused, summary, proof, evaluation, speeds)
    size = folder.gguf.stat().st_size
    folder.write_results(build_results(outcome, size, console.seconds, _environment()))
    print_table(folder, console)
    return folder


def _resolve(config: RunConfig, info: TeacherInfo) -> RunConfig:
    """Fill in what depends on the teacher: the student's default size."""
    size = parse_size(config.student.size) if config.student.size else default_size(info.width, info.layers)
    return config.model_copy(update={"student": config.student.model_copy(update={"size": str(size)})})


def _build(config: RunConfig, file: GGUFFile, info: TeacherInfo, console: Console) -> SO8TForCausalLM:
    assert config.student.size is not None
    shape = student_config(
        parse_size(config.student.size),
        vocab_size=info.vocab_size,
        context_length=info.context_length,
        tie_embeddings=config.student.tie_embeddings,
        bos=info.bos,
        eos=info.eos,
    )
    student = build_student(shape, config.seed)
    initialise_embeddings(student, file.tensor("token_embd.weight"))
    parameters = student.num_parameters()
    console.note(f"student {config.student.size}: {human_count(parameters)} parameters")
    if parameters >= info.parameters:
        console.warn(
            f"student {config.student.size} has {human_count(parameters)} parameters, not fewer than the "
            f"teacher's {human_count(info.parameters)}; choose a smaller --student-size to compress"
        )
    return student


def _open_store(
    config: RunConfig, places: Places, folder: RunFolder, teacher: GGUFTeacher, corpus: Corpus, stem: str
) -> SoftTargetStore:
    """Open the store these very soft targets belong in; beside the run's folder unless told otherwise."""
    nodes = nodes_for(config.loss.temperature, config.loss.final_temperature)
    identity: dict[str, Any] = {
        "kind": "compact",
        "teacher_sha256": teacher.info.sha256,
        "tokenizer_sha256": teacher.info.tokenizer_sha256,
        "vocab_size": teacher.info.vocab_size,
        "corpus_sha256": corpus.digest(),
        "num_topk": config.targets.num_topk,
        "nodes": list(nodes),
    }
    manifest = Manifest(identity, len(corpus), SEQUENCES_PER_SHARD)
    where = places.store or folder.path.parent / "stores" / f"{stem}-{manifest.key[:12]}"
    store = SoftTargetStore.create_or_open(where, manifest)
    stored = min(config.targets.num_topk, teacher.info.vocab_size)
    per_token = stored * (6 if teacher.info.vocab_size <= 1 << 16 else 8) + 4 * len(nodes) + 4
    needed = len(corpus) * min(config.data.max_length, teacher.info.context_length) * per_token
    free = shutil.disk_usage(where).free + store.bytes_on_disk()
    if needed > free:
        raise UserError(
            f"the soft targets need up to {human_bytes(needed)}, {where} has {human_bytes(free)} free; free some "
            "space, choose --store on another disk, or lower --samples or targets.num_topk"
        )
    return store


def _capture(teacher: GGUFTeacher, corpus: Corpus, store: SoftTargetStore, console: Console) -> bool:
    """Fill the store; returns whether everything was there already."""
    with console.stage("Capture", total=len(corpus)) as stage:
        summary = capture(teacher, corpus, store, stage.update)
        tokens = int(store.lengths().sum())
        size = f"{human_count(tokens)} tokens, {human_bytes(store.bytes_on_disk())} in {store.folder}"
        if summary.written == 0:
            stage.finish(f"skipped: soft targets of this teacher and data reused, {size}")
        elif summary.reused:
            stage.finish(f"{summary.written} shards captured, {summary.reused} reused, {size}")
        else:
            stage.finish(size)
    for shard in summary.damaged:
        console.warn(f"{store.shard_path(shard)} was damaged and has been captured again")
    return summary.written == 0


def _train(
    config: RunConfig, student: SO8TForCausalLM, data: TrainingData, folder: RunFolder, console: Console
) -> TrainingSummary:
    steps = len(data.batches(config.train.epochs, config.train.batch_size))
    with console.stage("Train", total=steps) as stage:
        objective = Objective(config.loss)
        summary = train(student, data, objective, config.train, folder.path, stage.update)
        first, last = summary.scores[0][1], summary.scores[-1][1]
        stage.finish(
            f"{steps} steps, {human_count(summary.tokens_seen)} tokens; held-out KL {first.kl:.3f} → {last.kl:.3f}"
        )
    if summary.continued_from:
        console.note(f"training was continued from step {summary.continued_from}")
    return summary


def _save_student(student: SO8TForCausalLM, folder: RunFolder, tokenizer: dict[str, Any], name: str) -> None:
    """Write ``student/`` beside its place and move it there, whole or not at all."""
    temporary = folder.path / f".student.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        student.save_pretrained(temporary)
        write_tokenizer(temporary / folder.tokenizer.name, tokenizer, name)
        if folder.student.exists():
            shutil.rmtree(folder.student)  # from an earlier, interrupted end of this same run
        temporary.replace(folder.student)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _evaluate(
    config: RunConfig,
    path: Path,
    folder: RunFolder,
    student: SO8TForCausalLM,
    held_out: HeldOut,
    console: Console,
) -> tuple[Evaluation, dict[str, tuple[float, float]]]:
    """Score untrained student, trained student and exported file against the teacher; time both files."""
    done = 0
    with console.stage("Evaluate", total=len(held_out.sequences)) as stage:
        with GGUFTeacher(path, gpu_layers=config.teacher.gpu_layers) as teacher:
            untrained = build_student(student.config, config.seed)
            initialise_embeddings(untrained, teacher.file.tensor("token_embd.weight"))
            with GGUFTeacher(folder.gguf, gpu_layers=config.teacher.gpu_layers) as exported:
                models = {
                    "before": student_scorer(untrained),
                    "after": student_scorer(student),
                    "exported": llama_scorer(exported),
                }

                def report(count: int) -> None:
                    nonlocal done
                    done += count
                    stage.update(done)

                evaluation = evaluate(teacher, held_out.sequences, models, report)
                speeds = {"teacher": _speed(teacher), "student": _speed(exported)}
        score = evaluation.models["exported"]
        stage.finish(
            f"KL {score.kl:.3f}, agreement {score.agreement:.1%} over {evaluation.positions} positions"
        )
    return evaluation, speeds


def _speed(model: GGUFTeacher) -> tuple[float, float]:
    """Prompt and generation speed in tokens per second, within the model's context."""
    prompt = min(SPEED_PROMPT_TOKENS, model.info.context_length // 2)
    return model.speed(prompt, min(SPEED_NEW_TOKENS, model.info.context_length - prompt - 1))


def _environment() -> dict[str, Any]:
    packages = ("so8t-distill", "torch", "transformers", "llama-cpp-python", "gguf", "accelerate", "numpy")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "packages": {name: version(name) for name in packages},
    }
