"""Runs that are killed by SIGKILL and go on; each in a process forked from this one, imported once.

``python worker_kill.py FOLDER [NAME...]`` prints one JSON line per run: {"name": ..., "same": ...}; names
such as "trainer step 9" choose some of them.
"""

import json
import os
import resource
import signal
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import TrainerCallback

import dynlora.allocator.compaction
from dynlora import last_checkpoint
from small_net import adamw, adapted, allocated, data
from small_trainer import losses_of, trainer_of, weights

STEPS, SAVE_EVERY = 30, 2  # window: steps 4 to 15
FIELDS = {"target_r": 0.5, "prune_interval": 3}  # ranks of 0 to 4
AT_STEP = [("step", n) for n in (1, 3, 6, 9, 14, 15, 16, 21, 29)]
IN_WRITE = [
    (kind, n) for kind, n in (("adapter", 8), ("optimizer", 16), ("state", 14), ("state", 30))
]
TRAINER_KILLS = [
    *AT_STEP, *IN_WRITE, ("compaction", 15), ("full disk", 8), ("full disk", 16), ("read-only", 20),
]  # fmt: skip
LOOP_KILLS = [
    *(("step", n) for n in (1, 3, 5, 9, 12, 14, 15, 16, 24, 30)),
    *(("write", n) for n in (6, 16, 30)), ("compaction", 15), ("full disk", 14), ("full disk", 18),
]  # fmt: skip
NO_SPACE = 3  # exit code of a run that ends with an error, where the others are killed


def die(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def die_after_half(path, content):
    """Leave a half-written file and die."""
    Path(path).write_bytes(content[: len(content) // 2])
    die()


class DieAtStep(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_kwargs):
        if state.global_step == self.step:
            die()


def fill_disk():
    """From now on no file can grow beyond 200 bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def lose_rights(folder):
    """From now on this process cannot write into the folder."""
    if os.geteuid() == 0:
        os.seteuid(65534)  # the superuser may write anywhere
    else:
        Path(folder).chmod(0o555)


def arm(kind, step, current_step):
    """Make the next write of ``kind`` at ``step`` die in its middle."""
    real_save, real_json = torch.save, transformers.TrainerState.save_to_json
    real_adapter = sys.modules["peft.peft_model"].safe_save_file

    def save(thing, path, *args, **kwargs):
        if "optimizer" in str(path) and current_step() == step:
            if kind == "optimizer":
                die_after_half(path, b"PK" * 500)
            if kind == "read-only":
                lose_rights(Path(path).parent)
        return real_save(thing, path, *args, **kwargs)

    def save_adapter(tensors, path, *args, **kwargs):
        if kind == "adapter" and current_step() == step:
            die_after_half(path, b"\x10" * 500)
        if kind == "full disk" and current_step() == step:
            fill_disk()
        return real_adapter(tensors, path, *args, **kwargs)

    def save_json(self, path):
        if kind == "state" and self.global_step == step:
            die_after_half(path, b'{"global_step": 99, "epoch": 1.0}')
        return real_json(self, path)

    torch.save, transformers.TrainerState.save_to_json = save, save_json
    sys.modules["peft.peft_model"].safe_save_file = save_adapter


def die_in_compaction():
    """Die when the parameters are cut, before the optimizer has forgotten those that left."""
    dynlora.allocator.compaction.forget_parameters_ = die


def trainer_run(folder, kill=None):
    arguments = {
        "max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVE_EVERY, "save_total_limit": 2
    }  # fmt: skip
    run, callback = trainer_of(folder, arguments=arguments, dropout=0.2, **FIELDS)
    if kill:
        kind, step = kill
        if kind == "step":
            run.add_callback(DieAtStep(step))
        elif kind == "compaction":
            die_in_compaction()
        else:
            arm(kind, step, lambda: run.state.global_step)
    run.train(resume_from_checkpoint=last_checkpoint(folder))
    return losses_of(run)[:STEPS], callback.ranks, weights(run.model)


def loop_run(folder, kill=None):
    saved = Path(folder) / "saved.pt"
    kind, at = kill or (None, None)
    state = torch.load(saved, weights_only=True) if saved.exists() else None
    model = adapted()
    optimizer = adamw(model)
    allocator = allocated(model, optimizer, total_steps=STEPS, **FIELDS)
    if state:
        model.load_state_dict(state["model"])
        if kind != "forget":
            optimizer.load_state_dict(state["optimizer"])
        allocator.load_state_dict(state["allocator"])
    if kind == "compaction":
        die_in_compaction()
    losses = state["losses"] if state else []
    x, y = data()
    while allocator.step < STEPS:
        loss = ((model(x) - y) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if (kind, at) == ("step", allocator.step):
            die()
        if allocator.step % SAVE_EVERY == 0:
            content = {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "allocator": allocator.state_dict(), "losses": losses,
            }  # fmt: skip
            temporary = saved.with_suffix(".part")
            if (kind, at) == ("write", allocator.step):
                die_after_half(temporary, b"PK" * 500)
            if (kind, at) == ("full disk", allocator.step):
                fill_disk()
            torch.save(content, temporary)
            temporary.replace(saved)
    ranks = allocator.finalize_()
    return losses, ranks, weights(model)


def in_child(run, folder, kill=None):
    """Run in a forked process; True if it came to its end."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            content = run(folder, kill)
        except (OSError, RuntimeError, SafetensorError):
            if kill is None or kill[0] not in {"full disk", "read-only"}:
                raise
            os._exit(NO_SPACE)
        torch.save(content, Path(folder) / "result.pt")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if os.waitstatus_to_exitcode(status) == NO_SPACE:
        return False
    if status:
        raise SystemExit(f"child of {run.__name__} with kill={kill} failed: {status}")
    return True


def result(folder):
    return torch.load(Path(folder) / "result.pt")


def same(one, two):
    """Losses, ranks and weights are equal to the last bit."""
    tensors = one[2].keys() == two[2].keys() and all(
        torch.equal(one[2][k], two[2][k]) for k in one[2]
    )
    return one[:2] == two[:2] and tensors


def report(name, folder, whole, *, died):
    found = result(folder)
    row = {"name": name, "died": died, "same": same(found, result(whole)), "ranks": found[1]}
    sys.stdout.write(json.dumps(row) + "\n")


def main(root, *chosen):
    for kind, run, kills in (
        ("trainer", trainer_run, TRAINER_KILLS), ("loop", loop_run, LOOP_KILLS)
    ):  # fmt: skip
        kills = [k for k in kills if not chosen or f"{kind} {k[0]} {k[1]}" in chosen]
        whole = tempfile.mkdtemp(dir=root)
        in_child(run, whole)
        for kill in kills:
            folder = tempfile.mkdtemp(dir=root)
            died = not in_child(run, folder, kill)
            in_child(run, folder)
            report(f"{kind} {kill[0]} {kill[1]}", folder, whole, died=died)
        if chosen and f"{kind} control" not in chosen:
            continue
        control = tempfile.mkdtemp(dir=root)  # a run that loses its optimizer's state must differ
        died = not in_child(run, control, ("step", 13))
        if run is trainer_run:
            Path(last_checkpoint(control), "optimizer.pt").unlink()
        in_child(run, control, ("forget", 0))
        report(f"{kind} control", control, whole, died=died)


if __name__ == "__main__":
    main(*sys.argv[1:])
