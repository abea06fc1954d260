"""The hook points of a block, each defined once per block layout, and read in one forward pass.

A block adds what its attention computes, then what its MLP computes, to the residual stream. Families differ
in where their norms stand and in the names of their modules; a ``Layout`` says for each hook point which
module's input or output it is. What a family lacks is refused from its configuration alone, before any weight
is loaded. docs/format.md says what each hook point means where norms stand behind the sublayers.
"""

import re
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, cast

from torch import Tensor, nn

from ..errors import ModelError

HOOKS = ("resid_pre", "resid_mid", "resid_post", "attn_z", "attn_out", "mlp_in", "mlp_out")
"""Residual stream before the block, after attention, after the block; input of attention's output projection,
heads side by side; what attention and the MLP add to the stream; the MLP module's input."""

TRANSFORMER_LENS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
}
"""What TransformerLens calls them; it has no name for ``mlp_in``, which is behind the norm and its gain."""


class Place(NamedTuple):
    """Where a hook point is read: the input or the output of a module."""

    module: str
    """Path below the block; empty for the block itself. With ``{layer}`` in it: path below the model."""

    side: Literal["input", "output"]


class Site(NamedTuple):
    """One hook point of one layer."""

    layer: int
    hook: str


Layout = Mapping[str, Place]


def _layout(
    attention: str, mlp: str, *, mid: Place | None, behind_attention: str = "", behind_mlp: str = ""
) -> Layout:
    """A layout of a block.

    Args:
        attention: attention's output projection.
        mlp: the MLP.
        mid: where the stream after attention is read; None where attention and MLP run side by side.
        behind_attention: the norm through which attention's output reaches the stream, if there is one.
        behind_mlp: likewise of the MLP.
    """
    places = {
        "resid_pre": Place("", "input"),
        "resid_mid": mid,
        "resid_post": Place("", "output"),
        "attn_z": Place(attention, "input"),
        "attn_out": Place(behind_attention or attention, "output"),
        "mlp_in": Place(mlp, "input"),
        "mlp_out": Place(behind_mlp or mlp, "output"),
    }
    return {hook: place for hook, place in places.items() if place}


_SERIAL = _layout("self_attn.o_proj", "mlp", mid=Place("post_attention_layernorm", "input"))
_SANDWICH = _layout(
    "self_attn.o_proj",
    "mlp",
    mid=Place("pre_feedforward_layernorm", "input"),
    behind_attention="post_attention_layernorm",
    behind_mlp="post_feedforward_layernorm",
)
_NORMS_BEHIND = _layout(
    "self_attn.o_proj",
    "mlp",
    mid=Place("mlp", "input"),
    behind_attention="post_attention_layernorm",
    behind_mlp="post_feedforward_layernorm",
)
_PARALLEL_NEOX = _layout("attention.dense", "mlp", mid=None)
# Norms of the stream itself: attn_out and mlp_out are what is added before each norm.
_POST_NORM = {
    **_layout("attention.output.dense", "intermediate", mid=Place("attention.output", "output")),
    "mlp_out": Place("output.dense", "output"),
}

LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "smollm3"), _SERIAL),
    **dict.fromkeys(("gemma2", "gemma3_text"), _SANDWICH),
    **dict.fromkeys(("olmo2", "olmo3"), _NORMS_BEHIND),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), _POST_NORM),
    "gpt2": _layout("attn.c_proj", "mlp", mid=Place("ln_2", "input")),
    "gpt_neox": _layout("attention.dense", "mlp", mid=Place("post_attention_layernorm", "input")),
    "phi": _layout("self_attn.dense", "mlp", mid=None),
}
"""The layout of a block by the configuration's ``model_type``."""


def layout_of(config: Any) -> Layout:
    """The layout of a model's blocks; of an unknown one only the residual stream around a block.

    Args:
        config: of the part of the model that takes token ids.
    """
    if config.model_type == "gpt_neox" and config.use_parallel_residual:
        return _PARALLEL_NEOX
    around = {"resid_pre": Place("", "input"), "resid_post": Place("", "output")}
    return LAYOUTS.get(config.model_type, around)


def place_of(config: Any, hook: str, model: str) -> Place:
    """Where a hook point is read in a model of this configuration.

    Args:
        config: of the part of the model that takes token ids.
        hook: one of ``HOOKS``.
        model: how messages call the model.

    Raises:
        ModelError: no such hook point, or none in this model.
    """
    if hook not in HOOKS:
        raise ModelError(f"there is no hook point {hook!r}; take some of {', '.join(HOOKS)}")
    layout = layout_of(config)
    if hook in layout:
        return layout[hook]
    if config.model_type in LAYOUTS:
        raise ModelError(
            f"{model} has no {hook}: its attention and MLP both read the stream before the block; "
            f"take some of {', '.join(layout)}"
        )
    raise ModelError(
        f"posae does not know where {hook} is in a model of type {config.model_type}; take resid_pre or "
        "resid_post, or name the module: --module 'path.{layer}.to.module:output'"
    )


def parse_module(text: str) -> Place:
    """The place that ``--module`` names.

    Raises:
        ModelError: not of the form ``path.{layer}.to.module:input`` or ``:output``.

    >>> parse_module("model.layers.{layer}.mlp.down_proj:input")
    Place(module='model.layers.{layer}.mlp.down_proj', side='input')
    """
    path, _, side = text.rpartition(":")
    if side not in ("input", "output") or not re.fullmatch(r"\w+(\.(\w+|\{layer\}))*", path):
        raise ModelError(f"--module {text!r}: write it as 'model.layers.{{layer}}.mlp:output', or :input")
    if path.count("{layer}") != 1:
        raise ModelError(f"--module {text!r} needs {{layer}} once, in place of the layer's number")
    return Place(path, "input" if side == "input" else "output")


def width_of(config: Any, hook: str) -> int:
    """Width of a hook point's activations: of ``attn_z`` all heads side by side, else the stream's."""
    if hook != "attn_z":
        return int(config.hidden_size)
    heads = int(config.num_attention_heads)
    return heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)


def module_at(model: nn.Module, block: nn.Module, place: Place, layer: int) -> nn.Module:
    """The module that a place names.

    Raises:
        AttributeError: there is none.
    """
    if "{layer}" in place.module:
        return model.get_submodule(place.module.replace("{layer}", str(layer)))
    return block.get_submodule(place.module)


class AllRead(Exception):
    """Every site was read, so the forward pass need not continue."""


@contextmanager
def reading(
    modules: Mapping[Site, tuple[nn.Module, str]], keep: Callable[[Site, Tensor], None]
) -> Generator[set[Site]]:
    """Read sites while the model runs within; the pass ends, without an error, once each was read.

    Args:
        modules: module and side of each site.
        keep: is given each site's activations, as the model has them.

    Yields:
        The sites that were not read yet: empty after a pass in which every hook fired.
    """
    left = set(modules)

    def read(site: Site, value: Any) -> None:
        keep(site, cast(Tensor, value[0] if isinstance(value, tuple) else value))
        left.discard(site)
        if not left:
            raise AllRead

    handles = [_hook(site, *place, read) for site, place in modules.items()]
    try:
        yield left
    except AllRead:
        pass
    finally:
        for handle in handles:
            handle.remove()


def _hook(site: Site, module: nn.Module, side: str, read: Callable[[Site, Any], None]) -> Any:
    if side == "output":
        return module.register_forward_hook(lambda _module, _arguments, output: read(site, output))

    def before(_module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        values: Iterable[Any] = arguments or named.values()
        read(site, next(iter(values)))

    return module.register_forward_pre_hook(before, with_kwargs=True)
