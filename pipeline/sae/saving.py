"""An autoencoder on disk: ``sae_weights.safetensors`` and ``cfg.json``, named as in SAELens 6.

What lies there works on raw activations: the activation scale is folded into the weights. Where positions
change nothing, SAELens opens ``standard``, ``topk``, ``jumprelu`` and ``batchtopk`` (as ``jumprelu``) with
``SAE.load_from_disk``, and encodes and decodes the same. All others have an architecture that it refuses
until ``posae.pipeline.interop.saelens`` is imported, and their weights are as they are here.
Whatever it does not know stands under ``posae`` in ``cfg.json``, which it passes over.

Each file is written under a temporary name, made durable, and renamed; ``cfg.json`` holds the
digest of the weights, so that a torn pair or a damaged file is noticed. Nothing is unpickled.
Cost: saving and loading hold the weights twice in memory for a moment.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_type_hints

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt, ValidationError, create_model
from safetensors import SafetensorError
from torch import Tensor

from ...store.errors import SettingsError
from ...store.files import StoreFiles
from ..errors import RunError, RunNotFoundError
from ..ranges import PositionRange
from .autoencoder import Autoencoder, CommonSettings, Setting
from .registry import architecture_class

WEIGHTS_FILE = "sae_weights.safetensors"
CONFIGURATION_FILE = "cfg.json"


class _OurKeys(BaseModel):
    """``posae`` in ``cfg.json``; further keys are the autoencoder's ``own_settings``."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    __pydantic_extra__: dict[str, Setting]  # pyright: ignore[reportIncompatibleVariableOverride]

    architecture: str
    ranges: tuple[tuple[int, int], ...] = Field(max_length=4096)
    alpha: FiniteFloat
    folded_activation_scale: FiniteFloat
    """The scale at which training was done; the weights hold it already."""
    weights_sha256: str


