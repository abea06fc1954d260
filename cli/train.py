"""``posae train``: an autoencoder from a store, or all of a sweep."""

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
            help="TOML file with settings; options given here win over it.",
            rich_help_panel=Group.BASICS,
        ),
    ] = None,
    sweep: Annotated[
        Path | None,
        typer.Option(
            "--sweep",
            help="TOML file that names many runs; options given here win over it.",
            rich_help_panel=Group.RESOURCES,
        ),
    ] = None,
    controls: Annotated[
        bool | None,
        typer.Option(
            "--controls/--no-controls",
            help="Train the controls of a position-aware run too, each in a folder below RUN. A sweep does "
            "so by itself.",
            show_default=False,
            rich_help_panel=Group.RESOURCES,
        ),
    ] = None,
    together: Annotated[
        int,
        typer.Option(
            "--together",
            min=1,
            help="Runs of a sweep that share a pass over the store, if half of the memory holds them. They "
            "give the same weights as alone.",
            rich_help_panel=Group.RESOURCES,
        ),
    ] = 8,
    resident: Annotated[
        Resident,
        typer.Option(
            "--resident",
            help="Whether the layer is kept decoded in memory, so that the store is read once. auto: where a "
            "GPU or a server would be waited for, half of the memory holds it, and it is read again.",
            rich_help_panel=Group.RESOURCES,
        ),
    ] = "auto",
    track: Annotated[
        list[TrackerName] | None,
        typer.Option(
            "--track",
            help="Show the curves in TensorBoard or Weights & Biases too; may be given twice. Each needs the "
            "extra of its name.",
            show_default=False,
            rich_help_panel=Group.OUTPUT,
        ),
    ] = None,
    cache: Cache = None,
    cache_size: CacheSize = None,
) -> None:
    """Train an autoencoder on one layer of a store, and score it on the held-out part.

    Run again with the same options it resumes at its last checkpoint. With --sweep: all runs that a file
    names, and their controls; those that read the same batches share a pass over the store. Started by
    torchrun, its processes share the run, or the runs of a sweep.

    Example: posae train pile.zarr runs/paper --layer 12
    """
    from ..pipeline.sae.run_settings import resolve_train_settings
    from ..pipeline.train.sweep import Plan, Study, read_sweep

    preset: str | None = options.pop("preset")
    studies: list[Study] = []
    if sweep:
        if preset is not None or config is not None:
            raise SettingsError("--sweep takes its settings from its file; leave --preset and --config out")
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
    # Damage and hostile files are found before anything heavy is loaded.
    for layer in sorted({opened.layer_or_middle(settings.layer) for settings in all_settings}):
        opened.check_layer(layer)
    from ..pipeline.device import keep_freed_memory

    keep_freed_memory()
    if studies:
        from ..pipeline.train import LayerMemory
        from .trainings import fit_to, train_all

        plan = Plan(studies, fit_to(opened, run))
        with if_interrupted(lambda: _how_many_are_done(run, plan)):
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
        training.check()  # before anything is said of a training that cannot be
        errors.print(about_position(store.position_r2(training.layer)), soft_wrap=True)
        if training.epochs >= 2:
            errors.print(f"the training part is read {training.epochs:,.1f} times", soft_wrap=True)
        with if_interrupted(lambda: _how_far(run)), LiveProgress(curve="FVU") as progress:
            was_left = train_one(training, EvaluateSettings(), progress, memory, track, team)
    found = scores(run)
    if found is None:
        console.print(f"{run}: trained; the store holds nothing out, so nothing was scored", soft_wrap=True)
        return
    if not was_left:
        console.print(f"{run}: finished before", soft_wrap=True)
    console.print(comparison([run]))
    if found["l0"] > found["dictionary_size"] / 2:
        console.print(
            f"note: {found['l0']:.0f} of {found['dictionary_size']} features are active on a token: "
            "this code is not sparse; a larger --l1-coefficient makes it so",
            soft_wrap=True,
        )
    if is_position_aware(training.settings.model_dump()):
        console.print(
            "note: this run knows positions and stands without controls; the same command with --controls "
            "and a folder for all of them trains both",
            soft_wrap=True,
        )


def _how_far(folder: Path) -> str:
    from ..pipeline.runs import Run

    run = Run(folder)
    if run.is_finished:
        return "the training is done, and the same command scores it"
    step = run.checkpoint_step
    if step is None:
        return "no checkpoint is there yet, and the same command begins anew"
    return f"a checkpoint of step {step:,} is there, and the same command goes on"


def _how_many_are_done(folder: Path, plan: "Plan") -> str:
    from ..pipeline.runs import Run

    n_done = sum(Run(folder / planned.folder).is_finished for planned in plan.trainings)
    return f"{n_done} of {len(plan.trainings)} trainings are done, and the same command goes on"
