"""What is known of a language model from its config alone, and whether it is the model of a store.

``model_facts`` costs one small file: no weights are loaded, though those of a local folder are read
once for their digest (one or two seconds per GB).
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from transformers.utils import hub

from ...store.manifest import Manifest
from ..digests import commit_on_hub, sha256_once
from ..errors import ModelError
from .model_files import DEMO, is_hub_id, loading, local_folder, read_config

_hub = cast(Any, hub)

# Beside the weights, the files that decide about tokens and activations.
_PINNED_FILES = {
    "config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
}
_VARYING_KEYS = {"transformers_version", "dtype", "torch_dtype"}


class ModelFacts(NamedTuple):
    """What is known of a language model without loading its weights."""

    id: str
    """Hub id; base name of a local folder; ``demo``."""

    revision: str | None
    """Commit on the hub; for a folder the digest of its files, None while it has no weights."""

    config_hash: str
    """sha256 of the config as canonical JSON, without what varies by machine and library version."""

    n_layers: int
    """Number of layers (blocks)."""

    d_model: int
    """Width of the residual stream."""


def model_facts(model: str, revision: str | None = None) -> ModelFacts:
    """Find a language model and read its config.

    Load the model at the revision that this returns: then it stays the same model even if its branch on the
    hub moves in between.

    Args:
        model: ``demo`` (built in), a local folder or a hub id.
        revision: branch, tag or commit on the hub, None for its main branch; for a folder the
            digest that it must have.

    Raises:
        ModelError: missing, gated, out of reach, of an unknown type, not a language model, or a folder
            whose files are not those of ``revision``.
    """
    folder = local_folder(model)
    with loading(model, revision):
        if folder is None:
            file = _hub.cached_file(model, "config.json", revision=revision)
            # The cache keeps each commit in a folder of its name.
            current = _hub.extract_commit_hash(file, None)
        else:
            file = folder / "config.json" if (folder / "config.json").is_file() else None
            current = _digest(folder)
            if revision not in (None, current):
                raise ModelError(
                    f"the files of {model} have the digest {current}, not the revision {revision}: "
                    f"restore them, or leave the revision out"
                )
        if file is None:
            raise ModelError(
                f"{model} has no config.json: give a model in the format of transformers, as "
                f"save_pretrained writes it"
            )
        config = read_config(model, folder, current)
        text = config.get_text_config()
        return ModelFacts(
            id=DEMO if model == DEMO else folder.name if folder else model,
            revision=current,
            config_hash=_config_hash(config),
            n_layers=text.num_hidden_layers,
            d_model=text.hidden_size,
        )


def facts_of_recorded(model: str, manifest: Manifest, revision: str | None = None) -> ModelFacts:
    """Facts of a model that should be the one recorded in ``manifest``.

    If ``manifest`` records the same hub id, its commit is used, so that the hub is not contacted.

    Args:
        model: ``demo``, a local folder or a hub id.
        manifest: of a store.
        revision: as for ``model_facts``; by default the recorded one.

    Raises:
        ModelError: as ``model_facts``.
    """
    recorded = manifest.model_revision
    if revision is None and model == manifest.language_model and is_hub_id(model, recorded):
        revision = recorded
    return model_facts(model, revision)


def is_recorded(model: str, facts: ModelFacts, manifest: Manifest) -> bool:
    """Whether a model is the one recorded in ``manifest``: by commit, or by digest of weights and tokenizer.

    A folder may also be a copy of the commit, if its files still have the digests that the hub gave them.

    Args:
        model: as given to ``model_facts``.
        facts: what that returned.
        manifest: of a store.
    """
    recorded = manifest.model_revision
    if recorded is None or facts.config_hash != manifest.model_config_hash:
        return False
    folder = local_folder(model)
    if facts.revision == recorded or folder is None:
        return facts.revision == recorded
    return {commit_on_hub(file) for file in _deciding_files(folder)} == {recorded}


def default_layers(n_layers: int) -> tuple[int, ...]:
    """The layers to harvest by default, at the same relative depths as 5, 12 and 19 of Gemma 2's 26.

    >>> default_layers(26), default_layers(6), default_layers(2)
    ((5, 12, 19), (1, 2, 4), (0, 1))
    """
    return tuple(dict.fromkeys(n_layers * layer // 26 for layer in (5, 12, 19)))


def check_layers(facts: ModelFacts, layers: Sequence[int]) -> None:
    """Refuse layers that the model does not have.

    Raises:
        ModelError: there is no such layer, or none was asked for.
    """
    has = f"{facts.id} has {facts.n_layers} layers, 0-{facts.n_layers - 1}"
    if not layers:
        raise ModelError(f"{has}: choose at least one of them")
    for layer in layers:
        if not 0 <= layer < facts.n_layers:
            # The paper uses Gemma 2, whose name differs from that of the older model by two letters.
            if facts.id == "google/gemma-2b" and 0 <= layer < 26:
                raise ModelError(f"{has}; layer {layer} exists in google/gemma-2-2b")
            raise ModelError(f"{has}; there is no layer {layer}: choose from those")


def _config_hash(config: Any) -> str:
    """sha256 of a config, in hex."""

    def stable(value: Any) -> Any:
        if isinstance(value, dict):
            items = cast("dict[str, Any]", value).items()
            return {
                key: stable(item)
                for key, item in items
                if key not in _VARYING_KEYS and not key.startswith("_")
            }
        return value

    content = stable(json.loads(config.to_json_string(use_diff=False)))
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _deciding_files(folder: Path) -> list[Path]:
    """The files of a model that decide about tokens and activations, sorted by name."""
    return sorted(
        file for file in folder.iterdir() if file.suffix == ".safetensors" or file.name in _PINNED_FILES
    )


def _digest(folder: Path) -> str | None:
    """The revision of a local model: a digest of its files; None if it has no weights."""
    files = _deciding_files(folder)
    if not any(file.suffix == ".safetensors" for file in files):
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {sha256_once(file)}\n".encode())
    return f"sha256:{digest.hexdigest()[:16]}"
