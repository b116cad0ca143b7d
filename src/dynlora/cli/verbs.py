"""Verbs of ``dynlora`` that another distribution brings; each is loaded when it is asked for.

A distribution names them in its entry points, group ``dynlora.commands``. Each is a ``typer.Typer`` with
one command or several, in a module that is quick to import: ``dynlora --help`` imports them all.
"""

from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from typer.core import TyperGroup

from dynlora.cli.terminal import USER_MISTAKE, print_error

GROUP = "dynlora.commands"
LAB_VERBS = frozenset({"assets", "bench", "demo", "train"})


def installed_verbs() -> dict[str, EntryPoint]:
    """Verbs of other distributions by name, in alphabetical order; nothing is imported."""
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    return dict(sorted(found.items()))


class Verbs(TyperGroup):
    """The verbs of the library, then those that are installed beside it; the library's win."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names for ``--help``."""
        own = super().list_commands(ctx)
        return [*own, *(name for name in installed_verbs() if name not in own)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of this name, None if there is none."""
        own = super().get_command(ctx, cmd_name)
        entry = installed_verbs().get(cmd_name) if own is None else None
        if entry is None:
            return own
        command = typer.main.get_command(entry.load())
        command.name = cmd_name  # a command alone in its app is named after its function
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Name, command and the rest of ``args``.

        Raises:
            typer.Exit: a verb of dynlora-lab, which is not installed; stderr says how to install it.
        """
        verb = args[0]
        if self.get_command(ctx, verb) is None:
            if verb in LAB_VERBS and not ctx.resilient_parsing:  # as it is for shell completion
                print_error(f"{verb} is a command of dynlora-lab; pip install dynlora-lab")
                raise typer.Exit(USER_MISTAKE)
            for name in installed_verbs():  # "did you mean" knows only what is in place
                self.add_command(self.get_command(ctx, name), name)
        return super().resolve_command(ctx, args)
