"""What probing found, as it stands in ``evaluation.json``: classes, tasks, and the mean of all.

Means are over classes, then over tasks, as in SAEBench. Beside each accuracy stands its standard error,
so that nobody reads noise: of a class binomial over its test rows; of a task the mean of those of its
classes, which share rows and so do not average out; of the mean of all as of independent tasks.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, TypedDict

from .protocol import Choice, ClassScores, Sizes


class Score(TypedDict):
    """An accuracy between 0 and 1, where .5 is chance, and how far it is noise."""

    accuracy: float
    standard_error: float


class ClassResult(TypedDict):
    """One class against the rest."""

    n_train: int
    n_test: int
    scores: dict[str, dict[str, Score]]
    """By what was probed (``activations``, ``codes``), then by ``1``, ``2``, ``5``, ``all``."""


class TaskResult(TypedDict):
    """The classes of one task."""

    level: Literal["token", "context"]
    """What is labelled: a token, or a whole context or text, of which means are probed."""
    classes: dict[str, ClassResult]
    left_out: dict[str, str]
    """Labels without a probe, and why."""
    mean: dict[str, dict[str, Score]]


class ProbingResult(TypedDict):
    """The key ``probing`` of ``evaluation.json``."""

    source: Literal["offline", "saebench"]
    n_train: int
    """Rows of a probe where a class has enough of them."""
    n_test: int
    full_probe: str
    """How the probe on all features is chosen."""
    seed: int
    tasks: dict[str, TaskResult]
    mean: dict[str, dict[str, Score]] | None
    """None where no task could be probed."""
    data: dict[str, Any]
    """Where the rows come from: see ``offline`` and ``hub``."""


def score(accuracy: float, n_rows: int) -> Score:
    """An accuracy over ``n_rows`` test rows.

    One row of either outcome is added for the error alone, which else were 0 where all rows are right.
    """
    shrunk = (accuracy * n_rows + 1) / (n_rows + 2)
    return {"accuracy": accuracy, "standard_error": math.sqrt(shrunk * (1 - shrunk) / n_rows)}


def class_result(found: ClassScores) -> ClassResult:
    """One class, with its noise."""
    scores = {
        name: {k: score(accuracy, found.n_test) for k, accuracy in by_k.items()}
        for name, by_k in found.accuracies.items()
    }
    return {"n_train": found.n_train, "n_test": found.n_test, "scores": scores}


def task_result(
    level: Literal["token", "context"], classes: Mapping[str, ClassResult], left_out: Mapping[str, str]
) -> TaskResult:
    """One task and the mean of its classes, of which there is at least one."""
    mean = _mean([found["scores"] for found in classes.values()], independent=False)
    return {"level": level, "classes": dict(classes), "left_out": dict(left_out), "mean": mean}


def probing_result(
    source: Literal["offline", "saebench"],
    tasks: Mapping[str, TaskResult],
    sizes: Sizes,
    choice: Choice,
    seed: int,
    data: Mapping[str, Any],
) -> ProbingResult:
    """All tasks, and the mean of those that have one."""
    means = [task["mean"] for task in tasks.values() if task["mean"]]
    return {
        "source": source,
        "n_train": sizes.train,
        "n_test": sizes.test,
        "full_probe": choice.value,
        "seed": seed,
        "tasks": dict(tasks),
        "mean": _mean(means, independent=True) if means else None,
        "data": dict(data),
    }


def _mean(scores: list[dict[str, dict[str, Score]]], independent: bool) -> dict[str, dict[str, Score]]:
    if not scores:
        return {}

    def one(name: str, k: str) -> Score:
        all_of_them = [found[name][k] for found in scores]
        errors = [found["standard_error"] for found in all_of_them]
        error = math.hypot(*errors) if independent else math.fsum(errors)
        accuracy = math.fsum(found["accuracy"] for found in all_of_them)
        return {"accuracy": accuracy / len(scores), "standard_error": error / len(scores)}

    return {name: {k: one(name, k) for k in by_k} for name, by_k in scores[0].items()}
