"""Runs as tables of text, the same for a terminal, a page and Markdown.

A row is one run or, of a sweep with several seeds, their mean ± standard deviation.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePath
from typing import NamedTuple

from .comparison import Finding, over_agnostic
from .gains import L0_TOLERANCE
from .measured import Measured, Study, mean_and_deviation
from .paper.claims import Judged
from .verdicts import Answer

MAX_RANGES = 8
"""Position ranges that fit beside each other."""


class Table(NamedTuple):
    """Rows of text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    n_left: int = 1
    """How many columns, the first ones, hold text; the others hold figures."""

    def without(self, name: str) -> "Table":
        """The same table without one column."""
        place = list(self.columns).index(name)
        return self._columns([n for n in range(len(self.columns)) if n != place])

    def halves(self) -> "list[Table]":
        """Two tables with the same text, and half of the figures each."""
        first, n = self.n_left, len(self.columns)
        middle = (first + n + 1) // 2
        return [self._columns([*range(first), *part]) for part in (range(first, middle), range(middle, n))]

    def _columns(self, places: Sequence[int]) -> "Table":
        rows = [[row[place] for place in places] for row in self.rows]
        n_left = sum(place < self.n_left for place in places)
        return Table(self.title, [self.columns[place] for place in places], rows, n_left)


class Series(NamedTuple):
    """Runs that differ only in their seed."""

    label: str
    runs: Sequence[Measured]
    is_control: bool = False

    def mean(self, value: Callable[[Measured], float | None]) -> tuple[float, float] | None:
        """Mean and standard deviation over the runs that have the value."""
        return mean_and_deviation(map(value, self.runs))

    def list_mean(self, *keys: str) -> list[float | None]:
        """Means of the entries of a list of ``evaluation.json``; None where a run lacks the entry."""
        lists = [run.series(*keys) for run in self.runs]
        if not lists or len({len(values) for values in lists}) > 1:
            return []
        return [
            sum(known) / len(known)
            if len(known := [v for v in values if v is not None]) == len(values)
            else None
            for values in zip(*lists, strict=True)
        ]


POSITION_ANSWERS = {
    Answer.HOLDS: "helped",
    Answer.SIZE_UNCLEAR: "size unclear",
    Answer.SMALLER: "gain below 1 %",
    Answer.NO_DIFFERENCE: "no difference",
    Answer.CONTRADICTED: "did not help",
    Answer.NOT_ENOUGH_DATA: "not enough data",
}
"""What an answer is called where the claim is that position helps."""

COLOURS = {
    text: "green" if answer is Answer.HOLDS else "red" if answer.is_refuted else "yellow"
    for answer in Answer
    for text in (answer.value, POSITION_ANSWERS[answer])
}
"""Of the text of each answer: green where the claim holds, red where it is refuted."""


def series_of_runs(runs: Iterable[Measured]) -> list[Series]:
    """Each run with scores by itself, labelled with its folder's name, and with its layer where these differ.

    The label says if a run was scored on another store than it was trained from, or on contexts that it was
    trained on.
    """
    scored = [run for run in runs if run.missing is None]
    layers = {run.score("layer") for run in scored}
    return [
        Series(
            PurePath(run.folder).name
            + ("" if len(layers) == 1 else f", layer {run.score('layer') or 0:.0f}")
            + (", on another store" if run.is_of_another_store else "")
            + (", trained on its contexts" if run.n_seen_contexts else ""),
            [run],
        )
        for run in scored
    ]


def series_of_studies(studies: Iterable[Study]) -> list[Series]:
    """All seeds of each name. Runs that several studies name have the label of the first."""
    by_runs: dict[tuple[str, ...], Series] = {}
    for study in studies:
        for name in study.names():
            runs = list(study.series(name).values())
            is_control = any(run.name == name and run.control for run in study.runs)
            if runs:
                by_runs.setdefault(tuple(sorted(run.folder for run in runs)), Series(name, runs, is_control))
    return list(by_runs.values())


def scores(series: Sequence[Series]) -> Table:
    """Size, L0, FVU and dead features, a row each."""
    runs = [run for one in series for run in one.runs]
    layers = {run.score("layer") for run in runs}
    layer = f", layer {layers.pop() or 0:.0f}" if len(layers) == 1 else ""
    columns = ["run", "architecture", "features", "parameters", "L0", "FVU", "dead"]
    timed = any(run.score("training_seconds") is not None for run in runs)
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
    n_seen = sum(bool(run.n_seen_contexts) for run in runs)
    where = "on contexts that were trained on" if n_seen == len(runs) else "on the held-out part"
    some = ", some on contexts that were trained on" if 0 < n_seen < len(runs) else ""
    title = f"scores {where}{some}{layer}"
    return Table(title, [*columns, *(["time"] if timed else [])], rows, n_left=2)


def by_range(series: Sequence[Series]) -> list[Table]:
    """FVU by position range: a table for all runs of the same ranges, of at most ``MAX_RANGES`` of them."""
    tables: list[Table] = []
    for ranges in dict.fromkeys(tuple(one.runs[0].ranges) for one in series):
        means = [(one.label, one.list_mean("fvu_by_range")) for one in series]
        same = [
            (label, values)
            for (label, values), one in zip(means, series, strict=True)
            if tuple(one.runs[0].ranges) == ranges and len(values) == len(ranges)
        ]
        for start in range(0, len(ranges), MAX_RANGES):
            part = slice(start, start + MAX_RANGES)
            rows = [[label, *map(_number, values[part])] for label, values in same]
            tables.append(Table("FVU by position range", ["run", *ranges[part]], rows))
    return tables


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
    """Scores that ``posae evaluate`` measures only on request; a row for each run that has some."""
    tables: list[Table] = []
    for title, all_measures in _BEYOND.items():
        measures = [(name, value) for name, value in all_measures if any(map(_has(value), series))]
        means = [(one.label, [one.mean(value) for _, value in measures]) for one in series]
        rows = [
            [label, *(f"{mean[0]:.3f}" if mean else "-" for mean in some)]
            for label, some in means
            if any(some)
        ]
        tables.append(Table(title, ["run", *(name for name, _ in measures)], rows))
    return [table for table in tables if table.rows]


