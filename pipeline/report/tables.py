"""Runs as tables of words, the same for a terminal, a page and Markdown.

A row is one run, or where a sweep made it with several seeds the mean of them, ± their standard deviation.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePath
from typing import NamedTuple

from .comparison import Finding
from .measured import Measured, Study, mean_and_deviation
from .paper.claims import Judged
from .verdicts import Answer

MAX_RANGES = 8
"""As many as fit beside each other."""


class Table(NamedTuple):
    """Words in rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    n_left: int = 1
    """How many columns, the first, hold words; the others hold figures."""

    def without(self, name: str) -> "Table":
        """The same less one column."""
        place = list(self.columns).index(name)
        return self._columns([n for n in range(len(self.columns)) if n != place])

    def halves(self) -> "list[Table]":
        """Two tables with the same words, and half of the figures each."""
        first, n = self.n_left, len(self.columns)
        middle = (first + n + 1) // 2
        return [self._columns([*range(first), *part]) for part in (range(first, middle), range(middle, n))]

    def _columns(self, places: Sequence[int]) -> "Table":
        rows = [[row[place] for place in places] for row in self.rows]
        n_left = sum(place < self.n_left for place in places)
        return Table(self.title, [self.columns[place] for place in places], rows, n_left)


class Series(NamedTuple):
    """Runs that differ in nothing but their seed."""

    label: str
    runs: Sequence[Measured]
    is_control: bool = False

    def mean(self, value: Callable[[Measured], float | None]) -> tuple[float, float] | None:
        """Mean and standard deviation over those that tell."""
        return mean_and_deviation(map(value, self.runs))

    def list_mean(self, *keys: str) -> list[float | None]:
        """Means of the entries of a list of ``evaluation.json``; None where a run does not tell."""
        lists = [run.series(*keys) for run in self.runs]
        if not lists or len({len(found) for found in lists}) > 1:
            return []
        return [
            sum(told) / len(told)
            if len(told := [v for v in values if v is not None]) == len(values)
            else None
            for values in zip(*lists, strict=True)
        ]


POSITION_ANSWERS = {
    Answer.HOLDS: "helped",
    Answer.DOES_NOT_HOLD: "did not help",
    Answer.CANNOT_BE_TOLD: "cannot be told",
}


def series_of_runs(runs: Iterable[Measured]) -> list[Series]:
    """Each run with scores for itself, called by its folder's name, and by its layer where these differ.

    A run that was scored on another store than it was trained from says so.
    """
    scored = [run for run in runs if run.missing is None]
    layers = {run.score("layer") for run in scored}
    return [
        Series(
            PurePath(run.folder).name
            + ("" if len(layers) == 1 else f", layer {run.score('layer') or 0:.0f}")
            + (", on another store" if run.is_of_another_store else ""),
            [run],
        )
        for run in scored
    ]


def series_of_studies(studies: Iterable[Study]) -> list[Series]:
    """All seeds of each name, each training once, called as it is first called."""
    found: dict[tuple[str, ...], Series] = {}
    for study in studies:
        for name in study.names():
            runs = list(study.series(name).values())
            is_control = any(run.name == name and run.control for run in study.runs)
            if runs:
                found.setdefault(tuple(sorted(run.folder for run in runs)), Series(name, runs, is_control))
    return list(found.values())


def scores(series: Sequence[Series]) -> Table:
    """Size, sparsity and what is left unexplained, a line each."""
    layers = {run.score("layer") for one in series for run in one.runs}
    layer = f", layer {layers.pop() or 0:.0f}" if len(layers) == 1 else ""
    columns = ["run", "architecture", "features", "parameters", "L0", "FVU", "dead"]
    timed = any(run.score("training_seconds") is not None for one in series for run in one.runs)
    rows = [
        [
            one.label,
            one.runs[0].architecture,
            _count(one, "dictionary_size"),
            _count(one, "n_parameters") + _overhead(one),
            _decimals(one, "l0", 1),
            _fvu(one),
            _dead(one),
            *([_time(one)] if timed else []),
        ]
        for one in series
    ]
    title = f"scores on the held-out part{layer}"
    return Table(title, [*columns, *(["time"] if timed else [])], rows, n_left=2)


def by_range(series: Sequence[Series]) -> list[Table]:
    """FVU by position range: a table for runs of the same ranges, of at most ``MAX_RANGES`` of them."""
    found: list[Table] = []
    for ranges in dict.fromkeys(tuple(one.runs[0].ranges) for one in series):
        told = [(one.label, one.list_mean("fvu_by_range")) for one in series]
        same = [
            (label, values)
            for (label, values), one in zip(told, series, strict=True)
            if tuple(one.runs[0].ranges) == ranges and len(values) == len(ranges)
        ]
        for start in range(0, len(ranges), MAX_RANGES):
            part = slice(start, start + MAX_RANGES)
            rows = [[label, *map(_number, values[part])] for label, values in same]
            found.append(Table("FVU by position range", ["run", *ranges[part]], rows))
    return found


Measure = tuple[str, Callable[[Measured], float | None]]

_BEYOND: dict[str, tuple[Measure, ...]] = {
    "what the language model loses": (
        ("CE-loss recovered", lambda run: run.score("ce_loss", "recovered")),
        ("KL in nats", lambda run: run.score("ce_loss", "kl")),
    ),
    "accuracy of sparse probes": tuple(
        (f"{what}, k = {k}", lambda run, what=what, k=k: run.probe(what, k))
        for what in ("codes", "activations")
        for k in ("1", "5", "all")
    ),
}


