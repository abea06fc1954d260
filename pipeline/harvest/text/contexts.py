"""Contexts: rows of token ids of equal length, cut from documents and put into random order.

``take_contexts`` reads only as many documents as it needs, in one pass, and holds a batch of them at a time
(at most about 2 MiB of text) besides the arrays that it returns: 12 bytes per token, in memory or in a file.
Its cost is that of the tokenizer, 1 to 2 MB of text per second and core. The order takes 8 bytes of memory
per context, and contexts are gathered as they are written.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from ....store.errors import SettingsError
from ....store.files import PARTIAL, writing
from ...errors import CorpusError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_BATCH_DOCUMENTS = 256
_BATCH_BYTES = 1 << 21
_PIECE_CHARACTERS = 1 << 20


class Contexts(NamedTuple):
    """Contexts, and the documents of their tokens.

    Attributes:
        tokens: int32 [contexts, positions].
        documents: int64 [contexts, positions], the index of each token's document, counted from 0 in
            the corpus's order; for the first token of a context that of the next token.
        n_documents: documents read from the corpus.
        n_left_out: documents among them that were not used: empty, or with ``truncate`` shorter than
            a context.
    """

    tokens: NDArray[np.int32]
    documents: NDArray[np.int64]
    n_documents: int
    n_left_out: int


class SpecialTokens(NamedTuple):
    """The special tokens of a tokenizer.

    Attributes:
        first: the id that every context begins with: BOS, else CLS, else None.
        separator: EOS, which ends each packed document; None where the tokenizer has none.
        ids: all special ids, sorted.
        first_is: ``bos``, ``cls`` or None.
    """

    first: int | None
    separator: int | None
    ids: tuple[int, ...]
    first_is: str | None


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> SpecialTokens:
    """The special tokens of ``tokenizer``."""
    bos, cls, eos = (
        cast("int | None", getattr(tokenizer, f"{name}_token_id")) for name in ("bos", "cls", "eos")
    )
    ids = cast("list[int | None]", tokenizer.all_special_ids)  # None: named, but not in the table
    first, first_is = (bos, "bos") if bos is not None else (cls, "cls")
    return SpecialTokens(
        first=first,
        separator=eos,
        ids=tuple(sorted({i for i in ids if i is not None})),
        first_is=first_is if first is not None else None,
    )


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A digest of ``tokenizer``, 64 hexadecimal digits, equal on every machine.

    For a fast tokenizer of its ``tokenizer.json`` without truncation and padding, which calls change;
    for others of the sorted vocabulary. Both include the special ids.
    """
    special = special_tokens(tokenizer)
    content: dict[str, object]
    if tokenizer.is_fast:
        content = json.loads(cast("PreTrainedTokenizerFast", tokenizer).backend_tokenizer.to_str())
        content |= {"truncation": None, "padding": None}
    else:
        content = {"vocabulary": tokenizer.get_vocab()}
    canonical = json.dumps([content, special._asdict()], sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def take_contexts(
    documents: Iterable[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    n_contexts: int,
    context_length: int,
    packing: Literal["pack", "truncate"] = "pack",
    skip_contexts: int = 0,
    progress: Callable[[int], None] | None = None,
    folder: Path | None = None,
) -> Contexts:
    """The first contexts of the corpus, in its order, after the skipped ones.

    Each context begins with BOS (else CLS, if there is one), followed by tokens of documents. ``pack``
    joins all documents, each ended by EOS if there is one, and cuts the stream into contexts; the
    incomplete last one is dropped. ``truncate`` takes the beginning of each document that is long
    enough. Text that only looks like a special token (``<bos>``) is tokenised as text, if the
    tokenizer supports that.

    Documents above 1,048,576 characters are tokenised in pieces, cut at a line's end if there is one;
    so text files may have any size, and only the part in use is tokenised.

    Args:
        documents: texts; read once, and only as far as needed.
        tokenizer: of the language model.
        n_contexts: number of contexts to take.
        context_length: tokens per context, including the first (BOS or CLS).
        packing: ``pack`` or ``truncate``.
        skip_contexts: number of contexts to skip before.
        progress: called now and then with the number of contexts taken.
        folder: where a file of no name holds the result, so that the system may take its memory back; by
            default it is in memory.

    Raises:
        SettingsError: a number out of range, a packing that is none, more than memory holds.
        CorpusError: the corpus has fewer contexts.
        StoreWriteError: the disk has no room for the file.
    """
    if context_length < 2:
        raise SettingsError(f"contexts of {context_length} tokens hold no text; use 2 or more")
    if n_contexts < 1:
        raise SettingsError(f"--contexts is {n_contexts}; it must be at least 1")
    if skip_contexts < 0:
        raise SettingsError(f"--skip-contexts is {skip_contexts}; it must be at least 0")
    if packing not in ("pack", "truncate"):
        raise SettingsError(f"packing {packing!r} does not exist; use pack or truncate")
    tokens, origins = _empty(n_contexts, context_length, folder)
    special = special_tokens(tokenizer)
    n_first = 0 if special.first is None else 1
    body = context_length - n_first

    # Contexts are cut from one stream of tokens. With `truncate`, each document that is long
    # enough contributes exactly the body of one context.
    begin, end = skip_contexts * body, (skip_contexts + n_contexts) * body
    filled = n_documents = n_left_out = 0
    is_empty = True
    pieces = _pieces(documents, packing, context_length)
    while filled < end:
        batch = _batch(pieces, packing, body, end - filled)
        if not batch:
            raise _too_few(filled // body, n_contexts, skip_contexts, context_length, n_left_out)
        for piece, row in zip(batch, _encoded(batch, tokenizer), strict=True):
            n_documents = piece.document + 1
            ids = row
            if packing == "truncate":
                ids = row[:body] if len(row) >= body else []
            is_empty = is_empty and not ids
            if piece.is_last:
                if is_empty:
                    n_left_out += 1
                elif packing == "pack" and special.separator is not None:
                    ids = [*ids, special.separator]
                is_empty = True
            start, stop = max(filled, begin), min(filled + len(ids), end)
            if start < stop:
                rows, columns = np.divmod(np.arange(start - begin, stop - begin), body)
                tokens[rows, columns + n_first] = ids[start - filled : stop - filled]
                origins[rows, columns + n_first] = piece.document
            filled = min(filled + len(ids), end)
            if filled == end:
                break
        if progress is not None:
            progress(max(0, filled - begin) // body)
    tokens[:, :n_first] = special.first or 0  # only now, so that rows that are never filled take no memory
    origins[:, :n_first] = origins[:, n_first : n_first + 1]
    return Contexts(tokens, origins, n_documents, n_left_out)


class _Piece(NamedTuple):
    """Text that is tokenised together: a document, or a part of a very long one."""

    document: int
    text: str
    is_last: bool


def _pieces(documents: Iterable[str], packing: str, context_length: int) -> Iterator[_Piece]:
    for document, text in enumerate(documents):
        if packing == "truncate":  # no text of interest has tokens of 64 characters on average
            longest = max(_PIECE_CHARACTERS, 64 * context_length)
            yield _Piece(document, text[:longest], is_last=True)
            continue
        start = 0
        while len(text) - start > _PIECE_CHARACTERS:
            stop = start + _PIECE_CHARACTERS
            stop = text.rfind("\n", start + _PIECE_CHARACTERS // 2, stop) + 1 or stop
            yield _Piece(document, text[start:stop], is_last=False)
            start = stop
        yield _Piece(document, text[start:], is_last=True)


def _batch(pieces: Iterator[_Piece], packing: str, body: int, missing: int) -> list[_Piece]:
    """Pieces to tokenise together, no more than ``missing`` tokens need.

    Hardly any tokenizer makes more tokens of a text than its bytes plus one; a separator may follow.
    """
    batch: list[_Piece] = []
    n_bytes = most_tokens = 0
    for piece in pieces:
        batch.append(piece)
        piece_bytes = len(piece.text.encode())
        n_bytes += piece_bytes
        most_tokens += body if packing == "truncate" else piece_bytes + 2
        if len(batch) == _BATCH_DOCUMENTS or n_bytes >= _BATCH_BYTES or most_tokens >= missing:
            break
    return batch


def _encoded(batch: list[_Piece], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    return encode(tokenizer, [piece.text for piece in batch], split_special_tokens=True)["input_ids"]


def encode(tokenizer: "PreTrainedTokenizerBase", text: str | list[str], **options: Any) -> dict[str, Any]:
    """What a tokenizer makes of a text, or of several: nothing added, padded or cut off.

    Args:
        tokenizer: of the model.
        text: one text, or a list of them.
        **options: of the tokenizer's own, e.g. ``return_offsets_mapping``.
    """
    encoding = tokenizer(
        text,
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # otherwise it warns about every text longer than the model's context
        **options,
    )
    return cast("dict[str, Any]", encoding)


def _empty(
    n_contexts: int, context_length: int, folder: Path | None
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Room for the result; int32 and int64 [contexts, positions]."""
    shape = (n_contexts, context_length)
    if folder is not None:
        return _in_a_file(folder, shape, np.int32), _in_a_file(folder, shape, np.int64)
    try:
        return np.empty(shape, np.int32), np.empty(shape, np.int64)
    except (MemoryError, ValueError, OverflowError):  # the last two: too large a number
        raise SettingsError(
            f"{n_contexts:,} contexts of {context_length:,} tokens need "
            f"{12 * n_contexts * context_length / 1e9:,.0f} GB of memory; lower --contexts"
        ) from None


def _in_a_file(folder: Path, shape: tuple[int, int], dtype: type[np.integer]) -> NDArray[Any]:
    """An array of zeros in an unnamed file, which is deleted with the array."""
    n_bytes = shape[0] * shape[1] * np.dtype(dtype).itemsize
    with writing(folder), tempfile.TemporaryFile(prefix=".", suffix=PARTIAL, dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # reports a full disk now, and not by a signal later
            os.posix_fallocate(file.fileno(), 0, n_bytes)
        return np.memmap(file, dtype, "r+", shape=shape).view(np.ndarray)


def _too_few(
    n_found: int, n_contexts: int, skip_contexts: int, context_length: int, n_left_out: int
) -> CorpusError:
    n_left = n_found - skip_contexts
    message = f"the corpus has {max(0, n_left):,} contexts of {context_length:,} tokens"
    if skip_contexts:
        message += f" after the {min(n_found, skip_contexts):,} skipped"
    message += f", but {n_contexts:,} were requested"
    if n_left_out:
        message += f" ({n_left_out:,} documents are empty or too short)"
    if n_left > 0:
        return CorpusError(f"{message}; use --contexts {n_left} or fewer, or a larger corpus")
    if n_found:
        return CorpusError(f"{message}; lower --skip-contexts below {n_found}, or use a larger corpus")
    return CorpusError(f"{message}; use a larger corpus, or shorter contexts (--context-length)")


def order_of_contexts(n_contexts: int, *, seed: int, held_out: int) -> NDArray[np.int64]:
    """A random permutation by the seed, so that few neighbours share a document.

    The last ``held_out`` contexts stay last; both parts are permuted separately.

    Args:
        n_contexts: number of contexts.
        seed: 0 or more.
        held_out: how many contexts, counted from the end, are held out.

    Returns:
        Which context of the corpus's order comes in each place; int64 [contexts].

    Raises:
        SettingsError: a negative seed, or more contexts held out than there are.
    """
    if seed < 0:
        raise SettingsError(f"seed {seed} is negative; use 0 or more")
    if not 0 <= held_out <= n_contexts:
        raise SettingsError(f"{held_out} of {n_contexts} contexts cannot be held out")
    n_training = n_contexts - held_out
    return np.concatenate(
        [
            np.random.Generator(np.random.PCG64([seed, 0])).permutation(n_training),
            np.random.Generator(np.random.PCG64([seed, 1])).permutation(held_out) + n_training,
        ]
    )


class InOrder:
    """Rows of an array in another order, gathered on access."""

    def __init__(self, rows: NDArray[Any], order: NDArray[np.int64]) -> None:
        """Rows [n, …], and the index of the row in each place, [n]."""
        self._rows, self._order = rows, order

    def __getitem__(self, places: slice) -> NDArray[Any]:
        """The rows of some places; a copy."""
        indices = self._order[places]
        by_index = np.argsort(indices)  # the order in the file
        gathered = np.empty((len(indices), *self._rows.shape[1:]), self._rows.dtype)
        gathered[by_index] = self._rows[indices[by_index]]
        return gathered


def held_out_contexts(n_contexts: int, fraction: float, chunk_contexts: int = 8) -> int:
    """How many contexts are held out, so that those for training fill whole chunks.

    The training part is the number of chunks nearest to what ``fraction`` leaves (of two equally
    near ones, the even one), but at least one chunk and less than all contexts. Nothing is held
    out if ``fraction`` is 0 or there is no more than one chunk.

    Args:
        n_contexts: contexts in all.
        fraction: part to hold out, 0 to 0.5.
        chunk_contexts: contexts in a chunk.

    Raises:
        SettingsError: ``fraction`` lies outside 0 to 0.5.

    >>> held_out_contexts(4096, 0.05)
    208
    """
    if not 0 <= fraction <= 0.5:
        raise SettingsError(f"held-out fraction {fraction} is not between 0 and 0.5; use e.g. 0.05")
    if fraction == 0 or n_contexts <= chunk_contexts:
        return 0
    most_chunks = (n_contexts - 1) // chunk_contexts
    chunks = round(n_contexts * (1 - fraction) / chunk_contexts)
    return n_contexts - chunk_contexts * min(max(chunks, 1), most_chunks)
