"""The command ``posae``: one line a command, and what becomes of errors.

Exit codes: 0 done; 1 a ``PosaeError``, in one line that says what to do next; 2 wrong usage; 130
interrupted. Anything else is a bug and keeps its traceback.
"""

import logging
import sys
from typing import Annotated

import typer
from rich.logging import RichHandler

from .. import __version__
from ..store.errors import PosaeError
from .display import errors, show_error
from .evaluate import evaluate
from .harvest import harvest
from .inspect_store import inspect_store
from .report import report
from .train import train

app = typer.Typer(
    name="posae",
    help="Sparse autoencoders that know the position of each token.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("harvest")(harvest)
app.command("train")(train)
app.command("inspect-store")(inspect_store)
app.command("evaluate")(evaluate)
app.command("report")(report)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"posae {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Sparse autoencoders that know the position of each token.

    Harvest a language model's activations into a store, once; train from it as often as you like.
    """


def main() -> None:
    """Run the command line."""
    logging.getLogger("posae").addHandler(RichHandler(console=errors, show_time=False, show_path=False))
    # Its retries are told once, by our own error, when they are used up.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        app()
    except PosaeError as error:
        show_error(error)
        sys.exit(1)
    except KeyboardInterrupt:
        errors.print("interrupted; run the same command again, it goes on where it stopped")
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has enough of it, as `head` does.
        sys.stderr.close()
        sys.exit(0)
