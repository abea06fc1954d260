"""What was measured of each run, and for which study: the only module that knows the shape of a run's files.

A run may be unfinished, or written by an older posae: what a file lacks, or holds in another form, is None.
Nothing is computed before it is asked for; a figure over steps reads the lines of ``metrics.jsonl`` once.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from ..settings.flat import without_foreign
from .verdicts import MIN_STEPS

SETTLED = 0.1
"""Figures over steps leave out this share of the steps, the first ones."""


def number(value: Any, *keys: str) -> float | None:
    """The number at the end of ``keys``, each a key of the object before; None if it is not finite.

    >>> number({"drift": {"cosine_mean": 0.5}}, "drift", "cosine_mean"), number({"drift": None}, "drift", "x")
    (0.5, None)
    """
    for key in keys:
        value = cast("Mapping[str, Any]", value).get(key) if isinstance(value, Mapping) else None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def numbers(value: Any) -> list[float | None]:
    """A list of numbers, with None for every other entry; empty where there is no list."""
    return [number(item) for item in cast("list[Any]", value)] if isinstance(value, list) else []


class Line(NamedTuple):
    """One figure of one line of ``metrics.jsonl``."""

    step: int
    tokens: float
    value: float


@dataclass(frozen=True)
class Measured:
    """One run: what its files say.

    Attributes:
        folder: as the user gave it.
        config: content of ``config.json``.
        evaluation: content of ``evaluation.json``; empty where there is none.
        metrics: the lines of ``metrics.jsonl``.
        missing: why it has no scores; None where it has.
    """

    folder: str
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    evaluation: Mapping[str, Any] = field(default_factory=dict[str, Any])
    metrics: Sequence[Mapping[str, Any]] = ()
    missing: str | None = None

    def score(self, *keys: str) -> float | None:
        """A number of ``evaluation.json``."""
        return number(self.evaluation, *keys)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Its training settings."""
        settings: Any = self.config.get("settings")
        return without_foreign(cast("dict[str, Any]", settings)) if isinstance(settings, dict) else {}

    def setting(self, name: str, default: Any = None) -> Any:
        """One of its settings; ``default`` where the posae that trained it did not have it."""
        return self.settings.get(name, default)

    @property
    def n_steps(self) -> int:
        """Steps of the whole run; 0 where they are not known."""
        return int(number(self.settings, "steps") or 0)

    @property
    def has_too_few_steps(self) -> bool:
        """Whether it is too short for a verdict."""
        return 0 < self.n_steps < MIN_STEPS

    def steps(self, name: str) -> list[Line]:
        """One figure over all logged steps, where it was finite."""
        lines: list[Line] = []
        for line in self.metrics:
            value, step, tokens = number(line, name), number(line, "step"), number(line, "tokens")
            if value is not None and step is not None:
                lines.append(Line(int(step), tokens or 0.0, value))
        return lines

    # What it was scored on

    @property
    def is_of_another_store(self) -> bool:
        """Whether it was scored on a store that it was not trained from, as far as that is known."""
        store: Any = self.evaluation.get("store")
        return isinstance(store, dict) and cast("dict[str, Any]", store).get("trained_from") is False

    @property
    def n_seen_contexts(self) -> int | None:
        """How many of the contexts that it was scored on it was trained on; None where that is not known."""
        n_seen = self.score("store", "seen_contexts")
        return None if n_seen is None else int(n_seen)

    @property
    def n_scored_contexts(self) -> int | None:
        """How many contexts it was scored on."""
        span = self.series("contexts")
        return (
            int(span[1] - span[0]) if len(span) == 2 and span[0] is not None and span[1] is not None else None
        )

    @property
    def is_probed_on_seen_contexts(self) -> bool:
        """Whether the rows of its probes come from contexts that it was trained on, too."""
        probing: Any = self.evaluation.get("probing")
        data: Any = cast("Mapping[str, Any]", probing).get("data") if isinstance(probing, Mapping) else None
        return isinstance(data, Mapping) and cast("Mapping[str, Any]", data).get("contexts") == "all"

    # Size

    @property
    def architecture(self) -> str:
        """Its architecture."""
        return str(self.evaluation.get("architecture") or self.setting("architecture", ""))

    @property
    def d_model(self) -> int | None:
        """Width of the activations that it was trained on."""
        width = number(self.config, "store", "d_model")
        return None if width is None else int(width)

    @property
    def overhead(self) -> float | None:
        """Parameters added for position, as a share of the others."""
        base = self.score("n_base_parameters")
        total = self.score("n_parameters")
        return total / base - 1 if total is not None and base else None

    @property
    def ranges(self) -> list[str]:
        """Position ranges of its scores by range."""
        ranges = self.evaluation.get("ranges")
        return [str(item) for item in cast("list[Any]", ranges)] if isinstance(ranges, list) else []

    # Over steps

    @property
    def gradient_variance(self) -> float | None:
        """Variance of the gradient's norm over all steps after the first tenth, logged or not."""
        parts: list[tuple[int, float, float]] = []
        mean_squares = {line.step: line.value for line in self.steps("gradient_norm_mean_square")}
        means = self.steps("gradient_norm_mean")
        before = 0
        for step, _, mean in means:
            # A line's means are over the steps since the line before.
            if before >= SETTLED * means[-1].step and step in mean_squares:
                parts.append((step - before, mean, mean_squares[step]))
            before = step
        n = sum(n_steps for n_steps, _, _ in parts)
        if n < 2:
            return None
        mean = sum(n_steps * value for n_steps, value, _ in parts) / n
        mean_square = sum(n_steps * square for n_steps, _, square in parts) / n
        return max(0.0, mean_square - mean**2) * n / (n - 1)

    @property
    def converged(self) -> bool | None:
        """Whether all logged losses are finite, their last tenth is below the first, and the FVU is below 1.

        None where too little was logged, or nothing was scored.
        """
        losses = [line.get("loss") for line in self.metrics]
        if len(losses) < 4 or self.score("fvu") is None:
            return None if len(losses) < 4 or not self.evaluation else False
        finite = [value for value in map(number, losses) if value is not None]
        if len(finite) < len(losses):
            return False
        part = max(1, len(finite) // 10)
        fvu = self.score("fvu")
        assert fvu is not None
        return sum(finite[-part:]) < sum(finite[:part]) and fvu < 1

    def first_at(self, fvu: float, cost: str) -> float | None:
        """What it cost until the FVU of a training batch was at most ``fvu``; None where it never was.

        Args:
            fvu: as a fraction.
            cost: a cumulative key of ``metrics.jsonl``: tokens, cpu_seconds.
        """
        for line in self.metrics:
            of_batch = number(line, "fvu")
            if of_batch is not None and of_batch <= fvu:
                return number(line, cost)
        return None

    @property
    def base_kept(self) -> float | None:
        """FVU of the base code at the last logged step, over that at the end of the base phase (alpha 0)."""
        pairs = [(number(line, "alpha"), number(line, "fvu_base")) for line in self.metrics]
        before = [fvu for alpha, fvu in pairs if alpha == 0 and fvu]
        after = [fvu for alpha, fvu in pairs if alpha and fvu is not None]
        return after[-1] / before[-1] if before and after else None

    # Features

    @property
    def decoder_kept(self) -> float | None:
        """Share of the features that kept their direction since the end of the base phase."""
        return self.score("drift", "kept_share")

    @property
    def best_clusters(self) -> tuple[int, float, float] | None:
        """Best number of clusters of firing profiles by position; its silhouette, and that by chance."""
        n, score, null = (self.score("clusters", key) for key in ("best_n", "score", "null_score"))
        return None if n is None or score is None or null is None else (int(n), score, null)

    def probe(self, what: str, k: str, task: str | None = None) -> float | None:
        """Accuracy of sparse probes.

        Args:
            what: activations, or codes.
            k: how many features a probe sees: 1, 2, 5 or all.
            task: one task; by default the mean of all.
        """
        keys = ("mean",) if task is None else ("tasks", task, "mean")
        return self.score("probing", *keys, what, k, "accuracy")

    @property
    def probing_source(self) -> str | None:
        """Which tasks were probed: offline, or saebench."""
        probing = self.evaluation.get("probing")
        return str(cast("Mapping[str, Any]", probing).get("source")) if isinstance(probing, Mapping) else None

    def series(self, *keys: str) -> list[float | None]:
        """A list of numbers of ``evaluation.json``."""
        value: Any = self.evaluation
        for key in keys:
            value = cast("Mapping[str, Any]", value).get(key) if isinstance(value, Mapping) else None
        return numbers(value)


@dataclass(frozen=True)
class StudyRun:
    """A run in a study.

    Attributes:
        name: the same for all its seeds.
        seed: runs of one seed are paired.
        control: None, or which control it is: agnostic, shared, shuffled, more-active.
        of: name of the run that it is a control of.
        run: its files.
        has_adapters: of a position-aware run, whether something learned differs by position range; None
            where its sweep is of a version that did not record it.
    """

    name: str
    seed: int
    run: Measured
    control: str | None = None
    of: str | None = None
    has_adapters: bool | None = None


@dataclass(frozen=True)
class Study:
    """Runs that answer one question.

    Attributes:
        study: its name, such as layer-norm.
        title: a few words.
        claim: what the paper says, or None.
        runs: all of its runs, unfinished ones included.
    """

    study: str
    title: str
    runs: Sequence[StudyRun]
    claim: str | None = None

    def names(self) -> list[str]:
        """Names of its runs."""
        return list(dict.fromkeys(run.name for run in self.runs))

    def series(self, name: str) -> dict[int, Measured]:
        """The runs of one name that have scores, by seed."""
        return {run.seed: run.run for run in self.runs if run.name == name and run.run.missing is None}

    def control(self, of: str, role: str) -> dict[int, Measured] | None:
        """One control of the run ``of``, by seed; None where the study has none."""
        runs = [run for run in self.runs if run.of == of and run.control == role]
        scored = {run.seed: run.run for run in runs if run.run.missing is None}
        return scored if runs else None


def mean_and_deviation(values: Iterable[float | None]) -> tuple[float, float] | None:
    """Mean and standard deviation (n - 1; 0 of one value) of the values that are not None.

    >>> mean_and_deviation([1.0, None, 3.0])
    (2.0, 1.4142135623730951)
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    mean = sum(known) / len(known)
    n_free = max(1, len(known) - 1)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in known) / n_free)
