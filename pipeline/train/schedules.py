"""Schedules of alpha and the learning rate, and a clock for training time.

All are pure functions of the step, except for a curriculum that waits for a plateau: it observes the loss,
and its state is part of a checkpoint.
"""

import math
import time
from typing import Self

import torch
from torch import Tensor

_LOOKS = 50
"""Number of plateau checks per run."""
_STILL_FALLING = 0.01
"""A loss that falls by a smaller share than this between two checks has reached a plateau."""


class Curriculum:
    """The schedule of alpha, the weight of the position adapters in equations 3 and 5, from 0 to 1.

    >>> curriculum = Curriculum("linear", steps=10_000, warmup_steps=1000, ramp_steps=9000)
    >>> curriculum.alpha(999), curriculum.alpha(5499), curriculum.alpha(9999)
    (0.0, 0.5, 1.0)

    Attributes:
        shape: ``linear`` (the paper's), ``cosine``, ``step`` (at once), or ``plateau``: linear, starting when
            the loss stops falling, between the end of the warm-up and the last step that leaves room.
    """

    def __init__(self, shape: str, *, steps: int, warmup_steps: int, ramp_steps: int) -> None:
        """Start without an observed loss."""
        self.shape = shape
        self._warmup_steps = warmup_steps
        self._ramp_steps = 1 if shape == "step" else ramp_steps
        self._latest = max(warmup_steps, steps - ramp_steps)
        self._look_steps = max(1, steps // _LOOKS)
        self._begun = self._latest if shape == "plateau" else warmup_steps
        self._sum, self._previous = 0.0, math.inf

    def alpha(self, step: int) -> float:
        """Alpha of update number ``step``, counted from 0."""
        share = min(1.0, max(0.0, (step + 1 - self._begun) / max(1, self._ramp_steps)))
        return (1 - math.cos(math.pi * share)) / 2 if self.shape == "cosine" else share

    def looks(self, step: int) -> bool:
        """Whether the curriculum needs the loss of update number ``step``."""
        return self.shape == "plateau" and step < self._begun

    def see(self, step: int, loss: Tensor) -> None:
        """Observe the loss of update number ``step`` if needed, which synchronises a GPU."""
        if not self.looks(step):
            return
        self._sum += loss.item()
        if (step + 1) % self._look_steps:
            return
        falls = self._sum < (1 - _STILL_FALLING) * self._previous
        if not falls and step + 1 >= self._warmup_steps:
            self._begun = step + 1
        self._previous, self._sum = self._sum, 0.0

    def tensor(self) -> Tensor:
        """The state; float64 [3]."""
        return torch.tensor([self._begun, self._sum, self._previous], dtype=torch.float64)

    def restore(self, seen: Tensor) -> None:
        """The reverse of ``tensor``."""
        begun, self._sum, self._previous = (float(value) for value in seen)
        self._begun = int(begun)


def learning_rate_factor(step: int, steps: int, *, warmup: float, decay: float) -> float:
    """The factor of the learning rate in update number ``step``, counted from 0.

    Args:
        step: number of updates made before.
        steps: number of updates of the run.
        warmup: share of the steps, from the first, over which it rises from 0.
        decay: share of the steps, to the last, over which it falls to 0.

    >>> [round(learning_rate_factor(step, 100, warmup=0.1, decay=0.2), 2) for step in (0, 9, 50, 89, 99)]
    [0.1, 1.0, 1.0, 0.55, 0.05]
    """
    up = (step + 1) / (warmup * steps) if warmup else 1.0
    down = (steps - step) / (decay * steps) if decay else 1.0
    return min(1.0, up, down)


class Clock:
    """Total time of a run's steps, over all its processes since the start.

    It runs within its ``with`` blocks, so runs that train side by side are not counted.
    """

    def __init__(self, before: Tensor | None = None) -> None:
        """Create a stopped clock; ``before`` is the ``tensor`` of an earlier one."""
        self._elapsed = [float(value) for value in before] if before is not None else [0.0, 0.0]
        self._started: list[float] | None = None

    def __enter__(self) -> Self:
        """Start the clock."""
        self._started = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the clock."""
        self._elapsed, self._started = [self.seconds, self.cpu_seconds], None

    @staticmethod
    def _now() -> list[float]:
        return [time.perf_counter(), time.process_time()]

    def _since(self, kind: int) -> float:
        running = 0.0 if self._started is None else self._now()[kind] - self._started[kind]
        return self._elapsed[kind] + running

    @property
    def seconds(self) -> float:
        """Wall time."""
        return self._since(0)

    @property
    def cpu_seconds(self) -> float:
        """CPU time of all threads of the process."""
        return self._since(1)

    def tensor(self) -> Tensor:
        """Both times; float64 [2]."""
        return torch.tensor([self.seconds, self.cpu_seconds], dtype=torch.float64)
