"""A run killed by SIGKILL at any moment goes on as if nothing had happened."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dynlora import last_checkpoint

WORKER = Path(__file__).parents[1] / "helpers" / "worker_kill.py"


def killed(folder, *names):
    command = [sys.executable, WORKER, folder, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["name"] for row in rows if not row["died"]] == []
    assert all(0 in row["ranks"].values() for row in rows)
    return rows


def test_a_killed_run_ends_bit_for_bit_like_the_uninterrupted_one(tmp_path):
    """After the freeze, where the user's script builds a model of other ranks than were saved."""
    names = ["trainer step 21", "trainer optimizer 16", "loop step 9", "loop compaction 15"]
    rows = killed(tmp_path, *names, "loop control")
    assert [row["name"] for row in rows] == [*names, "loop control"]
    assert [row["same"] for row in rows] == [True] * 4 + [False]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_so_it_does_wherever_it_is_killed(tmp_path):
    """Trainer and plain loop; before, in and after the window, in every write, in the compaction.

    Others end with an error in the middle of a write, on a full disk or in a read-only folder.
    """
    rows = killed(tmp_path)
    assert len(rows) == 17 + 16 + 2
    controls = ["trainer control", "loop control"]  # what they lost must be noticed
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
