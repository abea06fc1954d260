"""Tasks that need no download: what a token is, from the text that it stands in; what a document is.

A task is a small function: from a passage to a label for each of its tokens (None: none), or from a
document's name to one label. Labels of a token are those of its first character that is no space, for
tokenizers join spaces to what follows; a token of spaces alone has labels of its own first character.

``token class`` and ``package`` need the document; the others make do with the decoded context, where
brackets count from its beginning, and nothing is said of a line whose beginning is not in it.
"""

import io
import keyword
import re
import tokenize
from bisect import bisect
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .passages import Passage

Labels = list[str | None]
"""One a token."""

_KINDS = ("space", "name", "keyword", "number", "string", "operator", "comment")
_KIND_OF_TOKEN = {
    tokenize.NUMBER: "number",
    tokenize.STRING: "string",
    tokenize.OP: "operator",
    tokenize.COMMENT: "comment",
    # Since Python 3.12 the parts of f-strings are tokens.
    **{getattr(tokenize, f"FSTRING_{p}", -1): "string" for p in ("START", "MIDDLE", "END")},
}
_DISTANCES = ("0-7", "8-23", "24-39", "40+")
_WORD = re.compile(r"[^\W\d]\w+")


class _Source(NamedTuple):
    """A Python source, character by character; [characters]."""

    kinds: NDArray[np.uint8]
    """Index into ``_KINDS``."""
    depths: NDArray[np.int64]
    """Open brackets; a bracket itself stands outside."""


@lru_cache(maxsize=2)
def _source(text: str) -> _Source | None:
    """The source as Python's tokenizer sees it; None if it is none."""
    starts = np.cumsum([0, *(len(line) for line in io.StringIO(text))])
    kinds = np.zeros(len(text) + 1, np.uint8)
    steps = np.zeros(len(text) + 2, np.int64)
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            (row, column), (last_row, last_column) = token.start, token.end
            start, stop = starts[row - 1] + column, starts[min(last_row, len(starts)) - 1] + last_column
            kind = _KIND_OF_TOKEN.get(token.type, "space")
            if token.type == tokenize.NAME:
                kind = "keyword" if keyword.iskeyword(token.string) else "name"
            kinds[start:stop] = _KINDS.index(kind)
            if token.type == tokenize.OP and token.string in "([{":
                steps[stop] += 1
            elif token.type == tokenize.OP and token.string in ")]}":
                steps[start] -= 1
    except (tokenize.TokenError, SyntaxError):
        return None
    return _Source(kinds, np.cumsum(steps))


@lru_cache(maxsize=2)
def _inked(text: str) -> NDArray[np.int64]:
    """For each character the next that is no space, itself included; [characters + 1]."""
    marks = np.fromiter((not c.isspace() for c in text), np.bool_, len(text))
    where = np.where(marks, np.arange(len(text)), len(text))
    return np.append(np.minimum.accumulate(where[::-1])[::-1], len(text))


def _first_characters(passage: Passage) -> NDArray[np.int64]:
    """The character that decides about each token, -1 for a token that stands for none; [tokens]."""
    starts, stops = passage.spans.T
    inked = _inked(passage.text)[starts]
    return np.where(starts < stops, np.where(inked < stops, inked, starts), -1)


def token_class(passage: Passage) -> Labels:
    """Name, keyword, number, string, operator, comment or space, by Python's own tokenizer."""
    source = _source(passage.text) if passage.is_whole else None
    at = _first_characters(passage)
    if source is None:
        return [None] * len(at)
    return [_KINDS[source.kinds[i]] if i >= 0 else None for i in at]


def bracket_depth(passage: Passage) -> Labels:
    """How many brackets are open: 0, 1, 2, or 3 and more."""
    at = _first_characters(passage)
    if passage.is_whole:
        source = _source(passage.text)
        if source is None:
            return [None] * len(at)
        depths = source.depths
    else:
        depths = _counted_depths(passage.text)
    return [_at_most(int(depths[i]), 3) if i >= 0 else None for i in at]


def _counted_depths(text: str) -> NDArray[np.int64]:
    """Open brackets at each character; those that were opened before the text are not known."""
    depths = np.zeros(len(text), np.int64)
    depth = 0
    for i, character in enumerate(text):
        if character in ")]}":
            depth = max(0, depth - 1)
        depths[i] = depth
        depth += character in "([{"
    return depths


def indentation(passage: Passage) -> Labels:
    """How far the token's line is indented, in steps of four columns: 0, 1, 2, or 3 and more."""
    labels: Labels = []
    for at in _first_characters(passage).tolist():
        start = _line_start(passage, at)
        if start is None:
            labels.append(None)
            continue
        stop = passage.text.find("\n", start)
        line = passage.text[start : stop if stop >= 0 else len(passage.text)].expandtabs(4)
        inked = line.lstrip()
        labels.append(_at_most((len(line) - len(inked)) // 4, 3) if inked else None)
    return labels


def line_distance(passage: Passage) -> Labels:
    """Characters between the line's start and the token: 0-7, 8-23, 24-39, or 40 and more."""
    labels: Labels = []
    for at in _first_characters(passage).tolist():
        start = _line_start(passage, at)
        labels.append(None if start is None else _DISTANCES[bisect((8, 24, 40), at - start)])
    return labels


def _line_start(passage: Passage, at: int) -> int | None:
    if at < 0:
        return None
    start = passage.text.rfind("\n", 0, at) + 1
    return start if start > 0 or passage.is_whole else None


def first_use(passage: Passage) -> Labels:
    """Whether a word (in Python source: a name) comes first here or again, at the token that ends it.

    First means first in this passage: what the language model saw.
    """
    labels: Labels = [None] * len(passage.spans)
    text, stops = passage.text, passage.spans[:, 1]
    begin, end = int(passage.spans[0, 0]), int(stops[-1])
    source = _source(text) if passage.is_whole else None
    seen: set[str] = set()
    for word in _WORD.finditer(text, begin, end):
        start, stop = word.span()
        # A word that is cut by the passage's edge is not known.
        if start == begin and (not passage.is_whole or (start > 0 and _is_of_word(text[start - 1]))):
            continue
        if stop == end and (not passage.is_whole or (end < len(text) and _is_of_word(text[end]))):
            continue
        if source is not None and _KINDS[source.kinds[start]] != "name":
            continue
        labels[int(np.searchsorted(stops, stop - 1, "right"))] = "again" if word[0] in seen else "first"
        seen.add(word[0])
    return labels


def _is_of_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _at_most(number: int, most: int) -> str:
    return str(number) if number < most else f"{most}+"


def package(name: str) -> str:
    """The package of the standard library that a file belongs to."""
    first, slash, _ = name.partition("/")
    return first if slash else "(single modules)"


TOKEN_TASKS: dict[str, Callable[[Passage], Labels]] = {
    "token class": token_class,
    "bracket depth": bracket_depth,
    "indentation": indentation,
    "distance to line start": line_distance,
    "first use": first_use,
}

DOCUMENT_TASKS: dict[str, Callable[[str], str]] = {"package": package}
"""These label a context by the document that fills most of it."""