_RETENTION: Measure = ("retention", lambda run: run.score("retention"))
_BASE: Measure = ("FVU of base", lambda run: run.score("fvu_base"))
_KEPT: Measure = ("decoder kept", lambda run: run.decoder_kept)
_VARIANCE: Measure = ("gradient variance", lambda run: run.gradient_variance)
_CONVERGED: Measure = ("converged", lambda run: None if run.converged is None else float(run.converged))

_POSITION: Measure = ("position features", lambda run: run.score("position_features", "features"))
_SLOTS: Measure = ("of them per token", lambda run: run.score("position_features", "slots"))

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


def of_study(study: Study) -> Table:
    """The runs of one study, with the measures of its question."""
    series = [Series(name, list(study.series(name).values())) for name in study.names()]
    roles = {run.name: run.control for run in study.runs}
    # A study with no other controls has the agnostic one for its column alone.
    hidden = {"agnostic"} if {*roles.values()} <= {None, "agnostic"} else set[str | None]()
    series = [one for one in series if one.runs and roles[one.label] not in hidden]
    measures = [
        (name, value) for name, value in MEASURES.get(study.study, ()) if any(map(_has(value), series))
    ]
    gains = [_over_agnostic(study, one.label) for one in series]
    columns = ["run", "seeds", "parameters", "L0", "FVU"]
    columns += [*([GAIN] if any(gains) else []), *(name for name, _ in measures)]
    rows = [
        [
            one.label,
            str(len(one.runs)),
            _count(one, "n_parameters"),
            _decimals(one, "l0", 1),
            _fvu(one),
            *([gain] if any(gains) else []),
            *(_significant(one.mean(value)) for _, value in measures),
        ]
        for one, gain in zip(series, gains, strict=True)
    ]
    title = f"{study.study}: {study.title}" if study.title not in ("", study.study) else study.study
    return Table(title, columns, rows)


GAIN = "to agnostic at equal L0"


def _over_agnostic(study: Study, name: str) -> str:
    """How much more it leaves unexplained than its agnostic control: the figure of ``comparison``.

    Empty without a control.
    """
    if not (study.control(name, "agnostic") or {}).keys() & study.series(name).keys():
        return ""
    comparison = over_agnostic(study, name)
    return comparison.gain.negated().change_alone() if comparison and comparison.gain else "L0 differs"


def position(findings: Sequence[Finding]) -> Table:
    """Whether position helped the runs that have more than an agnostic control; all, if none has."""
    full = [finding for finding in findings if {"shuffled", "more-active"} - {*finding.missing}]
    rows = [[finding.name, POSITION_ANSWERS[finding.answer], finding.reason] for finding in full or findings]
    title = (
        f"did position help, at equal L0 (within {100 * L0_TOLERANCE:g} %, or between two measured points)"
    )
    return Table(title, ["run", "answer", "why"], rows, n_left=3)


def claims(judged: Sequence[Judged]) -> Table:
    """Verdicts on the paper's claims, without those that no run is about."""
    rows = [
        [f"“{one.claim.says}”", one.verdict.answer.value, one.verdict.reason]
        for one in judged
        if one.is_asked
    ]
    return Table("the paper's claims", ["the paper says", "verdict", "measured"], rows, n_left=3)


def missing(runs: Iterable[Measured]) -> Table:
    """Runs without scores."""
    rows = [[run.folder, run.missing] for run in runs if run.missing]
    return Table("without scores", ["run", "why"], rows, n_left=2)


def _has(value: Callable[[Measured], float | None]) -> Callable[[Series], bool]:
    return lambda one: one.mean(value) is not None


def _count(one: Series, score: str) -> str:
    mean = one.mean(lambda run: run.score(score))
    return f"{mean[0]:,.0f}" if mean else "-"


def _overhead(one: Series) -> str:
    mean = one.mean(lambda run: run.overhead)
    return f" (+{mean[0]:.0%})" if mean and mean[0] else ""


def _decimals(one: Series, score: str, digits: int) -> str:
    mean = one.mean(lambda run: run.score(score))
    return f"{mean[0]:.{digits}f}" if mean else "-"


def _dead(one: Series) -> str:
    mean = one.mean(lambda run: run.score("dead_fraction"))
    return f"{mean[0]:.1%}" if mean else "-"


def _fvu(one: Series) -> str:
    mean = one.mean(lambda run: run.score("fvu"))
    if not mean:
        return "-"
    return f"{mean[0]:.4f}" + (f" ± {mean[1]:.4f}" if len(one.runs) > 1 else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _time(one: Series) -> str:
    mean = one.mean(lambda run: run.score("training_seconds"))
    return f"{mean[0]:,.0f} s" if mean else "-"


def _significant(mean: tuple[float, float] | None) -> str:
    if not mean:
        return "-"
    return f"{mean[0]:.3g}" if abs(mean[0]) < 1000 else f"{mean[0]:,.0f}"
