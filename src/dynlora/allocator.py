"""RankAllocator: joins the equations, the gated layers and an optimizer. All run state is here."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynlora import allocation
from dynlora.adapter.components import GatedLayer, find_config, find_gated_layers, is_trainable
from dynlora.adapter.fold import finalize_, swap_config_
from dynlora.adapter.guard import expect_step_of, stop_hearing, stop_waiting
from dynlora.adapter.patterns import ragged_config
from dynlora.adapter.sharding import laid_out, scale_all_
from dynlora.averaged_copies import AveragedCopies
from dynlora.compaction import compact_, release_dropped_
from dynlora.distributed import DdpFinder, agreed, can_rebuild, rebuild_reducer_, world_size
from dynlora.health import can_look, check_gradients
from dynlora.measures import component_sizes, prune_event
from dynlora.moments import forget_pruned_
from dynlora.optimizer_state import CannotShrinkError
from dynlora.parameter_budget import fitting
from dynlora.preflight import check_optimizer, check_shards, known_target, known_total_steps
from dynlora.progress import KEPT_FIELDS, STATE_VERSION, check_model, check_state
from dynlora.scoring import Score, add_dem_gradients_, scorer
from dynlora.stepping import attach, is_inner_step, loss_scale, once_computed, steppable


class RankAllocator:
    """Scores, prunes and freezes the components of one DynLora adapter, driven by its optimizer.

    Attached to the optimizer's step hooks, it needs no call in the training loop: before each step it
    adds the gradient of DEM, afterwards it scores every component and, inside the pruning window,
    prunes the least important ones of the whole model. A step that a GradScaler skips does not count.

    Args:
        model: a model with a trainable DynLora adapter; PeftModel, injected or wrapped.
        optimizer: the torch optimizer that holds the adapter's parameters.
        total_steps: optimizer steps of the whole run; the config's ``total_steps`` if not given.
        adapter: which adapter; may be left out if only one is trainable.
        score: instead of the config's importance: a function that writes scores into ``ema`` of each
            layer after every step until the freeze.

    Attributes:
        step: optimizer steps seen.
        is_frozen: whether the ranks are final.
        num_components: N, components in the model at the start.
        target_components: N_T, components at the end: target_r times modules, rounded.
        history: one entry a prune event, as ``measures.prune_event`` makes it.

    Raises:
        ValueError: there is no such adapter, none that is trainable, ``total_steps`` is unknown, the
            optimizer lacks the adapter's parameters or drives another allocator of it, or the budget
            exceeds the initial components.
        TypeError: the optimizer has no step hooks, or ``score`` is no function.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        total_steps: int | None = None,
        adapter: str | None = None,
        score: Score | None = None,
    ) -> None:
        self.model = model
        self.adapter, self.config = find_config(model, adapter)
        self.score = scorer(self.config, score)
        self.layers = find_gated_layers(model, self.adapter)
        if not is_trainable(self.layers):
            raise ValueError(
                f"adapter={self.adapter!r} is not trainable: its gates receive no gradient. Load it "
                "with is_trainable=True, or activate it with model.set_adapter(...)."
            )
        self.total_steps = known_total_steps(self.config, total_steps)
        self.start, self.stop = allocation.pruning_window(
            self.total_steps, prune_start=self.config.prune_start, prune_end=self.config.prune_end
        )
        self.num_components = sum(m.num_components for m in self.layers)
        self.target_components = known_target(self.config, self.layers)
        self.step = 0
        self.is_frozen = False
        self._has_seen_a_step = False
        self.history: list[dict[str, Any]] = []
        self._copies = AveragedCopies(self.adapter)
        self._held: list[tuple[GatedLayer, Tensor]] = []  # layers with dead components, and masks
        self.optimizer = steppable(optimizer)
        check_optimizer(self.optimizer, self.layers)
        check_shards(self.config, self.layers)
        for gated in self.layers:
            expect_step_of(self.optimizer, gated.layer, self.adapter)
        self._scalings = {m.name: None if m.is_dropped else m.scaling for m in self.layers}
        self._finder = DdpFinder(model)
        self._handles = attach(self.optimizer, before=self._before_step, after=self._after_step)
        if isinstance(self.optimizer, Optimizer):
            self._handles.append(
                self.optimizer.register_load_state_dict_pre_hook(
                    lambda held, _state: release_dropped_(self.layers, held)
                )
            )

    def ranks(self) -> dict[str, int]:
        """Live rank by module name, zeros included."""
        return {m.name: int(m.live.sum()) for m in self.layers}

    @property
    def budget(self) -> int:
        """Components that may be alive after the steps done so far (Eq. 9)."""
        return allocation.budget_at(self.step, **self._budget_plan())

    def _budget_plan(self) -> dict[str, Any]:
        """What Eq. 9 is computed from."""
        return {
            "total": self.num_components,
            "target": self.target_components,
            "start": self.start,
            "stop": self.stop,
            "schedule": self.config.schedule,
        }

    def plan(self) -> dict[str, Any]:
        """The run as it is meant to go, for its record; plain numbers.

        Returns:
            total_steps, importance (its name, or "own" for a ``score``), window (t₀, t₁), schedule (step
            and budget of each prune event), ranks (now, by module name), component_sizes (numbers in one
            component of plain LoRA, by module name), num_components and target_components.
        """
        events = allocation.prune_plan(**self._budget_plan(), interval=self.config.prune_interval)
        return {
            "total_steps": self.total_steps,
            "importance": self.score.name,
            "window": [self.start, self.stop],
            "schedule": [list(event) for event in events],
            "num_components": self.num_components,
            "target_components": self.target_components,
            "ranks": self.ranks(),
            "component_sizes": component_sizes(self.layers),
        }

    def also_compact(self, copy: nn.Module) -> None:
        """Let a copy of the model, such as an ``AveragedModel`` of torch, shrink with it at the freeze.

        A copy averages parameters pairwise with the model's, so it must keep their shapes. It ends as a
        model with a DynLora adapter of the same ranks: ``finalize_(copy)`` makes it a plain LoRA.

        Args:
            copy: a deep copy of the model, wrapped or not, made before or after the freeze.

        Raises:
            ValueError: the copy has no such adapter, or its modules have other ranks than the model's.
        """
        self._copies.add(copy, self.layers)

    def detach(self) -> None:
        """Take the hooks off the optimizer; nothing is scored or pruned from here on."""
        for handle in self._handles:
            handle.remove()
        for gated in self.layers:
            stop_hearing(self.optimizer, gated.layer, self.adapter)
        self._handles = []
        self._finder.forget()

    def finalize_(self) -> dict[str, int]:
        """End the run: detach, and turn the adapter into a plain LoRA with the same function.

        A run that ends before the freeze keeps every living component, with a warning: the function
        stays, the budget is not met. Call ``freeze_()`` first to cut at once.

        Returns:
            Final rank by module name, zeros included.

        Raises:
            RuntimeError: the optimizer never made a step with this allocator attached.
        """
        self.check_has_stepped()
        if not self.is_frozen:
            warnings.warn(
                f"Training ended after {self.step} of {self.total_steps} steps, before the ranks are "
                f"frozen at step {self.stop}: the adapter keeps more than its budget of "
                f"{self.target_components} components. Call allocator.freeze_() before finalize_() to "
                "cut it down at once.",
                stacklevel=2,
            )
        self.detach()
        return finalize_(self.model, self.adapter)

    def check_has_stepped(self) -> None:
        """Raise RuntimeError if no optimizer step was ever seen."""
        if self.step == 0:
            raise RuntimeError(
                "The RankAllocator never saw an optimizer step, so nothing was scored or pruned: the "
                "optimizer it is attached to is not the one being stepped, or every step was skipped. "
                "Pass the optimizer whose step() trains the adapter."
            )

    def state_dict(self) -> dict[str, Any]:
        """Progress of the run, plain numbers only (JSON).

        Scores and masks are buffers of the model (``lora_ema``, ``lora_live``) and are saved with it.
        """
        return {
            "version": STATE_VERSION,
            "step": self.step,
            "is_frozen": self.is_frozen,
            "num_components": self.num_components,
            "window": [self.start, self.stop],
            "history": [dict(event) for event in self.history],
            **self._plan(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a run whose model (with its buffers) and optimizer are already restored.

        Raises:
            ValueError: the state is damaged, another version's or another plan's, or the model's
                adapter was not restored.
        """
        check_state(state, self._plan())
        check_model(state, self.layers)
        self.step, self.is_frozen = state["step"], state["is_frozen"]
        self.start, self.stop = state["window"]
        self.num_components = state["num_components"]
        self.history = [dict(event) for event in state["history"]]
        self._note_masks()

    def _plan(self) -> dict[str, Any]:
        """What must not change between the parts of one run."""
        return {
            "total_steps": self.total_steps,
            "target_components": self.target_components,
            **{name: getattr(self.config, name) for name in KEPT_FIELDS},
            "modules": self._scalings,
        }

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Check the gradients and add η·∂R; with a closure, each time after it has computed them."""
        if is_inner_step(optimizer):
            return None
        return once_computed(args, kwargs, lambda: self._prepare_gradients(optimizer))

    def _prepare_gradients(self, optimizer: Any) -> None:
        scale = loss_scale(optimizer)
        # a scaled step is checked, and skipped, by its scaler
        if scale is None and can_look(self.layers):
            check_gradients(self.layers, step=self.step + 1)
        if self.is_frozen:
            return
        self.score.before_step(self.layers, scale)
        if factor := self.config.dem_weight / self.num_components:
            add_dem_gradients_(self.layers, factor=factor, grad_scale=scale)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        if is_inner_step(optimizer):
            return
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return  # a fused optimizer was called by a GradScaler and skipped the update itself
        if self.step == self.total_steps:
            raise RuntimeError(
                f"The optimizer made a step beyond total_steps={self.total_steps}: the schedule was made "
                "for a shorter run. Build the RankAllocator with the real number of optimizer steps, or "
                "finalize_() it before going on."
            )
        self.step += 1
        if not self._has_seen_a_step:
            self._has_seen_a_step = True
            for gated in self.layers:
                stop_waiting(gated.layer, self.adapter)
        if not self.is_frozen:
            self.score(self.layers, self.step)
            if allocation.is_prune_step(
                self.step, start=self.start, stop=self.stop, interval=self.config.prune_interval
            ):
                self._prune()
        if self.step == self.stop:
            self._freeze()
        elif self.is_frozen or not self.config.revival:
            self._hold_masks()

    def _prune(self) -> None:
        """Keep the budget's best components of the whole model; the gates of the others become 0."""
        scores = torch.cat([m.ema.float() for m in self.layers])
        if not self.config.revival:
            scores[~torch.cat([m.live for m in self.layers])] = -1.0
        self.score.check(self.layers, self.step)
        if self.config.budget == "parameters":
            keep = fitting(self.layers, scores, self.config, self.step, (self.start, self.stop))
        else:
            keep = allocation.select_components(scores, self.budget)
        keep = agreed(keep)
        before = torch.cat([m.live for m in self.layers])
        sizes = [m.num_components for m in self.layers]
        for gated, live in zip(self.layers, keep.split(sizes), strict=True):
            gated.live.copy_(live)
        self._note_masks()
        self._hold_masks()
        if self.config.forget_pruned:
            forget_pruned_(self.layers, self.optimizer)
        self.history.append(prune_event(self.layers, scores, before, keep, step=self.step))

    def _note_masks(self) -> None:
        """Remember whose gates to hold at 0, so that no step has to ask the device."""
        present = [m for m in self.layers if not m.is_dropped]
        if bool(torch.cat([m.live for m in present]).all()):
            present = []
        self._held = [(m, laid_out(m.live.to(m.gate.dtype), m.gate)) for m in present]

    def _hold_masks(self) -> None:
        if self._held:
            scale_all_([m.gate for m, _ in self._held], [mask for _, mask in self._held])

    def freeze_(self) -> None:
        """Make the ranks final now: cut to the target budget and compact, whatever the step.

        Raises:
            RuntimeError: the optimizer never made a step with this allocator attached.
        """
        self.check_has_stepped()
        if self.is_frozen:
            return
        self.stop = self.step
        self.start = min(self.start, self.stop - 1)
        with torch.no_grad():
            self._prune()
        self._freeze()

    def _freeze(self) -> None:
        self.is_frozen = True
        self._copies.mask_like_(self.layers)
        ddp = self._finder.ddp
        can_shrink = self.config.compact and (world_size() == 1 or (ddp and can_rebuild(ddp)))
        if not can_shrink or any(m.is_sharded for m in self.layers):
            return
        try:
            compact_(self.layers, self.optimizer)
            self._note_masks()
        except CannotShrinkError as reason:
            warnings.warn(
                f"Dead components keep their place until finalize_: {reason}", stacklevel=2
            )
            return
        if ddp:
            rebuild_reducer_(ddp)
        ragged = ragged_config(self.config, self.layers)
        swap_config_(self.model, self.adapter, ragged)
        self._copies.compact_(ragged)
