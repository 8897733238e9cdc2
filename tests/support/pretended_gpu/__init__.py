"""A GPU that is none: its tensors say that they are on ``DEVICE``; their values lie in main memory.

Over 400 lines because what runs, refuses and counts an operation is one function's work.

PyTorch's Python backend for ``PrivateUse1``. Like CUDA it refuses to mix tensors of both devices.
Within ``watch`` it counts what CUDA makes the processor wait for (synchronizations), what crosses
the bus, and what is launched, by the line of this project that asked for it. A copy between the
device and memory that is not pinned is waited for, ``non_blocking`` or not. What is copied to
pinned memory without waiting is there only after the next synchronization, as on a real device.
Nothing here says anything about time.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, ClassVar, TypeVar
from unittest.mock import patch
from weakref import WeakValueDictionary

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.optim import optimizer
from torch.utils import _foreach_utils
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

Module = TypeVar("Module", bound=nn.Module)
NAME = "pretended"
MEMORY = 12 << 30  # bytes that it pretends to have
ROOT = Path(__file__).parents[3]
PRODUCT = tuple(f"{ROOT / part}/" for part in ("distill", "stability", "students", "teachers"))


class Event:
    """A mark in the device's work, as ``torch.cuda.Event`` is."""

    def record(self) -> None:
        """Everything is done at once here but for copies, which the wait completes."""

    def synchronize(self) -> None:
        _waited("Event.synchronize")


class _Module:
    """What PyTorch asks of a device's module (``torch.pretended``)."""

    Event = Event
    is_available = is_initialized = staticmethod(lambda: True)
    is_in_bad_fork = _is_in_bad_fork = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    manual_seed_all = staticmethod(lambda seed: None)
    get_device_properties = staticmethod(lambda device: SimpleNamespace(total_memory=MEMORY))
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])
    synchronize = staticmethod(lambda device=None: _waited("synchronize"))
    empty_cache = staticmethod(lambda: None)
    memory_allocated = staticmethod(lambda: _watched[-1].bytes_alive)
    max_memory_allocated = staticmethod(lambda: _watched[-1].peak)

    @staticmethod
    def reset_peak_memory_stats() -> None:
        _watched[-1].peak = _watched[-1].bytes_alive


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module)
DEVICE = torch.device(f"{NAME}:0")
aten = torch.ops.aten

# How often CUDA's kernel waits by itself: for a number, for the size of a result, for an error
# code. A matrix exponential looks for the matrices of five ranges of norms.
WAITS = Counter(
    {
        aten._local_scalar_dense: 1,
        aten.equal: 1,
        aten.nonzero: 1,
        aten.masked_select: 1,
        aten._unique2: 1,
        aten.unique_consecutive: 1,
        aten.bincount: 1,
        aten._linalg_eigh: 1,
        aten._linalg_svd: 1,
        aten.linalg_matrix_exp: 5,
    }
)
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
LISTS = (list, tuple)
COPIES = (aten._to_copy, aten.copy_, aten._foreach_copy_)
NO_KERNEL = (aten.empty, aten.empty_strided, aten.empty_like, aten._local_scalar_dense, aten.copy_)


@dataclass
class Watched:
    """``syncs``: by operation and "file:line"; ``bytes`` over the bus and ``launches`` by the line;
    ``bytes_alive`` of the tensors made within, and their ``peak``."""

    syncs: Counter[tuple[str, str]] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    bytes_alive: int = 0
    peak: int = 0


_watched: list[Watched] = []
_pinned: dict[int, Any] = {}  # storages, which are kept so that no other takes their place
_under_way: list[tuple[Tensor, Tensor]] = []  # copies to main memory that nobody waited for yet


class _Storage:
    """One storage on the device, for as long as a tensor has it."""

    known: ClassVar[WeakValueDictionary[int, _Storage]] = WeakValueDictionary()

    def __init__(self, size: int) -> None:
        self.size, self.watched = size, list(_watched)
        for one in self.watched:
            one.bytes_alive += size
            one.peak = max(one.peak, one.bytes_alive)

    def __del__(self) -> None:
        for one in self.watched:
            one.bytes_alive -= self.size

    @classmethod
    def of(cls, tensor: Tensor) -> _Storage:
        storage = tensor.untyped_storage()
        one = cls.known.get(storage._cdata)
        if one is None:
            one = cls.known[storage._cdata] = cls(storage.nbytes())
        return one


