"""The language model: known from its config alone, or loaded to read the residual stream.

``model_facts`` costs one small file: no weights are loaded, though those of a local folder are read
once for their digest (one or two seconds per GB). ``LanguageModel.load`` takes 2 bytes of memory per
parameter, the head left out. ``activations`` costs a forward pass that ends after the last layer
wanted: layers 5 and 12 of 26 run half the model.

Only data is loaded: weights from safetensors, never from pickles, and no code of the model's own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

import torch
import transformers
from transformers.utils import hub, logging

from ...store.errors import SettingsError
from ...store.manifest import Manifest
from ..digests import commit_on_hub, sha256_once
from ..errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Any, as few of their functions are typed. Importing transformers is quick, the first use of one of its
# classes is not: so these are named only where they are used.
_transformers = cast(Any, transformers)
_hub = cast(Any, hub)

_DEMO = "demo"
_DEMO_FOLDER = Path(__file__).parent / "demo_model"
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
# Any other name would make transformers fetch a kernel of that name from the hub and run it.
_ATTENTIONS = ("eager", "sdpa", "flash_attention_2")


class ModelFacts(NamedTuple):
    """What is known of a language model without loading its weights."""

    id: str
    """Hub id; base name of a local folder; ``demo``."""

    revision: str | None
    """Commit on the hub; for a folder the digest of its files, None while it has no weights."""

    config_hash: str
    """sha256 of the config as canonical JSON, less what varies by machine and library version."""

    n_layers: int
    """Number of layers (blocks)."""

    d_model: int
    """Width of the residual stream."""


def model_facts(model: str, revision: str | None = None) -> ModelFacts:
    """Find a language model and read its config.

    The revision found is what later loading should be given, so that a model that moves on the hub
    between two calls stays the same model here.

    Args:
        model: ``demo`` (built in), a local folder or a hub id.
        revision: branch, tag or commit on the hub, None for its main branch; for a folder the
            digest that it must have.

    Raises:
        ModelError: missing, gated, out of reach, of an unknown type, no model of text, or a folder
            whose files are not those of ``revision``.
    """
    folder = _local_folder(model)
    with _loading(model, revision):
        if folder is None:
            file = _hub.cached_file(model, "config.json", revision=revision)
            # The cache keeps each commit in a folder of its name.
            found = _hub.extract_commit_hash(file, None)
        else:
            file = folder / "config.json" if (folder / "config.json").is_file() else None
            found = _digest(folder)
            if revision not in (None, found):
                raise ModelError(
                    f"the files of {model} have the digest {found}, not the revision {revision}: "
                    f"restore them, or leave the revision out"
                )
        if file is None:
            raise ModelError(
                f"{model} has no config.json: give a model in the format of transformers, as "
                f"save_pretrained writes it"
            )
        config = _read_config(model, folder, found)
        text = config.get_text_config()
        return ModelFacts(
            id=_DEMO if model == _DEMO else folder.name if folder else model,
            revision=found,
            config_hash=_config_hash(config),
            n_layers=text.num_hidden_layers,
            d_model=text.hidden_size,
        )


def is_hub_id(model: str, revision: str | None) -> bool:
    """Whether a store's word for its model is one of the hub's: a stranger's names no place on this machine.

    Args:
        model: as its manifest has it.
        revision: likewise; of a folder it is a digest.
    """
    is_of_folder = (revision or "").startswith("sha256:")
    return not (is_of_folder or Path(model).exists() or model.startswith((".", "/", "~")))


def facts_of_recorded(model: str, manifest: Manifest, revision: str | None = None) -> ModelFacts:
    """What is known of a model that is to be the one of ``manifest``.

    A hub id that the manifest has too means the commit there, so that no hub is asked.

    Args:
        model: ``demo``, a local folder or a hub id.
        manifest: of a store.
        revision: as for ``model_facts``, where one was given.

    Raises:
        ModelError: as ``model_facts``.
    """
    recorded = manifest.model_revision
    if revision is None and model == manifest.language_model and is_hub_id(model, recorded):
        revision = recorded
    return model_facts(model, revision)


def is_recorded(model: str, facts: ModelFacts, manifest: Manifest) -> bool:
    """Whether a model is the one of ``manifest``: by commit, or by the digest of weights and tokenizer.

    A folder may also be a copy of the commit, if the digests of the hub that it was fetched with still hold.

    Args:
        model: as given to ``model_facts``.
        facts: what that found.
        manifest: of a store.
    """
    recorded = manifest.model_revision
    if recorded is None or facts.config_hash != manifest.model_config_hash:
        return False
    folder = _local_folder(model)
    if facts.revision == recorded or folder is None:
        return facts.revision == recorded
    return {commit_on_hub(file) for file in _deciding_files(folder)} == {recorded}


def default_layers(n_layers: int) -> tuple[int, ...]:
    """The layers to harvest where none are named, as deep as 5, 12 and 19 are of Gemma 2's 26.

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
            # The paper means Gemma 2, whose name differs from that of the older model by two letters.
            if facts.id == "google/gemma-2b" and 0 <= layer < 26:
                raise ModelError(f"{has}; layer {layer} exists in google/gemma-2-2b")
            raise ModelError(f"{has}; there is no layer {layer}: choose from those")


