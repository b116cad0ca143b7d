"""Histories as runs leave them."""

from dynlora.history import HistoryFile

KINDS = ["attention.self.query", "attention.output.dense", "output.dense"]
LORA = {
    "r": 6, "lora_alpha": 9, "task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"],
    "target_modules": ["dense", "query"], "exclude_modules": ["pooler.dense"], "lora_dropout": 0.1,
}  # fmt: skip


def names(layers):
    return [f"bert.encoder.layer.{i}.{kind}" for i in range(layers) for kind in KINDS]


def write_run(folder, *, layers=3, steps=100, every=5, init_r=6, unit="parameters"):
    """A history as a run of ``steps`` leaves it; each prune event takes one component of 10 parameters."""
    file = HistoryFile(folder)
    ranks = dict.fromkeys([*names(layers), "classifier"], init_r)
    size = 10 if unit == "parameters" else 1
    events = range(every, steps // 2 + 1, every)
    total = sum(ranks.values())
    memory = {"process": 300 * 2**20}
    file.append({"event": "start", "step": 0, "time": 1000.0, "ranks": dict(ranks), "total_steps": steps,
                 "window": [0, steps // 2], "component_sizes": dict.fromkeys(ranks, 10), "budget": unit,
                 "total_cost": size * total, "target_cost": size * (total - len(events)),
                 "schedule": [[s, size * (total - i)] for i, s in enumerate(events, start=1)],
                 "lora": LORA | {"r": init_r}, "memory_bytes": memory})  # fmt: skip
    for step in range(1, steps + 1):
        time = 1000.0 + step
        if step in events:
            live = [name for name, rank in ranks.items() if rank]
            ranks[live[step % len(live)]] -= 1
            file.append({"event": "prune", "step": step, "time": time, "ranks": dict(ranks), "cut": 1,
                         "revived": 0, "live": sum(ranks.values()), "cost": size * sum(ranks.values()),
                         "importance_kept": [0.1, 0.2, 0.3, 0.4, 0.5], "importance_cut": None})  # fmt: skip
        file.append({"event": "log", "step": step, "time": time, "memory_bytes": memory,
                     "logs": {"loss": 2 / step, "learning_rate": 1e-3}})  # fmt: skip
        if step % 50 == 0:
            file.append({"event": "log", "step": step, "time": time, "memory_bytes": memory,
                         "logs": {"eval_accuracy": step / steps, "eval_loss": 1.0,
                                  "eval_runtime": 3.0}})  # fmt: skip
    file.append({"event": "end", "step": steps, "time": 1000.0 + steps, "ranks": ranks,
                 "live": sum(ranks.values()), "is_frozen": True, "memory_bytes": memory})  # fmt: skip
    return folder
