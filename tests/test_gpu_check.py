"""The check for a GPU runs on a CPU with tiny shapes, and its record is whole whatever fails."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MODULES = [p.stem for p in BENCHMARKS.glob("*.py")]


@pytest.fixture(scope="module", autouse=True)
def scripts_as_modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        patch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def check():
    import gpu_check

    return gpu_check


@pytest.fixture
def plan():
    import gpu_plan

    return gpu_plan


def rehearsed(check, folder, only, *words):
    with pytest.raises(SystemExit) as ended:
        check.main(["--rehearse", "--commit", "abc", "--only", only, "--out", str(folder), *words])
    assert ended.value.code == 0
    return {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in folder.glob("*")}


def planned(plan, name, run):
    return plan.Planned("a", name, 0, run)


def written(folder):
    return json.loads((folder / "a.json").read_text(encoding="utf-8"))["cases"]


def test_a_rehearsed_case_says_where_it_comes_from_and_times_every_arm(check, tmp_path):
    import gpu_arms

    found = rehearsed(check, tmp_path, "steps: RoBERTa-base", "--seconds", "100000")
    assert list(found) == ["steps"]
    assert found["steps"]["commit"] == "abc"
    assert {"date", "command", "versions", "machine", "threads"} <= found["steps"].keys()
    for case in found["steps"]["cases"].values():
        assert list(case["arms"]) == list(gpu_arms.ARMS)
        assert "failed" not in case
        assert case["arms"][gpu_arms.LORA_TARGET]["ratio"] == 1
        assert case["arms"][gpu_arms.BEFORE]["peer"] == gpu_arms.LORA_INITIAL


@pytest.mark.parametrize(
    "only",
    [
        "gain",
        "allocator",
        "promises",
        "quantised",
        pytest.param("compiled", marks=pytest.mark.slow),
    ],
)
def test_a_rehearsed_section_fails_in_no_case(check, tmp_path, only):
    found = rehearsed(check, tmp_path, f"{only}: ", "--seconds", "100000")
    cases = found[only]["cases"]
    assert [name for name, c in cases.items() if {"error", "failed", "left_out"} & c.keys()] == []


def test_every_arm_with_an_allocator_is_what_its_name_says(plan):
    import gpu_arms

    case = plan.promises.EXACT
    made = {n: arm(case, gpu_arms.base_model(case, "cpu")) for n, arm in gpu_arms.ARMS.items()}
    allocators = {n: t.allocator for n, t in made.items() if t.allocator is not None}
    assert [n for n, a in allocators.items() if a.is_frozen] == [
        gpu_arms.AFTER,
        gpu_arms.AFTER_FUSED,
    ]
    assert allocators[gpu_arms.BEFORE].cost == allocators[gpu_arms.BEFORE].total_cost
    window = allocators[gpu_arms.WINDOW]
    assert window.target_cost < window.cost < window.total_cost
    assert 0 in allocators[gpu_arms.AFTER].ranks().values()


def test_what_no_run_has_measured_yet_comes_before_what_has_results(plan):
    """Of the timed cases; the results are those beside the benchmarks."""
    import render_gpu

    cases = render_gpu.newest(BENCHMARKS / "results" / "gpu")
    known = {(case.section, case.name) for case in cases if case.is_measured}
    costs = plan.Costs("cuda", plan.Clock(0.0), plan.attempt, rounds=1, steps=1)
    timed = [c for c in plan.plan(costs, rehearse=False) if c.section != "promises"]
    has_result = [(c.section, c.name) in known for c in timed]
    assert has_result == sorted(has_result)
    assert sum(c.seconds for c, has in zip(timed, has_result, strict=True) if not has) < 540


def test_the_launches_beside_those_of_a_gpu_are_as_the_page_says(check):
    import allocator_cost
    import torch
    from cases import LLAMA_1B, LLAMA_8B

    asked = ((LLAMA_1B, 4, torch.float32), (LLAMA_8B, 3, torch.bfloat16))
    counts = [
        allocator_cost.count_launches(allocator_cost.layer_sizes(shape) * layers, 24, None, dtype)
        for shape, layers, dtype in asked
    ]
    assert counts == [19, 25]


def test_without_time_every_case_is_recorded_as_left_out(check, tmp_path):
    found = rehearsed(check, tmp_path, "", "--seconds", "0")
    cases = [c for section in found.values() for c in section["cases"].values()]
    assert len(found) == 6
    assert all(c.keys() == {"left_out"} for c in cases)


def test_a_case_that_raises_leaves_its_traceback_and_the_next_one_runs(plan, tmp_path):
    cases = [planned(plan, "bad", lambda: {"x": 1 // 0}), planned(plan, "good", lambda: {"x": 1})]
    assert plan.check(cases, plan.Record(tmp_path, {}), plan.Clock(float("inf")), "cpu")
    assert "ZeroDivisionError" in written(tmp_path)["bad"]["error"]
    assert written(tmp_path)["good"]["x"] == 1


def test_a_case_that_leaves_the_device_unusable_ends_the_worker_and_the_next_one_goes_on(
    plan, tmp_path, monkeypatch
):
    def clean(device):
        raise RuntimeError("CUDA error: device-side assert triggered")

    cases = [planned(plan, name, lambda: {"x": 1}) for name in ("first", "second")]
    clock = plan.Clock(float("inf"))
    monkeypatch.setattr(plan, "_clean", clean)
    assert not plan.check(cases, plan.Record(tmp_path, {}), clock, "cuda")
    assert "device-side" in written(tmp_path)["first"]["device_unusable_afterwards"]
    assert "second" not in written(tmp_path)
    monkeypatch.undo()
    assert plan.check(cases, plan.Record(tmp_path, {}), clock, "cpu")
    assert written(tmp_path)["second"]["x"] == 1


def test_a_case_in_which_the_process_ends_is_recorded_and_not_run_again(plan, tmp_path):
    class Killed(BaseException):
        pass

    def killed():
        raise Killed

    cases = [planned(plan, "kills", killed), planned(plan, "next", lambda: {"x": 1})]
    clock = plan.Clock(float("inf"))
    with pytest.raises(Killed):
        plan.check(cases, plan.Record(tmp_path, {}), clock, "cpu")
    assert plan.check(cases, plan.Record(tmp_path, {}), clock, "cpu")
    assert "the process ended" in written(tmp_path)["kills"]["error"]
    assert written(tmp_path)["next"]["x"] == 1


def test_workers_follow_each_other_until_one_ends_well_or_adds_nothing(
    check, tmp_path, monkeypatch
):
    class Ended:
        def __init__(self, code):
            self.returncode = code

    codes = iter([3, 3, 0, 0])
    calls = []

    def run(command, **_):
        calls.append(command)
        (tmp_path / f"{len(calls)}.json").write_text("x")
        return Ended(next(codes))

    monkeypatch.setattr(check.subprocess, "run", run)
    check.supervise(["--out", str(tmp_path)], tmp_path, check.time.monotonic() + 10)
    assert len(calls) == 3
    monkeypatch.setattr(check.subprocess, "run", lambda *_, **__: Ended(1))
    check.supervise([], tmp_path, check.time.monotonic() + 10)  # ends


def test_a_folder_that_holds_results_is_refused(check, tmp_path):
    (tmp_path / "steps.json").write_text("{}")
    with pytest.raises(SystemExit, match="holds results already"):
        check.main(["--out", str(tmp_path)])
