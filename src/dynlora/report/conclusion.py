"""What came out of a run, in one or two sentences."""

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
