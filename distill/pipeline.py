"""``distill run``: from a GGUF teacher to a proved GGUF student, stage by stage."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from distill.batches import split
from distill.capturing import StorePlace, fill_store, load_teacher, open_store, read_data, recipe_for
from distill.config import RunConfig
from distill.console import Console, human_bytes, human_count
from distill.corpus import Corpus
from distill.engine import TrainingData, TrainingSummary, train
from distill.errors import UserError
from distill.evaluate import Evaluation, evaluate, llama_scorer, student_scorer
from distill.exporting import export_proved, save_student, tokenizer_entries
from distill.objective import Objective
from distill.prove import Proof, tokenized_lines
from distill.results import Outcome, build_results, print_table
from distill.run_folder import HeldOut, RunFolder, choose_folder
from distill.teacher_source import gguf_file_of, open_teacher, teacher_stem
from students.builder import build_student, count_parameters, default_size, parse_size, student_config
from students.config import SO8TConfig
from students.export import ExportNames, MetadataEntry
from students.initialise import initialise_embeddings
from students.model import SO8TForCausalLM
from teachers.base import Teacher, TeacherInfo
from teachers.gguf_file import read_gguf
from teachers.gguf_teacher import GGUFTeacher
from teachers.store import SoftTargetStore, exclusive

SPEED_PROMPT_TOKENS = 128
SPEED_NEW_TOKENS = 64
TRAINING_COPIES = 4  # float32 weights, gradients and two moments: what training needs at the very least


@dataclass(frozen=True)
class Places:
    """Where a run keeps its things, as the user asked: none means the default."""

    out: Path | None = None
    store: Path | None = None


@dataclass(frozen=True)
class Prepared:
    """What the teacher leaves behind when it goes: everything training and export need."""

    config: RunConfig
    shape: SO8TConfig
    info: TeacherInfo
    store: SoftTargetStore
    reused: bool
    data: TrainingData
    held_out: HeldOut
    tokenizer: dict[str, MetadataEntry]


def run(config: RunConfig, places: Places, console: Console) -> RunFolder:
    """Do a whole run, or what is left of it, and return its folder.

    Raises:
        UserError, StoreError, TeacherFileError, TeacherError: the input cannot be used.
        TrainingAborted, ProofFailed: training or export went wrong.
        OSError: the disk refuses.
    """
    path = gguf_file_of(config.teacher)
    with load_teacher(config, console) as teacher:
        info = teacher.info
        config = _resolve(config, info)
        shape = _shape(config, info, console)
        stem = teacher_stem(config.teacher)
        folder = RunFolder(places.out) if places.out else choose_folder(config, stem)
        folder.check(config)
        corpus = read_data(config, teacher, console)
        recipe = recipe_for(config.targets, teacher, console)
        store = open_store(teacher, corpus, recipe, StorePlace(places.store, folder.path.parent, stem))
        with exclusive(folder.path):
            folder.claim(
                config,
                {
                    "teacher_name": info.name,
                    "teacher_sha256": info.sha256,
                    "soft_targets": store.manifest.key,
                },
            )
            if folder.finished:
                console.note(f"{folder.path} already holds this run, finished; nothing was done again")
            else:
                prepared = _prepare(config, shape, teacher, corpus, store, console)
                # The teacher is out of memory while the student trains.
                teacher.close()
                _finish(prepared, path, folder, console)
        print_table(folder, console)
    return folder


def _prepare(
    config: RunConfig,
    shape: SO8TConfig,
    teacher: Teacher,
    corpus: Corpus,
    store: SoftTargetStore,
    console: Console,
) -> Prepared:
    """Everything that needs the teacher before training."""
    with exclusive(store.folder):
        reused = fill_store(teacher, corpus, store, console)
    data = TrainingData(store, split(store, config.data.held_out, config.seed), config.seed)
    sequences = [store.tokens(int(index)) for index in data.split.held_out]
    held_out = HeldOut(sequences, tokenized_lines(teacher, sequences))
    tokenizer = tokenizer_entries(read_gguf(gguf_file_of(config.teacher)))
    return Prepared(config, shape, teacher.info, store, reused, data, held_out, tokenizer)


def _finish(prepared: Prepared, path: Path, folder: RunFolder, console: Console) -> None:
    """Train, export, prove, evaluate, write down."""
    config, info, held_out = prepared.config, prepared.info, prepared.held_out
    folder.write_held_out(held_out)
    student = _new_student(prepared.shape, config.seed, path)
    summary = _train(prepared, student, folder, console)
    name = f"{info.name} distilled {config.student.size} SO8T"
    save_student(student, folder, prepared.tokenizer, name)
    with console.stage("Export and prove") as stage:
        names = ExportNames(name, {"teacher_name": info.name, "teacher_sha256": info.sha256})
        quant = config.export.quant
        proof = export_proved(student, folder.gguf, quant, prepared.tokenizer, names, held_out)
        stage.finish(_describe_proof(proof, folder.gguf))
    evaluation, speeds = _evaluate(prepared, path, folder, student, console)
    outcome = Outcome(
        config, info, student, prepared.store, prepared.reused, summary, proof, evaluation, speeds
    )
    size = folder.gguf.stat().st_size
    folder.write_results(build_results(outcome, size, console.seconds, _environment()))


def _resolve(config: RunConfig, info: TeacherInfo) -> RunConfig:
    """Fill in what depends on the teacher: the student's default size."""
    size = parse_size(config.student.size) if config.student.size else default_size(info.width, info.layers)
    return config.model_copy(update={"student": config.student.model_copy(update={"size": str(size)})})


