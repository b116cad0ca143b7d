"""DynLoraCallback: the second of the two lines beside a LoRA script. It holds no algorithm."""

import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from dynlora.allocator import RankAllocator
from dynlora.history import HistoryFile
from dynlora.live import LiveLogs, RankImage, calling_handler, stand_first
from dynlora.measures import memory_bytes
from dynlora.scoring import Score

MAX_SKIPPED_STEPS = 40
"""fp16 only: a GradScaler starts at 2**16 and halves its scale at each skipped step, so more skips
in a row mean that no gradient will ever be finite."""

_KEPT = ("step", "budget", "cut", "revived")


class DynLoraCallback(TrainerCallback, ExportableState):  # type: ignore[misc]  # transformers is untyped here
    """Lets transformers.Trainer, and every trainer built on it, allocate ranks while it trains.

    Builds a RankAllocator on the Trainer's optimizer and number of steps, saves and restores its
    progress with each checkpoint, and turns the adapter into a plain LoRA when training ends (after
    ``load_best_model_at_end``). What happens on the way is in the Trainer's logs (mean rank, budget,
    DEM, gates: see ``live.live_fields``) and, line by line, in ``history.jsonl`` in ``output_dir``.

    Args:
        adapter: which adapter; may be left out if only one DynLora adapter is trainable.
        rank_image: draws the ranks at each prune event for TensorBoard, such as
            ``dynlora.report.rank_image``; None draws nothing.
        score: a function instead of the config's importance; see RankAllocator.

    Attributes:
        allocator: the RankAllocator of the current run, None before training.
        ranks: final rank by module name, zeros included; empty until training has ended.
        history: one entry a prune event; see RankAllocator.history.
    """

    def __init__(
        self,
        adapter: str | None = None,
        rank_image: RankImage | None = None,
        *,
        score: Score | None = None,
    ) -> None:
        self.adapter = adapter
        self.rank_image = rank_image
        self.score = score
        self.allocator: RankAllocator | None = None
        self.ranks: dict[str, int] = {}
        self._skipped = 0
        self._seen = 0
        self._is_complete = False
        self._file: HistoryFile | None = None  # of the first process
        self._written = 0  # prune events that are in the file

    @property
    def history(self) -> list[dict[str, Any]]:
        """Prune events so far; see RankAllocator.history."""
        return self.allocator.history if self.allocator else []

    def state(self) -> dict[str, Any]:
        """What Trainer writes into ``trainer_state.json`` for this callback.

        Of the history only its few numbers: the rest is in ``history.jsonl``, not in each checkpoint.
        """
        progress = self.allocator.state_dict() if self.allocator else None
        if progress is not None:
            progress["history"] = [{k: e[k] for k in _KEPT} for e in progress["history"]]
        return {"args": {"adapter": self.adapter}, "attributes": {"progress": progress}}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Any,
        **_kwargs: Any,
    ) -> None:
        """Build the allocator; on a resumed run, restore its progress."""
        if self.allocator:  # of an earlier run, interrupted or finished
            self.allocator.detach()
        self.ranks = {}
        self.allocator = RankAllocator(
            model, optimizer, total_steps=state.max_steps, adapter=self.adapter, score=self.score
        )
        if state.global_step > 0:
            self.allocator.load_state_dict(_saved_progress(state))
        self._seen = self.allocator.step
        self._is_complete = state.global_step >= state.max_steps
        if self._is_complete:
            self.allocator.detach()
        stand_first(LiveLogs(self.allocator, self.rank_image), calling_handler())
        self._open_history(args, state)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **_kwargs: Any,
    ) -> None:
        """Undo the one extra step that Trainer makes when a finished run is resumed.

        A run killed between its last checkpoint and its end would otherwise end elsewhere.
        """
        if self._is_complete:
            for parameter in model.parameters():
                parameter.grad = None  # torch optimizers leave such parameters alone

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        """Fail at the first step that went by without the allocator."""
        allocator = self._running()
        self._write_prune_events()
        if self._is_complete:
            control.should_training_stop = True
            return
        self._skipped = 0 if allocator.step > self._seen else self._skipped + 1
        self._seen = allocator.step
        if self._skipped > (MAX_SKIPPED_STEPS if args.fp16 else 0):
            raise RuntimeError(
                f"Trainer finished step {state.global_step}, but the optimizer that DynLoraCallback is "
                "attached to was not stepped: nothing would be pruned. A trainer that replaces its "
                "optimizer after on_train_begin, or wraps it without torch's step hooks, cannot drive "
                "dynlora; use RankAllocator(model, optimizer, total_steps=...) on the real one."
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, Any],
        **_kwargs: Any,
    ) -> None:
        """Keep what Trainer logs, evaluations included, beside the prune events."""
        if not self._is_complete:
            self._write("log", step=state.global_step, logs=logs, memory_bytes=memory_bytes())

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        """A checkpoint without a single allocated step is a mistake, not a checkpoint."""
        self._running().check_has_stepped()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        """Turn the adapter into a plain LoRA; whatever is saved from here on is stock PEFT.

        Under FSDP and ZeRO shapes cannot change in place: the adapter stays gated, and a warning says
        how to export it.
        """
        allocator = self._running()
        if any(gated.is_sharded for gated in allocator.layers):
            self.ranks = allocator.ranks()
            allocator.detach()
            self._write_end(allocator)
            warnings.warn(
                "The adapter is sharded (FSDP, ZeRO) and stays gated. Call "
                "export_lora(trainer.model, folder) on every process to write the plain LoRA; save_model "
                "writes one that needs dynlora.",
                stacklevel=2,
            )
            return
        self.ranks = allocator.finalize_()
        self._write_end(allocator)

    def _open_history(self, args: TrainingArguments, state: TrainerState) -> None:
        """Begin ``history.jsonl``, or take it up where the checkpoint was written."""
        allocator = self._running()
        self._written = len(allocator.history)
        self._file = None
        if not state.is_world_process_zero:
            return
        step = state.global_step
        self._file = HistoryFile(args.output_dir, resume_step=step if step > 0 else None)
        told = {e["step"]: e for e in self._file.events if e["event"] == "prune"}
        for entry in allocator.history:
            entry.update({k: v for k, v in told.get(entry["step"], {}).items() if k != "event"})
        self._write("start", step=step, **allocator.plan(), memory_bytes=memory_bytes())

    def _write_prune_events(self) -> None:
        history = self._running().history
        for entry in history[self._written :]:
            self._write("prune", **entry)
        self._written = len(history)

    def _write_end(self, allocator: RankAllocator) -> None:
        self._write_prune_events()
        self._write(
            "end",
            step=allocator.step,
            ranks=self.ranks,
            budget=sum(self.ranks.values()),
            is_frozen=allocator.is_frozen,
            memory_bytes=memory_bytes(),
        )

    def _write(self, event: str, **fields: Any) -> None:
        if self._file is not None:
            self._file.append({"event": event, "time": round(time.time(), 3), **fields})

    def _running(self) -> RankAllocator:
        if self.allocator is None:
            raise RuntimeError(
                "DynLoraCallback was added after training had begun. Pass it to the Trainer: "
                "callbacks=[DynLoraCallback()]."
            )
        return self.allocator


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint of a Trainer run that was written to its end.

    A run killed while it wrote a checkpoint leaves a folder that ``resume_from_checkpoint=True`` would
    choose and fail on. Trainer writes ``trainer_state.json`` last, so a folder where it is whole is
    whole: ``trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))``.

    Args:
        output_dir: the ``output_dir`` of the TrainingArguments.

    Returns:
        The folder of the checkpoint, or None to start from the beginning.
    """
    folders = Path(output_dir).glob("checkpoint-*")
    steps = {
        int(f.name.partition("-")[2]): f for f in folders if f.name.partition("-")[2].isdigit()
    }
    for _, folder in sorted(steps.items(), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            continue
        return str(folder)
    return None


def _saved_progress(state: TrainerState) -> dict[str, Any]:
    saved = state.stateful_callbacks.get(DynLoraCallback.__name__, {})
    if isinstance(saved, list):
        saved = saved[0]
    progress = saved.get("attributes", {}).get("progress")
    if progress is None:
        raise ValueError(
            f"The checkpoint at step {state.global_step} holds no progress of DynLoraCallback: it was "
            "written without the callback. Resume from a checkpoint of a dynlora run, or start anew."
        )
    return dict(progress)
