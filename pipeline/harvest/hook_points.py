"""The hook points of a block, each defined once per block layout; ``hooks.capture`` reads them.

A block adds what its attention computes, then what its MLP computes, to the residual stream. Families differ
in where their norms stand and in the names of their modules; a ``Layout`` says for each hook point which
module's input or output it is. What a family lacks is refused from its configuration alone, before any weight
is loaded. docs/format.md says what each hook point means where norms stand behind the sublayers.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from ..errors import ModelError
from .hooks import Side

HOOKS = ("resid_pre", "resid_mid", "resid_post", "attn_z", "attn_out", "mlp_in", "mlp_out")
"""Residual stream before the block, after attention, after the block; input of attention's output projection,
heads side by side; what attention and the MLP add to the stream; the MLP module's input."""


class Place(NamedTuple):
    """Where a hook point is read: the input or the output of a module."""

    module: str
    """Path below the block; empty for the block itself. With ``{layer}`` in it: path below the model."""

    side: Side


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