def _shape(config: RunConfig, info: TeacherInfo, console: Console) -> SO8TConfig:
    """The student's shape; its size is judged before anything of that size is allocated."""
    assert config.student.size is not None
    shape = student_config(
        parse_size(config.student.size),
        vocab_size=info.vocab_size,
        context_length=info.context_length,
        tie_embeddings=config.student.tie_embeddings,
        bos=info.bos,
        eos=info.eos,
    )
    parameters = count_parameters(shape)
    console.note(f"student {config.student.size}: {human_count(parameters)} parameters")
    needed, memory = 4 * parameters * TRAINING_COPIES, psutil.virtual_memory().total
    if needed > memory:
        raise UserError(
            f"student {config.student.size} has {human_count(parameters)} parameters; training it needs at least "
            f"{human_bytes(needed)} of memory, this machine has {human_bytes(memory)}; choose a smaller size"
        )
    if parameters >= info.parameters:
        console.warn(
            f"student {config.student.size} has {human_count(parameters)} parameters, not fewer than the "
            f"teacher's {human_count(info.parameters)}; choose a smaller --student-size to compress"
        )
    return shape


def _new_student(shape: SO8TConfig, seed: int, teacher: Path) -> SO8TForCausalLM:
    """The student as training begins: random weights from the seed, embeddings from the teacher."""
    student = build_student(shape, seed)
    initialise_embeddings(student, read_gguf(teacher).tensor("token_embd.weight"))
    return student


def _train(
    prepared: Prepared, student: SO8TForCausalLM, folder: RunFolder, console: Console
) -> TrainingSummary:
    settings = prepared.config.train
    steps = len(prepared.data.batches(settings.epochs, settings.batch_size))
    with console.stage("Train", total=steps) as stage:
        objective = Objective(prepared.config.loss)
        summary = train(student, prepared.data, objective, settings, folder.path, stage.update)
        first, last = summary.scores[0][1], summary.scores[-1][1]
        learnt = human_count(summary.tokens_seen)
        stage.finish(f"{steps} steps, {learnt} tokens; held-out KL {first.kl:.3f} → {last.kl:.3f}")
    if summary.continued_from:
        console.note(f"training was continued from step {summary.continued_from}")
    return summary


def _describe_proof(proof: Proof, path: Path) -> str:
    return (
        f"{proof.quant}, {human_bytes(path.stat().st_size)}; KL {proof.mean_kl:.1e} from PyTorch over "
        f"{proof.positions} positions"
    )


def _evaluate(
    prepared: Prepared, path: Path, folder: RunFolder, student: SO8TForCausalLM, console: Console
) -> tuple[Evaluation, dict[str, tuple[float, float]]]:
    """Score untrained student, trained student and exported file against the teacher; time both files."""
    config, sequences = prepared.config, prepared.held_out.sequences
    with (
        console.stage("Evaluate", total=len(sequences)) as stage,
        open_teacher(config.teacher) as teacher,
        GGUFTeacher(folder.gguf, gpu_layers=config.teacher.gpu_layers) as exported,
    ):
        models = {
            "before": student_scorer(_new_student(prepared.shape, config.seed, path)),
            "after": student_scorer(student),
            "exported": llama_scorer(exported),
        }
        evaluation = evaluate(teacher, sequences, models, stage.update)
        speeds = {"teacher": _speed(teacher), "student": _speed(exported)}
        score = evaluation.models["exported"]
        stage.finish(
            f"KL {score.kl:.3f}, agreement {score.agreement:.1%} over {evaluation.positions} positions"
        )
    return evaluation, speeds


def _speed(model: Teacher) -> tuple[float, float]:
    """Prompt and generation speed in tokens per second, within the model's context."""
    prompt = min(SPEED_PROMPT_TOKENS, model.info.context_length // 2)
    return model.speed(prompt, min(SPEED_NEW_TOKENS, model.info.context_length - prompt - 1))


def _environment() -> dict[str, Any]:
    packages = ("so8t-distill", "torch", "transformers", "llama-cpp-python", "gguf", "accelerate", "numpy")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "packages": {name: version(name) for name in packages},
    }
