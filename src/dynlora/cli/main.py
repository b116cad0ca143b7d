"""The command ``dynlora``: its options, and nothing else."""

from pathlib import Path
from typing import Annotated

try:
    import rich  # noqa: F401 (the demo prints with it)
    import typer
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"dynlora: the command line needs {missing.name}; pip install 'dynlora[cli]'"
    ) from None

from dynlora.cli import assets
from dynlora.cli.look_options import register

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


app.add_typer(assets.app, name="assets")


def main() -> None:
    """Entry point of ``dynlora`` and ``python -m dynlora``."""
    app(prog_name="dynlora")


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[
        bool, typer.Option("--version", metavar="", help="Print the version and exit.")
    ] = False,
) -> None:
    """Train LoRA with a rank budget instead of a rank (DoRA, ACL 2024).

    In a script: DynLoraConfig instead of LoraConfig, and DynLoraCallback()
    among the Trainer's callbacks. Here: a demonstration of both.
    """
    if version:
        from dynlora import __version__

        typer.echo(f"dynlora {__version__}")
        raise typer.Exit


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What to do.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", metavar="", help="Check, count and print; train nothing.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", metavar="", help="Go on from the last checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help="Replace an earlier run.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", metavar="", help="Print nothing but errors.")
    ] = False,
    json_lines: Annotated[
        bool, typer.Option("--json", metavar="", help="Print one JSON object a line.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", metavar="", help="Show the traceback of an error.")
    ] = False,
) -> None:
    """Fine-tune a model as a recipe says; any of its fields by --field value.

    For instance: dynlora train recipes/paper/roberta-base/cola.yaml
    --method lora --seed 3 --training.learning_rate 1e-3

    Ctrl-C saves a checkpoint. Exit code: 0 done, 1 failed, 2 a mistake in
    recipe or data, 130 stopped by Ctrl-C.
    """
    from dynlora.cli.train import train as run_train

    code = run_train(
        recipe,
        context.args,
        dry_run=dry_run,
        resume=resume,
        overwrite=overwrite,
        output="json" if json_lines else "quiet" if quiet else "terminal",
        debug=debug,
    )
    raise typer.Exit(code)


@app.command()
def demo(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="ID_OR_FOLDER",
            help="Pretrained model: hub id or local folder.",
            show_default="all-MiniLM-L6-v2, fetched once",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.csv",
            help="Texts with the columns text, label and, if wished, split (train, test).",
            show_default="WordNet glosses in 26 classes",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the trained adapter.")
    ] = Path("dynlora-demo"),
    init_r: Annotated[
        int, typer.Option("--init-r", metavar="N", help="Rank of every module at the start.")
    ] = 6,
    target_r: Annotated[
        float, typer.Option("--target-r", metavar="X", help="Mean rank of the modules at the end.")
    ] = 4,
    epochs: Annotated[
        float | None,
        typer.Option(metavar="X", help="Passes over the training texts, 1 if not given."),
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(metavar="N", help="Optimizer steps, instead of epochs.")
    ] = None,
    learning_rate: Annotated[
        float, typer.Option(metavar="X", help="Highest learning rate of the run.")
    ] = 1e-2,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Texts in an optimizer step.")] = 32,
    seed: Annotated[int, typer.Option(metavar="N", help="Fixes head, adapter and order.")] = 0,
    quick: Annotated[
        bool,
        typer.Option("--quick", metavar="", help="60 optimizer steps: a look in about a minute."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", metavar="", help="Show the traceback of an error.")
    ] = False,
) -> None:
    """Fine-tune a text classifier with dynamic ranks, and check what comes out.

    Prints accuracy before and after, the rank that each module ends with,
    and whether the saved adapter loads in stock PEFT without dynlora.
    Takes about 3 minutes on 2 CPU cores.

    Exit code: 0 all checks passed, 1 one failed, 2 wrong usage.
    """
    from dynlora.cli.demo import demo as run_demo

    code = run_demo(
        debug=debug,
        quick=quick,
        model=model,
        data=data,
        output=output,
        init_r=init_r,
        target_r=target_r,
        epochs=epochs,
        max_steps=max_steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        seed=seed,
    )
    raise typer.Exit(code)


register(app)
