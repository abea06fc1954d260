"""Whether position helped: made-up runs beside made-up controls, and what is said of them."""

import math
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats  # pyright: ignore[reportMissingTypeStubs]

from posae.pipeline.report.comparison import Finding, did_position_help, findings
from posae.pipeline.report.measured import Measured
from posae.pipeline.report.verdicts import Answer, Interval, interval, judge, opposite, together

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
    assert found.words.startswith("position helped: 8.0 % less unexplained than an agnostic autoencoder")
    assert "of the same size (95 % interval " in found.words
    assert "3 seeds), more than one further active feature is worth (4.0 %)" in found.words
    assert "with one adapter for all ranges the gain is gone" in found.words
    assert "with positions shuffled the gain is gone" in found.words


def test_what_one_more_feature_is_worth_too_is_said(made: "type[MadeRuns]") -> None:
    found = finding(made, controlled(made, shared=0.1, shuffled=0.1, more_active=0.09))
    assert found.answer is Answer.HOLDS
    assert "no more than one further active feature is worth (10.0 %)" in found.words


@pytest.mark.parametrize("role", ["shared", "shuffled"])
@settings(deadline=None, max_examples=30)
@given(ratio=st.floats(0.5, 1.0))
def test_never_where_a_control_does_as_well(made: "type[MadeRuns]", role: str, ratio: float) -> None:
    others = {"shared": 0.1, "shuffled": 0.1, role: 0.092 * ratio}
    found = finding(made, controlled(made, more_active=0.099, **others))
    assert found.answer is Answer.DOES_NOT_HOLD
    assert "the gain is capacity, not position" in found.words


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
        assert a < min(b, c, d)
    assert set(found.missing) == {*left_out, "more-active"}
    assert "missing: " in found.words


def test_one_seed_is_never_told_from_noise(made: "type[MadeRuns]") -> None:
    runs = controlled(made, shared=0.1, shuffled=0.1, more_active=0.096)
    found = finding(made, {name: some[:1] for name, some in runs.items()})
    assert found.answer is Answer.CANNOT_BE_TOLD
    assert found.words.startswith("cannot be told from noise: 7.9 % less unexplained")


def test_seeds_that_differ_by_more_than_the_gain_tell_nothing(made: "type[MadeRuns]") -> None:
    runs = controlled(made, shared=0.1, shuffled=0.1) | {
        "aware": seeds(made, 0.097, AWARE, noise=(0.9, 1.1, 1.0))
    }
    found = finding(made, runs)
    assert found.answer is Answer.CANNOT_BE_TOLD
    assert found.words.startswith("cannot be told from noise: 3.0 % less unexplained")


def test_a_loss_is_told_as_one(made: "type[MadeRuns]") -> None:
    found = finding(made, controlled(made, aware=0.12, shared=0.1, shuffled=0.1))
    assert found.answer is Answer.DOES_NOT_HOLD
    assert found.words.startswith("position did not help: 20.0 % more unexplained")
    assert "(95 % interval 19.7 to 20.3, 3 seeds)" in found.words


def test_an_equal_fvu_is_no_help(made: "type[MadeRuns]") -> None:
    found = finding(made, controlled(made, aware=0.1, shared=0.1, shuffled=0.1))
    assert found.answer is Answer.DOES_NOT_HOLD


@pytest.mark.parametrize(
    ("l0", "fvu", "answer"),
    [
        (18.0, 0.092, Answer.CANNOT_BE_TOLD),  # more active, and better: by which of the two?
        (18.0, 0.12, Answer.DOES_NOT_HOLD),  # more active, and yet worse
        (14.0, 0.092, Answer.HOLDS),  # fewer, and yet better
        (14.0, 0.12, Answer.CANNOT_BE_TOLD),
        (16.2, 0.092, Answer.HOLDS),  # within the tolerance
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
    if answer is Answer.CANNOT_BE_TOLD:
        assert found.words.startswith(f"not comparable: L0 is {l0}, and 16.0 of the agnostic control")


def test_a_gain_that_is_but_further_active_features_is_none(made: "type[MadeRuns]") -> None:
    runs = controlled(made, shared=0.1, shuffled=0.1, more_active=0.096)
    runs["aware"] = seeds(made, 0.1 * (0.96) ** 0.5, AWARE, l0=16.5)  # on the line between the two
    found = finding(made, runs)
    assert found.gain is not None
    assert found.gain.mean == pytest.approx(0, abs=1e-3)
    assert found.answer is Answer.DOES_NOT_HOLD
    assert "of the same size, both at L0 16.5 (95 % interval" in found.words


@pytest.mark.parametrize(
    ("size", "fvu", "answer"),
    [
        (300_000, 0.092, Answer.CANNOT_BE_TOLD),
        (300_000, 0.12, Answer.DOES_NOT_HOLD),
        (50_000, 0.092, Answer.HOLDS),
        (50_000, 0.12, Answer.CANNOT_BE_TOLD),
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
    assert told in found.words


def test_a_control_without_scores_is_named(made: "type[MadeRuns]") -> None:
    runs = controlled(made, shared=0.1, shuffled=0.1, more_active=0.096)
    runs["aware.shuffled"] = [Measured("gone", missing="has no scores yet")] * 3
    found = finding(made, runs)
    assert found.answer is Answer.CANNOT_BE_TOLD
    assert found.missing == ("shuffled",)
    assert found.words.endswith("; missing: shuffled")


def test_means_need_no_shared_control_and_shuffling_is_told_once(made: "type[MadeRuns]") -> None:
    means = BARE | {"position_mean": "exact"}
    shuffled = seeds(made, 0.1, means | {"shuffle_positions": True})
    runs = {"aware": seeds(made, 0.092, means), "aware.agnostic": seeds(made, 0.1, BARE)}
    runs |= {"aware.shared": shuffled, "aware.shuffled": shuffled}
    found = finding(made, runs)
    assert found.answer is Answer.HOLDS
    assert "one adapter" not in found.words
    assert "with positions shuffled the gain is gone" in found.words


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
    assert interval([2.0, None]) == (2.0, -math.inf, math.inf, 1)


@pytest.mark.parametrize(
    ("low", "high", "answer"),
    [
        (0.02, 0.04, Answer.HOLDS),
        (0.001, 0.009, Answer.DOES_NOT_HOLD),  # there, and too small
        (-0.02, -0.01, Answer.DOES_NOT_HOLD),
        (-0.01, 0.02, Answer.CANNOT_BE_TOLD),
    ],
)
def test_three_answers(low: float, high: float, answer: Answer) -> None:
    effect = Interval((low + high) / 2, low, high, 3)
    assert judge(effect) is answer
    assert opposite(opposite(answer)) is answer
    assert together([answer, Answer.HOLDS]) is answer
    assert together([answer, Answer.DOES_NOT_HOLD]) is Answer.DOES_NOT_HOLD
