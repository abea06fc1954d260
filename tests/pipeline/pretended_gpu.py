"""A GPU that is not there: tensors that say they are on ``cuda:0``, and are computed on the CPU.

What a real one refuses is refused: an operation on tensors of both places, numpy's look at one of its
tensors, a generator of the other place. So code for GPUs runs where there is none, and its numbers can be
compared. What this cannot show: streams, and what is ready when, as all is done at once; memory, speed, other
kernels' rounding.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Self, cast

import pytest
import torch
from torch.overrides import TorchFunctionMode

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
_MAY_MIX = {"copy_", "to", "__getitem__", "__setitem__", "_has_compatible_shallow_copy_type"}
"""What a GPU, too, takes of both places: copies, and indices that lie on the CPU."""
_MOVES = {"to", "cpu"}
_SAID: dict[Any, Any] = {torch.Tensor.device: GPU, torch.Tensor.is_cuda: True, torch.Tensor.is_cpu: False}
_torch = cast(Any, torch)
_GENERATOR = cast(Any, torch.Generator)


class _OnGpu(torch.Tensor):
    """A tensor that says it is on the GPU."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with _torch._C.DisableTorchFunctionSubclass():
            return _called(func, args, kwargs or {})


class _Factories(TorchFunctionMode):
    """What makes a tensor on the GPU, or brings one there, without having been given one of it."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        device, generator = _device_asked_for(func, args, kwargs), kwargs.get("generator")
        is_there = any(
            one is not None and one.type == "cuda" for one in (device, generator and generator.device)
        )
        if is_there or kwargs.get("pin_memory"):
            return _called(func, args, kwargs)
        return func(*args, **kwargs)


class _GeneratorThere(torch.Generator):
    """A generator that says it is where it was asked to be."""

    _there: torch.device

    def __new__(cls, device: Any = "cpu") -> Self:
        found = _GENERATOR.__new__(cls, "cpu")
        found._there = torch.device(device)
        return cast(Self, found)

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._there


class _Nothing:
    """A stream, or an event, where all is done at once."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, _: str) -> Callable[..., None]:
        return _do_nothing


def _do_nothing(*_: Any, **__: Any) -> None: ...


def _name(_: object) -> str:
    return "a pretended GPU"


def _memory(_: object) -> tuple[int, int]:
    return 2**34, 2**34


def _device_asked_for(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.device | None:
    """Where the result is to be; None where that follows from what is given."""
    device = kwargs.get("device")
    if func.__name__ == "cpu":
        device = CPU
    if func.__name__ == "to" and len(args) > 1:
        if isinstance(args[1], str | torch.device):
            device = args[1]
        elif isinstance(args[1], torch.Tensor):
            device = GPU if isinstance(args[1], _OnGpu) else CPU
    return None if device is None else torch.device(device)


def _called(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The result of ``func``, on the GPU where a real one would have it there."""
    name: str = func.__name__
    if name == "__get__" and func.__self__ in _SAID:
        return _SAID[func.__self__]
    if name == "record_stream":
        return None
    given = list(_tensors([args, kwargs]))
    ours = [tensor for tensor in given if isinstance(tensor, _OnGpu)]
    if name in ("numpy", "__array__") and ours:
        raise TypeError(f"{name}: a tensor on cuda:0 has no view of numpy's")
    if name == "__deepcopy__":
        copy = _on_gpu(args[0].detach().clone())
        return torch.nn.Parameter(copy) if isinstance(args[0], torch.nn.Parameter) else copy
    device = _device_asked_for(func, args, kwargs) or (GPU if ours else CPU)
    others = [tensor for tensor in given if not isinstance(tensor, _OnGpu) and tensor.ndim]
    if ours and others and name not in _MAY_MIX:
        raise RuntimeError(f"{name}: expected all tensors on one device, and some are on cuda:0, some on cpu")
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != device.type:
        raise RuntimeError(f"{name}: a generator on {generator.device} for a tensor on {device}")
    kwargs = {key: CPU if key == "device" else value for key, value in kwargs.items() if key != "pin_memory"}
    args = [CPU if n and isinstance(a, torch.device) else a for n, a in enumerate(args)]
    found = func(*args, **kwargs)
    if name in ("copy_", "__setitem__") or kwargs.get("out") is not None:
        return found
    is_ours = device.type == "cuda"
    if name in _MOVES and is_ours != bool(ours) and found.data_ptr() == args[0].data_ptr():
        found = found.clone()  # of one place to the other there is a copy, never a view
    return _mapped(found, _on_gpu if is_ours else _on_cpu)


def _on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if isinstance(tensor, _OnGpu) else tensor.as_subclass(_OnGpu)


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(torch.Tensor) if isinstance(tensor, _OnGpu) else tensor


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, dict | list | tuple):
        inner = cast("dict[Any, Any] | list[Any] | tuple[Any, ...]", values)
        for value in inner.values() if isinstance(inner, dict) else inner:
            yield from _tensors(value)


def _mapped(values: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(values, torch.Tensor):
        return change(values)
    if isinstance(values, list | tuple):  # and what torch returns in their stead
        several = cast("Sequence[Any]", values)
        return cast(Any, type(several))([_mapped(value, change) for value in several])
    return values


@contextmanager
def pretended_gpu() -> Generator[None]:
    """Within, there is one GPU."""
    conversion = torch.__future__
    before = conversion.get_overwrite_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch, _Factories():
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "mem_get_info", _memory)
        for name in ("set_device", "synchronize", "empty_cache"):
            patch.setattr(torch.cuda, name, partial(_do_nothing, name))  # torch wants each to be another
        patch.setattr(torch.cuda, "get_device_name", _name)
        patch.setattr(torch.cuda, "Stream", _Nothing)
        patch.setattr(torch.cuda, "Event", _Nothing)
        patch.setattr(torch.cuda, "current_stream", _Nothing)
        patch.setattr(torch.cuda, "stream", nullcontext)
        patch.setattr(torch, "Generator", _GeneratorThere)
        conversion.set_overwrite_module_params_on_conversion(True)  # else a module keeps the old tensors
        try:
            yield
        finally:
            conversion.set_overwrite_module_params_on_conversion(before)
