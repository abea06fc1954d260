"""``posae train``: an autoencoder from a store, or all of a sweep."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..pipeline.controls import is_position_aware, refuse_unknown_positions
from ..pipeline.settings import TRAIN_PRESETS, EvaluateSettings, TrainSettings, resolve_settings
from ..pipeline.sweep import Plan, Study, read_sweep
from ..store.errors import SettingsError
from ..store.reader import ActivationStore
from .display import LiveProgress, console, errors
from .options import Cache, CacheSize, Config, with_settings
from .report import comparison


@with_settings(TrainSettings)
def train(
    store: Annotated[str, typer.Argument(help="Store to train from: a folder, or a URL.")],
    run: Annotated[Path, typer.Argument(help="Folder of the run; of all runs with --sweep or --controls.")],
    options: dict[str, Any],
    preset: Annotated[
        str | None, typer.Option("--preset", help=f"Settings to start from: {', '.join(TRAIN_PRESETS)}.")
    ] = None,
    config: Config = None,
    sweep: Annotated[
        Path | None,
        typer.Option("--sweep", help="TOML file that names many runs; options given here win over it."),
    ] = None,
    controls: Annotated[
        bool | None,
        typer.Option(
            "--controls/--no-controls",
            help="Set a run that knows positions beside its controls, each in a folder below RUN. "
            "A sweep does so by itself.",
            show_default=False,
        ),
    ] = None,
    cache: Cache = None,
    cache_size: CacheSize = None,
) -> None:
    """Train an autoencoder on one layer of a store, and score it on the held-out part.

    Run again with the same words it goes on at its last checkpoint. With --sweep: all runs that a file
    names, and their controls, one after another.

    Example: posae train pile.zarr runs/paper --layer 12
    """
    studies: list[Study] = []
    if sweep:
        if preset is not None or config is not None:
            raise SettingsError("--sweep has its settings from its file; leave --preset and --config out")
        studies = read_sweep(sweep, options, controls)
        all_settings = [settings for study in studies for settings in study.runs.values()]
    else:
        settings = resolve_settings(
            TrainSettings, "train", presets=TRAIN_PRESETS, preset=preset, config=config, options=options
        )
        all_settings = [settings]
        if controls:
            name = preset or settings.architecture
            seeds = (settings.seed, settings.data_seed)
            title = f"{name} and its controls"
            studies = [Study(str(run), name, title, None, {name: settings}, (seeds,))]
    opened = ActivationStore.open(store)
    for settings in all_settings:
        refuse_unknown_positions(settings.model_dump(), opened.manifest.unknown, opened.root)
    # Damage and hostile files are found before anything heavy is loaded.
    for layer in sorted({opened.layer_or_middle(settings.layer) for settings in all_settings}):
        opened.check_layer(layer)
    if studies:
        from .trainings import fit_to, train_all

        train_all(opened, run, Plan(studies, fit_to(opened, run)))
    else:
        _train_alone(opened, run, all_settings[0])


def _train_alone(store: ActivationStore, run: Path, settings: TrainSettings) -> None:
    from ..pipeline.train import Training
    from .trainings import about_position, scores, train_one

    training = Training(store, run, settings)
    errors.print(about_position(store.position_r2(training.layer)), soft_wrap=True)
    with LiveProgress() as progress:
        was_left = train_one(training, EvaluateSettings(), progress)
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