class _OnGPU(torch.Tensor):
    """A tensor on the device; ``held`` has its values."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> _OnGPU:
        made: _OnGPU = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        made.storage_kept = _Storage.of(held)  # type: ignore[attr-defined]
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"on {DEVICE}: {self.held!r}"

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def new_tensor(  # type: ignore[override]
        self, data: Any, dtype: Any = None, **others: Any
    ) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=DEVICE, **others)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        made: Tensor = _OnGPU(self.held.clone())
        if isinstance(self, nn.Parameter):
            made = nn.Parameter(made, self.requires_grad)
        memo[id(self)] = made
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(operation, *args, **(kwargs or {}))


def _run(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operation that takes or makes a tensor on the device."""
    tensors = [one for given in (*args, *kwargs.values()) for one in _tensors(given)]
    there = [one for one in tensors if isinstance(one, _OnGPU)]
    _refuse_mixed(operation, tensors, there, kwargs.get("generator"))
    device = kwargs.get("device")
    result_there = bool(there) if device is None else torch.device(device).type == NAME
    options = {name: _each(_held, one) for name, one in kwargs.items()}
    if device is not None and result_there:
        options["device"] = "cpu"
    result = operation(*(_each(_held, one) for one in args), **options)
    known = {id(_held(one)): one for one in tensors}

    def wrapped(one: Tensor) -> Tensor:
        if id(one) not in known:
            return _OnGPU(one) if result_there else one
        if known[id(one)].shape != one.shape:
            raise TypeError(f"{operation} changes the shape of a tensor in place")
        return known[id(one)]

    result = _each(wrapped, result)
    if _watched:
        _record(operation, args, kwargs, result)
    return result


def _tensors(given: Any) -> list[Tensor]:
    """The tensors of one argument of an operation."""
    if isinstance(given, Tensor):
        return [given]
    return [one for one in given if isinstance(one, Tensor)] if type(given) in LISTS else []


def _each(change: Callable[[Tensor], Tensor], given: Any) -> Any:
    """An argument or a result with every tensor changed."""
    if isinstance(given, Tensor):
        return change(given)
    if type(given) in LISTS:
        return type(given)(_each(change, one) for one in given)
    return given


def _held(one: Tensor) -> Tensor:
    return one.held if isinstance(one, _OnGPU) else one


@cache
def _launches(operation: Any) -> bool:
    """Whether it has a kernel of its own: a view has none."""
    returned = operation._schema.returns
    alias = returned[0].alias_info if returned else None
    return operation.overloadpacket not in NO_KERNEL and (alias is None or alias.is_write)


@cache
def _takes_numbers(operation: Any) -> bool:
    """Whether numbers in main memory are arguments of it like any other."""
    name = operation.overloadpacket.__name__
    pointwise = torch.Tag.pointwise in operation.tags
    return pointwise or name.startswith(("_foreach", "fill", "mask"))


def _refuse_mixed(
    operation: Any, tensors: list[Tensor], there: list[_OnGPU], generator: Any
) -> None:
    """What CUDA refuses; it takes indices in main memory, and numbers where they are only read."""
    packet = operation.overloadpacket
    if generator is not None and generator.device.type == "cpu" and packet not in COPIES:
        raise RuntimeError(f"{operation}: expected a {DEVICE} generator, not one for cpu")
    if not there or len(there) == len(tensors) or packet in (*COPIES, *INDEXING):
        return
    strays = [one for one in tensors if not isinstance(one, _OnGPU)]
    if not _takes_numbers(operation) or any(one.dim() for one in strays):
        shapes = ", ".join(str(list(one.shape)) for one in strays)
        raise RuntimeError(
            f"{operation}: expected all tensors to be on the same device, but found {DEVICE} and "
            f"cpu ({shapes}) at {_place()}"
        )


