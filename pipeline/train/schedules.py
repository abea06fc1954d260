"""What changes by the step while training, alpha and the learning rate; and the time that it takes.

All are pure functions of the step but one: a curriculum that waits for a plateau has to see the loss, and
what it saw is a part of a checkpoint.
"""

import math
import time
from typing import Self

import torch
from torch import Tensor

_LOOKS = 50
"""How often in a training a plateau is looked for."""
_STILL_FALLING = 0.01
"""A loss that falls by a smaller share than this between two looks has reached a plateau."""


class Curriculum:
    """When position adapters come in: alpha of equations 3 and 5, 0 at first and 1 at last.

    >>> curriculum = Curriculum("linear", steps=10_000, warmup_steps=1000, ramp_steps=9000)
    >>> curriculum.alpha(999), curriculum.alpha(5499), curriculum.alpha(9999)
    (0.0, 0.5, 1.0)

    Attributes:
        shape: ``linear`` (the paper's), ``cosine``, ``step`` (at once), or ``plateau``: linear, from when the
            loss falls no more, between the warm-up's end and the last step that leaves room for the ramp.
    """

    def __init__(self, shape: str, *, steps: int, warmup_steps: int, ramp_steps: int) -> None:
        """Begin with a loss unseen."""
        self.shape = shape
        self._warmup_steps = warmup_steps
        self._ramp_steps = 1 if shape == "step" else ramp_steps
        self._latest = max(warmup_steps, steps - ramp_steps)
        self._look_steps = max(1, steps // _LOOKS)
        self._begun = self._latest if shape == "plateau" else warmup_steps
        self._sum, self._previous = 0.0, math.inf

    def alpha(self, step: int) -> float:
        """Alpha of the update that follows ``step`` others."""
        share = min(1.0, max(0.0, (step + 1 - self._begun) / max(1, self._ramp_steps)))
        return (1 - math.cos(math.pi * share)) / 2 if self.shape == "cosine" else share

    def looks(self, step: int) -> bool:
        """Whether the loss of the update that follows ``step`` others has to be seen."""
        return self.shape == "plateau" and step < self._begun

    def see(self, step: int, loss: Tensor) -> None:
        """Look at the loss of the update that followed ``step`` others, if need be: it makes a GPU wait."""
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
        """What was seen so far; float64 [3]."""
        return torch.tensor([self._begun, self._sum, self._previous], dtype=torch.float64)

    def restore(self, seen: Tensor) -> None:
        """The reverse of ``tensor``."""
        begun, self._sum, self._previous = (float(value) for value in seen)
        self._begun = int(begun)


def learning_rate_factor(step: int, steps: int, *, warmup: float, decay: float) -> float:
    """What the learning rate is multiplied by, in the update that follows ``step`` others.

    Args:
        step: updates made before.
        steps: of the training.
        warmup: share of the steps over which it rises from 0.
        decay: share of them, the last, over which it falls to 0.

    >>> [round(learning_rate_factor(step, 100, warmup=0.1, decay=0.2), 2) for step in (0, 9, 50, 89, 99)]
    [0.1, 1.0, 1.0, 0.55, 0.05]
    """
    up = (step + 1) / (warmup * steps) if warmup else 1.0
    down = (steps - step) / (decay * steps) if decay else 1.0
    return min(1.0, up, down)


class Clock:
    """How long the steps of a training have taken, over all times that it was begun or went on.

    It runs within its ``with`` blocks: others that train side by side with it are not counted.
    """

    def __init__(self, before: Tensor | None = None) -> None:
        """Stand; ``before`` is the ``tensor`` of an earlier clock."""
        self._told = [float(value) for value in before] if before is not None else [0.0, 0.0]
        self._started: list[float] | None = None

    def __enter__(self) -> Self:
        """Run."""
        self._started = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        """Stand."""
        self._told, self._started = [self.seconds, self.cpu_seconds], None

    @staticmethod
    def _now() -> list[float]:
        return [time.perf_counter(), time.process_time()]

    def _since(self, kind: int) -> float:
        running = 0.0 if self._started is None else self._now()[kind] - self._started[kind]
        return self._told[kind] + running

    @property
    def seconds(self) -> float:
        """By the wall."""
        return self._since(0)

    @property
    def cpu_seconds(self) -> float:
        """Of all of this process's threads."""
        return self._since(1)

    def tensor(self) -> Tensor:
        """Both; float64 [2]."""
        return torch.tensor([self.seconds, self.cpu_seconds], dtype=torch.float64)
