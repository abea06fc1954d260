"""Metrics of trainings as curves in TensorBoard or Weights & Biases, written by their own libraries.

Neither is imported unless it is asked for; each is an extra. A line of metrics costs a fraction of a
millisecond: both libraries write from threads or processes of their own. ``metrics.jsonl`` has the same.
"""

import os
import uuid
from collections.abc import Collection, Mapping
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, Self, cast

from ...store.errors import SettingsError
from ...store.files import StoreFiles
from ..errors import RunError


class TrackerName(StrEnum):
    """What can be asked for; the extra with its library is called the same."""

    TENSORBOARD = "tensorboard"
    WANDB = "wandb"


class Tracker(Protocol):
    """Where the curves of one run go."""

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Numbers measured after ``step`` steps."""

    def close(self, *, is_whole: bool) -> None:
        """Write what is not written yet; ``is_whole``: the training came to its end."""

    @property
    def where(self) -> str:
        """How to look at them."""
        ...


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics by name, those of a list by name and index; what is None is left out.

    >>> scalars({"step": 50, "loss": 2.0, "fvu_base": None, "fvu_by_range": [0.5, None, 0.25]})
    {'loss': 2.0, 'fvu_by_range/0': 0.5, 'fvu_by_range/2': 0.25}
    """
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, list):
            values = cast("list[float | None]", value)
            found |= {f"{name}/{i}": number for i, number in enumerate(values) if number is not None}
        elif value is not None and name != "step":
            found[name] = value
    return found


class Trackers:
    """All that were asked for, of all runs that train in one pass; each is opened at a run's first line.

    To be used as a context, which closes them.
    """

    def __init__(self, names: Collection[TrackerName], configs: Mapping[Path, Mapping[str, Any]]) -> None:
        """Check that the libraries are there; nothing is opened yet.

        Args:
            names: which trackers.
            configs: what ``config.json`` says, by the folder of the run.

        Raises:
            SettingsError: a library is not installed; says which extra has it.
        """
        for name in names:
            if find_spec(name) is None:
                raise SettingsError(
                    f"--track {name} needs a package that is not installed; run: pip install 'posae[{name}]'"
                )
        self._names = dict.fromkeys(names)
        self._configs = configs
        self._open: dict[Path, list[Tracker]] = {}

    def __call__(self, folder: Path, line: Mapping[str, Any]) -> None:
        """Hand on a line of metrics of the run in ``folder``.

        Raises:
            RunError: Weights & Biases refuses the run, most often as nobody has logged in.
            StoreWriteError: the disk refused.
        """
        if folder not in self._open:
            kinds = {TrackerName.TENSORBOARD: _TensorBoard, TrackerName.WANDB: _WeightsAndBiases}
            first = int(line["step"])
            self._open[folder] = []
            for name in self._names:
                self._open[folder].append(kinds[name](folder, first, self._configs[folder]))
        for tracker in self._open[folder]:
            tracker.add(int(line["step"]), scalars(line))

    @property
    def where(self) -> list[str]:
        """How to look at what was tracked, a line for each tracker of each run."""
        return [tracker.where for trackers in self._open.values() for tracker in trackers]

    def __enter__(self) -> Self:
        """Ready; nothing is opened yet."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write what is not written yet, however the training ended."""
        for trackers in self._open.values():
            for tracker in trackers:
                tracker.close(is_whole=kind is None)


class _TensorBoard:
    """Event files in the folder ``tensorboard`` of the run."""

    def __init__(self, folder: Path, first: int, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a training that was cut off wrote from there on is written again, and hidden.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first)
        self.where = f"tensorboard --logdir {folder}"

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)  # pyright: ignore[reportUnknownMemberType]

    def close(self, *, is_whole: bool) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A run of theirs, called by the last two folders of ours; its files lie in the folder ``wandb``."""

    def __init__(self, folder: Path, first: int, config: Mapping[str, Any]) -> None:
        import wandb

        quiet = wandb.Settings(console="off", silent=True)  # the terminal is ours
        try:
            self._run: wandb.Run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "posae"),
                dir=folder,
                id=_lasting_id(folder),
                name="/".join(folder.absolute().parts[-2:]),
                config=dict(config),
                resume="allow",
                reinit="create_new",  # trainings side by side have one each
                settings=quiet,
            )
        except wandb.Error as error:
            raise RunError(
                f"Weights & Biases refuses {folder}: {str(error).rstrip('.')}; WANDB_MODE=offline keeps the "
                "curves, to be sent later"
            ) from None
        offline = f"wandb sync {Path(self._run.dir).parent}"
        self.where = offline if self._run.offline else (self._run.url or offline)

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        # Of a step that is done again, after a cut, the first values stay: they are the same.
        self._run.log(dict(scalars), step=step)

    def close(self, *, is_whole: bool) -> None:
        self._run.finish(exit_code=0 if is_whole else 1)


def _lasting_id(folder: Path) -> str:
    """What their server knows the run by; kept in the run, so that a training goes on in the same curves."""
    path = folder / "wandb.id"
    if not path.exists():
        StoreFiles(folder).write(path.name, uuid.uuid4().hex[:16].encode())
    return path.read_text()
