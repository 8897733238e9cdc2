"""``distill capture`` by several workers, which datatrove starts: here, through Slurm or on Ray.

A worker is the same command as a user's own, in a process of its own, on the one store: it takes
shards until none is left. What starts, queues and restarts workers is datatrove's.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from distill.config.schema import RunConfig
from distill.errors import UserError, WorkersFailed
from distill.pipeline.status import status_of
from distill.runtime import interrupts
from distill.runtime.progress import Console
from teachers.launch import own_cores
from teachers.store.manifest import TASKS

EXECUTORS = {
    "local": ("datatrove.executor.local", "LocalPipelineExecutor"),
    "slurm": ("datatrove.executor.slurm", "SlurmPipelineExecutor"),
    "ray": ("datatrove.executor.ray", "RayPipelineExecutor"),
}
ENGINE = "engine"  # the folder of datatrove's own files and the workers' logs, among the tasks
# Options that we set.
OWN = {"pipeline", "tasks", "workers", "logging_dir", "skip_completed", "depends"}
WATCH_SECONDS = 1.0
WORDS = 500  # characters of a worker's last words


class CaptureWorker:
    """One worker, as datatrove calls it: ``(data, rank, world_size)``.

    ``shared``: the workers share this machine's cores and GPUs. A worker that fails raises, unless
    they do: then datatrove would end the others with it.
    """

    def __init__(self, settings: Path, store: Path, shared: bool) -> None:
        self.settings, self.store, self.shared = str(settings), str(store), shared
        self.folder, self.starter = str(Path.cwd()), interrupts.starter()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Taken over by a process of datatrove's pool, which would write to our terminal."""
        self.__dict__.update(state)
        if self.shared:
            _hush()

    def __repr__(self) -> str:
        return f"distill capture --store {self.store}"

    def __call__(self, data: object, rank: int = 0, world_size: int = 1) -> None:
        """Capture until the store is full.

        Raises:
            WorkersFailed: it ended otherwise; with its last words.
        """
        command = [sys.executable, "-m", "distill", "capture", "--config", self.settings]
        environment = dict(os.environ)
        if self.shared:
            environment |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size)}
            environment[interrupts.STARTED_BY] = self.starter
            environment.setdefault("OMP_NUM_THREADS", str(max(1, own_cores() // world_size)))
        log = Path(self.settings).with_name(f"worker-{rank:05d}.log")
        with log.open("wb") as output:
            ended = subprocess.run(
                [*command, "--store", self.store],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        log.with_suffix(".code").write_text(str(ended.returncode))
        if ended.returncode and not self.shared:
            raise WorkersFailed(f"worker {rank}: {_last_words(log, ended.returncode)}")


def require_executor(name: str, store: Path | None, workers: int) -> None:
    """See that an executor can be used, before anything is read.

    Raises:
        UserError: there is no such executor, or what it needs is not here.
    """
    if name not in EXECUTORS:
        raise UserError(f"--executor {name}: there are {', '.join(EXECUTORS)}")
    if store is None:
        raise UserError("--executor needs --store FOLDER, which all workers see")
    if workers < 1:
        raise UserError(f"--workers {workers}: give at least 1")
    for package, needed in (("datatrove", True), ("ray", name == "ray")):
        if needed and find_spec(package) is None:
            raise UserError(
                f"--executor {name} needs {package}, which is not installed: pip install "
                f"'so8t-distill[workers]'{' ray' * (package == 'ray')}; or start `distill capture` "
                "several times yourself, on the same --store"
            )
    if name == "slurm" and shutil.which("sbatch") is None:
        raise UserError("--executor slurm: there is no sbatch here; start it where jobs are sent")


def capture_with(
    name: str,
    workers: int,
    options: Sequence[str],
    config: RunConfig,
    store: Path,
    console: Console,
) -> None:
    """Have ``workers`` processes fill a store; those of this machine are waited for.

    ``options``: of datatrove's executor, as ``NAME=VALUE``.

    Raises:
        UserError: see ``require_executor``; an option that the executor does not have; or what the
            workers say of the input. WorkersFailed: they ended and the store is not full.
    """
    require_executor(name, store, workers)
    module, kind = EXECUTORS[name]
    made = getattr(importlib.import_module(module), kind)
    given = _given(options, made, name)
    folder = (store / TASKS / ENGINE).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("worker-*"):
        old.unlink()
    settings = folder / "settings.json"
    settings.write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    if name == "slurm" and (activate := Path(sys.prefix) / "bin" / "activate").exists():
        given.setdefault("env_command", f"source {activate}")
    if name == "local":
        _hush()
    elif name == "ray":
        _hush("ERROR")  # it only warns of what went wrong, and _require_full says that
    engine = made(
        pipeline=[CaptureWorker(settings, store.absolute(), name == "local")],
        tasks=workers,
        workers=workers,
        logging_dir=str(folder),
        skip_completed=False,  # a worker with nothing left to do ends at once
        **given,
    )
    if name == "slurm":
        engine.run()
        console.note(f"workers queued: {workers}; see `distill status {store}`")
        return
    with console.stage("Capture") as stage, _watching(store, stage):
        engine.run()
        stage.finish(f"{workers} workers, soft targets in {store}")
    _require_full(store, folder)


def _hush(level: str = "") -> None:
    """Keep datatrove's log off the terminal, but for ``level`` and above: workers have logs of
    their own, and its errors are raised."""
    from loguru import logger

    if level:
        logger.configure(handlers=[{"sink": sys.stderr, "level": level}])
    else:
        logger.disable("datatrove")


@contextmanager
def _watching(store: Path, stage: Any) -> Iterator[None]:
    """Within, a thread shows how many shards are done."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(WATCH_SECONDS):
            status = status_of(store)
            stage.total = status.shards or None
            note = f"{len(status.workers)} at work, {status.tokens_per_second:,.0f} tokens/s"
            stage.update(status.done, note)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _given(options: Sequence[str], executor: Any, name: str) -> dict[str, Any]:
    """Options as arguments of an executor; numbers, lists and objects in JSON.

    Raises:
        UserError: it has no such option, or needs another.
    """
    known = inspect.signature(executor).parameters
    there = [option for option in known if option not in OWN]
    given: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or key not in there:
            raise UserError(f"--engine {option}: {name} has {', '.join(there)}, as NAME=VALUE")
        try:
            given[key] = json.loads(value)
        except ValueError:
            given[key] = value
    for key in there:
        if known[key].default is inspect.Parameter.empty and key not in given:
            raise UserError(f"--executor {name} needs --engine {key}=VALUE")
    return given


def _require_full(store: Path, folder: Path) -> None:
    """See that the workers have filled the store."""
    status = status_of(store)
    codes = {log: _code(log) for log in folder.glob("worker-*.log")}
    failed = {log: code for log, code in sorted(codes.items()) if code}
    if status.shards and status.done == status.shards and not all(codes.values()):
        return
    log, code = next(iter(failed.items()), (folder, 0))
    words = _last_words(log, code) if failed else "no worker said why"
    message = f"{len(failed)} of {len(codes)} workers failed: {words} (logs in {folder})"
    if failed and set(failed.values()) == {2}:
        raise UserError(message)
    raise WorkersFailed(f"{message}; run the same command again, nothing saved is lost")


def _code(log: Path) -> int:
    """How a worker ended; -9 where not even who waited for it has lived to write it down."""
    code = log.with_suffix(".code")
    return int(code.read_text()) if code.exists() else -9


def _last_words(log: Path, code: int) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    words = lines[-1][-WORDS:] if lines else "it said nothing"
    return f"exit code {code}, {words}"
