"""``posae train``: train an autoencoder from a store, or all runs of a sweep."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..pipeline.settings import EvaluateSettings, Group, TrainSettings
from ..pipeline.train.trackers import TrackerName
from ..store.errors import SettingsError
from ..store.reader import ActivationStore
from .display import LiveProgress, console, errors, if_interrupted
from .lazy import LazyCommand
from .options import Cache, CacheSize, on_this_machine, with_fields
from .report import comparison

if TYPE_CHECKING:
    from ..pipeline.train.sweep import Plan

Resident = Literal["auto", "always", "never"]


class TrainCommand(LazyCommand):
    """``posae train``: architectures declare its options, beside classes of torch."""

    @staticmethod
    def complete() -> Callable[..., None]:
        """``train`` with an option for each setting of any architecture."""
        from ..pipeline.sae.run_settings import all_options

        return with_fields(all_options())(train)


def train(
    store: Annotated[str, typer.Argument(help="Store to train from: a folder, or a URL.")],
    run: Annotated[
        Path,
        typer.Argument(
            callback=on_this_machine, help="Folder of the run; of all runs with --sweep or --controls."
        ),
    ],
    options: dict[str, Any],
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="TOML file with settings; options override it.",
            rich_help_panel=Group.BASICS,
        ),
    ] = None,
    sweep: Annotated[
        Path | None,
        typer.Option(
            "--sweep",
            help="TOML file that lists many runs; options override it.",
            rich_help_panel=Group.RESOURCES,
        ),
    ] = None,
    controls: Annotated[
        bool | None,
        typer.Option(
            "--controls/--no-controls",
            help="Also train the controls of a position-aware run, each in a folder below RUN. "
            "A sweep does so by default.",
            show_default=False,
            rich_help_panel=Group.RESOURCES,
        ),
    ] = None,
    together: Annotated[
        int,
        typer.Option(
            "--together",
            min=1,
            help="Maximum number of runs of a sweep that share a pass over the store, as far as half of the "
            "memory holds them. Their weights are the same as when trained alone.",
            rich_help_panel=Group.RESOURCES,
        ),
    ] = 8,
    resident: Annotated[
        Resident,
        typer.Option(
            "--resident",
            help="Whether to keep the decoded layer in memory, so that the store is read only once. auto: on "
            "a GPU or from a server, if training needs more than one epoch and half of the memory suffices.",
            rich_help_panel=Group.RESOURCES,
        ),
    ] = "auto",
    track: Annotated[
        list[TrackerName] | None,
        typer.Option(
            "--track",
            help="Log the curves to TensorBoard or Weights & Biases too; may be given twice. Each needs the "
            "optional dependency of its name.",
            show_default=False,
            rich_help_panel=Group.OUTPUT,
        ),
    ] = None,
    cache: Cache = None,
    cache_size: CacheSize = None,
) -> None:
    """Train an autoencoder on one layer of a store, and score it on the held-out part.

    Run again with the same options, it resumes from its last checkpoint. With --sweep: all runs that a file
    lists, and their controls; those that read the same batches share a pass over the store. Started by
    torchrun, the processes share the run, or the runs of a sweep.

    Example: posae train pile.zarr runs/paper --layer 12
    """
    from ..pipeline.sae.run_settings import resolve_train_settings
    from ..pipeline.train.sweep import Plan, Study, read_sweep

    preset: str | None = options.pop("preset")
    studies: list[Study] = []
    if sweep:
        if preset is not None or config is not None:
            raise SettingsError("--sweep takes its settings from its file; leave out --preset and --config")
        studies = read_sweep(sweep, options, controls)
        all_settings = [settings for study in studies for settings in study.runs.values()]
    else:
        settings = resolve_train_settings(preset=preset, config=config, options=options)
        all_settings = [settings]
        if controls:
            name = preset or settings.architecture
            seeds = (settings.seed, settings.data_seed)
            title = f"{name} and its controls"
            studies = [Study(str(run), name, title, None, {name: settings}, (seeds,))]
    opened = ActivationStore.open(store)
    # Find damage and hostile files before a run is prepared.
    for layer in sorted({opened.layer_or_middle(settings.layer) for settings in all_settings}):
        opened.check_layer(layer)
    from ..pipeline.device import keep_freed_memory

    keep_freed_memory()
    if studies:
        from ..pipeline.train import LayerMemory
        from .trainings import fit_to, train_all

        plan = Plan(studies, fit_to(opened, run))
        with if_interrupted(lambda: _n_runs_finished(run, plan)):
            train_all(opened, run, plan, LayerMemory(resident), together, track or ())
    else:
        _train_alone(opened, run, all_settings[0], resident, track or ())


def _train_alone(
    store: ActivationStore,
    run: Path,
    settings: TrainSettings,
    resident: Resident,
    track: Sequence[TrackerName],
) -> None:
    from ..pipeline.train import LayerMemory, Training
    from ..pipeline.train.controls import is_position_aware
    from .trainings import about_position, scores, train_one

    training, memory = Training(store, run, settings), LayerMemory(resident)
    with training.team() as team:
        if not team.is_first:
            with if_interrupted(lambda: ""):
                training.train(memory=memory, team=team)
            return
        training.check()  # before anything is printed
        errors.print(about_position(store.position_r2(training.layer)), soft_wrap=True)
        if training.epochs >= 2:
            errors.print(f"{training.epochs:,.1f} epochs of the training part", soft_wrap=True)
        with if_interrupted(lambda: _saved_state(run)), LiveProgress(curve="FVU") as progress:
            was_left = train_one(training, EvaluateSettings(), progress, memory, track, team)
    evaluation = scores(run)
    if evaluation is None:
        console.print(f"{run}: trained; not scored, as the store has no held-out part", soft_wrap=True)
        return
    if not was_left:
        console.print(f"{run}: already finished", soft_wrap=True)
    console.print(comparison([run]))
    if evaluation["l0"] > evaluation["dictionary_size"] / 2:
        console.print(
            f"note: on average {evaluation['l0']:.0f} of {evaluation['dictionary_size']} features are active "
            "per token, so this code is not sparse; raise --l1-coefficient",
            soft_wrap=True,
        )
    if is_position_aware(training.settings.model_dump()):
        console.print(
            "note: this position-aware run has no controls; to train it with them, add --controls and give a "
            "new folder for all of them",
            soft_wrap=True,
        )


def _saved_state(folder: Path) -> str:
    from ..pipeline.runs import Run

    run = Run(folder)
    if run.is_finished:
        return "training is finished; run the same command again to score it"
    step = run.checkpoint_step
    if step is None:
        return "no checkpoint yet; the same command starts over"
    return f"checkpoint saved at step {step:,}; run the same command again to resume"


def _n_runs_finished(folder: Path, plan: "Plan") -> str:
    from ..pipeline.runs import Run

    n_done = sum(Run(folder / planned.folder).is_finished for planned in plan.trainings)
    return f"{n_done} of {len(plan.trainings)} runs are finished; run the same command again to resume"
