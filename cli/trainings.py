"""Training from the terminal: one run, or the runs of a sweep, those with the same batches side by side.

This imports torch, and so is imported only once the store has been checked.
"""

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ..pipeline.errors import RunError, RunNotFoundError
from ..pipeline.evaluate.evaluate import evaluate
from ..pipeline.progress import Progress
from ..pipeline.runs import Run
from ..pipeline.settings import EvaluateSettings, TrainSettings
from ..pipeline.train import LayerMemory, Ongoing, Team, Training, side_by_side, train_together
from ..pipeline.train.sweep import Fit, Fitted, Plan, Planned
from ..pipeline.train.trackers import TrackerName, Trackers
from ..store.errors import SettingsError
from ..store.plain_text import counted
from ..store.reader import ActivationStore
from .display import LiveProgress, console, duration, errors, is_short

_LITTLE_R2 = 0.01
"""Below this share of the variance, position means gained nothing where they were tried (docs/paper.md)."""


def about_position(r2: float) -> str:
    """How much of the variance position explains, and what follows for ``--position-mean``."""
    if math.isnan(r2):
        return "too few tokens to estimate how much of the variance position explains"
    share = f"position explains {max(0.0, r2):.2%} of this layer's variance"
    if r2 < _LITTLE_R2:
        return (
            f"{share}: too little for --position-mean to help; rotations by range do not show in this number"
        )
    return f"{share}; --position-mean subtracts it before encoding"


def scores(folder: Path) -> dict[str, Any] | None:
    """A run's ``evaluation.json``, or None if there is none.

    Raises:
        RunError: it cannot be read.
    """
    try:
        return Run(folder).evaluation
    except RunNotFoundError:
        return None


def train_one(
    training: Training,
    scoring: EvaluateSettings,
    progress: Progress,
    memory: LayerMemory,
    track: Sequence[TrackerName] = (),
    team: Team | None = None,
) -> bool:
    """Train or resume, and score on the held-out part; False if all was done already.

    Args:
        training: the run.
        scoring: what to score; the device is the run's.
        progress: receives the progress.
        memory: keeps the decoded layer, where it may.
        track: trackers that receive the metrics.
        team: the processes that share the run, if there are several; this is the first.

    Raises:
        PosaeError: as ``Trackers``, ``Training.train`` and ``evaluate``.
    """
    with Trackers(track, {training.run.folder: training.config}) as trackers:
        trained = training.train(progress, memory, trackers, team)
    _show_where(trackers)
    if not trained.steps_done and _is_scored(training.run.folder, scoring):
        return False
    _score(training, scoring, progress)
    return True


def _show_where(trackers: Trackers) -> None:
    for where in trackers.where:
        errors.print(f"curves: {where}", soft_wrap=True)


def _score(training: Training, scoring: EvaluateSettings, progress: Progress) -> None:
    store, layer = training.store, training.layer
    if store.held_out_part(layer)[0] < store.contexts_by_layer[layer]:
        own = {"device": training.settings.device}
        evaluate(training.run.folder, scoring.model_copy(update=own), progress, store)


def _is_scored(folder: Path, scoring: EvaluateSettings) -> bool:
    """Whether all requested scores are there."""
    evaluation = scores(folder)
    if evaluation is None:
        return False
    has_probing = scoring.probing == "none" or evaluation.get("probing") is not None
    return has_probing and not (scoring.ce_loss and evaluation.get("ce_loss") is None)


def fit_to(store: ActivationStore, folder: Path) -> Fit:
    """A function that resolves settings on ``store``; ``folder`` is the sweep's."""

    def fit(settings: TrainSettings) -> Fitted:
        training = Training(store, folder, settings)
        return Fitted(training.settings, training.new_autoencoder(None).n_parameters())

    return fit


