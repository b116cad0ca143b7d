"""What a run leaves behind: history.jsonl, the live fields in Trainer's logs, rank maps."""

import json
import shutil

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from dynlora._private import calling_self
from dynlora.allocator.record import five_numbers
from dynlora.callback.live_logs import LiveLogs, live_fields, put_first
from dynlora.history import HISTORY_FILE, HistoryFile, read_history
from small_net import attached, train
from small_trainer import SAVE_ALL, losses_of, trainer_of

POOR = {"target_r": 0.5}


def events_of(folder, kind):
    return [event for event in read_history(folder) if event["event"] == kind]


@pytest.fixture(scope="module", params=[False, True], ids=["stock", "gated"])
def finished(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run, callback = trainer_of(
        folder, gated=request.param, **POOR,
        arguments={"eval_strategy": "steps", "eval_steps": 10},
    )  # fmt: skip
    run.train()
    return run, callback, folder


# -- the file ------------------------------------------------------------------------------------


def test_a_run_tells_its_plan_its_prunings_its_logs_and_its_end(finished):
    run, callback, folder = finished
    start, end = events_of(folder, "start")[0], events_of(folder, "end")[0]
    prunes, logs = events_of(folder, "prune"), events_of(folder, "log")
    assert start["ranks"] == dict.fromkeys(callback.ranks, 4)
    assert start["window"] == [3, 10]
    assert (start["total_cost"], start["target_cost"], start["budget"]) == (136, 17, "parameters")
    assert [e["step"] for e in prunes] == [s for s, _ in start["schedule"]] == [6, 9, 10]
    for event, (_, budget) in zip(prunes, start["schedule"], strict=True):
        assert event["cost"] <= budget
    assert end["ranks"] == prunes[-1]["ranks"] == callback.ranks
    assert end["cost"] == prunes[-1]["cost"] <= 17
    assert 0 in end["ranks"].values()
    assert end["is_frozen"]
    assert [log["logs"]["loss"] for log in logs if "loss" in log["logs"]] == losses_of(run)
    assert [log["step"] for log in logs if "eval_loss" in log["logs"]] == [10, 20]
    times = [event["time"] for event in read_history(folder)]
    assert times == sorted(times)
    assert all(event["memory_bytes"]["process"] > 0 for event in [start, *logs, end])


def test_component_sizes_give_the_parameters_of_the_finished_adapter(finished):
    run, callback, folder = finished
    sizes = events_of(folder, "start")[0]["component_sizes"]
    counted = sum(rank * sizes[name] for name, rank in callback.ranks.items())
    assert counted == sum(p.numel() for n, p in run.model.named_parameters() if "lora_" in n)
    assert counted == events_of(folder, "end")[0]["cost"]


@pytest.mark.parametrize("revival", [False, True])
def test_an_event_accounts_for_every_component(revival):
    model, optimizer, allocator = attached(revival=revival, prune_interval=2, **POOR)
    train(model, optimizer, 40)
    alive = 12
    for event in allocator.history:
        alive += event["revived"] - event["cut"]
        assert alive == event["live"] == sum(event["ranks"].values())
        assert revival or event["revived"] == 0
        assert len(event["importance_kept"]) == 5
        assert event["importance_cut"] is None or len(event["importance_cut"]) == 5
    assert len(allocator.history) == 7


@pytest.fixture(scope="module")
def saved_everywhere(tmp_path_factory):
    """A folder with a checkpoint of every step, and its callback."""
    folder = tmp_path_factory.mktemp("saved")
    run, callback = trainer_of(folder, arguments=SAVE_ALL, **POOR)
    run.train()
    return folder, callback


@pytest.mark.parametrize("step", [4, 10, 17, 20])
def test_a_resumed_run_tells_the_same_story_once(tmp_path, saved_everywhere, step):
    """Lines beyond the checkpoint are dropped, and old ranks come back from the file."""
    folder, whole = saved_everywhere
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    expected = [without_time(e) for e in read_history(tmp_path) if e["event"] in {"prune", "log"}]
    run, again = trainer_of(tmp_path, arguments=SAVE_ALL, **POOR)
    run.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    events = read_history(tmp_path)
    assert [without_time(e) for e in events if e["event"] in {"prune", "log"}] == expected
    assert [e["step"] for e in events if e["event"] == "start"] == [0, step]
    assert [e["event"] for e in events].count("end") == 1
    drop = ("event", "time")
    assert [{k: v for k, v in e.items() if k not in drop} for e in again.history] == [
        {k: v for k, v in e.items() if k not in drop} for e in whole.history
    ]


def without_time(event):
    logs = {
        k: v for k, v in event.get("logs", {}).items() if not k.startswith(("train_", "total_"))
    }
    return {k: v for k, v in event.items() if k not in {"time", "memory_bytes"}} | {"logs": logs}


def test_a_new_run_in_the_same_folder_begins_a_new_file(tmp_path):
    for _ in range(2):
        trainer_of(tmp_path)[0].train()
    assert len(events_of(tmp_path, "start")) == len(events_of(tmp_path, "end")) == 1


def test_checkpoints_keep_only_numbers_of_the_history(tmp_path):
    """Ranks of every module at every event would make each checkpoint carry the whole file."""
    trainer_of(tmp_path, arguments={**SAVE_ALL, "save_steps": 20})[0].train()
    state = json.loads((tmp_path / "checkpoint-20" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["DynLoraCallback"]["attributes"]["progress"]["history"]
    assert [set(entry) for entry in saved] == [{"step", "cost", "live", "cut", "revived"}] * 3


def test_a_line_cut_short_is_left_out_and_dropped_on_resume(tmp_path):
    file = HistoryFile(tmp_path)
    for step in (0, 3, 6):
        file.append({"event": "log", "step": step})
    with (tmp_path / HISTORY_FILE).open("a") as torn:
        torn.write('{"event":"log","st')
    assert [e["step"] for e in read_history(tmp_path)] == [0, 3, 6]
    HistoryFile(tmp_path, resume_step=3)
    assert (tmp_path / HISTORY_FILE).read_text() == (
        '{"event":"log","step":0}\n{"event":"log","step":3}\n'
    )
    assert [p.name for p in tmp_path.iterdir()] == [HISTORY_FILE]


def test_a_foreign_line_is_named(tmp_path):
    (tmp_path / HISTORY_FILE).write_text('{"event":"log","step":1}\n[]\n{"event":"log","step":2}\n')
    with pytest.raises(ValueError, match="line 2 is not a JSON object with 'event' and 'step'"):
        read_history(tmp_path)


def test_what_json_cannot_say_becomes_null(tmp_path):
    HistoryFile(tmp_path).append(
        {"event": "log", "step": 1, "logs": {"a": float("nan"), "b": torch.tensor(2.5)}}
    )
    assert read_history(tmp_path)[0]["logs"] == {"a": None, "b": 2.5}


def test_five_numbers_of_nothing_and_of_one():
    assert five_numbers(torch.zeros(0)) is None
    assert five_numbers(torch.tensor([2.0])) == [2.0] * 5


# -- live ----------------------------------------------------------------------------------------


class Reporter(TrainerCallback):
    """Stands where TensorBoard's, W&B's and trackio's callbacks stand: before a user's."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, *, logs, **_kwargs):
        self.seen.append(dict(logs))


def test_reporters_before_the_callback_see_the_live_fields(tmp_path):
    reporter = Reporter()
    run, callback = trainer_of(tmp_path, callbacks=[reporter], revival=True, **POOR)
    run.train()
    steps = [logs for logs in reporter.seen if "loss" in logs]
    assert len(steps) == 20
    names = {"mean_rank", "live_components", "cost", "budget", "revived"}
    for logs in steps:
        assert {f"dynlora/{name}" for name in names} == {k for k in logs if "dynlora/" in k}
    assert steps[0]["dynlora/mean_rank"] == 4
    assert steps[-1]["dynlora/cost"] <= steps[-1]["dynlora/budget"] == 17
    assert steps[-1]["dynlora/live_components"] == sum(callback.ranks.values())
    assert run.state.log_history[0]["dynlora/budget"] == 136
    assert steps[-1]["dynlora/revived"] == sum(e["revived"] for e in callback.history)


def test_the_live_log_of_a_second_training_replaces_that_of_the_first():
    _, _, allocator = attached()
    handler = CallbackHandler([DefaultFlowCallback, Reporter], None, None, None, None)
    for _ in range(2):
        live = LiveLogs(allocator)
        put_first(live, handler)
    names = [type(c).__name__ for c in handler.callbacks]
    assert names == ["LiveLogs", "DefaultFlowCallback", "Reporter"]
    assert handler.callbacks[0] is live


def test_called_by_hand_there_is_no_handler():
    def method():
        return calling_self(CallbackHandler)

    assert method() is None


def test_tensorboard_shows_ranks_and_their_map(tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    report = pytest.importorskip("dynlora.report")
    run, callback = trainer_of(
        tmp_path, rank_image=report.rank_image, arguments={"report_to": ["tensorboard"]}
    )
    run.train()
    logs = next(p for p in tmp_path.rglob("events.out.*"))
    board = event_accumulator.EventAccumulator(str(logs.parent)).Reload()
    assert "train/dynlora/mean_rank" in board.Tags()["scalars"]
    assert [e.step for e in board.Images("dynlora/ranks")] == [e["step"] for e in callback.history]


def test_live_fields_of_a_plain_loop():
    model, optimizer, allocator = attached(total_steps=20, prune_interval=3, **POOR)
    train(model, optimizer, 12)
    fields = live_fields(allocator)
    assert fields["dynlora/mean_rank"] * 3 == fields["dynlora/live_components"]
    assert fields["dynlora/cost"] <= fields["dynlora/budget"] == 17