class _Configuration(BaseModel):
    """The keys of ``cfg.json`` that loading needs."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    architecture: str
    d_in: PositiveInt
    d_sae: PositiveInt
    dtype: Literal["float32"]
    posae: _OurKeys


def save_autoencoder(autoencoder: Autoencoder, folder: Path | str, metadata: Mapping[str, object]) -> None:
    """Write both files into ``folder``, which is made if need be; what was there is replaced.

    Args:
        autoencoder: on any device; it is not changed.
        folder: of the run.
        metadata: what SAELens wants to know, as JSON: ``model_name``, ``hook_name``,
            ``context_size``, ``dataset_path``, ``prepend_bos`` …

    Raises:
        StoreWriteError: the disk refused.
    """
    folder = Path(folder)
    weights, settings = autoencoder.weights_for_raw_units(), dict[str, Setting]()
    if autoencoder.ignores_positions:
        weights, settings = autoencoder.saelens_weights(weights), autoencoder.saelens_settings()
    weights = {name: weight.to("cpu", torch.float32).contiguous() for name, weight in weights.items()}
    weights_bytes = safetensors.torch.save(weights)
    configuration = {
        "architecture": autoencoder.saelens_name,
        "d_in": autoencoder.d_model,
        "d_sae": autoencoder.dictionary_size,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": "b_dec" in weights,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **settings,
        # SAELens rewrites the metadata of anything older than 6.
        "metadata": {**metadata, "sae_lens_version": "6.0.0"},
        "posae": {
            "architecture": autoencoder.architecture,
            "ranges": autoencoder.ranges,
            "alpha": autoencoder.alpha,
            "folded_activation_scale": autoencoder.activation_scale,
            "weights_sha256": hashlib.sha256(weights_bytes).hexdigest(),
            **autoencoder.own_settings(),
        },
    }
    text = json.dumps(configuration, indent=2, allow_nan=False) + "\n"
    files = StoreFiles(folder)
    files.make_root()
    files.write(WEIGHTS_FILE, weights_bytes)
    files.write(CONFIGURATION_FILE, text.encode())


def load_autoencoder(folder: Path | str) -> Autoencoder:
    """The autoencoder saved in ``folder``, on the CPU and in ``eval()`` mode.

    It is for use, not for resuming training: its ``activation_scale`` is 1, so that its losses
    are in raw units and the rows of its decoder do not have unit norm.

    Raises:
        RunNotFoundError: there is no such folder, or no saved autoencoder in it.
        RunError: the files are damaged or of another kind, or do not belong together.
    """
    folder = Path(folder)
    configuration = _read_configuration(folder)
    autoencoder = _without_values(configuration, folder)
    autoencoder.load_state_dict(_read_weights(autoencoder, configuration, folder), assign=True)
    return autoencoder


def without_values(configuration: Mapping[str, Any], folder: Path | str) -> Autoencoder:
    """The autoencoder that a ``cfg.json`` describes, in ``eval()`` mode, its weights only shapes as yet.

    Args:
        configuration: what the file holds.
        folder: where it lies, for error messages.

    Raises:
        RunError: posae has not saved it so.
    """
    try:
        parsed = _Configuration.model_validate_json(json.dumps(configuration))
    except ValidationError as error:
        raise _misread(Path(folder), error) from None
    return _without_values(parsed, Path(folder))


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        problem = f"has no {name}; give the folder of a run that has trained"
        if not folder.is_dir():
            problem = "there is no such folder; give that of a run"
        raise RunNotFoundError(f"{folder}: {problem}") from None
    except OSError as error:
        raise RunError(f"{folder / name}: cannot be read: {error.strerror}") from error


def _read_configuration(folder: Path) -> _Configuration:
    try:
        return _Configuration.model_validate_json(_read(folder, CONFIGURATION_FILE))
    except ValidationError as error:
        raise _misread(folder, error) from None


def _without_values(configuration: _Configuration, folder: Path) -> Autoencoder:
    """The autoencoder that ``cfg.json`` describes, its weights only shapes as yet."""
    ours = configuration.posae
    try:
        kind = architecture_class(ours.architecture)
        own = _keywords(kind).model_validate(ours.model_extra or {}).model_dump(exclude_unset=True)
        autoencoder = kind(
            d_model=configuration.d_in,
            dictionary_size=configuration.d_sae,
            ranges=[PositionRange(*edges) for edges in ours.ranges],
            generator=None,
            **own,
        )
        autoencoder.alpha = ours.alpha
        return autoencoder.eval()
    except ValidationError as error:
        raise _misread(folder, error, "posae.") from None
    except (SettingsError, TypeError, RuntimeError, OverflowError) as error:
        # The last three: beyond any tensor.
        problem = str(error).splitlines()[0]
        raise RunError(f"{folder / CONFIGURATION_FILE}: {problem}") from error


def _keywords(kind: type[Autoencoder]) -> type[BaseModel]:
    """The types of the keywords that ``own_settings`` names."""
    hints = get_type_hints(CommonSettings) | get_type_hints(kind.__init__)
    names = [*kind.setting_names(), "position_mean", "position_adapter"]
    fields: dict[str, Any] = {name: (hints[name], None) for name in names}
    return create_model("Keywords", __config__=ConfigDict(strict=True, extra="forbid"), **fields)


def _misread(folder: Path, error: ValidationError, within: str = "") -> RunError:
    first = error.errors()[0]
    place = within + ".".join(str(part) for part in first["loc"]) or "the file"
    return RunError(
        f"{folder / CONFIGURATION_FILE}: {place}: {first['msg']}; posae opens only what posae has saved"
    )


def _read_weights(autoencoder: Autoencoder, configuration: _Configuration, folder: Path) -> dict[str, Tensor]:
    """The weights, each of the name, shape and dtype that ``autoencoder`` asks for."""
    path = folder / WEIGHTS_FILE
    content = _read(folder, WEIGHTS_FILE)
    if hashlib.sha256(content).hexdigest() != configuration.posae.weights_sha256:
        raise RunError(
            f"{path}: damaged, or not saved together with {CONFIGURATION_FILE}; "
            "restore both from a copy, or train again"
        )
    try:
        weights = safetensors.torch.load(content)
    except SafetensorError as error:
        raise RunError(f"{path}: not a safetensors file: {error}") from error
    # Also of runs from before SAELens' names were given to all that it knows: those are not in its units.
    if configuration.architecture == autoencoder.saelens_architecture:
        weights = autoencoder.take_saelens_weights(weights)
    wanted = {name: _kind(weight) for name, weight in autoencoder.state_dict().items()}
    found = {name: _kind(weight) for name, weight in weights.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise RunError(
                f"{path}: {name} is {found.get(name, 'missing')}, but by {CONFIGURATION_FILE} it "
                f"should be {wanted.get(name, 'absent')}"
            )
    return weights


def _kind(weight: Tensor) -> str:
    return f"{str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"