def train_all(
    store: ActivationStore,
    folder: Path,
    plan: Plan,
    memory: LayerMemory,
    together: int,
    track: Sequence[TrackerName] = (),
) -> None:
    """Train and score all runs of a sweep that are not finished; several processes may do so at once.

    A run that fails does not stop the others; a damaged store or a failing disk does.

    Args:
        store: the store that all runs read.
        folder: of the sweep.
        plan: its runs.
        memory: keeps a decoded layer, where it may.
        together: how many runs may share a pass over the store.
        track: trackers that receive the metrics of each run.

    Raises:
        SettingsError: a tracker's library is not installed.
        RunMismatchError: a run was begun with other settings; raised before anything is trained.
        RunError: a folder holds something else (raised likewise); or runs failed, once all others are done.
        StoreError: the store is damaged, or the disk failed.
    """
    Trackers(track, {})  # raises for a missing library before anything is trained
    trainings = plan.trainings
    made: dict[str, Training] = {}
    for planned in trainings:
        for place in (folder, folder / planned.name):
            if Run(place).is_begun:
                raise RunError(f"{place} is a single run; give the sweep another folder")
        made[planned.folder] = Training(store, folder / planned.folder, planned.settings)
        made[planned.folder].check()
    plan.write(folder)
    left = [
        planned for planned in trainings if not _is_done(store, folder, planned, plan.scoring[planned.folder])
    ]
    if not left:
        console.print(f"{folder}: already finished", soft_wrap=True)
        return
    console.print(_overview(trainings))
    for layer in sorted({training.settings.layer or 0 for training in left}):
        errors.print(f"layer {layer}: {about_position(store.position_r2(layer))}", soft_wrap=True)
    n_before = len(trainings) - len(left)
    before = f", {n_before} of them already finished" if n_before else ""
    errors.print(f"{counted(len(trainings), 'run')}{before}", soft_wrap=True)
    rest = _Rest(folder, plan, left, memory, track)
    groups = side_by_side([made[planned.folder] for planned in left], together)
    # First the free runs; then those that other processes had locked, which may have died.
    for wait in (False, True):
        busy: list[list[Training]] = []
        for group in groups:
            with ExitStack() as held:
                ours = [one for one in group if held.enter_context(one.run.locked(wait=wait))]
                rest.train(ours)
            busy.append([one for one in group if one not in ours])
        groups = [group for group in busy if group]
    failed = rest.failed
    if failed:
        raise RunError(
            f"{len(failed)} of {len(trainings)} runs failed: {'; '.join(failed)}; "
            "the others are finished, and the same command tries these again"
        )
    console.print(f"all runs are in {folder}; compare them with: posae report {folder}", soft_wrap=True)