def _record(operation: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Count an operation in everything that watches."""
    packet = operation.overloadpacket
    if packet in COPIES:
        _record_copies(packet, args, kwargs, result)
    if waits := _waits(packet, args, kwargs):
        _waited(packet.__name__, waits)
    if _launches(operation):
        place = _place()
        for one in _watched:
            one.launches[place] += 1


def _waits(packet: Any, args: Any, kwargs: Any) -> int:
    if packet is aten.repeat_interleave:
        return int(kwargs.get("output_size") is None)
    if packet not in INDEXING:
        return WAITS[packet]
    indices = [one for one in args[1] if one is not None]
    masks = [one for one in indices if one.dtype in (torch.bool, torch.uint8)]
    filled = packet is not aten.index and args[2].numel() == 1 and len(indices) == len(masks) == 1
    for one in indices:
        if not isinstance(one, _OnGPU):
            _crossed(one, waited=True, how="index in main memory")
    return 0 if filled else len(masks)


def _record_copies(packet: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Count what crosses the bus, and hold back what nobody waits for."""
    if packet is aten._to_copy:
        pairs, blocking = [(result, args[0])], not kwargs.get("non_blocking")
        if not blocking and not isinstance(result, _OnGPU):
            _pinned[_key(result)] = result.untyped_storage()  # as CUDA allocates it
    else:
        lists = packet is aten._foreach_copy_
        pairs = list(zip(*args[:2], strict=True)) if lists else [(args[0], args[1])]
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
    for target, source in pairs:
        if isinstance(target, _OnGPU) == isinstance(source, _OnGPU):
            continue
        host = source if isinstance(target, _OnGPU) else target
        waited = blocking or _key(host) not in _pinned or not host.is_contiguous()
        how = "to the GPU" if isinstance(target, _OnGPU) else "to main memory"
        _crossed(source, waited=waited, how=f"copy {how}")
        if not waited and host is target:
            _under_way.append((target, target.clone()))
            target.fill_(-1)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _crossed(tensor: Tensor, *, waited: bool, how: str) -> None:
    for one in _watched:
        one.bytes[_place()] += tensor.numel() * tensor.element_size()
    if waited:
        _waited(how)


def _waited(how: str, times: int = 1) -> None:
    """The device has done all its work."""
    for target, values in _under_way:
        target.copy_(values)
    _under_way.clear()
    for one in _watched:
        one.syncs[how, _place()] += times


def _place() -> str:
    """The innermost line of the product on the stack, else of its tests, else of the backward pass
    (which runs in a thread of PyTorch's)."""
    frame: FrameType | None = sys._getframe(1)
    of_tests = ""
    while frame is not None:
        path = frame.f_code.co_filename
        if path != __file__ and path.startswith(str(ROOT)):
            place = f"{path[len(str(ROOT)) + 1 :]}:{frame.f_lineno}"
            if path.startswith(PRODUCT):
                return place
            of_tests = of_tests or place
        frame = frame.f_back
    return of_tests or "backward"


# Lists of its tensors are operated on together, as CUDA's are.
for _types in (_foreach_utils._foreach_supported_types, optimizer._foreach_supported_types):
    _types.append(_OnGPU)
_backend = torch.library.Library("_", "IMPL")
_backend.fallback(_run, "PrivateUse1")
# A fallback does not do for these: ``torch.tensor`` keeps Python's dispatch out, and others are
# made of an empty tensor that grows.
_direct = torch.library.Library("aten", "IMPL")
for _operation in (
    aten.copy_.default,
    aten.empty_strided.default,
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.eye.default,
    aten.eye.m,
):
    _direct.impl(_operation, partial(_run, _operation), "PrivateUse1")


def _pin_memory(tensor: Tensor, device: Any = None) -> Tensor:
    pinned = tensor.clone()
    _pinned[_key(pinned)] = pinned.untyped_storage()
    return pinned


@contextmanager
def watch() -> Iterator[Watched]:
    """Count what happens within; memory can be pinned, modules can be moved as they are."""
    watched = Watched()
    _watched.append(watched)
    swap = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # ties of weights stay
    try:
        with (
            patch.object(torch.Tensor, "pin_memory", _pin_memory),
            patch.object(torch.Tensor, "is_pinned", lambda one: _key(one) in _pinned),
        ):
            yield watched
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swap)
        _watched.remove(watched)
        if not _watched:
            _waited("end")
            _pinned.clear()


@contextmanager
def training_on_gpu() -> Iterator[Watched]:
    """``watch``, in a launch whose device is this one."""
    launch = PartialState()
    before = launch.device
    launch.device = DEVICE
    try:
        with watch() as watched:
            yield watched
    finally:
        launch.device = before


def on_gpu(tensor: Tensor) -> Tensor:
    """A copy on the device."""
    return _OnGPU(tensor.detach().clone())


def to_gpu(module: Module) -> Module:
    """Move a module to the device, in place; what is tied stays tied."""
    moved: dict[int, Tensor] = {}
    for one in module.modules():
        for name, weight in one._parameters.items():
            if weight is not None and not isinstance(weight, _OnGPU):
                if id(weight) not in moved:
                    copy = on_gpu(weight)
                    moved[id(weight)] = nn.Parameter(copy, weight.requires_grad)
                one._parameters[name] = moved[id(weight)]  # type: ignore[assignment]
        for name, buffer in one._buffers.items():
            if buffer is not None and not isinstance(buffer, _OnGPU):
                one._buffers[name] = moved.setdefault(id(buffer), on_gpu(buffer))
    return module
