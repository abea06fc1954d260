"""Alpha and the learning rate by the step: the paper's line, the other shapes, and waiting for a plateau."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posae.pipeline.train.schedules import Clock, Curriculum, learning_rate_factor

shapes = st.sampled_from(["linear", "cosine", "step", "plateau"])


@given(shapes, st.integers(1, 200), st.data())
def test_alpha_rises_from_0_to_1(shape: str, steps: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, steps - 1))
    ramp = data.draw(st.integers(1, steps - warmup))
    curriculum = Curriculum(shape, steps=steps, warmup_steps=warmup, ramp_steps=ramp)
    losses = data.draw(st.lists(st.floats(0, 10), min_size=steps, max_size=steps))
    alphas: list[float] = []
    for step, loss in enumerate(losses):
        alphas.append(curriculum.alpha(step))
        curriculum.see(step, torch.tensor(loss))
    assert alphas == sorted(alphas)
    assert not any(alphas[:warmup])
    assert alphas[-1] == 1.0


def test_shapes() -> None:
    def alphas(shape: str, ramp: int = 4) -> list[float]:
        curriculum = Curriculum(shape, steps=8, warmup_steps=2, ramp_steps=ramp)
        return [round(curriculum.alpha(step), 3) for step in range(8)]

    assert alphas("linear") == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert alphas("cosine") == [0, 0, round((1 - math.sqrt(0.5)) / 2, 3), 0.5, 0.854, 1, 1, 1]
    assert alphas("step") == [0, 0, 1, 1, 1, 1, 1, 1]


def test_a_plateau_is_waited_for_and_seen() -> None:
    def alphas(losses: list[float]) -> list[float]:
        curriculum = Curriculum("plateau", steps=100, warmup_steps=10, ramp_steps=20)
        found: list[float] = []
        for step, loss in enumerate(losses):
            if step == 31:  # goes on from a checkpoint
                seen = curriculum.tensor()
                curriculum = Curriculum("plateau", steps=100, warmup_steps=10, ramp_steps=20)
                curriculum.restore(seen)
            found.append(curriculum.alpha(step))
            curriculum.see(step, torch.tensor(loss))
        return found

    falling = alphas([0.9**step for step in range(100)])
    assert falling.index(next(a for a in falling if a)) == 80, "it falls to the end"
    flat = alphas([max(0.9**step, 0.9**40) for step in range(100)])
    assert flat.index(next(a for a in flat if a)) == 44, "two steps to a look, and two looks that are equal"
    assert flat[63] == 1.0


def test_the_learning_rate_rises_and_falls() -> None:
    constant = [learning_rate_factor(step, 10, warmup=0, decay=0) for step in range(10)]
    assert constant == [1.0] * 10
    shaped = [learning_rate_factor(step, 10, warmup=0.2, decay=0.5) for step in range(10)]
    assert shaped == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_a_clock_goes_on_and_stands_between_its_blocks() -> None:
    clock = Clock(torch.tensor([100.0, 50.0], dtype=torch.float64))
    assert (clock.seconds, clock.cpu_seconds) == (100, 50)
    with clock:
        sum(range(10**5))
        assert 100 < clock.seconds < 101
        assert 50 < clock.cpu_seconds < 52
    before = clock.seconds
    sum(range(10**5))
    assert clock.seconds == before
    later = Clock(clock.tensor())
    with later:
        assert later.seconds >= before
