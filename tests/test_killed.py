"""A run killed by SIGKILL at any moment goes on as if nothing had happened."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dynlora import last_checkpoint

WORKER = Path(__file__).with_name("worker_kill.py")


@pytest.mark.timeout(600)
def test_killed_runs_end_bit_for_bit_like_the_uninterrupted_one(tmp_path):
    """Trainer and plain loop; before, in and after the window, in every write, in the compaction.

    Others end with an error in the middle of a write, on a full disk or in a read-only folder.
    """
    command = [sys.executable, WORKER, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 17 + 16 + 2
    assert [row["name"] for row in rows if not row["died"]] == []
    controls = ["trainer_run control", "loop_run control"]  # what they lost must be noticed
    assert [row["name"] for row in rows if not row["same"]] == controls


def write(folder, step, text):
    (folder / f"checkpoint-{step}").mkdir()
    if text is not None:
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(text)


def test_the_last_checkpoint_is_the_newest_whole_one(tmp_path):
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "nowhere") is None
    write(tmp_path, 9, "{}")
    write(tmp_path, 20, "{}")
    write(tmp_path, 100, '{"global_st')
    write(tmp_path, 110, None)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")
