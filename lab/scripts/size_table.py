"""Write the README of a suite of sizes that was cut off: only seeds that every method has are in its table.

python lab/scripts/size_table.py lab/results/size-vision
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path


def main(folder: Path) -> None:
    """Score and size of each method, at the learning rate that the selecting set prefers."""
    found: dict[tuple[str, str, float], dict[int, tuple[float, float, int, float]]] = defaultdict(
        dict
    )
    for file in sorted((folder / "cells").glob("*.json")):
        cell = json.loads(file.read_text(encoding="utf-8"))
        key = cell["cell"]
        found[key["method"], key["task"], key["learning_rate"]][key["seed"]] = (
            cell["selected"]["final"],
            cell["reported"]["final"],
            cell["budget"]["parameters_end"],
            cell["cpu_s"],
        )
    seeds = sorted(set.intersection(*(set(cells) for cells in found.values())))
    methods, tasks, rates = (sorted({key[i] for key in found}) for i in range(3))
    full = max(cell[2] for cells in found.values() for cell in cells.values())
    rows = []
    for method in methods:
        scores, sizes, seconds = [], [], []
        for task in tasks:
            at = {r: [found[method, task, r][s] for s in seeds] for r in rates}
            best = max(at.values(), key=lambda cells: statistics.mean(c[0] for c in cells))
            scores.append(100 * statistics.mean(c[1] for c in best))
            sizes.append(statistics.mean(c[2] for c in best) / full)
            seconds.append(statistics.mean(c[3] for c in best))
        rows.append((statistics.mean(sizes), method, scores, statistics.mean(seconds)))
    head = ["method", *(f"{task} (accuracy)" for task in tasks), "mean", "size", "CPU seconds"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for size, method, scores, cpu in sorted(rows, reverse=True):
        cells = [f"{score:.1f}" for score in (*scores, statistics.mean(scores))]
        lines.append(f"| {' | '.join([method, *cells, f'{size:.2f}', f'{cpu:.0f}'])} |")
    text = (
        f"# Results of the suite `{folder.name}`, cut off\n\n"
        "Written by `lab/scripts/size_table.py` from the files in `cells/`; edit nothing here.\n\n"
        f"Means over seeds {', '.join(map(str, seeds))}, the ones that all methods have. The learning rate "
        f"of each method and task is the better of {', '.join(map(str, rates))} on the selecting set. Size "
        f"is the share of {full:,} parameters.\n\n" + "\n".join(lines) + "\n"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
