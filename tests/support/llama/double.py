"""A double for the llama_cpp package: the real one, but for what a test wants to go wrong in it.

A worker's process gets the parent's ``sys.path``, so a folder in front of it that holds this double
takes the real package's place there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from teachers import example_teacher
from teachers.llama_cpp import worker
from teachers.llama_cpp.library import build as llama_library

_SOURCE = """
import ctypes, json, os, pathlib, time
fault = json.loads(pathlib.Path(__file__).with_name("fault.json").read_text())
if fault["import_error"]:
    raise RuntimeError(fault["import_error"])
real = pathlib.Path(fault["real"])
__path__ = [str(real)]
import numpy as np
import llama_cpp.llama_cpp as native
from llama_cpp.llama_cpp import *
no_devices = ctypes.c_void_p()
extra_buffers, gpu, alone, example, decodes, vocab = True, False, False, False, 0, 0
load, decode = native.llama_model_load_from_file, native.llama_decode
get_logits = native.llama_get_logits

def applies():
    if fault["where"] == "other files":
        return not example
    if fault["where"] == "driver":
        return not alone
    return fault["where"] == "always" or (gpu if fault["where"] == "gpu" else extra_buffers)

def note(**what):
    with open(fault["notes"], "a") as file:
        file.write(json.dumps(what) + "\\n")

def llama_model_load_from_file(path, parameters):
    global extra_buffers, gpu, alone, vocab, example
    alone = not ctypes.c_void_p.from_address(parameters.devices).value  # an empty list of devices
    parameters.devices = ctypes.addressof(no_devices)  # those of the pretended library are none
    extra_buffers, gpu = bool(parameters.use_extra_bufts), parameters.n_gpu_layers != 0
    note(process=os.getpid(), extra_buffers=extra_buffers, gpu_layers=parameters.n_gpu_layers,
         alone=alone, load_mode=parameters.load_mode)
    if fault["warning"]:
        os.write(2, fault["warning"].encode() + b"\\n")
    example = path == fault["example"].encode()
    if applies() and fault["die_at"] == 0:
        die()
    if applies() and fault["refuse"] and fault["die_at"] == -2:
        return None
    model = load(path, parameters)
    if model:
        vocab = native.llama_vocab_n_tokens(native.llama_model_get_vocab(model))
    return model

def die():
    mark = pathlib.Path(fault["mark"])
    if fault["times"] and mark.exists() and len(mark.read_text()) >= fault["times"]:
        return
    with mark.open("a") as file:
        file.write("x")
    if not fault["signal"]:
        time.sleep(60)
    os.write(2, b"ggml.c:1: GGML_ASSERT(double) failed\\n")
    os.kill(os.getpid(), fault["signal"])

def llama_decode(context, batch):
    global decodes, size
    decodes, size = decodes + 1, batch.n_tokens
    if applies() and decodes == fault["die_at"]:
        die()
    return decode(context, batch)

def llama_get_logits(context):
    logits = get_logits(context)
    if applies() and fault["logits"]:
        rows = np.ctypeslib.as_array(logits, shape=(size, vocab))
        rows[:] = np.nan if fault["logits"] == "nan" else np.roll(rows, 1, axis=1)
    return logits

make_context = native.llama_init_from_model

def llama_init_from_model(model, parameters):
    note(op_offload=bool(parameters.op_offload), offload_kqv=bool(parameters.offload_kqv))
    return None if applies() and fault["refuse"] else make_context(model, parameters)

native.llama_init_from_model = llama_init_from_model
native.llama_model_load_from_file = llama_model_load_from_file
native.llama_decode, native.llama_get_logits = llama_decode, llama_get_logits
if fault["where"] == "gpu":
    import teachers.llama_cpp.library.ggml as ggml
    ggml.gpu_devices = lambda: [(1, "Pretended")]
    ggml.device_memory = lambda device: (1 << 40, 1 << 40)
"""


@dataclass(frozen=True)
class Fault:
    """What goes wrong.

    ``die_at``: the decode of a process at which it dies of ``signal`` (0: is busy for a minute); 0
    is loading, -1 never. Only ``times`` times over all processes (0: always). ``logits``: "nan", or
    "wrong" for those of other tokens. ``refuse``: no context is made, with ``die_at`` -2 no model.
    ``where``: "extra buffers", "gpu", "driver" (wherever a GPU is not shut out), "other files" than
    the example teacher's, or "always". ``warning``: what loading a file writes to the log.
    ``import_error``: the package does not load at all.
    """

    die_at: int = -1
    signal: int = 11
    times: int = 0
    logits: str = ""
    refuse: bool = False
    warning: str = ""
    where: str = "extra buffers"
    import_error: str = ""


@contextmanager
def llama_cpp_with(fault: Fault, folder: Path) -> Iterator[Path]:
    """Meanwhile new workers run a llama.cpp with ``fault``; gives the file with a sign per death.

    Beside it ``notes`` has a JSON line for each model and context made: with which parameters.
    """
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None and spec.origin is not None
    real, package = Path(spec.origin).parent, folder / "llama_cpp"
    package.mkdir(parents=True)
    mark = folder / "deaths"
    (package / "__init__.py").write_text(_SOURCE, encoding="utf-8")
    content = asdict(fault) | {
        "real": str(real),
        "mark": str(mark),
        "notes": str(folder / "notes"),
        "example": str(example_teacher()),
    }
    (package / "fault.json").write_text(json.dumps(content), encoding="utf-8")
    (package / "lib").symlink_to(real / "lib")
    with pytest.MonkeyPatch.context() as changed:
        changed.delitem(
            sys.modules, "llama_cpp", raising=False
        )  # where tools have imported it here
        changed.syspath_prepend(str(folder))
        search = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
        changed.setenv("PYTHONPATH", search)  # of commands that a test starts
        changed.setattr(worker, "already_logged", set())
        changed.setattr(worker, "without_extra_buffers", {})
        llama_library.fingerprint.cache_clear()
        yield mark
    llama_library.fingerprint.cache_clear()
