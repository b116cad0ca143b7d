"""The command ``dynlora``: its own verbs, and those of the distributions installed beside it."""

from typing import Annotated

try:
    import rich  # noqa: F401 (what it prints, it prints with it)
    import typer
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"dynlora: the command line needs {missing.name}; pip install 'dynlora[cli]'"
    ) from None

from dynlora.cli.export import export
from dynlora.cli.look import inspect, report, watch
from dynlora.cli.shrink import shrink
from dynlora.cli.terminal import flag, quiet_imports
from dynlora.cli.verbs import Verbs

app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of ``dynlora`` and ``python -m dynlora``."""
    quiet_imports()
    app(prog_name="dynlora")


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, flag("--version", "Print the version and exit.")] = False,
) -> None:
    """Make LoRA adapters as small as they can be (DoRA, ACL 2024).

    In a script: DynLoraCallback(target_r=8) among the Trainer's callbacks.
    Here: look at what comes out, make it smaller, export it. With
    dynlora-lab installed, also runs from a recipe: dynlora demo --quick.
    """
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"dynlora {installed('dynlora')}")
        raise typer.Exit


for verb in (export, inspect, report, watch, shrink):
    app.command()(verb)
