"""``posae train``: an autoencoder from a store."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from ..pipeline.settings import TRAIN_PRESETS, EvaluateSettings, TrainSettings, resolve_settings
from ..store.reader import ActivationStore
from .display import LiveProgress, console, errors
from .options import Config, with_settings
from .report import comparison

_LITTLE_R2 = 0.01
"""Below this share, position means brought nothing where they were tried (docs/paper.md)."""


@with_settings(TrainSettings)
def train(
    store: Annotated[Path, typer.Argument(help="Store to train from.")],
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    options: dict[str, Any],
    preset: Annotated[
        str | None, typer.Option("--preset", help=f"Settings to start from: {', '.join(TRAIN_PRESETS)}.")
    ] = None,
    config: Config = None,
) -> None:
    """Train an autoencoder on one layer of a store, and score it on the held-out part.

    Run again with the same words it goes on at its last checkpoint.

    Example: posae train pile.zarr runs/paper --layer 12
    """
    settings = resolve_settings(
        TrainSettings, "train", presets=TRAIN_PRESETS, preset=preset, config=config, options=options
    )
    opened = ActivationStore.open(store)
    # Damage and hostile files are found before anything heavy is loaded.
    layer = opened.layer_or_middle(settings.layer)
    opened.check_layer(layer)
    from ..pipeline.evaluate import evaluate
    from ..pipeline.runs import Run
    from ..pipeline.train import Training

    training = Training(opened, run, settings)
    errors.print(_about_position(opened.position_r2(layer)), soft_wrap=True)
    with LiveProgress() as progress:
        trained = training.train(progress)
    if not trained.steps_done and (run / "evaluation.json").exists():
        console.print(f"{run}: finished before", soft_wrap=True)
    elif opened.held_out_part(training.layer)[0] < opened.contexts_by_layer[training.layer]:
        with LiveProgress() as progress:
            evaluate(run, EvaluateSettings(store=store, device=settings.device), progress)
    else:
        console.print(f"{run}: trained; the store holds nothing out, so nothing was scored", soft_wrap=True)
        return
    console.print(comparison([run]))
    found = Run(run).evaluation
    if found["l0"] > found["dictionary_size"] / 2:
        console.print(
            f"note: {found['l0']:.0f} of {found['dictionary_size']} features are active on a token: "
            "this code is not sparse; a larger --l1-coefficient makes it so",
            soft_wrap=True,
        )


def _about_position(r2: float) -> str:
    """What there is to gain by knowing the position."""
    if math.isnan(r2):
        return "what position explains cannot be told of so few tokens"
    told = f"position explains {max(0.0, r2):.2%} of this layer's variance"
    if r2 < _LITTLE_R2:
        return f"{told}: next to nothing for an autoencoder to gain by knowing it"
    return f"{told}; --position-mean takes that off before encoding"