def beyond(series: Sequence[Series]) -> list[Table]:
    """What is measured only where ``posae evaluate`` is asked to; a line to each run that has some of it."""
    found: list[Table] = []
    for title, all_measures in _BEYOND.items():
        measures = [(name, value) for name, value in all_measures if any(map(_told(value), series))]
        told = [(one.label, [one.mean(value) for _, value in measures]) for one in series]
        rows = [
            [label, *(f"{mean[0]:.3f}" if mean else "-" for mean in means)]
            for label, means in told
            if any(means)
        ]
        found.append(Table(title, ["run", *(name for name, _ in measures)], rows))
    return [table for table in found if table.rows]


_RETENTION: Measure = ("retention", lambda run: run.score("retention"))
_BASE: Measure = ("FVU of base", lambda run: run.score("fvu_base"))
_KEPT: Measure = ("decoder kept", lambda run: run.decoder_kept)
_VARIANCE: Measure = ("gradient variance", lambda run: run.gradient_variance)
_CONVERGED: Measure = ("converged", lambda run: None if run.converged is None else float(run.converged))

_POSITION: Measure = ("of position", lambda run: run.score("position_features", "features"))
_SLOTS: Measure = ("their slots", lambda run: run.score("position_features", "slots"))

MEASURES: dict[str, tuple[Measure, ...]] = {
    "position": (_POSITION, _SLOTS),
    "layer-norm": (_VARIANCE,),
    "residual": (_RETENTION, _BASE),
    "ranges": (_BASE,),
    "warmup": (_BASE, _KEPT),
    "dropout": (_RETENTION, _BASE),
    "masks": (_CONVERGED,),
    "overhead": (_BASE,),
    "curricula": (_RETENTION, _BASE, _KEPT),
    "published-code": (_BASE,),
}
"""What a study is about, beside the FVU."""


def of_study(study: Study) -> Table:
    """The runs of one study, with what it is about."""
    series = [Series(name, list(study.series(name).values())) for name in study.names()]
    roles = {run.name: run.control for run in study.runs}
    # Of a study with no other controls the column says what these are for.
    hidden = {"agnostic"} if {*roles.values()} <= {None, "agnostic"} else set[str | None]()
    series = [one for one in series if one.runs and roles[one.label] not in hidden]
    measures = [
        (name, value) for name, value in MEASURES.get(study.study, ()) if any(map(_told(value), series))
    ]
    beside = [_beside_agnostic(study, one) for one in series]
    columns = ["run", "seeds", "parameters", "L0", "FVU"]
    columns += [*(["to agnostic"] if any(beside) else []), *(name for name, _ in measures)]
    rows = [
        [
            one.label,
            str(len(one.runs)),
            _count(one, "n_parameters"),
            _decimals(one, "l0", 1),
            _fvu(one),
            *([change] if any(beside) else []),
            *(_significant(one.mean(value)) for _, value in measures),
        ]
        for one, change in zip(series, beside, strict=True)
    ]
    title = f"{study.study}: {study.title}" if study.title not in ("", study.study) else study.study
    return Table(title, columns, rows)


def _beside_agnostic(study: Study, one: Series) -> str:
    """How much more it leaves unexplained than the agnostic control of the same seed; empty without one."""
    controls = study.control(one.label, "agnostic") or {}
    pairs = [
        (run.score("fvu"), controls[seed].score("fvu"))
        for seed, run in study.series(one.label).items()
        if seed in controls
    ]
    found = mean_and_deviation(ours / theirs - 1 for ours, theirs in pairs if ours is not None and theirs)
    return f"{found[0]:+.1%}" if found else ""


def position(found: Sequence[Finding]) -> Table:
    """Whether position helped the runs that have more than an agnostic control; all, if none has."""
    full = [finding for finding in found if {"shuffled", "more-active"} - {*finding.missing}]
    rows = [[finding.name, POSITION_ANSWERS[finding.answer], finding.words] for finding in full or found]
    return Table("did position help", ["run", "answer", "why"], rows, n_left=3)


def claims(found: Sequence[Judged]) -> Table:
    """What became of the paper's claims; of those that no run is about nothing."""
    rows = [
        [f"“{one.claim.says}”", one.verdict.answer.value, one.verdict.reason] for one in found if one.is_asked
    ]
    return Table("the paper's claims", ["the paper says", "verdict", "measured"], rows, n_left=3)


def missing(runs: Iterable[Measured]) -> Table:
    """Runs without scores."""
    rows = [[run.folder, run.missing] for run in runs if run.missing]
    return Table("without scores", ["run", "why"], rows, n_left=2)


def _told(value: Callable[[Measured], float | None]) -> Callable[[Series], bool]:
    return lambda one: one.mean(value) is not None


def _count(one: Series, score: str) -> str:
    found = one.mean(lambda run: run.score(score))
    return f"{found[0]:,.0f}" if found else "-"


def _overhead(one: Series) -> str:
    found = one.mean(lambda run: run.overhead)
    return f" (+{found[0]:.0%})" if found and found[0] else ""


def _decimals(one: Series, score: str, digits: int) -> str:
    found = one.mean(lambda run: run.score(score))
    return f"{found[0]:.{digits}f}" if found else "-"


def _dead(one: Series) -> str:
    found = one.mean(lambda run: run.score("dead_fraction"))
    return f"{found[0]:.1%}" if found else "-"


def _fvu(one: Series) -> str:
    found = one.mean(lambda run: run.score("fvu"))
    if not found:
        return "-"
    return f"{found[0]:.4f}" + (f" ± {found[1]:.4f}" if len(one.runs) > 1 else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _time(one: Series) -> str:
    found = one.mean(lambda run: run.score("training_seconds"))
    return f"{found[0]:,.0f} s" if found else "-"


def _significant(found: tuple[float, float] | None) -> str:
    if not found:
        return "-"
    return f"{found[0]:.3g}" if abs(found[0]) < 1000 else f"{found[0]:,.0f}"
