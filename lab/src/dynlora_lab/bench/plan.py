"""Which cells a suite wants, given those that are finished. Pure: results in, cells out."""

import math
from collections.abc import Mapping

from dynlora_lab.bench.results import DONE, Result
from dynlora_lab.bench.suite import Cell, Suite


def wanted_cells(suite: Suite, results: Mapping[str, Result]) -> list[Cell]:
    """Every cell that is due so far, finished ones included, in the order to run them.

    First the sweep; then, for each task and method whose sweep is complete, all seeds at the learning
    rate that the sweep chose. Seeds are the outer loop, so that a part of the cells compares already.
    A cell that takes the ranks of another waits for it.
    """
    sweep = [
        Cell(task=task, method=method, learning_rate=rate, seed=seed)
        for seed in suite.tune_seeds
        for task in suite.tasks
        for method in suite.methods
        for rate in suite.rates(task, method)
    ]
    pairs = [(task, method) for task in suite.tasks for method in suite.methods]
    chosen = {pair: chosen_rate(suite, results, *pair) for pair in pairs}
    final = [
        Cell(task=task, method=method, learning_rate=rate, seed=seed)
        for seed in suite.seeds
        for (task, method), rate in chosen.items()
        if rate is not None
    ]
    cells = {cell.key: cell for cell in (*sweep, *final)}
    return [cell for cell in cells.values() if _has_ranks(suite, results, cell)]


def source_of(suite: Suite, results: Mapping[str, Result], cell: Cell) -> Cell | None:
    """The cell whose final ranks ``cell`` takes: of its method's ``ranks_of``, same task and seed.

    Returns:
        None where the method takes no ranks, or the learning rate of the other one is not chosen yet.
    """
    method = suite.methods[cell.method].get("ranks_of")
    if method is None:
        return None
    rate = chosen_rate(suite, results, cell.task, method)
    if rate is None:
        return None
    return Cell(task=cell.task, method=method, learning_rate=rate, seed=cell.seed)


def _has_ranks(suite: Suite, results: Mapping[str, Result], cell: Cell) -> bool:
    """Whether the ranks that ``cell`` is to take are there, or it takes none."""
    if "ranks_of" not in suite.methods[cell.method]:
        return True
    source = source_of(suite, results, cell)
    return source is not None and results.get(source.key, {}).get("status") == DONE


def num_cells(suite: Suite, results: Mapping[str, Result]) -> int:
    """Cells of the whole suite; where no learning rate can be chosen there are no more seeds to run."""
    more = len(set(suite.seeds) - set(suite.tune_seeds))
    count = 0
    for task in suite.tasks:
        for method in suite.methods:
            rates = suite.rates(task, method)
            count += len(rates) * len(suite.tune_seeds)
            is_open = any(k not in results for k in _sweep_keys(suite, task, method))
            if is_open or chosen_rate(suite, results, task, method) is not None:
                count += more
    return count


def num_ended(suite: Suite, results: Mapping[str, Result]) -> int:
    """Cells of the suite that have a result; results that it does not want, or no more, do not count."""
    return sum(cell.key in results for cell in wanted_cells(suite, results))


def chosen_rate(
    suite: Suite, results: Mapping[str, Result], task: str, method: str
) -> float | None:
    """The learning rate with the best mean on the selection set after the last epoch.

    A failed cell counts as the worst there is; ties go to the smaller rate. The reported sets are not
    looked at.

    Returns:
        None while the sweep is incomplete, or if every cell of it failed.
    """
    keys = _sweep_keys(suite, task, method)
    if any(key not in results for key in keys):
        return None
    best: tuple[float, float] | None = None
    for rate in suite.rates(task, method):
        found = [results[k] for k in keys if results[k]["cell"]["learning_rate"] == rate]
        value = _mean_selected(found)
        if math.isfinite(value) and (best is None or value > best[0]):
            best = (value, rate)
    return best[1] if best else None


def _mean_selected(found: list[Result]) -> float:
    """Mean on the selection set, the better the higher; −∞ if one of them failed."""
    if any(result["status"] != DONE for result in found):
        return -math.inf
    values = [r["selected"]["final"] * (1 if r["is_better_higher"] else -1) for r in found]
    return sum(values) / len(values)


def _sweep_keys(suite: Suite, task: str, method: str) -> list[str]:
    return [
        Cell(task=task, method=method, learning_rate=rate, seed=seed).key
        for rate in suite.rates(task, method)
        for seed in suite.tune_seeds
    ]