def load_tokenizer(model: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model.

    Args:
        model: ``demo``, a local folder or a hub id.
        revision: on the hub, ``ModelFacts.revision``; for a folder of no effect.

    Raises:
        ModelError: missing, gated, out of reach, without tokenizer or in need of code of its own.
    """
    folder = _local_folder(model)
    with _loading(model, revision):
        tokenizer = _transformers.AutoTokenizer.from_pretrained(
            folder or model, revision=None if folder else revision, trust_remote_code=False
        )
        # Where the files are missing, most kinds come back without an error, knowing no token.
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise ModelError(_no_tokenizer(model))
        return tokenizer


class LanguageModel:
    """A language model without its head, in bfloat16, ready to be read.

    Attributes:
        facts: what is known from the config.
        device: where weights and activations lie.
        text_model: the part of the model that takes token ids.
        blocks: its layers; the output of block ``l`` is hook point ``resid_post`` of layer ``l``.
    """

    _loader = "AutoModel"

    def __init__(self, facts: ModelFacts, device: torch.device, text_model: torch.nn.Module) -> None:
        """Find the blocks of a loaded model; users call ``load``.

        Raises:
            ModelError: the layers are not kept in one list of blocks.
        """
        self.facts = facts
        self.device = device
        self.text_model = text_model
        modules = cast("Iterable[tuple[str, torch.nn.Module]]", text_model.named_modules())
        lists = {
            name: module
            for name, module in modules
            if isinstance(module, torch.nn.ModuleList) and len(module) == facts.n_layers
        }
        if not lists:
            raise ModelError(
                f"{facts.id} does not keep its {facts.n_layers} layers in one list of blocks, "
                f"where posae could read them: choose another model"
            )
        # The shallowest: a block may hold a list as long, such as one of experts.
        self.blocks = lists[min(lists, key=lambda name: name.count("."))]

    @classmethod
    def load(
        cls,
        model: str,
        revision: str | None = None,
        *,
        device: torch.device | str = "cpu",
        attention: str = "eager",
    ) -> Self:
        """Load a language model.

        Args:
            model: ``demo``, a local folder or a hub id.
            revision: as for ``model_facts``.
            device: where to run it.
            attention: how attention is computed, ``eager``, ``sdpa`` or ``flash_attention_2``; the
                last bits of activations depend on it.

        Raises:
            ModelError: as ``model_facts``, or weights that are missing, incomplete or pickled.
            SettingsError: no such attention.
        """
        if attention not in _ATTENTIONS:
            raise SettingsError(f"no attention {attention}: choose from {', '.join(_ATTENTIONS)}")
        facts = model_facts(model, revision)
        folder = _local_folder(model)
        if folder and facts.revision is None:
            raise ModelError(
                f"{model} holds no weights in the format safetensors, and pickles "
                f"(pytorch_model.bin) are not loaded: save the model anew with save_pretrained"
            )
        with _loading(model, facts.revision):
            # bfloat16 whatever the weights' own type: it is what a store holds.
            loaded, report = getattr(_transformers, cls._loader).from_pretrained(
                folder or model,
                revision=None if folder else facts.revision,
                dtype=torch.bfloat16,
                attn_implementation=attention,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            # transformers fills what it does not find with random numbers. The pooler, which comes
            # after the last block, is the one part that checkpoints rightly leave out.
            missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
            if missing:
                raise ModelError(
                    f"{model} lacks {len(missing)} of its weights, the first {missing[0]}: "
                    f"fetch a complete copy"
                )
            return cls._of(facts, torch.device(device), loaded)

    @classmethod
    def _of(cls, facts: ModelFacts, device: torch.device, loaded: Any) -> Self:
        # Of a model of text and images only the text part is kept.
        text_model = loaded.get_decoder()
        text_model.config.use_cache = False
        text_model.eval().to(device)
        return cls(facts, device, text_model)

    def check_length(self, n_positions: int) -> None:
        """Refuse contexts that the model does not take.

        Raises:
            ModelError: they are too long.
        """
        limit = getattr(self.text_model.config, "max_position_embeddings", None)
        if limit and 0 < limit < n_positions:
            raise ModelError(
                f"{self.facts.id} takes at most {limit} positions, these contexts have "
                f"{n_positions}: choose a shorter context length"
            )

    def activations(self, tokens: torch.Tensor, layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """Run contexts through the model and read the residual stream after some layers.

        Blocks after the last of ``layers`` do not run. Every token is attended to: contexts hold no
        padding.

        Args:
            tokens: int32 or int64 [contexts, positions], on any device.
            layers: layers to read, in any order.

        Returns:
            Per layer in ascending order, bfloat16 [contexts, positions, d_model] on ``device``.

        Raises:
            ModelError: no such layer, contexts longer than the model takes, or a block that gives
                something other than one vector per position.
        """
        check_layers(self.facts, layers)
        self.check_length(tokens.shape[1])
        shape = (*tokens.shape, self.facts.d_model)
        last = max(layers)
        found: dict[int, torch.Tensor] = {}

        def keep(layer: int, _block: torch.nn.Module, _arguments: Any, output: Any) -> None:
            activations = cast(torch.Tensor, output[0] if isinstance(output, tuple) else output)
            if activations.shape != shape:
                raise ModelError(
                    f"layer {layer} of {self.facts.id} gives {tuple(activations.shape)}, not "
                    f"[contexts, positions, d_model] = {shape}: choose another model"
                )
            found[layer] = activations.to(torch.bfloat16)
            if layer == last:
                raise _LastLayerDone

        # Not transformers' hidden_states: the last of those comes after the final norm.
        hooks = [self.blocks[layer].register_forward_hook(partial(keep, layer)) for layer in set(layers)]
        try:
            with torch.inference_mode():
                self.text_model(tokens.to(self.device))
        except _LastLayerDone:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return found


class CausalLanguageModel(LanguageModel):
    """A language model with the head that predicts the next token."""

    _loader = "AutoModelForCausalLM"
    _whole: Any

    @classmethod
    def load(
        cls,
        model: str,
        revision: str | None = None,
        *,
        device: torch.device | str = "cpu",
        attention: str = "eager",
    ) -> Self:
        """As ``LanguageModel.load``.

        Raises:
            ModelError: also a model that does not predict the next token from those before it.
        """
        folder = _local_folder(model)
        with _loading(model, revision):
            config = _read_config(model, folder, revision)
            is_causal = type(config) in _transformers.MODEL_FOR_CAUSAL_LM_MAPPING
            is_masked = type(config) in _transformers.MODEL_FOR_MASKED_LM_MAPPING and not config.is_decoder
            if not is_causal or is_masked:
                raise ModelError(
                    f"{model} does not predict the next token from those before it (model_type "
                    f"{config.model_type}), so it has no CE loss: leave --ce-loss out"
                )
        return super().load(model, revision, device=device, attention=attention)

    @classmethod
    def _of(cls, facts: ModelFacts, device: torch.device, loaded: Any) -> Self:
        found = super()._of(facts, device, loaded)
        found._whole = loaded.eval().to(device)
        return found

    def logits(
        self,
        tokens: torch.Tensor,
        layer: int,
        replace: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Run contexts through the whole model, with one layer's output replaced.

        Args:
            tokens: int32 or int64 [contexts, positions], on any device.
            layer: the layer whose output (hook point ``resid_post``) is replaced.
            replace: is given that output, bfloat16 [contexts, positions, d_model], and returns what goes on
                in its place, of the same shape and any float dtype; None leaves it.

        Returns:
            [contexts, positions, vocabulary].

        Raises:
            ModelError: no such layer.
        """
        check_layers(self.facts, [layer])

        def splice(_block: torch.nn.Module, _arguments: Any, output: Any) -> Any:
            if replace is None:
                return output
            rest = cast("tuple[Any, ...]", output)[1:] if isinstance(output, tuple) else None
            first = cast(torch.Tensor, output if rest is None else output[0])
            replaced = replace(first).to(first.dtype)
            return replaced if rest is None else (replaced, *rest)

        hook = self.blocks[layer].register_forward_hook(splice)
        try:
            with torch.inference_mode():
                return self._whole(input_ids=tokens.to(self.device).long()).logits
        finally:
            hook.remove()


class _LastLayerDone(Exception):
    """The forward pass has gone as far as wanted."""


def _local_folder(model: str) -> Path | None:
    """The folder that ``model`` means, or None where it is a hub id.

    Raises:
        ModelError: no such folder, a file, or nothing that could be a hub id.
    """
    if model == _DEMO:
        return _DEMO_FOLDER
    path = Path(model).expanduser() if model.startswith("~/") else Path(model)
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise ModelError(f"{model} is a file: give the folder that holds config.json and weights")
    if model.startswith((".", "/", "~")):
        raise ModelError(f"there is no folder {model}: check the path")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise ModelError(_not_found(model))
    return None


def _read_config(model: str, folder: Path | None, commit: str | None) -> Any:
    """The config of a model that posae can read, as a ``transformers.PretrainedConfig``.

    Raises:
        ModelError: of an unknown type, in need of code of its own, or no model of text.
    """
    source, revision = (folder, None) if folder else (model, commit)
    content, _ = _transformers.PretrainedConfig.get_config_dict(source, revision=revision)
    model_type = content.get("model_type")
    if model_type not in _transformers.CONFIG_MAPPING:
        remedy = (
            "it needs code of its own, which posae never runs: choose another model"
            if "auto_map" in content
            else "upgrade transformers, or choose another model"
        )
        raise ModelError(
            f"{model} is of model_type {model_type}, unknown to transformers "
            f"{transformers.__version__}; {remedy}"
        )
    config = _transformers.AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    text = config.get_text_config()
    kinds = (_transformers.MODEL_FOR_CAUSAL_LM_MAPPING, _transformers.MODEL_FOR_MASKED_LM_MAPPING)
    is_language_model = any(type(part) in kind for part in (config, text) for kind in kinds)
    if not is_language_model or config.is_encoder_decoder:
        raise ModelError(
            f"{model} is of model_type {model_type}, which posae cannot read: choose a decoder or "
            f"an encoder of text, such as google/gemma-2-2b"
        )
    return config


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
    """The files of a model that decide about tokens and activations, in the order of their names."""
    return sorted(
        file for file in folder.iterdir() if file.suffix == ".safetensors" or file.name in _PINNED_FILES
    )


def _digest(folder: Path) -> str | None:
    """What stands for the revision of a local model; None where there are no weights."""
    files = _deciding_files(folder)
    if not any(file.suffix == ".safetensors" for file in files):
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {sha256_once(file)}\n".encode())
    return f"sha256:{digest.hexdigest()[:16]}"


@contextmanager
def _loading(model: str, revision: str | None) -> Generator[None]:
    """Keep transformers quiet, and make any failure of it one clear error.

    Bars of downloads stay: they are progress, and shown in a terminal only.
    """

    def without_bar(make: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        return make(*args, **kwargs | {"disable": True})

    verbosity = logging.get_verbosity()
    hook = logging.set_tqdm_hook(without_bar)
    logging.set_verbosity_error()
    try:
        yield
    except ModelError:
        raise
    # Whatever the files of others contain, reading them fails with almost any class of error.
    except Exception as error:
        raise ModelError(_explain(model, revision, error)) from error
    finally:
        logging.set_verbosity(verbosity)
        logging.set_tqdm_hook(hook)


def _explain(model: str, revision: str | None, error: Exception) -> str:
    """What to tell of an error from transformers: what, where and what to do next."""
    # transformers wraps what it met, at times more than once.
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None:
        chain.append(link)
        link = link.__cause__ or link.__context__

    def met(*kinds: type[Exception]) -> bool:
        return any(isinstance(met_error, kinds) for met_error in chain)

    page = f"https://huggingface.co/{model}"
    # A gated repository is also one not found, therefore first.
    if met(_hub.GatedRepoError):
        return f"{model} is gated: accept its licence on {page}, then run `hf auth login` or set HF_TOKEN"
    if met(_hub.RepositoryNotFoundError):
        return _not_found(model)
    if met(_hub.RevisionNotFoundError):
        return f"{model} has no revision {revision}: choose one from {page}/commits/main"
    if met(_hub.LocalEntryNotFoundError, _hub.OfflineModeIsEnabled):
        which = f"{model} at revision {revision}" if revision else f"{model} is no folder here,"
        why = "HF_HUB_OFFLINE is set" if _hub.is_offline_mode() else "the hub cannot be reached"
        remedy = "connect to download it once, or give a local folder"
        return f"{which} was not downloaded before, and {why}: {remedy}"
    if "does not appear to have a file named" in str(error):
        return (
            f"{model} has no weights in the format safetensors within reach, and pickles "
            f"(pytorch_model.bin) are not loaded: check the network, or choose another model"
        )
    if "instantiate the backend tokenizer" in str(error):
        return _no_tokenizer(model)
    if met(torch.OutOfMemoryError):
        return f"the device has too little memory for {model}: choose --device cpu, or a smaller model"
    reason = shorten(str(error), 300, placeholder=" …")
    return (
        f"{model} could not be loaded ({type(error).__name__}: {reason}): check that its files are "
        f"complete and that transformers {transformers.__version__} can read them"
    )


def _not_found(model: str) -> str:
    return (
        f"{model} is no folder here and no model on https://huggingface.co/models: check the "
        f"spelling; for a private one run `hf auth login` or set HF_TOKEN"
    )


def _no_tokenizer(model: str) -> str:
    return f"no tokenizer.json of {model} is in reach: put it beside config.json, or check the network"
