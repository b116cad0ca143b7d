"""DynLoraCallback: the one argument beside a LoRA script. It holds no algorithm."""

import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ExportableState

from dynlora._private import calling_self
from dynlora.allocation import settings_from
from dynlora.allocation.settings import is_integer
from dynlora.allocator import RankAllocator
from dynlora.allocator.record import memory_bytes
from dynlora.allocator.scores import Score
from dynlora.callback.held_out import known_evaluate
from dynlora.callback.live_logs import LiveLogs, RankImage, put_first
from dynlora.callback.model_card import write_card
from dynlora.history import HistoryFile
from dynlora.lora.components import configs_of, is_lora
from dynlora.lora.follow import AdapterStart, CheckpointFollower

MAX_SKIPPED_STEPS = 40
"""fp16 only: a GradScaler starts at 2**16 and halves its scale at each skipped step, so more skips
in a row mean that no gradient will ever be finite."""

_KEPT = ("step", "cost", "live", "cut", "revived")


class DynLoraCallback(TrainerCallback, ExportableState):  # type: ignore[misc]  # transformers is untyped here
    """Lets transformers.Trainer, and every trainer built on it, allocate ranks while it trains.

    Builds a RankAllocator on the Trainer's optimizer and number of steps, saves and restores its
    progress with each checkpoint, and leaves a plain LoRA without pruned components when training ends
    (after ``load_best_model_at_end``). What happens on the way is in the Trainer's logs (see
    ``live_logs.live_fields``) and, line by line, in ``history.jsonl`` in ``output_dir``.

    Args:
        target_r: mean rank per adapted module at the end, or ``auto`` for the smallest adapter that keeps
            its gain on held-out rows but for ``tolerance`` of it; left out only where the adapter's
            config is a DynLoraConfig, which holds the settings itself.
        evaluate: with ``auto``, a function that returns the held-out loss; by default that of the
            Trainer's ``eval_dataset``, whose gradients are used too.
        eval_batches: with ``auto``, how many batches of the ``eval_dataset`` are used, at least 1.
        adapter: which adapter; may be left out if only one LoRA adapter is trainable.
        rank_image: draws the ranks at each prune event for TensorBoard, such as
            ``dynlora.report.rank_image``; None draws nothing.
        score: a function instead of an importance by name; see RankAllocator.
        freeze_on_stop: whether a run that ends before the freeze, by early stopping say, is cut to its
            target then; otherwise it keeps all living components, with a warning. With ``auto`` it is
            always cut then, and so is a best checkpoint from before the freeze.
        preset: ``paper`` for the paper's values of the settings that are not given.
        settings: other fields of ``dynlora.allocation.Settings``.

    Attributes:
        allocator: the RankAllocator of the current run, None before training.
        ranks: final rank by module name, zeros included; empty until training has ended.
        history: one entry a prune event; see RankAllocator.history.

    Raises:
        ValueError: a setting is out of range.
        TypeError: a setting is unknown.
    """

    def __init__(
        self,
        target_r: float | Literal["auto"] | None = None,
        *,
        evaluate: Callable[[], float] | None = None,
        eval_batches: int = 8,
        adapter: str | None = None,
        rank_image: RankImage | None = None,
        score: Score | None = None,
        freeze_on_stop: bool = False,
        preset: str | None = None,
        **settings: Any,
    ) -> None:
        if target_r is not None:
            settings["target_r"] = target_r
        if settings:  # fail here, not in train()
            settings_from(settings, preset=preset, where="DynLoraCallback")
        if not is_integer(eval_batches) or eval_batches < 1:
            raise ValueError(
                f"eval_batches={eval_batches!r} must be an integer of at least 1: how many "
                "batches the held-out loss is computed on."
            )
        if "total_steps" in settings:
            raise ValueError(
                f"total_steps={settings['total_steps']!r} must not be given: the Trainer knows its "
                "number of steps. Leave it out."
            )
        self.evaluate = evaluate
        self.eval_batches = eval_batches
        self.adapter = adapter
        self.rank_image = rank_image
        self.score = score
        self.freeze_on_stop = freeze_on_stop
        self.preset = preset
        self.settings = settings
        self.allocator: RankAllocator | None = None
        self.ranks: dict[str, int] = {}
        self._start: AdapterStart | None = None
        self._follower: CheckpointFollower | None = None
        self._saw_trainer_built = False
        self._skipped = self._seen = 0
        self._is_complete = False
        self._file: HistoryFile | None = None  # of the first process
        self._plan: dict[str, Any] = {}  # when the run began, before any checkpoint
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
        arguments: dict[str, Any] = {"adapter": self.adapter, "freeze_on_stop": self.freeze_on_stop}
        arguments |= {"eval_batches": self.eval_batches, "preset": self.preset, **self.settings}
        return {"args": arguments, "attributes": {"progress": progress}}

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the model take the ranks of a checkpoint that it is resumed from."""
        _refuse_rebuilt_callbacks(args)
        self._saw_trainer_built = True
        model = kwargs.get("model")
        if model is None or not any(is_lora(c) for c in configs_of(model).values()):
            return  # model_init builds another, or on_train_begin says what is missing
        self._stop_following()
        self._start = AdapterStart.of(model, self.adapter)
        self._follower = CheckpointFollower(model, self._start)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Build the allocator; on a resumed run, restore its progress."""
        _refuse_rebuilt_callbacks(args)
        if not self._saw_trainer_built and args.save_strategy != "no":
            warnings.warn(
                "DynLoraCallback was added to a Trainer that had already been built. A run that is resumed "
                "in this way cannot load checkpoints from after the freeze: PEFT reports a size mismatch. "
                "Pass callbacks=[DynLoraCallback(...)] to the Trainer, or call callback.on_init_end("
                "trainer.args, trainer.state, trainer.control, model=trainer.model) before train().",
                stacklevel=2,
            )
        if self.allocator:  # of an earlier run, interrupted or finished
            self.allocator.detach()
        self.ranks = {}
        start = self._start
        model = kwargs["model"]
        if start is None or not start.is_of(model):
            start = AdapterStart.of(model, self.adapter)
        target_r = self.settings.get("target_r", getattr(start.config, "target_r", None))
        self.allocator = RankAllocator(
            model,
            kwargs["optimizer"],
            total_steps=state.max_steps,
            adapter=self.adapter,
            score=self.score,
            evaluate=known_evaluate(self.evaluate, target_r, self.eval_batches),
            preset=self.preset,
            start=start,
            **self.settings,
        )
        self._stop_following()
        if state.global_step > 0:
            self.allocator.load_state_dict(self._saved_progress(state))
        self._seen = self.allocator.step
        self._is_complete = state.global_step >= state.max_steps
        if self._is_complete:
            self.allocator.stop_listening()  # load_best_model_at_end may ask for other ranks yet
        put_first(LiveLogs(self.allocator, self.rank_image), calling_self(CallbackHandler))
        self._open_history(args, state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Undo the one extra step that Trainer makes when a finished run is resumed.

        A run killed between its last checkpoint and its end would otherwise end elsewhere.
        """
        if self._is_complete:
            for parameter in kwargs["model"].parameters():
                parameter.grad = None  # torch optimizers leave such parameters alone

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        """Fail at the first step that went by without the allocator."""
        allocator = self._running()
        self._write_prune_events()
        if control.should_save or control.should_log:  # before anything spoiled is written
            allocator.check_finite()
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
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep what Trainer logs, evaluations included, beside the prune events."""
        if not self._is_complete:
            logs = kwargs["logs"]
            self._write("log", step=state.global_step, logs=logs, memory_bytes=memory_bytes())

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        """A checkpoint without a single allocated step is a mistake, not a checkpoint."""
        self._running().check_has_stepped()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave a plain LoRA without pruned components, and its model card in ``output_dir``.

        Under FSDP and ZeRO shapes cannot change in place: pruned components stay as zeros, and a warning
        says how to leave them out.
        """
        allocator = self._running()
        is_wanted = self.freeze_on_stop or allocator.settings.is_auto
        if is_wanted and (allocator.is_frozen or not self._is_complete):
            allocator.freeze_()
        cost = allocator.cost  # gated modules are not there to be asked once they are folded
        is_sharded = any(module.is_sharded for module in allocator.modules)
        self.ranks = allocator.finalize_()
        has_best = args.load_best_model_at_end and state.best_model_checkpoint is not None
        kept = state.best_global_step if has_best else state.global_step
        self._write_end(allocator, cost, kept)
        if self._file is not None:
            folder, model = Path(args.output_dir), kwargs["model"]
            logs = [log for log in state.log_history if log["step"] <= kept]
            write_card(folder, model, self._plan, self.ranks, logs)
        if is_sharded:
            warnings.warn(
                "The adapter is sharded (FSDP, ZeRO), so pruned components stay in it as zeros. Call "
                "export_lora(trainer.model, folder) on every process to write it without them.",
                stacklevel=2,
            )

    def _stop_following(self) -> None:
        """The allocator follows checkpoints from here on."""
        if self._follower is not None:
            self._follower.remove()
            self._follower = None

    def _saved_progress(self, state: TrainerState) -> dict[str, Any]:
        """The progress of this callback's adapter in a checkpoint; ValueError if it holds none."""
        saved = state.stateful_callbacks.get(type(self).__name__, {})
        entries = saved if isinstance(saved, list) else [saved]
        found = [p for e in entries if (p := e.get("attributes", {}).get("progress")) is not None]
        for progress in found:
            if len(found) == 1 or progress.get("adapter") == self._running().adapter:
                return dict(progress)
        raise ValueError(
            f"The checkpoint at step {state.global_step} holds no progress of {type(self).__name__}: it "
            "was written without this callback. Resume from a checkpoint of a run with it, or start "
            "a new run."
        )

    def _open_history(self, args: TrainingArguments, state: TrainerState) -> None:
        """Begin ``history.jsonl``, or take it up where the checkpoint was written."""
        allocator = self._running()
        self._written, self._file = len(allocator.history), None
        if not state.is_world_process_zero:
            return
        step = state.global_step
        self._file = HistoryFile(args.output_dir, resume_step=step if step > 0 else None)
        recorded = {e["step"]: e for e in self._file.events if e["event"] == "prune"}
        for entry in allocator.history:
            entry.update({k: v for k, v in recorded.get(entry["step"], {}).items() if k != "event"})
        starts = [e for e in self._file.events if e["event"] == "start"]
        plan = allocator.plan()
        self._plan = starts[0] if starts else plan
        self._write("start", step=step, **plan, memory_bytes=memory_bytes())

    def _write_prune_events(self) -> None:
        history = self._running().history
        for entry in history[self._written :]:
            self._write("prune", **entry)
        self._written = len(history)

    def _write_end(self, allocator: RankAllocator, cost: int, kept_step: int) -> None:
        self._write_prune_events()
        at_end = {"ranks": self.ranks, "live": sum(self.ranks.values()), "cost": cost}
        at_end |= {"kept_step": kept_step, "is_frozen": allocator.is_frozen}
        at_end |= {"memory_bytes": memory_bytes()}
        self._write("end", step=allocator.step, **at_end)

    def _write(self, event: str, **fields: Any) -> None:
        if self._file is not None:
            self._file.append({"event": event, "time": round(time.time(), 3), **fields})

    def _running(self) -> RankAllocator:
        if self.allocator is None:
            raise RuntimeError(
                "DynLoraCallback was added after training had begun. Pass it to the Trainer: "
                "callbacks=[DynLoraCallback(target_r=...)]."
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
    named = [(f.name.partition("-")[2], f) for f in Path(output_dir).glob("checkpoint-*")]
    for _, folder in sorted(((int(n), f) for n, f in named if n.isdigit()), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            continue
        return str(folder)
    return None


def _refuse_rebuilt_callbacks(args: TrainingArguments) -> None:
    if args.restore_callback_states_from_checkpoint:
        raise ValueError(
            "restore_callback_states_from_checkpoint=True would replace DynLoraCallback by a new one "
            "without its functions, and the one that you passed would not be used. Leave it at False: "
            "the callback restores its progress by itself."
        )