class _Rest:
    """The unfinished runs of a sweep, and their progress.

    Attributes:
        failed: one line for each run that failed.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        left: Sequence[Planned],
        memory: LayerMemory,
        track: Sequence[TrackerName],
    ) -> None:
        self._folder, self._plan, self._memory, self._track = folder, plan, memory, track
        self._planned = {folder / planned.folder: planned for planned in left}
        self._n_all = len(plan.trainings)
        self._n_done = self._n_all - len(left)
        self._cost_left = sum(planned.cost for planned in left)
        self._cost_done = 0.0
        self._seconds_training = self._seconds_scoring = 0.0
        self._n_scored = 0
        self.failed: list[str] = []

    def train(self, group: Sequence[Training]) -> None:
        """Train and score runs that share a pass; they are locked."""
        if not group:
            return
        numbers = (
            f"{self._n_done + 1}-{self._n_done + len(group)}" if len(group) > 1 else f"{self._n_done + 1}"
        )
        begun: list[Ongoing] = []
        broken: dict[Path, RunError | SettingsError] = {}
        for training in group:
            try:
                ongoing = Ongoing.begin(training)
            except (RunError, SettingsError) as error:
                broken[training.run.folder] = error
            else:
                begun += [ongoing] if ongoing else []
        if begun:
            configs = {one.training.run.folder: one.training.config for one in begun}
            with LiveProgress() as progress, Trackers(self._track, configs) as trackers:
                labelled = _Labelled(progress, f"{numbers}/{self._n_all}")
                started = time.monotonic()
                train_together(begun, labelled, self._memory, trackers)
                self._seconds_training += time.monotonic() - started
        self._cost_left -= sum(self._planned[training.run.folder].cost for training in group)
        for one in begun:
            cost = self._planned[one.training.run.folder].cost
            self._cost_done += cost * (one.stop - one.start) / one.stop
        for training in group:
            self._score(training, broken.get(training.run.folder))

    def _score(self, training: Training, broken: RunError | SettingsError | None) -> None:
        planned = self._planned[training.run.folder]
        scoring = self._plan.scoring[planned.folder]
        self._n_done += 1
        label = f"{self._n_done}/{self._n_all} {planned.folder}"
        try:
            if broken:
                raise broken
            if not _is_done(training.store, self._folder, planned, scoring):
                started = time.monotonic()
                with LiveProgress() as progress:
                    _score(training, scoring, _Labelled(progress, label))
                self._seconds_scoring += time.monotonic() - started
                self._n_scored += 1
            outcome = _main_scores(training.run.folder)
        except (RunError, SettingsError) as error:
            self.failed.append(f"{planned.folder}: {error}")
            outcome = f"failed: {error}"
        seconds = self._seconds_left()
        if seconds is not None:
            outcome += f"; about {duration(seconds)} left for the others"
        errors.print(f"{label}: {outcome}", soft_wrap=True)

    def _seconds_left(self) -> float | None:
        """Estimated time for training and scoring the rest, from the runs so far; None before the first."""
        n_left = self._n_all - self._n_done
        if not n_left or (self._cost_left and not self._cost_done):
            return None
        training = self._seconds_training * self._cost_left / self._cost_done if self._cost_left else 0.0
        scoring = self._seconds_scoring * n_left / max(1, self._n_scored)
        return training + scoring or None


def _is_done(store: ActivationStore, folder: Path, planned: Planned, scoring: EvaluateSettings) -> bool:
    run, layer = folder / planned.folder, planned.settings.layer or 0
    nothing_held_out = store.held_out_part(layer)[0] >= store.contexts_by_layer[layer]
    return Run(run).is_finished and (nothing_held_out or _is_scored(run, scoring))


def _overview(trainings: Sequence[Planned]) -> Table:
    """One line per run, with its seeds together."""
    table = Table(pad_edge=False, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("run", overflow="fold", no_wrap=is_short(planned.name for planned in trainings))
    table.add_column("architecture", overflow="fold")
    for name in ("features", "parameters", "steps"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("seeds", justify="right")
    by_name: dict[str, list[Planned]] = {}
    for planned in trainings:
        by_name.setdefault(planned.name, []).append(planned)
    for name, group in by_name.items():
        first = group[0]
        table.add_row(
            name,
            first.settings.architecture,
            f"{first.settings.dictionary_size:,}",
            f"{first.n_parameters:,}",
            f"{first.settings.steps:,}",
            ", ".join(str(planned.seed) for planned in group),
        )
    return table


def _main_scores(folder: Path) -> str:
    evaluation = scores(folder)
    if evaluation is None:
        return "no scores"
    fvu = "-" if evaluation["fvu"] is None else f"{evaluation['fvu']:.4f}"
    return f"FVU {fvu}, L0 {evaluation['l0']:.1f}"


class _Labelled:
    """Progress whose task names begin with the run's label."""

    def __init__(self, progress: Progress, label: str) -> None:
        self._progress, self._label = progress, label

    def begin(self, task: str, total: int, unit: str, done: int = 0, unit_bytes: int = 0) -> None:
        self._progress.begin(f"{self._label} {task}", total, unit, done, unit_bytes)

    def advance(self, amount: int, note: str = "") -> None:
        self._progress.advance(amount, note)

    def end(self) -> None:
        self._progress.end()

    def say(self, line: str) -> None:
        self._progress.say(line)
