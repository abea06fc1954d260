"""Someone who does not wait for the end of a training."""

from posae.pipeline.progress import Silent


class Impatient(Silent):
    """Presses Ctrl-C after some steps, or has something else go wrong."""

    def __init__(self, steps: int, error: BaseException | None = None) -> None:
        self.steps_left = steps
        self.error = error or KeyboardInterrupt()

    def advance(self, amount: int, note: str = "") -> None:
        self.steps_left -= 1
        if not self.steps_left:
            raise self.error
