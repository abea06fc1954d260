"""The command ``posae``: one line a command, and what becomes of errors.

Exit codes: 0 done; 1 a ``PosaeError``, in one line that says what to do next; 2 wrong usage; 130
interrupted. Anything else is a bug and keeps its traceback. A file of a store that is cut short while it is
decoded ends the command with such a line and 1 too, though no Python is running then: see ``_on_bus_error``.
"""

import ctypes
import inspect
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.logging import RichHandler
from typer.core import TyperGroup

from .. import __version__
from ..pipeline.settings import in_plain_words
from ..store.errors import PosaeError
from ..store.shards import ShardReader
from .copy import copy
from .display import errors, show_error, show_interrupt
from .evaluate import evaluate
from .harvest import harvest
from .import_activations import import_activations
from .import_sae import import_sae
from .inspect_store import inspect_store
from .merge import merge
from .plant import plant
from .report import report
from .train import TrainCommand, train
from .versions import versions


class _Commands(TyperGroup):
    """The commands; errors and interrupts of all of them get posae's own messages instead of typer's."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = in_plain_words(error.__cause__) or error.message
            raise
        except KeyboardInterrupt as interrupt:
            show_interrupt(interrupt)
            sys.exit(130)


app = typer.Typer(
    name="posae",
    cls=_Commands,
    help="Sparse autoencoders that know the position of each token.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _flowing(command: Callable[..., None]) -> str:
    """A command's docstring with one line per paragraph, so that terminals of any width wrap it."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


_COMMANDS: dict[str, Callable[..., None]] = {
    "harvest": harvest,
    "train": train,
    "inspect-store": inspect_store,
    "evaluate": evaluate,
    "report": report,
    "copy": copy,
    "plant": plant,
    "merge": merge,
    "import": import_activations,
    "import-sae": import_sae,
}
_LAZY = {"train": TrainCommand}


def _incomplete() -> None:
    """What a lazy command is registered with."""


for _name, _command in _COMMANDS.items():
    _kind = _LAZY.get(_name)
    app.command(_name, cls=_kind, help=_flowing(_command))(_incomplete if _kind else _command)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"posae {__version__}")
        for name, version in versions():
            typer.echo(f"  {name:<13} {version}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_version,
            is_eager=True,
            help="Show the versions of posae and of the libraries that results depend on.",
        ),
    ] = False,
) -> None:
    """Sparse autoencoders that know the position of each token.

    Harvest a language model's activations into a store, once; train from it as often as you like.
    """


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_bus_error(_: int) -> None:
    """Report which file was cut short while it was read, and exit; the system would kill us silently.

    Reading a map past the end of its file raises SIGBUS. A handler of Python's own would never run: it waits
    for the faulting instruction, which faults for ever. This one is C's, called at once in the thread that
    read. It may take the GIL: checksums and decoders hold no lock that the GIL's holder could wait for.
    """
    files = ShardReader.cut_short()
    what = (
        f"{files[0]}, and check the others"
        if files
        else "a file of the store was cut short while it was read, or its disk failed; look for damage"
    )
    if os.isatty(2):
        os.write(2, b"\r\x1b[K\x1b[?25h")  # the progress bar hid the cursor
    os.write(2, f"error: {what}: posae inspect-store STORE --verify\n".encode())
    os._exit(1)


def main() -> None:
    """Run the command line."""
    # Read when torch loads its OpenMP. By default its threads spin for each other for a millisecond: where
    # another process uses a core, training with small matrices becomes many times slower (docs/log.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    ctypes.CDLL(None).signal(int(signal.SIGBUS), _on_bus_error)
    logging.getLogger("posae").addHandler(RichHandler(console=errors, show_time=False, show_path=False))
    # Our own error reports its retries once, when they are used up.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        app()
    except PosaeError as error:
        show_error(error)
        sys.exit(1)
    except KeyboardInterrupt as interrupt:
        show_interrupt(interrupt)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output closed the pipe, as `head` does.
        sys.stderr.close()
        sys.exit(0)
