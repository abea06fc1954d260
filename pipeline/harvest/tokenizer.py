"""The tokenizer of a language model, and the one that a store's tokens were made with."""

from typing import TYPE_CHECKING, Any, cast

import transformers

from ...store.errors import StoreMismatchError
from ...store.reader import ActivationStore
from ..progress import Progress, Silent
from .model_files import DEMO, is_hub_id, loading, local_folder, no_tokenizer
from .text.contexts import tokenizer_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_transformers = cast(Any, transformers)  # few of its functions are typed


def load_tokenizer(model: str, revision: str | None = None) -> "PreTrainedTokenizerBase":
    """Load the tokenizer that belongs to a model.

    Args:
        model: ``demo``, a local folder or a hub id.
        revision: on the hub, ``ModelFacts.revision``; ignored for a folder.

    Raises:
        ModelError: missing, gated, out of reach, without tokenizer or in need of code of its own.
    """
    folder = local_folder(model)
    with loading(model, revision):
        tokenizer = _transformers.AutoTokenizer.from_pretrained(
            folder or model, revision=None if folder else revision, trust_remote_code=False
        )
        # Without their files most tokenizers load without an error, and with an empty vocabulary.
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise no_tokenizer(model)
        return tokenizer


def tokenizer_of(
    store: ActivationStore, named: str | None, *, option: str, progress: Progress | None = None
) -> "PreTrainedTokenizerBase":
    """Load the tokenizer that a store's tokens were made with, compared by its digest.

    Args:
        store: whose tokens are to be read as text; not one that was imported.
        named: hub id or folder to load it from; by default the model that the store records.
        option: the option that sets ``named``, for messages.
        progress: shows what is loaded.

    Raises:
        ModelError: as ``load_tokenizer``.
        StoreMismatchError: the store records a local model and none is named; or another tokenizer.
    """
    manifest = store.manifest
    name = named or manifest.language_model
    revision = None if named else manifest.model_revision
    if not named and name != DEMO:
        if not is_hub_id(name, revision):
            raise StoreMismatchError(
                f"{store.root} was made with a local model, {name}; name its folder with {option}"
            )
        (progress or Silent()).say(f"tokenizer of {name}")
    tokenizer = load_tokenizer(name, revision)
    if tokenizer_hash(tokenizer) != manifest.tokenizer_hash:
        raise StoreMismatchError(
            f"the tokenizer of {name} is not the one that {store.root} was made with; "
            f"name the right one with {option}"
        )
    return tokenizer
