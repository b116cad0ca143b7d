"""A recipe on two processes: one record, the budget met, the measures of one process."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from dynlora.tasks.recipe import recipe_from
from dynlora.tasks.run import run
from tiny_classifier import save_encoder, save_texts


@pytest.mark.slow
def test_two_processes_train_one_recipe(tmp_path):
    recipe = {
        "task": "text-classification",
        "model": save_encoder(tmp_path / "tiny"),
        "output": str(tmp_path / "two"),
        "data": {"name": str(save_texts(tmp_path / "texts.csv"))},
        "adapter": {"target_r": 2, "init_std": 0.02},
        "training": {
            "learning_rate": 1e-2,
            "max_steps": 20,
            "per_device_train_batch_size": 4,
            "use_cpu": True,
            "eval_strategy": "no",
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, "-m", "dynlora", "train", str(tmp_path / "recipe.yaml"), "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [e["event"] for e in events].count("result") == 1
    two = json.loads((tmp_path / "two" / "run.json").read_text())
    one = run(recipe_from({**recipe, "output": str(tmp_path / "one")})).record
    assert two["machine"]["processes"] == 2
    assert two["budget"]["components_end"] == one["budget"]["components_end"] == 26
    measured = [r["evaluations"][0]["eval_loss"] for r in (one, two)]
    assert measured[0] == pytest.approx(measured[1], rel=1e-4)
