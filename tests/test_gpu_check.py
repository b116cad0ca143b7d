"""The check for a GPU runs on a CPU with tiny shapes, and its record is whole whatever fails."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

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


def rehearsed(check, folder, only, *words):
    check.main(["--rehearse", "--commit", "abc", "--only", only, "--out", str(folder), *words])
    return {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in folder.glob("*")}


def test_a_rehearsed_case_says_where_it_comes_from_and_times_every_arm(check, tmp_path):
    import gpu_arms

    found = rehearsed(check, tmp_path, "steps: RoBERTa-base", "--seconds", "100000")
    assert list(found) == ["steps"]
    assert found["steps"]["commit"] == "abc"
    assert {"date", "command", "versions", "machine", "threads"} <= found["steps"].keys()
    for case in found["steps"]["cases"].values():
        assert list(case["arms"]) == list(gpu_arms.ARMS)
        assert "failed" not in case
        assert case["arms"][gpu_arms.LORA]["ratio"] == 1


@pytest.mark.parametrize("only", ["gain", "allocator", "promises"])
def test_a_rehearsed_section_fails_in_no_case(check, tmp_path, only):
    found = rehearsed(check, tmp_path, f"{only}: ", "--seconds", "100000")
    cases = found[only]["cases"]
    assert [name for name, c in cases.items() if {"error", "failed", "left_out"} & c.keys()] == []


def test_without_time_every_case_is_recorded_as_left_out(check, tmp_path):
    found = rehearsed(check, tmp_path, "", "--seconds", "0")
    cases = [c for section in found.values() for c in section["cases"].values()]
    assert len(found) == 5
    assert all(c.keys() == {"left_out"} for c in cases)


def test_a_case_that_raises_leaves_its_traceback_and_the_next_one_runs(check, tmp_path):
    record = check.Record(tmp_path, {})
    cases = [
        check.Planned("a", "bad", 0, lambda: {"x": 1 // 0}),
        check.Planned("a", "good", 0, lambda: {"x": 1}),
    ]
    check.check(cases, record, check.Clock(float("inf")), "cpu")
    written = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["cases"]
    assert "ZeroDivisionError" in written["bad"]["error"]
    assert written["good"]["x"] == 1


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_fused_prototype_computes_what_stock_lora_computes(has_bias):
    from stock_fused import fuse_

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5, bias=has_bias), nn.Tanh(), nn.Linear(5, 4, bias=has_bias))
    model = get_peft_model(
        base, LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False)
    )
    x = torch.randn(2, 7, 6, requires_grad=True)
    trained = [x, *(p for p in model.parameters() if p.requires_grad)]

    def outcome():
        y = model(x)
        return y.detach(), torch.autograd.grad(y.square().sum(), trained)

    stock = outcome()
    assert fuse_(model) == 2
    torch.testing.assert_close(outcome(), stock)
