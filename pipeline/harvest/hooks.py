"""Hook points: places in a language model where activations are read and replaced.

A hook point is the input or output of a module. ``resid_post`` of a layer, the residual stream after it, is
the output of its block. One forward pass serves any number of hook points, and ends after the last of them.
"""

import re
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeVar, cast

from torch import Tensor
from torch.nn import Module, ModuleList

_AFTER = re.compile(r"blocks\.(\d{1,5})\.hook_resid_post|(?:\w+\.)*(?:layers|layer|h)\.(\d{1,5})")
_BEFORE = re.compile(r"blocks\.(\d{1,5})\.hook_resid_pre")

Side = Literal["input", "output"]
"""Which side of a module is read."""

Point = TypeVar("Point", bound=Hashable)
"""What a caller knows a hook point by: today the layer."""


def layer_of(hook_name: str) -> int | None:
    """The layer whose output a hook sees, i.e. the residual stream after the block; None for other hooks.

    Args:
        hook_name: as TransformerLens names it, or the name of a block's module in transformers.

    >>> layer_of("blocks.12.hook_resid_post"), layer_of("blocks.12.hook_resid_pre")
    (12, 11)
    >>> layer_of("model.layers.3"), layer_of("blocks.12.hook_mlp_out"), layer_of("blocks.0.hook_resid_pre")
    (3, None, None)
    """
    if after := _AFTER.fullmatch(hook_name):
        return int(after[1] or after[2])
    before = _BEFORE.fullmatch(hook_name)
    return int(before[1]) - 1 if before and int(before[1]) else None


def find_blocks(text_model: Module, n_layers: int) -> ModuleList | None:
    """The list of a model's blocks, one per layer; None if there is no list of that length."""
    modules = cast("Iterable[tuple[str, Module]]", text_model.named_modules())
    lists = {
        name: module for name, module in modules if isinstance(module, ModuleList) and len(module) == n_layers
    }
    # The shallowest: a block may hold a list of the same length, such as one of experts.
    return lists[min(lists, key=lambda name: name.count("."))] if lists else None


def capture(
    places: Mapping[Point, tuple[Module, Side]], forward: Callable[[], object]
) -> dict[Point, Tensor]:
    """Run a forward pass and return the inputs or outputs of some modules.

    Args:
        places: by the name of each hook point, its module and which side of it is read.
        forward: runs the model; it ends once every hook point is captured.

    Returns:
        Activations by hook point, in the order in which they were computed. A hook point whose module did not
        run is absent. Of a module that returns a tuple, the first entry; of inputs, the first.
    """
    captured: dict[Point, Tensor] = {}

    def keep(point: Point, value: Any) -> None:
        captured[point] = value[0] if isinstance(value, tuple) else value
        if len(captured) == len(places):
            raise _PassComplete

    hooks = [_hook(module, side, partial(keep, point)) for point, (module, side) in places.items()]
    try:
        forward()
    except _PassComplete:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return captured


def _hook(module: Module, side: Side, keep: Callable[[Any], None]) -> Any:
    if side == "output":
        return module.register_forward_hook(lambda _module, _arguments, output: keep(output))

    def before(_module: Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        keep(next(iter(arguments or named.values())))

    return module.register_forward_pre_hook(before, with_kwargs=True)


@contextmanager
def replaced(module: Module, replace: Callable[[Tensor], Tensor]) -> Generator[None]:
    """Replace a module's output, or the first entry of the tuple that it returns, while the context lasts.

    Args:
        module: whose output is replaced.
        replace: takes the output, returns the replacement: the same shape, any float dtype.
    """

    def splice(_module: Module, _arguments: Any, output: Any) -> Any:
        rest = cast("tuple[Any, ...]", output)[1:] if isinstance(output, tuple) else None
        original = cast(Tensor, output if rest is None else output[0])
        replacement = replace(original).to(original.dtype)
        return replacement if rest is None else (replacement, *rest)

    hook = module.register_forward_hook(splice)
    try:
        yield
    finally:
        hook.remove()


class _PassComplete(Exception):
    """Ends a forward pass once all that was wanted is captured."""
