"""``dynlora shrink``: its options, and what it prints."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from dynlora.cli.terminal import flag, guarded, quiet_libraries

if TYPE_CHECKING:
    from dynlora.shrink import ShrinkReport


@guarded
def shrink(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A finished LoRA.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="New folder.", show_default="nothing is written"),
    ] = None,
    energy: Annotated[
        float | None, typer.Option(metavar="X", help="Share of the spectral energy to keep: 0.95.")
    ] = None,
    per_module: Annotated[
        bool, flag("--per-module", "That share in each module by itself.")
    ] = False,
    method: Annotated[
        Literal["sv_ratio", "sv_fro", "sv_cumulative"] | None,
        typer.Option(metavar="RULE", help="kohya's sv_ratio, sv_fro or sv_cumulative."),
    ] = None,
    value: Annotated[float | None, typer.Option(metavar="X", help="Of --method.")] = None,
    mean_rank: Annotated[
        float | None, typer.Option(metavar="R", help="As many parameters as rank R everywhere.")
    ] = None,
    size_mb: Annotated[
        float | None, typer.Option(metavar="X", help="A file of at most X million bytes.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="BASE", help="Base model: folder or hub id.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Held-out texts, .csv or .jsonl: text, label."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(metavar="X", help="Share of the gain that may be lost.", show_default="0.003"),
    ] = None,
    uniform: Annotated[bool, flag("--uniform", "One rank everywhere, padded with zeros.")] = False,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Texts in a batch.")] = 8,
    max_length: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens of a text.")] = 512,
) -> None:
    """Make a finished LoRA smaller without training.

    With FOLDER alone: prints size against energy, and writes nothing. One
    rule decides what stays: --energy, --method, --mean-rank, --size-mb (with
    --data the better of two orders on it), or --model with --data, which
    finds the smallest size that loses --tolerance of the adapter's gain in
    held-out loss at most. Prints a LoraConfig that trains what came out.

    For instance: dynlora shrink out --energy 0.95 --out out-small
    dynlora shrink out --model BASE --data val.csv --out out-small

    Exit code: 0 done, 1 verification failed, 2 wrong usage.
    """
    from dynlora.shrink import shrink_adapter

    with quiet_libraries():
        done = shrink_adapter(
            folder, out, energy=energy, per_module=per_module, method=method, value=value,
            mean_rank=mean_rank, size_mb=size_mb, model=model, data=data, tolerance=tolerance,
            uniform=uniform, batch_size=batch_size, max_length=max_length,
        )  # fmt: skip
    console = Console()
    if done.after is None:
        console.print(_tables(done))
        return
    if done.points:
        console.print(_loss_table(done))
    console.print(Text(done.conclusion))
    console.print(Text(_details(done, uniform=uniform)))
    if done.config is not None:
        typer.echo(f"\n{done.config_source}")


def _tables(done: "ShrinkReport") -> RenderableType:
    """Size against energy."""
    before = done.before
    sizes = Table("energy", "MB", "of the file", "mean rank", "largest", "at rank 0", box=None)
    for share, size in done.energies:
        sizes.add_row(
            f"{share:.1%}", f"{size.num_bytes / 1e6:.3g}",
            f"{size.num_bytes / before.num_bytes:.0%}", f"{size.mean_rank:.2f}",
            str(size.max_rank), str(size.dead),
        )  # fmt: skip
    equal = Table("rank everywhere", "MB", "of the file", "energy", box=None)
    for rank, size in done.equal_ranks.items():
        equal.add_row(
            str(rank), f"{size.num_bytes / 1e6:.3g}",
            f"{size.num_bytes / before.num_bytes:.0%}", f"{size.energy:.1%}",
        )  # fmt: skip
    head = Text(
        f"{done.folder}: {before.num_bytes:,} bytes, {before.parameters:,} parameters, mean rank "
        f"{before.mean_rank:.3g}; decomposed in {done.seconds[0]:.1f} s\n"
    )
    last = Text("\nNothing was written: name a rule and --out, as --energy 0.95 --out DIR.")
    return Group(head, sizes, Text(), equal, last)


def _loss_table(done: "ShrinkReport") -> RenderableType:
    """Loss against size, for both orders, smallest within the tolerance marked."""
    table = Table("order", "components", "MB", "of the file", "loss", "gain lost", "", box=None)
    before = done.before
    table.add_row("whole", "", f"{before.num_bytes / 1e6:.3g}", "100%", f"{before.loss:.4f}")
    smallest = {}
    for point in done.points:
        if point.is_within:
            smallest[point.order] = point
    for point in done.points:
        mark = "smallest" if smallest.get(point.order) is point else ""
        table.add_row(
            point.order, str(point.components), f"{point.num_bytes / 1e6:.3g}",
            f"{point.num_bytes / before.num_bytes:.0%}", f"{point.loss:.4f}",
            f"{point.gain_lost:z.1%}",
            mark or ("within" if point.is_within else ""),
        )  # fmt: skip
    table.add_row("none", "0", "", "", f"{done.loss_without:.4f}", "100.0%")
    return Group(table, Text())


def _details(done: "ShrinkReport", *, uniform: bool) -> str:
    after = done.after
    assert after is not None  # noqa: S101  # the caller has looked; for the type checker
    form = f"padded to rank {after.max_rank}" if uniform else f"ranks up to {after.max_rank}"
    dead = f", {after.dead} modules left out" if after.dead else ""
    text = (
        f"{form}{dead}, {after.num_bytes:,} bytes, {after.energy:.2%} of the energy, "
        f"{done.seconds[1]:.1f} s"
    )
    if done.out is None:
        return f"{text}\nNothing was written: name --out DIR to write it."
    checks = f"every update read back is within {done.tensor_difference:.1g}"
    if done.output_difference is not None:
        checks += f", outputs in PEFT within {done.output_difference:.1g}"
    return f"Wrote {done.out}: {text}\nVerified: {checks}"
