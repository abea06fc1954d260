"""What a reader of tables should know first: whose scores cannot be set beside each other, whose are bad.

From what runs' files say, so it costs nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from .measured import Measured

_MOST_NAMED = 4
"""So many runs are named, of others it is said how many they are."""


class Note(NamedTuple):
    """A sentence about some runs."""

    words: str
    runs: Sequence[str] = ()
    """Their folders."""


@dataclass
class _Activations:
    """What some runs were scored on: a layer of a store."""

    path: str
    digests: Mapping[str, Any]
    layer: int | None
    folders: list[str] = field(default_factory=list[str])

    def is_like(self, other: "_Activations") -> bool:
        """Whether it is the same: by digests where both have some, else by where the store lies."""
        if self.layer != other.layer:
            return False
        if self.digests and other.digests:
            return self.digests == other.digests
        return self.path == other.path

    def words(self, *, with_digest: bool) -> str:
        """Store and layer, and if asked for what tells it from another of the same place."""
        layer = "" if self.layer is None else f" layer {self.layer}"
        digest = f" (activations {self._digest()})" if with_digest and self.digests else ""
        return f"{named(self.folders)}: {self.path}{layer}{digest}"

    def _digest(self) -> str:
        of_layer = [value for name, value in self.digests.items() if name not in ("tokens", "stats")]
        return str((of_layer or [*self.digests.values()])[0])[:8]


def notes(runs: Iterable[Measured]) -> list[Note]:
    """What is to be said of runs that stand in one table; those without scores do not count."""
    scored = [run for run in runs if run.missing is None]
    found = [_different_activations(scored), _above_one(scored)]
    return [note for note in found if note]


def left_out(n: int) -> Note:
    """That ``n`` claims are not shown."""
    what, are = ("claim", "is") if n == 1 else ("claims", "are")
    return Note(
        f"{n} more {what} of the paper {are} left out for lack of runs (examples/paper has sweeps for all)"
    )


def named(folders: Sequence[str]) -> str:
    """A list of runs that stays short.

    >>> named(["a", "b"]), named(["a", "b", "c", "d", "e", "f"])
    ('a, b', 'a, b, c, d and 2 more')
    """
    rest = len(folders) - _MOST_NAMED
    return ", ".join(folders[:_MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _different_activations(runs: Iterable[Measured]) -> Note | None:
    groups: list[_Activations] = []
    for run in runs:
        scored_on = _scored_on(run)
        if scored_on is None:
            continue
        group = next((group for group in groups if group.is_like(scored_on)), None)
        if group is None:
            groups.append(group := scored_on)
        group.folders.append(run.folder)
    if len(groups) < 2:
        return None
    places = [(group.path, group.layer) for group in groups]
    told = [group.words(with_digest=places.count((group.path, group.layer)) > 1) for group in groups]
    is_one_store = all(group.path == groups[0].path for group in groups) and len({*places}) == len(places)
    what = "layers" if is_one_store else "stores"
    return Note(
        f"these runs are of different {what}; their FVU cannot be compared: {'; '.join(told)}",
        [folder for group in groups for folder in group.folders],
    )


def _scored_on(run: Measured) -> _Activations | None:
    """None where its files do not tell."""
    places = [_object(run.evaluation.get("store")), _object(run.config.get("store"))]
    # What is not told of the held-out part is told of what it was trained from.
    store = next((place for place in places if place.get("path") is not None), None)
    if store is None:
        return None
    layer = run.score("layer")
    return _Activations(str(store["path"]), _object(store.get("read")), None if layer is None else int(layer))


def _above_one(runs: Iterable[Measured]) -> Note | None:
    folders = [run.folder for run in runs if (run.score("fvu") or 0.0) > 1]
    if not folders:
        return None
    each = "it" if len(folders) == 1 else "each"
    return Note(
        f"FVU above 1, worse than the mean of all: {named(folders)}; {each} diverged or has not trained long "
        "enough",
        folders,
    )


def _object(value: Any) -> Mapping[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}
