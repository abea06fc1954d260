"""Passages: the tokens of a context that follow each other in one document, with the text they stand in.

Where the documents can be had again, each is tokenised once, and a context's run of token ids is sought in
it: what stands there once has its place in the whole document. What is found twice or never is left out and
counted. Without documents the text is what the tokens of the context decode to, and what came before it is
not known.

Cost: tokenising the documents that the contexts come from (about 1 MB a second), or decoding each token
twice (about 30,000 tokens a second).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from ...harvest.text.contexts import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DECODED_BEFORE = 4
"""Tokens decoded before each token: a character may be spread over as many."""


class Passage(NamedTuple):
    """Neighbouring tokens of one context, all of one document."""

    context: int
    positions: NDArray[np.int64]
    """Where they stand in the context; [tokens]."""
    document: int
    text: str
    spans: NDArray[np.int64]
    """Characters [start, stop) of ``text`` that each token stands for; [tokens, 2]."""
    is_whole: bool
    """Whether ``text`` is all of the document; else it is what these tokens decode to."""


class Alignment(NamedTuple):
    """How many runs of token ids were sought in their documents, and what became of them."""

    runs: int
    found: int
    ambiguous: int
    """Found more than once; left out."""
    missing: int
    """Not found; left out."""


class Run(NamedTuple):
    """Positions [start, stop) of a context that one document fills."""

    context: int
    start: int
    stop: int
    document: int
    begins: bool
    """Whether the document is known to begin here."""
    ends: bool
    """Whether the document is known to end here."""


def runs(
    contexts: NDArray[np.int64],
    tokens: NDArray[np.int32],
    documents: NDArray[np.int64],
    first: int | None,
    separator: int | None,
) -> Iterator[Run]:
    """The runs of each context, without the first token of the context and separators.

    Args:
        contexts: index of each context; [contexts].
        tokens: ids; [contexts, positions].
        documents: which document each token came from; [contexts, positions].
        first: the id that every context begins with, if any.
        separator: the id that ends a document, if any.
    """
    for context, ids, origins in zip(contexts.tolist(), tokens, documents, strict=True):
        begin = 0 if first is None else 1
        is_edge = np.diff(origins[begin:]) != 0
        edges = [begin, *(np.flatnonzero(is_edge) + begin + 1).tolist(), len(ids)]
        for start, stop in pairwise(edges):
            ends = separator is not None and bool(ids[stop - 1] == separator)
            stop -= ends
            if stop > start:
                yield Run(context, start, stop, int(origins[start]), start > begin, ends)


def passages_of_documents(
    found_runs: Sequence[Run],
    tokens: Mapping[int, NDArray[np.int32]],
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
) -> tuple[list[Passage], Alignment]:
    """Passages whose text is the whole document.

    Args:
        found_runs: of all contexts.
        tokens: ids of each context; [positions].
        texts: the documents, in the corpus's order.
        tokenizer: a fast one, which tells offsets.
    """
    passages: list[Passage] = []
    n_ambiguous = n_missing = 0
    by_document = sorted(found_runs, key=lambda run: (run.document, run.context, run.start))
    document, ids, offsets = -1, b"", np.empty((0, 2), np.int64)
    for run in by_document:
        if run.document != document:
            document = run.document
            ids, offsets = _tokenised(texts[document] if document < len(texts) else "", tokenizer)
        wanted = tokens[run.context][run.start : run.stop]
        places = _places(ids, wanted, run)
        if len(places) != 1:
            n_ambiguous += len(places) > 1
            n_missing += not places
            continue
        spans = offsets[places[0] : places[0] + len(wanted)]
        positions = np.arange(run.start, run.stop)
        passages.append(Passage(run.context, positions, document, texts[document], spans, is_whole=True))
    return passages, Alignment(len(by_document), len(passages), n_ambiguous, n_missing)


def _tokenised(text: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[bytes, NDArray[np.int64]]:
    """Ids of a document as bytes of int32, and the characters that each stands for; [tokens, 2]."""
    encoding = encode(tokenizer, text, split_special_tokens=True, return_offsets_mapping=True)
    offsets = np.array(encoding["offset_mapping"], np.int64).reshape(-1, 2)
    return np.array(encoding["input_ids"], np.int32).tobytes(), offsets


def _places(ids: bytes, wanted: NDArray[np.int32], run: Run) -> list[int]:
    """Where in a document a run may stand: none, one, or the first two."""
    sought = wanted.tobytes()
    places: list[int] = []
    at = ids.find(sought)
    while at >= 0 and len(places) < 2:
        place, odd = divmod(at, wanted.itemsize)
        is_first, is_last = at == 0, at + len(sought) == len(ids)
        if not odd and (is_first or not run.begins) and (is_last or not run.ends):
            places.append(place)
        at = ids.find(sought, at + 1)
    return places


def passages_of_contexts(
    found_runs: Sequence[Run], tokens: Mapping[int, NDArray[np.int32]], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[Passage]:
    """Passages whose text is what their own tokens decode to.

    Args:
        found_runs: of all contexts.
        tokens: ids of each context; [positions].
        tokenizer: the store's.
    """
    for run in found_runs:
        ids = tokens[run.context][run.start : run.stop].tolist()
        before = [ids[max(0, i - _DECODED_BEFORE) : i] for i in range(len(ids))]
        shorter = _decoded(before, tokenizer)
        longer = _decoded([[*some, token] for some, token in zip(before, ids, strict=True)], tokenizer)
        pieces = [long[len(short) :] for short, long in zip(shorter, longer, strict=True)]
        stops = np.cumsum([len(piece) for piece in pieces])
        spans = np.stack([np.concatenate([[0], stops[:-1]]), stops], axis=1)
        positions = np.arange(run.start, run.stop)
        yield Passage(run.context, positions, run.document, "".join(pieces), spans, is_whole=False)


def _decoded(rows: list[list[int]], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    decode = cast("Callable[..., list[str]]", tokenizer.batch_decode)  # pyright: ignore[reportUnknownMemberType]
    found = decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    # Of a character whose bytes are not all there nothing is shown, so that its last token shows it.
    return [text.strip("\ufffd") for text in found]
