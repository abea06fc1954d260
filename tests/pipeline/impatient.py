"""Someone who does not wait for the end of a training."""

from posae.pipeline.progress import Silent


class Impatient(Silent):
    """Presses Ctrl-C after some steps."""

    def __init__(self, steps: int) -> None:
        self.steps_left = steps

    def advance(self, amount: int, note: str = "") -> None:
        self.steps_left -= 1
        if not self.steps_left:
            raise KeyboardInterrupt
