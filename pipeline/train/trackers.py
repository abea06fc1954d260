"""Curves of a run's metrics in TensorBoard or Weights & Biases, written by their own libraries.

Both are optional dependencies, imported on request. Logging a line of metrics costs a fraction of a
millisecond, as both write in their own threads or processes. ``metrics.jsonl`` holds the same numbers.
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
    """The trackers; the optional dependency of each has the same name."""

    TENSORBOARD = "tensorboard"
    WANDB = "wandb"


class Tracker(Protocol):
    """Receives the curves of one run."""

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Log numbers measured after ``step`` steps."""

    def close(self, *, is_whole: bool) -> None:
        """Write what is pending; ``is_whole``: training finished without an error."""

    @property
    def where(self) -> str:
        """How to view the curves."""
        ...


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics by name, those of a list by name and index, without None.

    >>> scalars({"step": 50, "loss": 2.0, "fvu_base": None, "fvu_by_range": [0.5, None, 0.25]})
    {'loss': 2.0, 'fvu_by_range/0': 0.5, 'fvu_by_range/2': 0.25}
    """
    numbers: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, list):
            values = cast("list[float | None]", value)
            numbers |= {f"{name}/{i}": number for i, number in enumerate(values) if number is not None}
        elif value is not None and name != "step":
            numbers[name] = value
    return numbers


class Trackers:
    """The requested trackers of all runs that train in one pass; each is opened at a run's first line.

    A context manager, which closes them.
    """

    def __init__(self, names: Collection[TrackerName], configs: Mapping[Path, Mapping[str, Any]]) -> None:
        """Check that the libraries are installed; nothing is opened yet.

        Args:
            names: which trackers.
            configs: the content of ``config.json``, by the run's folder.

        Raises:
            SettingsError: a library is not installed; names the optional dependency.
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
        """Nothing is opened yet."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write what is pending, however training ended."""
        for trackers in self._open.values():
            for tracker in trackers:
                tracker.close(is_whole=kind is None)


class _TensorBoard:
    """Event files in the folder ``tensorboard`` of the run."""

    def __init__(self, folder: Path, first: int, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A resumed run writes the steps from `first` on again; the old ones are hidden.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first)
        self.where = f"tensorboard --logdir {folder}"

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)  # pyright: ignore[reportUnknownMemberType]

    def close(self, *, is_whole: bool) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A Weights & Biases run, named after the last two folders of ours; its files are in ``wandb``."""

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
                reinit="create_new",  # one for each of several runs side by side
                settings=quiet,
            )
        except wandb.Error as error:
            raise RunError(
                f"Weights & Biases refuses {folder}: {str(error).rstrip('.')}; set WANDB_MODE=offline to "
                "keep the curves and send them later"
            ) from None
        offline = f"wandb sync {Path(self._run.dir).parent}"
        self.where = offline if self._run.offline else (self._run.url or offline)

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        # When a step is repeated after resuming, the first values stay; they are equal.
        self._run.log(dict(scalars), step=step)

    def close(self, *, is_whole: bool) -> None:
        self._run.finish(exit_code=0 if is_whole else 1)


def _lasting_id(folder: Path) -> str:
    """The run's id on their server; kept in the run, so that a resumed run continues the same curves."""
    path = folder / "wandb.id"
    if not path.exists():
        StoreFiles(folder).write(path.name, uuid.uuid4().hex[:16].encode())
    return path.read_text()
