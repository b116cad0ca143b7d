"""Write the tables of benchmarks/README.md, and its plot, from the JSON files in results/.

python benchmarks/render.py
"""

import json
from typing import Any

from measuring import HERE, RESULTS
from render_gpu import gpu_tables
from tables import table

MEGA = 1e6


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _bytes(size: float) -> str:
    return f"{size / MEGA:.2f} MB"


def step_cost(result: dict[str, Any]) -> str:
    """Steps: time, and ratios to PEFT's LoRA of the same rank and of the target rank, and to the floor."""
    parts = []
    for case in result["cases"]:
        rows = [
            (
                arm,
                _time(row["seconds"]),
                "{:.2f} ({:.2f} to {:.2f})".format(row["to_peer"], *row["to_peer_spread"]),
                f"{row['to_lora']:.2f}",
                f"{row['to_floor']:.2f}",
            )
            for arm, row in case["arms"].items()
        ]
        head = ("arm", "step", "÷ LoRA of its rank (range)", "÷ LoRA, target rank", "÷ floor")
        parts.append(f"**{case['case']}**\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def allocator_cost(result: dict[str, Any]) -> str:
    """Allocation: shares, whole models, growth and extrapolation."""
    shares = [
        (row["case"], f"{row['share']:.2%}", f"{row['worst']:.2%}") for row in result["shares"]
    ]
    whole = [_allocation(name, row) for name, row in result["whole"].items()]
    grown = [
        _allocation(f"{row['modules']} modules of 64x64, r 4", row)
        for row in result["growth"]["modules"]
    ]
    grown += [
        _allocation(f"24 modules of 768x768, r {row['rank']}", row)
        for row in result["growth"]["rank"]
    ]
    grown += [
        _allocation("24 modules of {0}x{0}, r 12".format(row["width"]), row)
        for row in result["growth"]["width"]
    ]
    scale = [
        (
            f"{row['model']}, r {row['rank']}",
            _time(row["one_layer"]["seconds"]),
            _time(row["two_layers"]["seconds"]),
            f"{_time(row['three_layers']['seconds'])} ({_time(row['three_layers_predicted_s'])})",
            f"{_time(row['whole_model_s'])}, {row['layers']} layers",
            _bytes(max(row[k]["peak_temporary_bytes"] for k in ("one_layer", "three_layers"))),
            _bytes(row["whole_model_state_bytes"]),
        )
        for row in result["scale"]
    ]
    costs = ("what", "time", "launches", "peak of temporaries", "adapter")
    heads = (
        "model",
        "1 layer",
        "2 layers",
        "3 layers (predicted)",
        "whole",
        "temporaries",
        "state",
    )
    return "\n\n".join(
        (
            table(("step", "allocator's share", "worst round"), shares),
            table(costs, whole + grown),
            table(heads, scale),
        )
    )


def _allocation(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    return (
        name,
        _time(row["seconds"]),
        str(row["launches"]),
        _bytes(row["peak_temporary_bytes"]),
        _bytes(row["adapter_bytes"]),
    )


def whole_run(result: dict[str, Any]) -> str:
    """Runs side by side."""
    rows = [
        (
            arm,
            _time(row["seconds"]),
            f"{row['to_lora']:.2f}",
            f"{row['peak_bytes'] / MEGA:.0f} MB",
            _bytes(row["state_bytes_start"]),
            _bytes(row["state_bytes_end"]),
            _bytes(row["saved_bytes"]),
        )
        for arm, row in result["arms"].items()
    ]
    head = (
        "arm",
        "run",
        "÷ PEFT LoRA at target rank",
        "peak above imports",
        "weights + gradients + optimizer, start",
        "end",
        "saved",
    )
    return f"{result['case']}\n\n{table(head, rows)}"


def reward(result: dict[str, Any]) -> str:
    """Rewards of held-out prompts by arm, then what differs between arms, seed by seed."""
    rows = []
    for name, arm in result["arms"].items():
        found = [run["held_out"] for run in arm["runs"]]
        mean, least, most = sum(found) / len(found), min(found), max(found)
        cells = (str(len(found)), f"{mean:.3f} ({least:.3f} to {most:.3f})", _empty(arm["runs"]))
        rows.append((name, *cells))
    head = ("arm", "seeds", "reward (range)", "modules at rank 0")
    gaps = [
        (
            row["arm"],
            row["against"],
            f"{row['mean']:+.3f} [{row['interval'][0]:+.3f}, {row['interval'][1]:+.3f}]",
            f"{row['wins']} : {row['losses']}",
            f"{row['sign_p']:.2g}",
        )
        for row in result["compared"]
    ]
    gap_head = ("arm", "against", "difference [95 %]", "better : worse", "p, sign test")
    return f"{table(head, rows)}\n\n{table(gap_head, gaps)}"


def _empty(runs: list[dict[str, Any]]) -> str:
    found = [sum(rank == 0 for rank in r["ranks"].values()) for r in runs if r["ranks"]]
    return f"{min(found)} to {max(found)} of {len(runs[0]['ranks'])}" if found else "–"


def plot(result: dict[str, Any], name: str) -> None:
    """Allocator time against modules, rank and width, on logarithmic axes."""
    from matplotlib.figure import Figure  # only here: tables need no plotting

    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, (axis, rows) in zip(figure.subplots(1, 3), result["growth"].items(), strict=True):
        axes.loglog([r[axis] for r in rows], [r["seconds"] * 1e3 for r in rows], "o-")
        axes.set_xlabel(axis)
        axes.set_ylabel("ms per step")
        axes.grid(visible=True, which="both", alpha=0.3)
    figure.savefig(RESULTS / name, metadata={"Date": None})


def source(record: dict[str, Any]) -> str:
    """Where a table's numbers come from, in one line."""
    machine, versions = record["machine"], record["versions"]
    load = ", ".join(map(str, record["load_at_end"]))
    place = machine.get("gpu", f"{machine['processor']}, {machine['cores']} cores")
    return (
        f"*`{record['command']}` at {record['commit'][:10]}"
        f"{'' if record['is_clean'] else ' with local changes'}, {record['date']}; torch "
        f"{versions['torch']}, transformers {versions['transformers']}, peft {versions['peft']}; {place}, "
        f"{record['threads']} thread(s); load averages at the end {load}.*"
    )


TABLES = {
    "step_cost": step_cost,
    "step_cost_4bit": step_cost,
    "allocator_cost": allocator_cost,
    "whole_run": whole_run,
    "reward": reward,
}


def rendered(text: str) -> str:
    """The page with what stands between the markers of every result replaced by its table."""
    for path in sorted(RESULTS.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        question, device, _ = path.name.split(".")
        block = f"{TABLES[question](record['result'])}\n\n{source(record)}"
        if question == "allocator_cost":
            block += f"\n\n![Allocator time](results/growth.{device}.svg)"
        text = _replaced(text, f"{question}.{device}", block)
    if any((RESULTS / "gpu").glob("*/*.json")):
        text = _replaced(text, "gpu", gpu_tables(RESULTS / "gpu"))
    return text


def _replaced(text: str, name: str, block: str) -> str:
    start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    before, _, rest = text.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(
            f"README.md has no lines {start!r} and {end!r}: add them where the table of {name} is to stand."
        )
    return f"{before}{start}\n{block}\n{end}{after}"


def main() -> None:
    """Renew the page and its plots."""
    for path in RESULTS.glob("allocator_cost.*.json"):
        device = path.name.split(".")[1]
        plot(json.loads(path.read_text(encoding="utf-8"))["result"], f"growth.{device}.svg")
    page = HERE / "README.md"
    page.write_text(rendered(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
