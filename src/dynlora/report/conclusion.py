"""What came out of a run, in one or two sentences."""

import math
from collections.abc import Mapping
from typing import Any

from dynlora.report.run import RankState, Run

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
    so_far = (
        "" if run.is_finished else f"After step {run.states[-1].step:,} of {run.total_steps:,}: "
    )
    sentences = [so_far + _size(run)]
    if run.auto is not None:
        sentences.append(which_rank(run.auto).rstrip("."))
    scores = [f"{metric_label(name)} {run.series(name)[-1][1]:.4g}" for name in run.metrics()]
    if scores:
        text = ", ".join(reversed(scores))
        sentences.append(text[0].upper() + text[1:])
    ranks, start = run.ranks, run.states[0].ranks
    if empty := sum(rank == 0 for rank in ranks.values()):
        sentences.append(f"{empty} of {len(ranks)} modules are empty")
    full = sum(rank == start.get(name) for name, rank in ranks.items())
    if full >= _MANY * len(ranks) and sum(ranks.values()) < sum(start.values()):
        sentences.append(
            f"{full} of {len(ranks)} modules end at rank {run.init_r}, the start: a higher r may help"
        )
    return ". ".join(sentences) + "."


def which_rank(found: Mapping[str, Any]) -> str:
    """What the search of ``target_r="auto"`` says of fixed ranks, in a sentence.

    >>> which_rank({"reference": 2.0, "by_rank": [[1, 10, 2.2], [4, 40, 2.006]]})
    'At the size of rank 1 the loss would have changed by +10 %, at that of rank 4 by +0.3 %.'
    """
    rises = [(row["rank"], row["rise"]) for row in rank_rows(found)]
    if not rises:
        return ""
    (rank, rise), *rest = rises
    more = "".join(f", at that of rank {r} by {x}" for r, x in rest)
    return f"At the size of rank {rank} the loss would have changed by {rise}{more}."


def rank_rows(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row a rank of ``target_r="auto"``'s record: size, held-out loss, and its rise."""
    reference = found["reference"]
    return [
        {
            "rank": f"{rank}",
            "cost": f"{cost:,}",
            "loss": f"{loss:.4g}",
            "rise": _percent(loss / reference - 1),
        }
        for rank, cost, loss in found["by_rank"]
    ]


def _percent(share: float) -> str:
    if not math.isfinite(share):
        return "NaN"
    return f"{100 * share:+.0f} %" if abs(share) >= 0.095 else f"{100 * share:+.1g} %"


def _size(run: Run) -> str:
    first, last = run.states[0], run.states[-1]
    if not run.parameters_of_rank_one:
        share = last.live / max(first.live, 1)
        return f"{last.live:,} of {first.live:,} components stay ({share * 100:.0f} %)"
    before, after = run.parameters_at(first), run.parameters_at(last)
    return (
        f"{after:,} of {before:,} parameters stay ({100 * after / max(before, 1):.0f} %), as many as in a "
        f"LoRA of rank {lora_rank(run, last):.3g}"
    )


def lora_rank(run: Run, state: RankState) -> float:
    """Rank of the plain LoRA on the same modules that has as many parameters."""
    return run.parameters_at(state) / run.parameters_of_rank_one


def metric_label(name: str) -> str:
    """What an evaluation measured, in words.

    >>> metric_label("eval_loss"), metric_label("eval_accuracy")
    ('evaluation loss', 'accuracy')
    """
    return "evaluation loss" if name == "eval_loss" else name.removeprefix("eval_")
