"""Whether position helped: made-up runs beside made-up controls, and what is said of them."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats  # pyright: ignore[reportMissingTypeStubs]

from posae.pipeline.report.comparison import Finding, did_position_help, findings
from posae.pipeline.report.gains import Kind, compare, curves, is_equal
from posae.pipeline.report.measured import Measured
from posae.pipeline.report.verdicts import (
    CONFIDENCE,
    MIN_SEEDS,
    MIN_STEPS,
    MIN_STEPS_SHARE,
    SMALLEST,
    Answer,
    Interval,
    all_of,
    interval,
    judge,
    judge_absence,
)
from posae.pipeline.sae.run_settings import train_presets

if TYPE_CHECKING:
    from ..conftest import MadeRuns

Runs = dict[str, list[Measured]]

SEEDS = (1.0, 1.01, 0.99)
"""What each seed makes of an FVU, alike in all runs."""
NOISE = (1.001, 0.999, 1.0)
"""What is left of noise in pairs."""

AWARE: dict[str, Any] = {
    "architecture": "batchtopk",
    "position_mean": "none",
    "position_adapter": "decoder:8",
}
BARE: dict[str, Any] = {"architecture": "batchtopk"}


def seeds(
    made: "type[MadeRuns]",
    fvu: float,
    values: dict[str, Any],
    *,
    noise: tuple[float, ...] = NOISE,
    n: int = 3,
    **scores: Any,
) -> list[Measured]:
    return [
        made.run({**values, "seed": seed}, fvu=fvu * SEEDS[seed] * noise[seed], **scores) for seed in range(n)
    ]


def controlled(made: "type[MadeRuns]", aware: float = 0.092, **fvu: float) -> Runs:
    """A position-aware run with an FVU of 0.092, the agnostic one with 0.1, and other controls as given."""
    runs = {
        "aware": seeds(made, aware, AWARE),
        "aware.agnostic": seeds(made, 0.1, BARE, noise=(1, 1, 1)),
    }
    for role, value in fvu.items():
        l0 = 17.0 if role == "more_active" else 16.0
        values = BARE | {"target_l0": 17} if role == "more_active" else AWARE | {role: True}
        name = role.replace("_", "-")
        runs[f"aware.{name}"] = seeds(made, value, values, noise=(1.0, 1.0, 1.0), l0=l0)
    return runs


def finding(made: "type[MadeRuns]", runs: Runs) -> Finding:
    controls = {name: (name.partition(".")[2], "aware") for name in runs if "." in name}
    return did_position_help(made.study("position", runs, controls), "aware")


def test_it_helped_where_every_control_does_worse(made: "type[MadeRuns]") -> None:
    found = finding(made, controlled(made, shared=0.1, shuffled=0.101, more_active=0.096))
    assert found.answer is Answer.HOLDS
    assert found.missing == ()
    assert found.gain is not None
    assert found.gain.mean == pytest.approx(0.08, abs=1e-3)
    assert found.reason.startswith(
        "position helped: 8.0 % less unexplained at equal L0 (16.0) than an agnostic autoencoder"
    )
    assert "of the same size (95 % interval " in found.reason
    assert "3 seeds), more than one more active feature is worth (4.0 %)" in found.reason
    assert "with one adapter for all ranges the gain is gone" in found.reason
    assert "with positions shuffled the gain is gone" in found.reason


def test_what_one_more_feature_is_worth_too_is_said(made: "type[MadeRuns]") -> None:
    found = finding(made, controlled(made, shared=0.1, shuffled=0.1, more_active=0.09))
    assert found.answer is Answer.HOLDS
    assert "no more than one more active feature is worth (10.0 %)" in found.reason


@pytest.mark.parametrize("role", ["shared", "shuffled"])
@settings(deadline=None, max_examples=30)
@given(ratio=st.floats(0.5, 1.0))
def test_never_where_a_control_does_as_well(made: "type[MadeRuns]", role: str, ratio: float) -> None:
    others = {"shared": 0.1, "shuffled": 0.1, role: 0.092 * ratio}
    found = finding(made, controlled(made, more_active=0.099, **others))
    assert found.answer.is_refuted
    assert "the gain is capacity, not position" in found.reason


@settings(deadline=None)
@given(
    st.lists(st.floats(0.05, 0.2), min_size=4, max_size=4),
    st.lists(st.floats(-0.02, 0.02), min_size=6, max_size=6),
    st.sets(st.sampled_from(["shared", "shuffled"])),
)
def test_it_never_helped_without_both_controls_beaten(
    made: "type[MadeRuns]", fvu: list[float], noise: list[float], left_out: set[str]
) -> None:
    a, b, c, d = fvu
    runs = {
        "aware": seeds(made, a, AWARE, noise=(1 + noise[0], 1 + noise[1], 1 + noise[2])),
        "aware.agnostic": seeds(made, b, BARE, noise=(1 + noise[3], 1 + noise[4], 1 + noise[5])),
        "aware.shared": seeds(made, c, AWARE | {"shared_adapters": True}),
        "aware.shuffled": seeds(made, d, AWARE | {"shuffle_positions": True}),
    }
    found = finding(made, {name: v for name, v in runs.items() if name.partition(".")[2] not in left_out})
    if found.answer is Answer.HOLDS:
        assert not left_out
        ours = [run.score("fvu") or math.nan for run in runs["aware"]]
        for name in ("aware.agnostic", "aware.shared", "aware.shuffled"):
            theirs = [run.score("fvu") or math.nan for run in runs[name]]
            saved = [1 - one / other for one, other in zip(ours, theirs, strict=True)]
            assert sum(saved) / len(saved) >= SMALLEST
    assert set(found.missing) == {*left_out, "more-active"}
    assert "missing: " in found.reason


def test_one_seed_is_never_told_from_noise(made: "type[MadeRuns]") -> None:
    runs = controlled(made, shared=0.1, shuffled=0.1, more_active=0.096)
    found = finding(made, {name: some[:1] for name, some in runs.items()})
    assert found.answer is Answer.NOT_ENOUGH_DATA
    assert found.reason.startswith("not enough seeds for a verdict (at least 3): 7.9 % less unexplained")


def test_seeds_that_differ_by_more_than_the_gain_tell_nothing(made: "type[MadeRuns]") -> None:
    runs = controlled(made, shared=0.1, shuffled=0.1) | {
        "aware": seeds(made, 0.097, AWARE, noise=(0.9, 1.1, 1.0))
    }
    found = finding(made, runs)
    assert found.answer is Answer.NOT_ENOUGH_DATA
    assert found.reason.startswith("too uncertain for a verdict: 3.0 % less unexplained")


def test_a_loss_is_told_as_one(made: "type[MadeRuns]") -> None:
    found = finding(made, controlled(made, aware=0.12, shared=0.1, shuffled=0.1))
    assert found.answer is Answer.CONTRADICTED
    assert found.reason.startswith("position did not help: 20.0 % more unexplained at equal L0")
    assert "(95 % interval 19.7 to 20.3, 3 seeds)" in found.reason


def test_an_equal_fvu_is_no_help(made: "type[MadeRuns]") -> None:
    found = finding(made, controlled(made, aware=0.1, shared=0.1, shuffled=0.1))
    assert found.answer is Answer.NO_DIFFERENCE
    assert found.reason.startswith("position made no difference of 1 % or more: 0.0 % ")


@pytest.mark.parametrize(
    ("l0", "fvu", "answer"),
    [
        (18.0, 0.092, Answer.NOT_ENOUGH_DATA),  # more active, and better: by which of the two?
        (18.0, 0.12, Answer.CONTRADICTED),  # more active, and yet worse
        (14.0, 0.092, Answer.HOLDS),  # fewer, and yet better
        (14.0, 0.12, Answer.NOT_ENOUGH_DATA),
        (16.1, 0.092, Answer.HOLDS),  # within the tolerance
        (16.2, 0.092, Answer.NOT_ENOUGH_DATA),
    ],
)
def test_without_a_line_l0_must_be_equal_or_speak_for_itself(
    made: "type[MadeRuns]", l0: float, fvu: float, answer: Answer
) -> None:
    runs = controlled(made, shared=0.13, shuffled=0.13) | {"aware": seeds(made, fvu, AWARE, l0=l0)}
    for name in ("aware.shared", "aware.shuffled"):
        runs[name] = seeds(made, 0.13, AWARE | {name: True}, l0=l0)
    found = finding(made, runs)
    assert found.answer is answer
    if answer is Answer.NOT_ENOUGH_DATA:
        assert found.gain is None
        assert found.reason.startswith(
            f"no comparison at equal L0: L0 is {l0}, that of the agnostic control 16.0"
        )
    elif l0 != 16.1:
        assert found.gain is None
        assert "%" not in found.reason
        assert f"active features (L0 {l0} against 16.0)" in found.reason


def test_a_gain_that_is_but_further_active_features_is_none(made: "type[MadeRuns]") -> None:
    runs = controlled(made, shared=0.1, shuffled=0.1, more_active=0.096)
    runs["aware"] = seeds(made, 0.1 * (0.96) ** 0.5, AWARE, l0=16.5)  # on the line between the two
    found = finding(made, runs)
    assert found.gain is not None
    assert found.gain.mean == pytest.approx(0, abs=1e-3)
    assert found.answer is Answer.NO_DIFFERENCE
    assert "at equal L0 (16.5) than an agnostic autoencoder of the same size (95 % interval" in found.reason


@pytest.mark.parametrize(
    ("size", "fvu", "answer"),
    [
        (300_000, 0.092, Answer.NOT_ENOUGH_DATA),
        (300_000, 0.12, Answer.CONTRADICTED),
        (50_000, 0.092, Answer.HOLDS),
        (50_000, 0.12, Answer.NOT_ENOUGH_DATA),
    ],
)
def test_a_larger_one_cannot_win_and_a_smaller_one_cannot_lose(
    made: "type[MadeRuns]", size: int, fvu: float, answer: Answer
) -> None:
    runs = controlled(made, shared=0.13, shuffled=0.13)
    runs["aware"] = seeds(made, fvu, AWARE, n_parameters=size)
    found = finding(made, runs)
    assert found.answer is answer
    told = "with 66.7 % fewer parameters" if size > 100_000 else "with 100.0 % more parameters"
    assert told in found.reason


def test_a_control_without_scores_is_named(made: "type[MadeRuns]") -> None:
    runs = controlled(made, shared=0.1, shuffled=0.1, more_active=0.096)
    runs["aware.shuffled"] = [Measured("gone", missing="has no scores yet")] * 3
    found = finding(made, runs)
    assert found.answer is Answer.NOT_ENOUGH_DATA
    assert found.missing == ("shuffled",)
    assert found.reason.endswith("; missing: shuffled")


def test_means_need_no_shared_control_and_shuffling_is_told_once(made: "type[MadeRuns]") -> None:
    means = BARE | {"position_mean": "exact"}
    shuffled = seeds(made, 0.1, means | {"shuffle_positions": True})
    runs = {"aware": seeds(made, 0.092, means), "aware.agnostic": seeds(made, 0.1, BARE)}
    runs |= {"aware.shared": shuffled, "aware.shuffled": shuffled}
    found = finding(made, runs)
    assert found.answer is Answer.HOLDS
    assert "one adapter" not in found.reason
    assert "with positions shuffled the gain is gone" in found.reason


def test_a_run_is_told_once_where_it_has_most_controls(made: "type[MadeRuns]") -> None:
    runs = controlled(made, shared=0.1, shuffled=0.1, more_active=0.096)
    controls = {name: (name.partition(".")[2], "aware") for name in runs if "." in name}
    few = {name: runs[name] for name in ("aware", "aware.agnostic")}
    studies = [made.study("ranges", few, controls), made.study("position", runs, controls)]
    assert [(one.name, one.study) for one in findings(studies)] == [("aware", "position")]


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=8))
def test_an_interval_is_students(values: list[float]) -> None:
    found = interval(values)
    assert found is not None
    spread: float = stats.sem(values)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    half = float(stats.t.ppf(0.975, len(values) - 1) * spread)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
    assert found.mean == pytest.approx(sum(values) / len(values))
    assert found.high - found.mean == pytest.approx(half, abs=1e-9)
    assert found.mean - found.low == pytest.approx(half, abs=1e-9)


def test_an_interval_of_one_has_no_end_and_of_none_is_none() -> None:
    assert interval([None, math.nan]) is None
    assert interval([2.0, None]) == Interval(2.0, -math.inf, math.inf, 1)


@pytest.mark.parametrize(
    ("low", "high", "claimed", "answer"),
    [
        (0.02, 0.04, 0.01, Answer.HOLDS),
        (0.01, 0.04, 0.01, Answer.HOLDS),
        (0.005, 0.04, 0.01, Answer.SIZE_UNCLEAR),
        (0.001, 0.009, 0.01, Answer.NO_DIFFERENCE),
        (-0.009, 0.009, 0.01, Answer.NO_DIFFERENCE),
        (-0.02, 0.009, 0.01, Answer.SMALLER),
        (-0.02, -0.001, 0.01, Answer.CONTRADICTED),
        (-0.01, 0.02, 0.01, Answer.NOT_ENOUGH_DATA),
        (0.2, 0.4, 0.15, Answer.HOLDS),
        (0.1, 0.4, 0.15, Answer.SIZE_UNCLEAR),
        (0.02, 0.1, 0.15, Answer.SMALLER),
        (-0.02, 0.1, 0.15, Answer.SMALLER),
        (-0.02, 0.2, 0.15, Answer.NOT_ENOUGH_DATA),
    ],
)
def test_an_answer_follows_from_where_the_interval_lies(
    low: float, high: float, claimed: float, answer: Answer
) -> None:
    effect = Interval((low + high) / 2, low, high, MIN_SEEDS)
    assert judge(effect, claimed) is answer
    assert judge(effect._replace(n=MIN_SEEDS - 1), claimed) is Answer.NOT_ENOUGH_DATA
    assert all_of([answer, Answer.HOLDS]) is answer
    assert all_of([answer, Answer.CONTRADICTED]) is Answer.CONTRADICTED


def test_nothing_is_lost_only_where_a_loss_of_one_percent_is_ruled_out() -> None:
    assert judge_absence(Interval(0.0, -0.005, 0.005, 3)) is Answer.HOLDS
    assert judge_absence(Interval(-0.1, -0.2, -0.05, 3)) is Answer.HOLDS
    assert judge_absence(Interval(0.1, 0.05, 0.2, 3)) is Answer.CONTRADICTED
    assert judge_absence(Interval(0.02, 0.005, 0.04, 3)) is Answer.NOT_ENOUGH_DATA


def share_of_holds(truth: float, claimed: float, deviation: float, n_seeds: int) -> float:
    """How often a claim of a size holds, in 4,000 experiments."""
    draws = np.random.default_rng(17).normal(truth, deviation, (4000, n_seeds))
    return sum(judge(interval(seeds), claimed) is Answer.HOLDS for seeds in draws.tolist()) / len(draws)


@pytest.mark.parametrize("deviation", [0.05, 0.2, 0.4, 1.0])
@pytest.mark.parametrize("n_seeds", [3, 5])
def test_noise_does_not_help_a_claim_that_is_larger_than_the_truth(deviation: float, n_seeds: int) -> None:
    """3.2 times where it is 1.6 times; and at the edge, where the truth is hardly less than claimed."""
    claimed = math.log(3.2)
    nominal = (1 - CONFIDENCE) / 2
    assert share_of_holds(math.log(1.6), claimed, deviation, n_seeds) <= nominal
    at_the_edge = share_of_holds(claimed - 1e-9, claimed, deviation, n_seeds)
    assert at_the_edge == pytest.approx(nominal, abs=0.0075)  # three standard errors
    assert share_of_holds(claimed + 20 * deviation, claimed, deviation, n_seeds) > 0.95


def test_the_best_of_many_intervals_holds_no_more_often_than_one() -> None:
    draws = np.random.default_rng(5).normal(0.01 - 1e-9, 0.1, (2000, 6, 3))
    judged = [[interval(seeds) for seeds in runs] for runs in draws.tolist()]

    def share(n_intervals: int) -> float:
        answers = [[judge(one.jointly(n_intervals)) for one in runs if one] for runs in judged]
        return sum(Answer.HOLDS in some for some in answers) / len(answers)

    assert share(1) > 0.1
    assert share(6) <= 0.025 + 0.011  # three standard errors


def test_runs_of_few_steps_get_figures_and_no_verdict(made: "type[MadeRuns]") -> None:
    runs = controlled(made, shared=0.1, shuffled=0.1, more_active=0.096)
    assert MIN_STEPS_SHARE * train_presets()["paper"]["steps"] == MIN_STEPS
    for steps, answer in ((MIN_STEPS, Answer.HOLDS), (MIN_STEPS - 1, Answer.NOT_ENOUGH_DATA)):
        for name in ("aware", "aware.shuffled"):
            runs[name] = [with_settings(run, steps=steps) for run in runs[name]]
        found = finding(made, runs)
        assert found.answer is answer
        assert "8.0 % less unexplained at equal L0" in found.reason
    assert found.reason.startswith("not enough steps for a verdict (499 of at least 500): 8.0 % ")


def with_settings(run: Measured, **values: Any) -> Measured:
    config = {**run.config, "settings": {**run.settings, **values}}
    return Measured(run.folder, config, run.evaluation, run.metrics, run.missing)


@settings(deadline=None)
@given(ours=st.floats(10, 24), theirs=st.floats(10, 24))
def test_a_gain_is_never_extrapolated(made: "type[MadeRuns]", ours: float, theirs: float) -> None:
    """Numbers lie within 1 % in L0 of a measured point, or between two of them."""

    def series(l0: float, fvu: float) -> dict[int, Measured]:
        return {0: made.run(l0=l0, fvu=fvu)}

    between = curves(series(14, 0.12), series(18, 0.08))
    comparison = compare(series(ours, 0.09), series(theirs, 0.1), between)
    is_known = is_equal(ours, theirs) or (min(ours, theirs) >= 14 and max(ours, theirs) <= 18)
    assert bool(comparison and comparison.gain) == is_known
    if comparison and not is_known:
        assert comparison.kind is Kind.AT_LEAST
        assert ours < theirs


def test_between_two_points_fvu_is_read_along_the_line_through_them(made: "type[MadeRuns]") -> None:
    agnostic, more = {0: made.run(l0=16, fvu=0.1)}, {0: made.run(l0=20, fvu=0.064)}
    between = curves(agnostic, more)
    comparison = compare({0: made.run(l0=18, fvu=0.04)}, agnostic, between)
    assert comparison is not None
    assert comparison.gain is not None
    assert comparison.gain.mean == pytest.approx(0.5)  # half of 0.08
    assert curves(more, agnostic) == between
