"""What readers of tables should know first: scores that cannot be compared, are not held out, or are bad."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from .measured import Measured

_MOST_NAMED = 4
"""Of more runs than this, the others are counted."""


class Note(NamedTuple):
    """A sentence about some runs."""

    text: str
    runs: Sequence[str] = ()
    """Their folders."""


@dataclass
class _Activations:
    """A layer of a store, and the runs that were scored on it."""

    path: str
    digests: Mapping[str, Any]
    layer: int | None
    folders: list[str] = field(default_factory=list[str])

    def is_like(self, other: "_Activations") -> bool:
        """Whether it is the same: by digests where both have some, else by the store's path."""
        if self.layer != other.layer:
            return False
        if self.digests and other.digests:
            return self.digests == other.digests
        return self.path == other.path

    def text(self, *, with_digest: bool) -> str:
        """Runs, store and layer; and a digest, which tells it from others with the same path."""
        layer = "" if self.layer is None else f" layer {self.layer}"
        digest = f" (activations {self._digest()})" if with_digest and self.digests else ""
        return f"{named(self.folders)}: {self.path}{layer}{digest}"

    def _digest(self) -> str:
        of_layer = [value for name, value in self.digests.items() if name not in ("tokens", "stats")]
        return str((of_layer or [*self.digests.values()])[0])[:8]


def notes(runs: Iterable[Measured]) -> list[Note]:
    """Notes on runs that stand in one table; runs without scores do not count."""
    scored = [run for run in runs if run.missing is None]
    optional = [_different_activations(scored), _above_one(scored)]
    return [*(note for note in optional if note), *_not_held_out(scored)]


def left_out(n: int) -> Note:
    """That ``n`` claims are not shown."""
    what, are = ("claim", "is") if n == 1 else ("claims", "are")
    return Note(
        f"{n} more {what} of the paper {are} left out for lack of runs (examples/paper has sweeps for all)"
    )


def named(folders: Sequence[str]) -> str:
    """A short list of runs.

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
    texts = [group.text(with_digest=places.count((group.path, group.layer)) > 1) for group in groups]
    is_one_store = all(group.path == groups[0].path for group in groups) and len({*places}) == len(places)
    what = "layers" if is_one_store else "stores"
    return Note(
        f"these runs are of different {what}; their FVU cannot be compared: {'; '.join(texts)}",
        [folder for group in groups for folder in group.folders],
    )


def _scored_on(run: Measured) -> _Activations | None:
    """What a run was scored on; None where its files do not say."""
    places = [_object(run.evaluation.get("store")), _object(run.config.get("store"))]
    # Scores of older versions do not name the store; then it is the one that the run was trained from.
    store = next((place for place in places if place.get("path") is not None), None)
    if store is None:
        return None
    layer = run.score("layer")
    return _Activations(str(store["path"]), _object(store.get("read")), None if layer is None else int(layer))


def _not_held_out(runs: Sequence[Measured]) -> list[Note]:
    """Runs whose scores are of contexts that they were trained on, or may be."""
    of_runs: list[Note] = []
    unknown: list[str] = []
    for run in runs:
        n_seen, n_scored = run.n_seen_contexts, run.n_scored_contexts
        if n_seen:
            of = "" if n_scored is None else f" of the {n_scored:,}"
            text = (
                f"was trained on {n_seen:,}{of} contexts that it is scored on; these are not held-out scores"
            )
            of_runs.append(Note(f"{run.folder} {text}", [run.folder]))
        elif n_seen is None and run.is_of_another_store:
            unknown.append(run.folder)
    if unknown:
        each = "it was" if len(unknown) == 1 else "they were"
        text = f"scored on another store; whether {each} trained on the same contexts is unknown"
        of_runs.append(Note(f"{named(unknown)}: {text}", unknown))
    probed = [run.folder for run in runs if run.is_probed_on_seen_contexts]
    if probed:
        text = "rows of sparse probes come from all contexts, those that were trained on included"
        of_runs.append(Note(f"{named(probed)}: {text}", probed))
    return of_runs


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
