"""Options of ``dynlora train``, ``bench`` and ``demo``, and nothing else: quick to import."""

import os
from pathlib import Path
from typing import Annotated

import typer

PANEL = "Commands of dynlora-lab"

train_app = typer.Typer(add_completion=False)
bench_app = typer.Typer(add_completion=False)
demo_app = typer.Typer(add_completion=False)


@train_app.command(
    rich_help_panel=PANEL,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
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

    For instance: dynlora train lab/recipes/paper/roberta-base/cola.yaml
    --method lora --seed 3 --training.learning_rate 1e-3

    Ctrl-C saves a checkpoint. Exit code: 0 done, 1 failed, 2 a mistake in
    recipe or data, 130 stopped by Ctrl-C.
    """
    _need_fields(recipe, what="recipe", first="task", debug=debug)
    from dynlora_lab.cli.train import train as run_train

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


@bench_app.command(rich_help_panel=PANEL)
def bench(
    suite: Annotated[
        Path | None, typer.Argument(metavar="SUITE.yaml", help="Tasks, methods, rates, seeds.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", metavar="", help="A tiny suite: does all of this work?")
    ] = False,
    results: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Results folder.", show_default="lab/results/NAME"),
    ] = None,
    workers: Annotated[int, typer.Option(metavar="N", min=1, help="Cells at once.")] = 1,
    devices: Annotated[
        str, typer.Option(metavar="0,1", help="GPUs; one worker each (CUDA_VISIBLE_DEVICES).")
    ] = "",
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Threads of a cell (OMP_NUM_THREADS).")
    ] = None,
    cell: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Run this cell only; repeatable.")
    ] = None,
    render: Annotated[
        bool, typer.Option("--render", metavar="", help="Only write the tables anew.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", metavar="", help="Run failed cells again.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", metavar="", help="Show the traceback of an error.")
    ] = False,
) -> None:
    """Run a suite of experiments and write its tables.

    Each cell (task, method, learning rate, seed) is a dynlora train run in a
    process of its own and leaves one JSON file. Finished cells never run
    again: after Ctrl-C or a crash the same command goes on, and more workers
    may join at any time.

    Exit code: 0 done, 1 cells failed, 2 a mistake, 130 stopped.
    """
    if suite is not None and not quick:
        _need_fields(suite, what="suite", first="name", debug=debug)
    try:
        from dynlora_lab.cli.bench import Wishes
        from dynlora_lab.cli.bench import bench as run_bench
    except ModuleNotFoundError as missing:
        from dynlora.cli.terminal import USER_MISTAKE, print_error

        print_error(f"this needs {missing.name}; pip install 'dynlora-lab[bench]'")
        raise typer.Exit(USER_MISTAKE) from missing

    code = run_bench(
        Wishes(
            suite=suite,
            quick=quick,
            results=results,
            workers=workers,
            devices=[d for d in devices.split(",") if d],
            threads=threads,
            cells=cell or [],
            render_only=render,
            retry_failed=retry_failed,
            debug=debug,
        )
    )
    raise typer.Exit(code)


@demo_app.command(rich_help_panel=PANEL)
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
    ] = 3e-3,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Texts in an optimizer step.")] = 32,
    seed: Annotated[int, typer.Option(metavar="N", help="Fixes head, adapter and order.")] = 0,
    quick: Annotated[
        bool,
        typer.Option("--quick", metavar="", help="60 optimizer steps instead of a whole epoch."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", metavar="", help="Show the traceback of an error.")
    ] = False,
) -> None:
    """Fine-tune a text classifier with dynamic ranks, and check what comes out.

    Prints accuracy before and after, the rank that each module ends with,
    and whether the saved adapter loads in stock PEFT without dynlora.
    Tells the time left from the first step on.

    Exit code: 0 all checks passed, 1 one failed, 2 wrong usage.
    """
    # before torch is loaded: threads that spin while they wait take four times as long beside one
    # busy program (lab/results/demo-neighbours.json)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from dynlora_lab.cli.demo import demo as run_demo

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


def _need_fields(path: Path, *, what: str, first: str, debug: bool) -> None:
    """Say at once that a file is missing or no YAML: importing what runs it takes seconds."""
    from dynlora.cli.terminal import USER_MISTAKE, report_error
    from dynlora_lab.tasks.typed_fields import RecipeError, read_fields

    try:
        read_fields(path, what=what, first=first)
    except RecipeError as error:
        raise typer.Exit(report_error(error, code=USER_MISTAKE, debug=debug)) from error
