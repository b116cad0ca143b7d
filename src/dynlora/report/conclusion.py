"""What came out of a run: in a sentence, in figures, and as a config for the next one."""

import math
from collections.abc import Mapping
from typing import Any

from dynlora.adapter_files.format import scaling_of
from dynlora.adapter_files.plain_config import as_python, plain_fields
from dynlora.report.run import Run

_MANY = 0.1
"""Share of the modules at the starting rank from which on a higher start is worth a word."""


def conclusion(run: Run) -> str:
    """Size, scores, empty modules, and whether the starting rank was the limit; "" without ranks.

    Examples:
        "84,480 of 168,960 parameters stay (50 %), as many as in a LoRA of rank 8. Accuracy 0.873.
        5 of 37 modules are empty. 13 of 37 modules end at rank 16, the start: a higher r may help."
    """
    if not run.states:
        return ""
    step, ranks = run.states[-1]
    so_far = "" if run.is_finished else f"After step {step:,} of {run.total_steps:,}: "
    sentences = [so_far + _size(run)]
    if run.auto is not None:
        sentences.append(which_rank(run.auto).rstrip("."))
    scores = [f"{metric_label(name)} {run.score(name):.4g}" for name in run.metrics()]
    if scores:
        text = ", ".join(reversed(scores))
        sentences.append(text[0].upper() + text[1:])
    start = run.states[0][1]
    if empty := sum(rank == 0 for rank in ranks.values()):
        sentences.append(f"{empty} of {len(ranks)} modules are empty")
    full = sum(rank == start.get(name) for name, rank in ranks.items())
    if full >= _MANY * len(ranks) and sum(ranks.values()) < sum(start.values()):
        sentences.append(
            f"{full} of {len(ranks)} modules end at rank {run.init_r}, the start: a higher r may help"
        )
    return ". ".join(sentences) + "."


def _size(run: Run) -> str:
    first, last = run.states[0][1], run.ranks
    before, after = run.parameters(first), run.parameters(last)
    if not before:
        total, live = sum(first.values()), sum(last.values())
        return f"{live:,} of {total:,} components stay ({100 * live / max(total, 1):.0f} %)"
    return (
        f"{after:,} of {before:,} parameters stay ({100 * after / before:.0f} %), as many as in a "
        f"LoRA of rank {run.lora_rank(last):.3g}"
    )


def summary_row(run: Run) -> dict[str, str]:
    """The run in one line of the comparison, as texts by column name."""
    row = {"run": run.name, "method": run.method}
    if "seed" in run.record:
        row["seed"] = str(run.record["seed"])
    step, total = run.last_step, run.total_steps or run.last_step
    state = "finished" if run.is_finished else f"{step / max(total, 1):.0%}"
    row["step"] = f"{step:,} of {total:,} ({state})"
    if run.states:
        first, last = run.states[0][1], run.ranks
        row["components"] = f"{sum(first.values()):,} → {sum(last.values()):,}"
        if run.parameters(first):
            row["parameters"] = f"{run.parameters(first):,} → {run.parameters(last):,}"
            row["as a LoRA of rank"] = f"{run.lora_rank(first):.3g} → {run.lora_rank(last):.3g}"
    if prunes := run.of("prune"):
        cut, back = (sum(e.get(k, 0) for e in prunes) for k in ("cut", "revived"))
        row["prunings"] = f"{len(prunes)}, {cut:,} cut, {back:,} revived"
    for name in run.metrics():
        row[metric_label(name)] = f"{run.score(name):.4g}"
    row["time"] = duration(run.seconds)
    if run.peak_bytes:
        row["peak memory"] = f"{run.peak_bytes / 2**20:,.0f} MiB"
    return row


def which_rank(found: Mapping[str, Any]) -> str:
    """What the search of ``target_r="auto"`` says of fixed ranks, in a sentence.

    >>> which_rank({"without": 3.0, "reference": 2.0, "by_rank": [[1, 10, 2.2], [4, 40, 2.003]]})
    'The size of rank 1 would have lost 20 % of the gain, that of rank 4 0.3 %.'
    """
    lost = [(row["rank"], row["lost"]) for row in rank_rows(found)]
    if not lost:
        return ""
    (rank, share), *rest = lost
    more = "".join(f", that of rank {r} {x}" for r, x in rest)
    return f"The size of rank {rank} would have lost {share} of the gain{more}."


def rank_rows(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row a rank of ``target_r="auto"``'s record: size, held-out loss, and the share of the gain lost.

    There are none where nothing was gained on held-out rows.
    """
    gain = found["without"] - found["reference"]
    if not 0 < gain < math.inf:
        return []
    return [
        {
            "rank": f"{rank}",
            "cost": f"{cost:,}",
            "loss": f"{loss:.4g}",
            "lost": _percent((loss - found["reference"]) / gain),
        }
        for rank, cost, loss in found["by_rank"]
    ]


def _percent(share: float) -> str:
    if not math.isfinite(share):
        return "all"
    return f"{100 * share:.0f} %" if share >= 0.095 or share == 0 else f"{100 * share:.1g} %"


def metric_label(name: str) -> str:
    """What an evaluation measured, in words.

    >>> metric_label("eval_loss"), metric_label("eval_accuracy")
    ('evaluation loss', 'accuracy')
    """
    return "evaluation loss" if name == "eval_loss" else name.removeprefix("eval_")


def duration(seconds: float) -> str:
    """Wall time for people.

    >>> [duration(s) for s in (0.4, 75, 3700)]
    ['0.4 s', '1 min 15 s', '1 h 1 min']
    """
    if seconds < 60:
        return f"{seconds:.2g} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"


def next_config(ranks: Mapping[str, int], lora: Mapping[str, Any]) -> str:
    """Python of a LoraConfig that trains exactly these ranks, all else as in ``lora``, the run's fields."""
    alive = {name: rank for name, rank in ranks.items() if rank}
    targets = [f".{target}" for target in lora.get("target_parameters") or ()]
    bare = {name: () for name in ranks if f".{name}".endswith(tuple(targets))}
    fields = plain_fields(
        lora,
        alive,
        {name: scaling_of(lora, name) for name in alive},
        dead=[name for name, rank in ranks.items() if not rank and name not in bare],
        parameters=bare,
    )
    return as_python({**fields, "init_lora_weights": lora.get("init_lora_weights", True)})
