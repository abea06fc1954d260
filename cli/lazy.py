"""Commands whose options are made when they are asked for: what they are made of takes seconds to import."""

from collections.abc import Callable
from typing import Any

from typer.core import TyperCommand
from typer.main import get_command_from_info
from typer.models import CommandInfo


class LazyCommand(TyperCommand):
    """A command without options at first; ``complete`` gives the function that has them all."""

    is_complete = False

    @staticmethod
    def complete() -> Callable[..., None]:
        """The function that typer makes the command of."""
        raise NotImplementedError

    def get_params(self, ctx: Any) -> list[Any]:
        """The options, made when parsing, help or completion first needs them."""
        if not self.is_complete:
            info = CommandInfo(name=self.name, callback=self.complete())
            made = get_command_from_info(info, pretty_exceptions_short=False, rich_markup_mode="rich")
            self.params, self.callback, self.is_complete = made.params, made.callback, True
        return super().get_params(ctx)
