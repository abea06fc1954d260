"""The files of a language model: where they are, their config, and clear errors if they cannot be read.

Only data is read: weights from safetensors, never from pickles, and no code from the model's repository.
"""

import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any, cast

import torch
import transformers
from transformers.utils import hub, logging

from ..errors import ModelError

# Any, as few of their functions are typed. Importing transformers is quick, the first use of one of its
# classes is not: classes are therefore looked up only where they are used.
_transformers = cast(Any, transformers)
_hub = cast(Any, hub)

DEMO = "demo"
_DEMO_FOLDER = Path(__file__).parent / "demo_model"


def local_folder(model: str) -> Path | None:
    """The folder that ``model`` names, or None for a hub id.

    Raises:
        ModelError: no such folder, a file, or a name that cannot be a hub id.
    """
    if model == DEMO:
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


def is_hub_id(model: str, revision: str | None) -> bool:
    """Whether the model that a store records is a hub id: a stranger's store names no path on this machine.

    Args:
        model: as its manifest has it.
        revision: likewise; for a folder it is a digest.
    """
    is_of_folder = (revision or "").startswith("sha256:")
    return not (is_of_folder or Path(model).exists() or model.startswith((".", "/", "~")))


def read_config(model: str, folder: Path | None, commit: str | None) -> Any:
    """The config of a model that posae can read, as a ``transformers.PretrainedConfig``.

    Args:
        model: ``demo``, a local folder or a hub id.
        folder: ``local_folder`` of it.
        commit: on the hub.

    Raises:
        ModelError: an unknown type, a model that needs its own code, or not a language model.
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


@contextmanager
def loading(model: str, revision: str | None) -> Generator[None]:
    """Keep transformers quiet, and turn any failure of it into a ModelError of one line.

    Progress bars of downloads are still shown, in a terminal only.

    Raises:
        ModelError: whatever failed.
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
    # Depending on what the files contain, reading them fails with almost any class of error.
    except Exception as error:
        raise ModelError(_explain(model, revision, error)) from error
    finally:
        logging.set_verbosity(verbosity)
        logging.set_tqdm_hook(hook)


def no_tokenizer(model: str) -> ModelError:
    """The error for a model without a usable tokenizer."""
    return ModelError(f"no tokenizer.json found for {model}: put it beside config.json, or check the network")


def _explain(model: str, revision: str | None, error: Exception) -> str:
    """The message for an error from transformers: what is wrong, where and what to do next."""
    # transformers wraps the original error, sometimes more than once.
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None:
        chain.append(link)
        link = link.__cause__ or link.__context__

    def was(*kinds: type[Exception]) -> bool:
        return any(isinstance(one, kinds) for one in chain)

    page = f"https://huggingface.co/{model}"
    # First, as a gated repository is also a repository that was not found.
    if was(_hub.GatedRepoError):
        return f"{model} is gated: accept its licence on {page}, then run `hf auth login` or set HF_TOKEN"
    if was(_hub.RepositoryNotFoundError):
        return _not_found(model)
    if was(_hub.RevisionNotFoundError):
        return f"{model} has no revision {revision}: choose one from {page}/commits/main"
    if was(_hub.LocalEntryNotFoundError, _hub.OfflineModeIsEnabled):
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
        return str(no_tokenizer(model))
    if was(torch.OutOfMemoryError):
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
