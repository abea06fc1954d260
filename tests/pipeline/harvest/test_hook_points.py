"""Hook points of every block layout, recomputed from one another with the model's own modules."""

from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from posae.pipeline.errors import ModelError
from posae.pipeline.harvest.hook_points import (
    HOOKS,
    layout_of,
    module_at,
    parse_module,
    place_of,
    width_of,
)
from posae.pipeline.harvest.hooks import Side, capture

_transformers: Any = transformers
N_LAYERS = 3
SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "vocab_size": 60,
    "max_position_embeddings": 32,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_embd": 24, "n_layer": N_LAYERS, "n_head": 4, "vocab_size": 60, "n_positions": 32}),
    "pythia": ("gpt_neox", SIZES),
    "serial neox": ("gpt_neox", {**SIZES, "use_parallel_residual": False}),
    "llama": ("llama", GROUPED),
    "mistral": ("mistral", GROUPED),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", {**GROUPED, "head_dim": 8}),
    "phi": ("phi", {**GROUPED, "hidden_size": 32}),
    "olmo2": ("olmo2", GROUPED),
    "gemma": ("gemma", {**GROUPED, "head_dim": 8}),
    "gemma2": ("gemma2", {**GROUPED, "head_dim": 8}),
    "gemma3": ("gemma3_text", {**GROUPED, "head_dim": 8}),
    "bert": ("bert", SIZES),
    "roberta": ("roberta", SIZES),
}
PARALLEL = ("pythia", "phi")
TOKENS = torch.arange(2 * 7).reshape(2, 7) % 50 + 3


def model_of(family: str) -> Any:
    kind, sizes = FAMILIES[family]
    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    config = _transformers.AutoConfig.for_model(kind, **sizes)
    model: Any = _transformers.AutoModel.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():  # norms with gains that differ from 1, and biases from 0
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def blocks_of(model: Any) -> nn.ModuleList:
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == N_LAYERS]
    return lists[0]


def read(model: Any, hooks: tuple[str, ...], layers: tuple[int, ...] = tuple(range(N_LAYERS))) -> Any:
    blocks = blocks_of(model)
    places = {hook: place_of(model.config, hook, "it") for hook in hooks}
    modules: dict[tuple[int, str], tuple[nn.Module, Side]] = {
        (layer, hook): (module_at(model, blocks[layer], place, layer), place.side)
        for layer in layers
        for hook, place in places.items()
    }
    with torch.no_grad():
        values = capture(modules, lambda: model(input_ids=TOKENS))
    assert values.keys() == modules.keys()
    return values


@pytest.mark.parametrize("family", FAMILIES)
def test_hook_points_follow_from_one_another(family: str) -> None:
    """The stream is the sum of what it was and of what each sublayer added, bit for bit."""
    model = model_of(family)
    hooks = tuple(layout_of(model.config))
    assert set(HOOKS) - set(hooks) == ({"resid_mid"} if family in PARALLEL else set())
    values = read(model, hooks)
    with torch.no_grad():
        hidden = model(input_ids=TOKENS, output_hidden_states=True).hidden_states
    for layer, block in enumerate(blocks_of(model)):
        x = {hook: values[(layer, hook)] for hook in hooks}
        for hook, value in x.items():
            assert value.shape == (*TOKENS.shape, width_of(model.config, hook)), hook
        torch.testing.assert_close(x["resid_pre"], hidden[layer], rtol=0, atol=0)
        check_block(family, block, x)


def check_block(family: str, block: Any, x: dict[str, Tensor]) -> None:
    before, after, attention, mlp = x["resid_pre"], x["resid_post"], x["attn_out"], x["mlp_out"]

    def same(got: Tensor, wanted: Tensor) -> None:
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)

    with torch.no_grad():
        if family in ("bert", "roberta"):
            same(x["resid_mid"], block.attention.output.LayerNorm(attention + before))
            same(x["mlp_in"], x["resid_mid"])
            same(mlp, block.output.dense(block.intermediate(x["mlp_in"])))
            same(after, block.output.LayerNorm(mlp + x["resid_mid"]))
            same(attention, block.attention.output.dense(x["attn_z"]))
            return
        behind = family in ("olmo2", "gemma2", "gemma3")
        norm = block.post_feedforward_layernorm if behind else nn.Identity()
        same(mlp, norm(block.mlp(x["mlp_in"])))
        attention_module: Any = next(
            m for name, m in block.named_children() if "attn" in name or name == "attention"
        )
        projection: Any = next(
            getattr(attention_module, name)
            for name in ("o_proj", "c_proj", "dense")
            if hasattr(attention_module, name)
        )
        norm = block.post_attention_layernorm if behind else nn.Identity()
        same(attention, norm(projection(x["attn_z"])))
        if family == "pythia":
            same(after, mlp + attention + before)
        elif family == "phi":
            same(after, attention + mlp + before)
        else:
            same(x["resid_mid"], before + attention)
            same(after, x["resid_mid"] + mlp)
            if family == "olmo2":
                same(x["mlp_in"], x["resid_mid"])


def note(ran: list[int], layer: int, *_: Any) -> None:
    ran.append(layer)


def test_the_pass_ends_once_everything_was_read() -> None:
    model = model_of("llama")
    ran: list[int] = []
    for layer, block in enumerate(blocks_of(model)):
        block.register_forward_hook(partial(note, ran, layer))
    values = read(model, ("resid_mid",), layers=(1,))
    assert [layer for layer, _hook in values] == [1]
    assert ran == [0]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_one_pass_reads_what_single_passes_read() -> None:
    model = model_of("gemma3")
    together = read(model, HOOKS)
    for hook in HOOKS:
        alone = read(model, (hook,), layers=(1,))
        torch.testing.assert_close(alone[(1, hook)], together[(1, hook)], rtol=0, atol=0)


def test_a_module_can_be_named() -> None:
    model = model_of("llama")
    place = parse_module("layers.{layer}.mlp.down_proj:input")
    module = module_at(model, blocks_of(model)[1], place, 1)
    with torch.no_grad():
        values = capture({"x": (module, place.side)}, lambda: model(input_ids=TOKENS))
    assert values["x"].shape == (2, 7, 40)


@pytest.mark.parametrize(
    "text", ["layers.{layer}.mlp", "mlp:output", "a.{layer}.{layer}:input", "a b.{layer}:input", ":input"]
)
def test_what_names_no_module_is_refused(text: str) -> None:
    with pytest.raises(ModelError, match="--module"):
        parse_module(text)


def test_what_a_model_lacks_is_refused_by_its_configuration() -> None:
    def config(kind: str) -> Any:
        return _transformers.AutoConfig.for_model(kind)

    with pytest.raises(
        ModelError, match=r"it has no resid_mid: .*; take some of resid_pre, resid_post, attn_z"
    ):
        place_of(config("gpt_neox"), "resid_mid", "it")
    with pytest.raises(ModelError, match="no hook point 'resid'; take some of resid_pre"):
        place_of(config("llama"), "resid", "it")
    with pytest.raises(ModelError, match="type falcon; take resid_pre or resid_post, or name the module"):
        place_of(config("falcon"), "mlp_out", "it")
