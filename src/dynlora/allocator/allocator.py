"""RankAllocator: joins the equations, the LoRA layers of a model and its optimizer."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynlora import allocation
from dynlora._private import can_rebuild, is_inner_step, rebuild_reducer_
from dynlora.allocator import checks, guard
from dynlora.allocator.auto import BudgetSearch, Choice, Evaluate, whole_loss
from dynlora.allocator.checks import reading_is_free
from dynlora.allocator.compaction import compact_, forget_parameters_
from dynlora.allocator.copies import AveragedCopies
from dynlora.allocator.dem import add_dem_to_gradients_
from dynlora.allocator.masks import Masks
from dynlora.allocator.processes import DdpFinder, broadcast_choice, world_size
from dynlora.allocator.record import prune_event
from dynlora.allocator.resume import (
    KEPT_SETTINGS,
    STATE_VERSION,
    check_state,
    restore_scores_,
    saved_scores,
)
from dynlora.allocator.scores import ImportanceScore, OwnScore, Score
from dynlora.allocator.step_hooks import (
    attach,
    loss_scale,
    once_computed,
    refuse_capture,
    steppable,
)
from dynlora.errors import CannotShrinkError
from dynlora.lora.adapter import LoraAdapter
from dynlora.lora.components import LoraComponents
from dynlora.lora.configs import recorded_fields
from dynlora.lora.follow import AdapterStart


class RankAllocator:
    """Scores, prunes and freezes the components of one LoRA adapter, driven by its optimizer.

    Attached to the optimizer's step hooks, it needs no call in the training loop. Until the first
    pruning it only reads: the run is the one without it. A step that a GradScaler skips does not count.

    Args:
        model: a model with a trainable LoRA adapter; PeftModel, injected or wrapped.
        optimizer: the torch optimizer that holds the adapter's parameters.
        total_steps: optimizer steps of the whole run.
        adapter: which adapter; may be left out if only one is trainable.
        score: instead of an importance by name: a function that writes scores into ``ema`` of each
            module after every step until the freeze.
        evaluate: with ``target_r="auto"``: a function that returns the held-out loss of the model as it
            is, called ten to twenty times at the freeze. On several processes each returns its own share's.
            With a method ``backward()`` it gives gradients too: see ``auto.Evaluate``.
        preset: ``paper`` for the paper's values of the settings that are not given.
        start: the adapter as it was when the run began, where the model has taken the ranks of a
            checkpoint since; DynLoraCallback passes it.
        settings: fields of ``dynlora.allocation.Settings``; ``target_r`` is needed. Left out where the
            adapter's config is a DynLoraConfig, which holds them.

    Attributes:
        settings: the Settings in force.
        modules: the adapted modules, in model order.
        step: optimizer steps seen.
        is_frozen: whether the ranks are final.
        total_cost: N of Eq. 9, what all components cost together, in parameters or components.
        target_cost: N_T of Eq. 9.
        history: one entry a prune event, as ``record.prune_event`` makes it.

    Raises:
        ValueError: there is no such adapter, none that is trainable, ``total_steps`` or ``target_r`` is
            unknown, the optimizer lacks the adapter's parameters or drives another allocator of it, the
            target exceeds what there is, or the adapter is of a kind that has no components.
        TypeError: the optimizer has no step hooks, a setting is unknown, or ``score`` is not a function.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        total_steps: int | None = None,
        adapter: str | None = None,
        score: Score | None = None,
        evaluate: Evaluate | None = None,
        preset: str | None = None,
        start: AdapterStart | None = None,
        **settings: Any,
    ) -> None:
        begun = AdapterStart.of(model, adapter) if start is None else start
        self._begun, self.adapter, self.modules = begun, begun.name, begun.modules
        kind = getattr(begun.config, "adapter_class", LoraAdapter)  # a DynLoraConfig has its own
        self._adapter: LoraAdapter = kind(model, begun)
        self.settings = self._adapter.settings(settings, preset)
        self.score = ImportanceScore(self.settings) if score is None else OwnScore(score)
        self._adapter.check()
        if not any(m.is_trainable for m in self.modules):
            raise ValueError(
                f"adapter={self.adapter!r} is not trainable: nothing that scores its components requires "
                f"gradients, such as {self.present[0].probes[0].name} of {self.present[0].path!r}. Load it "
                "with is_trainable=True, activate it with model.set_adapter(...), or unfreeze that "
                "parameter."
            )
        self.total_steps = checks.check_total_steps(self.settings, total_steps)
        self.start, self.stop = allocation.pruning_window(
            self.total_steps,
            prune_start=self.settings.prune_start,
            prune_end=self.settings.prune_end,
        )
        in_components = self.settings.budget == "components"
        self._costs = [1 if in_components else max(1, size) for size in begun.sizes.values()]
        ranks = begun.ranks.values()
        self.total_cost = sum(cost * rank for cost, rank in zip(self._costs, ranks, strict=True))
        checks.check_evaluate(self.settings, evaluate, self.modules)
        self.evaluate = evaluate
        self.target_cost = self.total_cost  # of "auto" until the freeze
        if (target_r := self.settings.target_r) != "auto":
            self.target_cost = allocation.target_cost(
                target_r, self._costs, in_components=in_components
            )
        self._floors = [max(self.settings.min_r, not m.can_drop) for m in self.modules]
        checks.check_target(
            self.settings,
            self.target_cost,
            self.total_cost,
            self._costs,
            self._floors,
            self.modules,
        )
        self.step = 0
        self.is_frozen = False
        self.history: list[dict[str, Any]] = []
        self._final_ranks: dict[str, int] | None = None
        self._guard = checks.FiniteGuard()
        self._copies = AveragedCopies(self.adapter)
        self._masks = Masks([])
        self.optimizer = steppable(optimizer)
        checks.check_optimizer(self.optimizer, self.present)
        guard.attach(self)
        self._parameters = [f.parameter for m in self.present for f in m.factors]
        for module in self.present:
            module.follow_device_()
        self._adapter.follow_checkpoints()
        self._finder = DdpFinder(model)
        self._handles = attach(self.optimizer, before=self._before_step, after=self._after_step)
        if isinstance(self.optimizer, Optimizer):
            self._handles.append(
                self.optimizer.register_load_state_dict_pre_hook(self._release_dropped)
            )

    @property
    def present(self) -> list[LoraComponents]:
        """The modules that still compute the adapter."""
        return [m for m in self.modules if not m.is_dropped]

    def ranks(self) -> dict[str, int]:
        """Live rank by module name, zeros included."""
        if self._final_ranks is not None:
            return dict(self._final_ranks)
        return {m.name: int(m.live.sum()) for m in self.modules}

    @property
    def budget(self) -> int:
        """What the live components may cost after the steps done so far (Eq. 9)."""
        return allocation.budget_at(self.step, **self._equation())

    @property
    def cost(self) -> int:
        """What the live components cost now."""
        return sum(c * r for c, r in zip(self._costs, self.ranks().values(), strict=True))

    def _equation(self) -> dict[str, int]:
        """What Eq. 9 is computed from."""
        costs = {"total": self.total_cost, "target": self.target_cost}
        return {**costs, "start": self.start, "stop": self.stop}

    def plan(self) -> dict[str, Any]:
        """The run as it is meant to go, for its record; plain numbers.

        Returns:
            total_steps, importance (its name, or "own" for a ``score``), budget (parameters or
            components), window (t₀, t₁), schedule (step and budget of each prune event), total_cost,
            target_cost, ranks and component_sizes (in parameters) by module name, and lora (fields of the
            LoraConfig that the run began with).
        """
        events = [(self.stop, self.target_cost)]
        if not self.settings.is_auto:
            interval = self.settings.prune_interval
            events = allocation.prune_plan(**self._equation(), interval=interval)
        return {
            "total_steps": self.total_steps,
            "importance": self.score.name,
            "budget": self.settings.budget,
            "window": [self.start, self.stop],
            "schedule": [list(event) for event in events],
            "total_cost": self.total_cost,
            "target_cost": self.target_cost,
            "ranks": self.ranks(),
            "component_sizes": dict(self._begun.sizes),
            "lora": recorded_fields(self._begun.config),
        }

    def also_compact(self, copy: nn.Module) -> None:
        """Let a copy of the model, such as an ``AveragedModel`` of torch, shrink with it at the freeze.

        A copy averages parameters pairwise with the model's, so it must keep their shapes.

        Args:
            copy: a deep copy of the model, wrapped or not, made before or after the freeze.

        Raises:
            ValueError: the copy has no such adapter, or its modules have other ranks than the model's.
        """
        self._copies.add(copy, self.modules)

    def stop_listening(self) -> None:
        """Take the hooks off the optimizer: its steps are not counted any more.

        The model still takes the ranks of a checkpoint that is loaded into it.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = []
        guard.detach(self)

    def detach(self) -> None:
        """Take all hooks off model and optimizer; nothing is scored or pruned from here on."""
        self.stop_listening()
        self._adapter.leave()
        self._finder.forget()

    def finalize_(self) -> dict[str, int]:
        """End the run: detach, and leave a plain LoRA with the same function.

        Pruned components that still have a place are removed, and the adapter's config describes the
        ranks. A run that ends before the freeze keeps every living component, with a warning: the
        function stays, the budget is not met. Call ``freeze_()`` first to cut at once.

        Returns:
            Final rank by module name, zeros included.

        Raises:
            RuntimeError: the optimizer never made a step with this allocator attached.
            NotFiniteError: a gradient or a weight of the adapter is NaN or infinite.
        """
        self.check_has_stepped()
        if callable(show_averages := getattr(self.optimizer, "eval", None)):
            show_averages()  # a schedule-free optimizer trains other weights than those to keep
        self.check_finite()
        if self.cost > self.target_cost:
            why = (
                "its weights are of a checkpoint from before the freeze (load_best_model_at_end)"
                if self.is_frozen
                else f"training ended after {self.step} of {self.total_steps} steps, before the ranks "
                f"are frozen at step {self.stop}"
            )
            warnings.warn(
                f"The adapter is over its budget: it keeps {self.cost} {self.settings.budget} instead of "
                f"{self.target_cost}, because {why}. Its function is unchanged. To cut it down, call "
                "allocator.freeze_() before finalize_(), pass freeze_on_stop=True to DynLoraCallback, or "
                "use `dynlora shrink` on what is saved.",
                stacklevel=2,
            )
        self.detach()
        self._final_ranks = self._adapter.finish_()
        return self.ranks()

    def check_has_stepped(self) -> None:
        """Raise RuntimeError if no optimizer step was ever seen."""
        if self.step == 0:
            raise RuntimeError(
                "The RankAllocator never saw an optimizer step, so nothing was scored or pruned: the "
                "optimizer it is attached to is not the one being stepped, or every step was skipped. "
                "Pass the optimizer whose step() trains the adapter."
            )

    def check_finite(self) -> None:
        """Raise NotFiniteError if gradients were, or weights are, NaN or infinite; waits for the device."""
        self._guard.read(step=self.step)
        checks.check_weights(self.modules)

    def state_dict(self) -> dict[str, Any]:
        """Progress, scores and masks of the run, plain numbers only (JSON)."""
        return {
            "version": STATE_VERSION,
            "adapter": self.adapter,
            "step": self.step,
            "is_frozen": self.is_frozen,
            "window": [self.start, self.stop],
            "history": [dict(event) for event in self.history],
            "scores": saved_scores(self.modules),
            **self._contract(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a run whose model and optimizer are already restored.

        Raises:
            ValueError: the state is damaged, another version's or another plan's, or the model's
                adapter was not restored.
        """
        contract = self._contract()
        if self.settings.is_auto and isinstance(state, dict):
            found = state.get("target_cost")  # at the freeze, or still the whole
            contract["target_cost"] = found if isinstance(found, int) else self.target_cost
        check_state(state, contract)
        self.target_cost = contract["target_cost"]
        restore_scores_(state, self.modules)
        self.step, self.is_frozen = state["step"], state["is_frozen"]
        self.start, self.stop = state["window"]
        self.history = [dict(event) for event in state["history"]]
        self._masks = Masks(self.modules)

    def _contract(self) -> dict[str, Any]:
        """What must not change between the parts of one run."""
        return {
            "total_steps": self.total_steps,
            "importance": self.score.name,
            **{name: getattr(self.settings, name) for name in KEPT_SETTINGS},
            "modules": self._begun.scalings,
            "total_cost": self.total_cost,  # last: what the user has set is named before it
            "target_cost": self.target_cost,
        }

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Read the gradients and add η·∂R; with a closure, each time after it has computed them."""
        if is_inner_step(optimizer):
            return None
        refuse_capture()
        guard.heard(self)  # now: optimizers chained inside this one step next
        return once_computed(args, kwargs, lambda: self._read_gradients(optimizer))

    def _read_gradients(self, optimizer: Any) -> None:
        scale = loss_scale(optimizer)
        present = self.present
        # a scaled step is checked, and skipped, by its scaler
        if scale is None or not reading_is_free(present):
            found_inf = getattr(optimizer, "found_inf", None)
            self._guard.look(present, step=self.step + 1, found_inf=found_inf)
        if self.is_frozen:
            return
        self.score.before_step(present, scale)
        components = sum(m.rank for m in present)
        if factor := self.settings.dem_weight / components:
            add_dem_to_gradients_(present, factor=factor, grad_scale=scale)

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
        if self.step == 1 and self.settings.is_auto:
            assert self.evaluate is not None  # noqa: S101  # check_evaluate has seen to it
            # what cannot be compared is refused now, not after the last step
            whole_loss(self.evaluate, self.present[0].ema.device)
        if not self.is_frozen:
            self.score(self.present, self.step)
            first = self.stop - 1 if self.settings.is_auto else self.start
            interval = self.settings.prune_interval
            if allocation.is_prune_step(self.step, start=first, stop=self.stop, interval=interval):
                self._prune()
        if self.step == self.stop:
            self._freeze()
        elif self.is_frozen or not self.settings.revival:
            self._masks.apply_()

    def _prune(self, *, is_last: bool = False) -> None:
        """Keep the components with the most score per cost in the whole model; the others become 0.

        With ``is_last`` the target is met now, whatever the step.
        """
        self._guard.read(step=self.step)
        if not self.is_frozen:  # else the scores of what came back are gone
            self.score.check(self.present, self.step)
        choice = self._search() if self.settings.is_auto else None
        if choice is None:
            scores = _gathered([m.ema.float() for m in self.modules])
        else:  # frozen, the state has the shapes of another checkpoint, and no step will follow
            optimizer = None if self.is_frozen else self.optimizer
            scores = choice.turn_(optimizer, () if self.is_frozen else self._copies.by_name())
        before = _gathered([m.live for m in self.modules])
        if not self.settings.revival:
            scores[~before] = -1.0
        sizes = [len(m.live) for m in self.modules]
        costs = torch.tensor(
            [cost for cost, size in zip(self._costs, sizes, strict=True) for _ in range(size)]
        )
        budget = self.target_cost if is_last else self.budget
        keep = allocation.select_components(scores, costs, budget, floors=self._floors, sizes=sizes)
        keep = broadcast_choice(keep, self.present[0].ema.device)
        for module, live in zip(self.modules, keep.split(sizes), strict=True):
            module.live.copy_(live)
        self._masks = Masks(self.modules)
        self._masks.apply_()
        cost = int(costs[keep].sum())
        event = prune_event(self.modules, scores, before, keep, step=self.step, cost=cost)
        self.history.append(event if choice is None else {**event, "auto": choice.record()})

    def _search(self) -> Choice:
        """Find the budget by held-out loss."""
        assert self.evaluate is not None  # noqa: S101  # check_evaluate has seen to it
        tolerance = self.settings.tolerance
        rows = [i for i, m in enumerate(self.modules) if not m.is_dropped]
        costs, floors = ([values[i] for i in rows] for values in (self._costs, self._floors))
        is_own = isinstance(self.score, OwnScore) or self.settings.importance != "sensitivity"
        search = BudgetSearch(
            self.present, costs, floors, self.evaluate, tolerance=tolerance, has_own_score=is_own
        )
        choice = search.search()
        self.target_cost = choice.curve.budget
        return choice

    @torch.no_grad()
    def freeze_(self) -> None:
        """Make the ranks final now, after at least one step: cut to the target, and compact.

        Frozen ranks stay, with one exception: with ``target_r="auto"``, weights of a checkpoint from
        before the freeze (``load_best_model_at_end``) are searched and cut as well. Call it before
        ``finalize_()`` then, with no step between the two.
        """
        self.check_has_stepped()
        if self.is_frozen:
            is_gated = any(m.is_gated for m in self.modules)
            if self.settings.is_auto and not is_gated and self.cost > self.target_cost:
                self._prune(is_last=True)
            return
        self._prune(is_last=True)  # where it refuses, the run can go on as planned
        self.stop = self.step
        self.start = min(self.start, self.stop - 1)
        self._freeze()

    def _freeze(self) -> None:
        self._copies.mask_like_(self.modules)
        self.is_frozen = True
        if self.settings.compact:
            self._copies.warn_of_others(self.modules)
        ddp = self._finder.ddp
        can_shrink = self.settings.compact and (world_size() == 1 or (ddp and can_rebuild(ddp)))
        if not can_shrink or any(m.is_sharded for m in self.modules):
            return
        if reason := self._adapter.must_keep_shapes:
            warnings.warn(reason, stacklevel=2)
            return
        try:
            compact_(self.modules, self.optimizer)
        except CannotShrinkError as error:
            warnings.warn(
                f"Pruned components keep their place until finalize_: {error}", stacklevel=2
            )
            return
        self._masks = Masks(self.modules)
        if ddp:
            rebuild_reducer_(ddp)
        self._copies.compact_(self._adapter.describe_ranks_())

    def _release_dropped(self, optimizer: Optimizer, _state: Any) -> None:
        """A state from after the freeze holds no parameters of dropped modules."""
        held = {id(f.parameter) for m in self.present for f in m.factors}
        gone = [p for p in self._parameters if id(p) not in held]
        forget_parameters_(optimizer, gone)


def _gathered(tensors: list[Tensor]) -> Tensor:
    """One tensor of all of them on the CPU; the modules of a model may lie on several devices."""
    devices = {t.device for t in tensors}
    return torch.cat(tensors if len(devices) == 1 else [t.cpu() for t in tensors]).cpu()
