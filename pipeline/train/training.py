"""Train one run, alone or shared by the processes that torchrun started."""

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

from ..errors import RunBusyError
from ..processes import shares_a_training
from ..progress import Progress
from ..runs import Run
from .data_parallel import Team, joined
from .ongoing import Ongoing, Watch
from .passes import train_together
from .resident import LayerMemory
from .setup import Setup


class Trained(NamedTuple):
    """The result of training."""

    run: Run
    steps_done: int
    """Updates made this time; 0 if the run was already finished."""


class Training(Setup):
    """A run that is about to be trained."""

    def train(
        self,
        progress: Progress | None = None,
        memory: LayerMemory | None = None,
        watch: Watch | None = None,
        team: Team | None = None,
    ) -> Trained:
        """Train to the last step, resuming at the last checkpoint if there is one.

        Args:
            progress: of tokens.
            memory: keeps the layer decoded, if it does.
            watch: receives each line of metrics.
            team: the processes that share the run, if there are several; each calls this.

        Raises:
            RunBusyError: another process trains the run.
            PosaeError: as ``Ongoing.begin`` and ``train_together``.
        """
        team = team or Team()
        if team.is_first:
            self.check()
        with self.run.locked() if team.is_first else nullcontext(True) as is_held:
            if not is_held:
                raise RunBusyError(
                    f"{self.run.folder} is being trained by another process; wait for it, or give another "
                    "folder"
                )
            ongoing = Ongoing.begin(self, team)
            if ongoing is None:
                return Trained(self.run, 0)
            train_together([ongoing], progress, memory, watch)
            return Trained(self.run, ongoing.step - ongoing.start)

    @contextmanager
    def team(self) -> Generator[Team]:
        """The processes that share the run: those that torchrun started, or this one alone.

        Raises:
            PosaeError: as ``joined``.
        """
        if shares_a_training():
            with joined(self.device) as several:
                yield several
        else:
            yield Team()
