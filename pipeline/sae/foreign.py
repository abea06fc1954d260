"""Autoencoders that SAELens 6 saved, made ones of posae; SAELens itself is not needed.

What SAELens does besides (a decoder's bias that is not taken off, codes scaled by norms of the decoder) is
folded into the weights of ``standard``, ``topk``, ``jumprelu`` or ``batchtopk``; what cannot be is refused.
Nothing is unpickled. Cost: the weights, twice in memory for a moment.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from ..errors import RunError, RunNotFoundError
from ..ranges import PositionRange
from .autoencoder import Autoencoder
from .registry import new_autoencoder
from .saving import CONFIGURATION_FILE, WEIGHTS_FILE

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


Size = Annotated[int, Field(ge=1, lt=2**31)]


class ForeignConfiguration(BaseModel):
    """The keys of SAELens' ``cfg.json`` that say what is computed."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    architecture: Literal["standard", "topk", "jumprelu", "batchtopk"]
    d_in: Size
    d_sae: Size
    apply_b_dec_to_input: bool = True
    normalize_activations: Literal["none"] = "none"
    reshape_activations: Literal["none"] = "none"
    k: Annotated[float, Field(ge=1)] | None = None
    rescale_acts_by_decoder_norm: bool = False


class Metadata(NamedTuple):
    """What the ``cfg.json`` of any autoencoder says of where it is from."""

    is_of_posae: bool
    hook_name: str | None
    """Where in the language model it was trained."""
    model_name: str | None
    """The language model, as the file names it."""


def read_metadata(folder: Path) -> Metadata:
    """What ``cfg.json`` says; what it does not say in printable words is None.

    Raises:
        RunNotFoundError: there is none.
        RunError: it is no JSON object.
    """
    found = _json(folder)
    said = found.get("metadata")
    said = cast("dict[str, Any]", said) if isinstance(said, dict) else {}
    return Metadata("posae" in found, _text(said.get("hook_name")), _text(said.get("model_name")))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and len(value) <= 200 and value.isprintable() else None


def read_configuration(folder: Path) -> ForeignConfiguration:
    """What ``cfg.json`` says.

    Raises:
        RunNotFoundError: there is none.
        RunError: it is no configuration of SAELens 6, or of an autoencoder that posae has nothing like.
    """
    found = _json(folder)
    place = folder / CONFIGURATION_FILE
    metadata = found.get("metadata")
    saved_by = (
        str(cast("dict[str, Any]", metadata).get("sae_lens_version")) if isinstance(metadata, dict) else ""
    )
    if not saved_by.partition(".")[0].isdecimal() or int(saved_by.partition(".")[0]) < 6:
        raise RunError(f"{place}: not saved by SAELens 6 or later; open it with SAELens 6 and save it again")
    try:
        return ForeignConfiguration.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        value = str(first["input"])[:50] if key in found else "missing"
        raise RunError(
            f"{place}: {key} is {value!r}, and posae has no such autoencoder; import standard, topk, "
            "jumprelu or batchtopk, whose activations are neither normalised nor reshaped"
        ) from None


def _json(folder: Path) -> dict[str, Any]:
    place = folder / CONFIGURATION_FILE
    try:
        found = json.loads(place.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise RunNotFoundError(
            f"{folder} has no {CONFIGURATION_FILE}; give the folder of a saved autoencoder"
        ) from None
    except (ValueError, RecursionError, OSError) as error:
        raise RunError(f"{place} cannot be read: {error}; save it again") from None
    if not isinstance(found, dict):
        raise RunError(f"{place} is no JSON object; save it again")
    return cast("dict[str, Any]", found)


def read_foreign(folder: Path, ranges: Sequence[PositionRange]) -> Autoencoder:
    """The autoencoder that SAELens saved in ``folder``, on the CPU in float32 and in ``eval()`` mode.

    Its architecture is the one with the same codes, of a trained BatchTopK of SAELens' ``jumprelu``. What
    codes do not depend on is not known, such as the target of an L0, and stands at its bound.

    Args:
        folder: with ``cfg.json`` and ``sae_weights.safetensors``.
        ranges: position ranges that it is to be scored by.

    Raises:
        RunNotFoundError: a file is missing.
        RunError: a file is damaged, or posae has no such autoencoder.
    """
    configuration = read_configuration(folder)
    architecture, size = configuration.architecture, configuration.d_sae
    own: dict[str, Any] = {"l1_coefficient": 0.0}
    if architecture != "standard":
        own = {"target_l0": min(size, round(configuration.k or size))}
    if architecture == "topk" and configuration.k is None:
        raise RunError(f"{folder / CONFIGURATION_FILE}: k is missing; save it again with SAELens")
    autoencoder = new_autoencoder(
        architecture,
        d_model=configuration.d_in,
        dictionary_size=size,
        ranges=ranges,
        generator=None,
        **own,
    )
    weights = _folded(_read_weights(folder, configuration), configuration)
    if architecture == "jumprelu":
        weights = autoencoder.take_saelens_weights(weights)
    autoencoder.load_state_dict(weights, assign=True)
    return autoencoder.eval()


def _read_weights(folder: Path, configuration: ForeignConfiguration) -> dict[str, Tensor]:
    """The weights by posae's names, in float64 so that folding rounds once."""
    place = folder / WEIGHTS_FILE
    d_in, d_sae = configuration.d_in, configuration.d_sae
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
    }
    if configuration.architecture == "jumprelu":
        shapes["threshold"] = (d_sae,)
    if configuration.architecture == "batchtopk":
        shapes["topk_threshold"] = ()
    try:
        found = safetensors.torch.load(place.read_bytes())
    except FileNotFoundError:
        raise RunNotFoundError(
            f"{folder} has no {WEIGHTS_FILE}; give the folder of a saved autoencoder"
        ) from None
    except (OSError, SafetensorError) as error:
        raise RunError(f"{place} cannot be read: {error}; save it again") from None
    for name in sorted(shapes.keys() | found.keys()):
        if name not in shapes or name not in found:
            problem = "unknown" if name in found else "missing"
            raise RunError(
                f"{place}: {name} is {problem}, and {configuration.architecture} has {', '.join(shapes)}"
            )
        weight = found[name]
        if tuple(weight.shape) != shapes[name] or weight.dtype not in _FLOATS:
            raise RunError(
                f"{place}: {name} is {weight.dtype} {list(weight.shape)}, not of {list(shapes[name])}"
            )
    weights = {name: weight.double() for name, weight in found.items()}
    if "topk_threshold" in weights:
        weights["threshold"] = weights.pop("topk_threshold")
    return weights


def _folded(weights: dict[str, Tensor], configuration: ForeignConfiguration) -> dict[str, Tensor]:
    """The weights with which posae computes the same; float32."""
    if not configuration.apply_b_dec_to_input:
        # W_encᵀ x + b_enc = W_encᵀ (x - b_dec) + (b_enc + W_encᵀ b_dec)
        weights["b_enc"] = weights["b_enc"] + weights["b_dec"] @ weights["W_enc"]
    if configuration.rescale_acts_by_decoder_norm:
        # Codes are chosen, and given, times the norm of the feature's row in the decoder.
        norms = weights["W_dec"].square().sum(1).sqrt()
        weights["W_enc"] = weights["W_enc"] * norms
        weights["b_enc"] = weights["b_enc"] * norms
        weights["W_dec"] = weights["W_dec"] / norms.clamp(min=1e-8)[:, None]
    return {name: weight.float().contiguous() for name, weight in weights.items()}
