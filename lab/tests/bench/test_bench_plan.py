"""Which cells a suite wants, and how the learning rate is chosen."""

import pytest

from bench_results import cell, failed, result, run_all, score, small_suite
from dynlora_lab.bench.plan import chosen_rate, num_cells, num_ended, source_of, wanted_cells


def test_the_sweep_comes_first_and_every_method_gets_the_same():
    suite = small_suite()
    first = wanted_cells(suite, {})
    assert {(c.task, c.method, c.learning_rate) for c in first} == {
        (t, m, r) for t in "ab" for m in ("lora", "dynlora") for r in (0.001, 0.01)
    }
    assert {c.seed for c in first} == {0}


def test_the_other_seeds_run_at_the_chosen_rate_alone():
    suite = small_suite()
    results, order = run_all(suite)
    assert len(order) == num_cells(suite, {}) == num_cells(suite, results) == 8 + 2 * 4
    assert {(c.learning_rate, c.seed) for c in order[8:]} == {(0.01, 1), (0.01, 2)}


def test_the_seed_of_the_sweep_is_not_run_twice():
    results, _ = run_all(small_suite())
    assert cell("a", "lora", 0.01, 0).key in results
    assert len(results) == len(set(results))


def test_later_seeds_are_paired_as_soon_as_possible():
    _, order = run_all(small_suite())
    assert [c.seed for c in order[8:]] == [1, 1, 1, 1, 2, 2, 2, 2]


def test_the_choice_never_looks_at_the_reported_set():
    suite = small_suite()

    def misleading(c):
        return result(c, score(c), reported=1 - score(c))

    assert run_all(suite)[1] == run_all(suite, misleading)[1]


def test_a_lower_metric_can_be_the_better_one():
    suite = small_suite()
    results, _ = run_all(suite, lambda c: result(c, score(c), is_better_higher=False))
    assert chosen_rate(suite, results, "a", "lora") == 0.001


def test_ties_go_to_the_smaller_rate():
    suite = small_suite()
    results, _ = run_all(suite, lambda c: result(c, 0.5))
    assert chosen_rate(suite, results, "a", "lora") == 0.001


def test_a_rate_that_failed_is_not_chosen():
    suite = small_suite()
    results, _ = run_all(
        suite, lambda c: failed(c) if c.learning_rate == 0.01 else result(c, score(c))
    )
    assert chosen_rate(suite, results, "a", "dynlora") == 0.001


def test_a_method_that_always_fails_ends_with_its_sweep():
    suite = small_suite()
    results, order = run_all(
        suite, lambda c: failed(c) if c.method == "lora" else result(c, score(c))
    )
    assert chosen_rate(suite, results, "a", "lora") is None
    assert sum(c.method == "lora" for c in order) == 4
    assert num_cells(suite, results) == len(order)


@pytest.mark.parametrize("missing", [0, 3])
def test_nothing_is_chosen_before_the_sweep_is_complete(missing):
    suite = small_suite(tune_seeds=[0, 1])
    keys = [cell("a", "lora", rate, seed) for rate in (0.001, 0.01) for seed in (0, 1)]
    results = {c.key: result(c, score(c)) for i, c in enumerate(keys) if i != missing}
    assert chosen_rate(suite, results, "a", "lora") is None


def test_a_rate_factor_scales_the_whole_sweep():
    suite = small_suite(
        methods={"lora": {"method": "lora"}, "full": {"method": "full", "rate_factor": 0.01}}
    )
    assert suite.rates("a", "lora") == [0.001, 0.01]
    assert suite.rates("a", "full") == [0.00001, 0.0001]


def test_a_method_that_takes_the_ranks_of_another_waits_for_them():
    methods = {
        "lora": {"method": "lora"},
        "dynlora": {"method": "dynlora"},
        "transfer": {"method": "lora", "ranks_of": "dynlora"},
    }
    suite = small_suite(methods=methods)
    seen = {}

    def run(c):
        seen[c.key] = source_of(suite, dict(finished), c)
        finished[c.key] = result(c, score(c) if c.method != "transfer" else c.learning_rate)
        return finished[c.key]

    finished = {}
    results, order = run_all(suite, run)
    assert len(order) == num_cells(suite, {}) == len(results)
    place = {c.key: i for i, c in enumerate(order)}
    for c in order:
        source = seen[c.key]
        if c.method != "transfer":
            assert source is None
            continue
        assert (source.task, source.method, source.seed) == (c.task, "dynlora", c.seed)
        assert source.learning_rate == 0.01
        assert place[source.key] < place[c.key]


def test_results_that_the_suite_does_not_want_do_not_count():
    suite = small_suite()
    results, _ = run_all(suite)
    stray = cell("a", "lora", 0.001, 2)  # another seed at a rate that was not chosen
    more = results | {stray.key: result(stray, 0.5)}
    assert num_ended(suite, more) == num_ended(suite, results) == len(results)


def test_ranks_are_not_taken_from_a_cell_that_failed():
    suite = small_suite(
        methods={"lora": {"method": "lora"}, "transfer": {"method": "lora", "ranks_of": "lora"}}
    )
    _, order = run_all(suite, lambda c: failed(c) if c.task == "a" else result(c, 0.5))
    assert {c.task for c in order if c.method == "transfer"} == {"b"}
