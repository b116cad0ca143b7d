"""What a person sees while a run goes on: a bar in a terminal, lines in a log."""

import io
import re

import pytest
from rich.console import Console

from dynlora_lab.cli import progress as progress_module
from dynlora_lab.cli.progress import progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when the test says so."""
    now = [1000.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    return passes


def log():
    return Console(file=io.StringIO(), width=80, force_terminal=False)


def lines(console):
    return console.file.getvalue().splitlines()


def test_a_log_tells_of_the_first_step_and_then_now_and_then(clock):
    console = log()
    with progress(console) as told:
        told.announce("Training with dynlora")
        told.on_step(0, 250, None)
        clock(8)
        told.on_log(1, {"loss": 3.2581})
        told.on_step(1, 250, 6.0)
        for done in range(2, 12):
            clock(8)
            told.on_step(done, 250, 6.0)
    first, *rest = lines(console)
    assert first == "Training with dynlora"
    assert rest == [
        "training 1/250, about 33:12 left, loss 3.258, rank 6.00",
        "training 5/250, about 32:40 left, loss 3.258, rank 6.00",
        "training 9/250, about 32:08 left, loss 3.258, rank 6.00",
    ]


def test_time_left_of_a_resumed_run_counts_its_own_steps_only(clock):
    console = log()
    with progress(console) as told:
        told.on_step(100, 110, None)
        clock(3)
        told.on_step(101, 110, None)
    assert lines(console) == ["training 101/110, about 27 s left"]


def test_each_evaluation_has_a_time_left_of_its_own(clock):
    console = log()
    with progress(console) as told:
        for pace in (40, 50):
            for batch in (1, 2):
                told.on_measure(batch, 3)
                clock(pace)
        told.on_log(5, {"eval_accuracy": 0.5, "eval_runtime": 3.0})
    assert lines(console) == [
        "measuring 2/3, about 40 s left",
        "measuring 2/3, about 50 s left",
        "step 5: accuracy 0.5000",
    ]


def test_a_terminal_shows_a_bar_with_time_left_and_loss_before_the_second_step(clock):
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with progress(console) as told:
        told.on_step(0, 20, None)
        clock(2)
        told.on_log(1, {"loss": 3.2581})
        told.on_step(1, 20, 6.0)
    text = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", console.file.getvalue())
    assert re.search(r"training .* 1/20 .*about 38 s left, loss 3\.258, rank 6\.00", text)
