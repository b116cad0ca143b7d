"""A recipe on two processes: one record, the budget met, the measures of one process."""

import json
import os
import signal
import subprocess
import sys

import pytest
import yaml

from dynlora_lab.tasks.recipe import recipe_from
from dynlora_lab.tasks.run import run
from tiny_classifier import save_encoder, save_texts

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def saved_recipe(folder, **training):
    recipe = {
        "task": "text-classification",
        "model": save_encoder(folder / "tiny"),
        "output": str(folder / "two"),
        "data": {"name": str(save_texts(folder / "texts.csv"))},
        "adapter": {"target_r": 2},
        "training": {
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "use_cpu": True,
            "eval_strategy": "no",
            **training,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return recipe, [*LAUNCH, "-m", "dynlora", "train", str(folder / "recipe.yaml"), "--json"]


@pytest.mark.slow
def test_two_processes_train_one_recipe(tmp_path):
    recipe, command = saved_recipe(tmp_path, max_steps=20)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [e["event"] for e in events].count("result") == 1
    two = json.loads((tmp_path / "two" / "run.json").read_text())
    one = run(recipe_from({**recipe, "output": str(tmp_path / "one")})).record
    assert two["machine"]["processes"] == 2
    assert two["budget"]["components_end"] == one["budget"]["components_end"] == 26
    measured = [r["evaluations"][0]["eval_loss"] for r in (one, two)]
    assert measured[0] == pytest.approx(measured[1], rel=1e-4)


@pytest.mark.slow
def test_ctrl_c_reaches_two_processes_at_one_step(tmp_path):
    _, command = saved_recipe(tmp_path, max_steps=2000, logging_steps=1, save_strategy="no")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
        start_new_session=True,
    ) as launched:  # fmt: skip
        for line in launched.stdout:
            if line.startswith("{") and json.loads(line).get("step", 0) >= 5:
                os.killpg(
                    launched.pid, signal.SIGINT
                )  # as a terminal does; the launcher adds its own
                break
        _, stderr = launched.communicate()
    assert "which is saved; go on with: dynlora train" in stderr
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert record["status"] == "interrupted"
    (checkpoint,) = (tmp_path / "two").glob("checkpoint-*")
    assert record["parts"][0]["step"] == int(checkpoint.name.partition("-")[2])
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {p.name for p in checkpoint.iterdir()}
