"""Ranks as a picture: an array for TensorBoard, and PNG or SVG files for papers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynlora.report.layout import group_by_stack
from dynlora.report.run import Run

CELL = 16  # pixels of a module's square in the array
COLORS = ((68, 1, 84), (59, 82, 139), (31, 122, 140), (94, 201, 98), (253, 231, 37))
"""viridis from rank 0 to the largest rank, as in the page and the terminal."""


def rank_image(ranks: Mapping[str, int]) -> NDArray[np.uint8]:
    """Ranks as coloured squares: rows are kinds of modules, columns are layers.

    Args:
        ranks: by module name.

    Returns:
        (height, width, 3); modules outside of any layer list are one row at the end, and white is where
        a layer has no such module. Colours are shares of the largest rank.

    Examples:
        >>> rank_image({"layers.0.up": 2, "layers.1.up": 0}).shape
        (16, 32, 3)
    """
    stacks, others = group_by_stack(ranks)
    rows = [
        [row.get(layer) for layer in stack.layers]
        for stack in stacks
        for row in stack.rows.values()
    ]
    rows += [list(others.values())] if others else []
    width = max(map(len, rows))
    highest = max([1, *ranks.values()])
    colors = np.full((len(rows), width, 3), 255, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, rank in enumerate(row):
            if rank is not None:
                colors[i, j] = COLORS[min(-(-rank * 4 // highest), 4)]
    return colors.repeat(CELL, axis=0).repeat(CELL, axis=1)


def write_picture(run: Run, path: Path) -> Path:
    """The final rank map as a PNG or SVG file, by the name's ending.

    Raises:
        ValueError: the run has no ranks, or the ending is neither .png nor .svg.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if path.suffix not in {".png", ".svg"}:
        raise ValueError(f"picture={str(path)!r} must end in .png or .svg.")
    if not run.ranks:
        raise ValueError(f"{run.folder} has no dynamic ranks to draw ({run.method}).")
    from matplotlib.figure import Figure

    stacks, _ = group_by_stack(run.ranks)
    sizes = [max(len(stack.rows), 1) for stack in stacks] or [1]
    columns = max([len(stack.layers) for stack in stacks] or [1])
    figure = Figure(figsize=(3 + 0.34 * columns, 1.2 + 0.34 * sum(sizes)), layout="constrained")
    axes = figure.subplots(len(sizes), 1, squeeze=False, height_ratios=sizes)[:, 0]
    drawn: Any = None
    for axis, stack in zip(axes, stacks, strict=True):
        grid = np.full((len(stack.rows), len(stack.layers)), np.nan)
        for i, row in enumerate(stack.rows.values()):
            for layer, rank in row.items():
                grid[i, stack.layers.index(layer)] = rank
                bright = rank > 0.6 * run.init_r
                axis.text(stack.layers.index(layer), i, rank, ha="center", va="center", size=8,
                          color="black" if bright else "white")  # fmt: skip
        drawn = axis.imshow(grid, cmap="viridis", vmin=0, vmax=run.init_r, aspect="auto")
        axis.set_yticks(range(len(stack.rows)), list(stack.rows), size=8)
        axis.set_xticks(range(len(stack.layers)), [str(n) for n in stack.layers], size=8)
        axis.set_title(stack.name if len(stacks) > 1 else f"Final ranks of {run.name}", size=9)
    axes[-1].set_xlabel("layer", size=9)
    if drawn is not None:
        figure.colorbar(drawn, ax=list(axes), label="rank", shrink=0.9)
    temporary = path.with_name(f".part-{path.name}")
    figure.savefig(temporary, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    temporary.replace(path)
    return path
