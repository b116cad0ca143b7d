"""DynLoraConfig: PEFT's LoraConfig with a rank budget instead of a rank, and its PeftType."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from peft import LoraConfig
from peft.utils.peft_types import PeftType

from dynlora.adapter.adapter_file import CONFIG_NAME, check_fields, read_config, read_folder
from dynlora.allocation.schedule import Schedule

_EXPANSION = 1.5  # initial over final budget in all runs of the paper (appendix E)

Importance = Literal["share", "norm", "gate", "sensitivity"]
Init = Literal["kaiming", "kaiming-lora", "lora"]
Budget = Literal["components", "parameters"]

_CHOICES: dict[str, Any] = {
    "importance": Importance,
    "schedule": Schedule,
    "init": Init,
    "budget": Budget,
    "preset": Literal["paper", None],
}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "importance": "share",
        "schedule": "slow-fast",
        "init": "kaiming",
        "init_std": None,
        "budget": "components",
        "forget_pruned": False,
        "revival": True,
        "prune_start": 0.15,
        "prune_end": 0.5,
        "ema_beta": 0.9,
        "dem_weight": 0.1,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
    }
}
"""What the paper and its code set; dem_weight and prune_interval vary by task there."""

_BEST: dict[str, Any] = {"importance": "sensitivity", "init": "lora", "dem_weight": 0.0}
"""Fields that are None until a preset or this table fills them, so that a value given always stays."""

_REFUSED = {
    "use_dora": "weight-decomposed DoRA (NVIDIA) is another method",
    "use_qalora": "QA-LoRA pools the inputs of A",
    "use_bdlora": "block-diagonal LoRA has no rank-one components",
    "kasa_config": "KaSA has gates of its own and changes the base weights",
    "monteclora_config": "MonteCLoRA samples its factors",
    "velora_config": "VeLoRA replaces the backward pass of A",
    "arrow_config": "Arrow routes between finished adapters",
    "alora_invocation_tokens": "activated LoRA is a LoRA variant",
    "lora_bias": "a bias in B belongs to no rank-one component",
    "target_parameters": "bare parameters have no LoRA layer that could hold gates",
    "layer_replication": "replicated layers share weights that pruning would cut twice",
    "ensure_weight_tying": "tied factors belong to two modules at once",
}


def _extended_peft_type(name: str) -> PeftType:
    """Member ``name`` of PeftType, added in memory if this PEFT does not know it.

    PEFT has no plug-in registry, and its mappings, transformers and hot-swapping all expect a real
    member with ``.value``. The enum metaclass refuses ``setattr``, hence ``type.__setattr__``.
    """
    if name in PeftType._value2member_map_:
        return PeftType(name)
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


DYNLORA = _extended_peft_type("DYNLORA")


@dataclass
class DynLoraConfig(LoraConfig):  # type: ignore[misc]  # peft is untyped
    """Which modules to adapt, and how many rank-one components may stay.

    A module starts with ``init_r`` components; training prunes the least important ones of the whole
    model until ``target_r`` per module are left on average. All other fields are LoraConfig's, with
    their meaning there; ``rank_pattern`` sets initial ranks, 0 in the config that is saved with a module
    that fell to rank 0. ``r`` is not given: it is ``init_r``.

    Args:
        init_r: components per adapted module at the start; ceil(1.5 · target_r) if not given.
        target_r: mean live components per adapted module at the end, a number in (0, init_r].
        prune_start: share of the optimizer steps before the first pruning, in [0, 1).
        prune_end: share of the steps at which the ranks are frozen, in (prune_start, 1].
        prune_interval: optimizer steps between two prunings, at least 1.
        ema_beta: β of Eq. 8, weight of the past in the smoothed importance, in [0, 1).
        dem_weight: η of Eq. 10, weight of the DEM penalty until the freeze; 0, the default, is off.
        revival: whether a pruned component may come back before the freeze, through the gradient of
            its gate (the paper's rule); False makes every cut final.
        compact: whether dead components are removed from modules, gradients and optimizer at the
            freeze; False keeps shapes and holds their gates at 0 until ``finalize_``.
        total_steps: optimizer steps of the run, where neither Trainer nor RankAllocator is told.
        init_std: a number draws A and B from N(0, init_std²), with gates of 0; None leaves it to ``init``.
        init: where init_std is None. ``lora``, the default, starts as LoRA does, A by its Kaiming and
            B = 0, with gates of 1, and trains at LoRA's learning rates. ``kaiming`` is the official code's
            (a = 0: B's elements have the variance 2 / init_r, hundreds of times A's), ``kaiming-lora``
            LoRA's Kaiming (a = √5) for both, a sixth of that variance; both with gates of 0.
        importance: what components are ranked by. ``sensitivity``, the default: abs(c · ∂L/∂c), what the
            loss would lose. ``share``: Eq. 7, their share of their module's update. ``norm``: the norm of
            their own update, so that modules that change more keep more. ``gate``: abs(c) alone.
        schedule: ``slow-fast``, Eq. 9, cuts most at the end of the window, when scores are ripe;
            ``fast-slow``, AdaLoRA's cubic, leaves the survivors more steps at their final ranks.
        budget: what target_r counts: ``components``, or ``parameters``: as many numbers as a LoRA of
            rank target_r on the same modules has, so that wide modules pay for their width.
        forget_pruned: whether the optimizer's state of pruned components is set to 0 at each pruning,
            so that only their gradient can bring them back, not old momentum.
        preset: ``paper`` gives every field above that is left at its default the paper's value, and
            lora_alpha and lora_dropout too, whatever the defaults of this version are.
        fused: whether plain Linear layers compute base and adapter in one autograd function where
            that is possible (one active adapter, no hooks, one dtype); the result is the same to
            rounding. False always takes PEFT's path.

    Raises:
        ValueError: a rule above is broken, ``r`` is given, or a LoRA variant is asked for that has no
            gated form.

    Examples:
        >>> DynLoraConfig(target_r=4).init_r
        6
    """

    r: int = field(default=None, metadata={"help": "Not given: dynlora starts at init_r."})  # type: ignore[assignment]  # filled in __post_init__
    init_r: int | None = field(
        default=None,
        metadata={"help": "Components per module at the start; default ceil(1.5 * target_r)."},
    )
    target_r: float = field(
        default=8,
        metadata={"help": "Mean live components per module at the end."},
    )
    prune_start: float = field(
        default=0.15, metadata={"help": "Share of the steps before the first pruning."}
    )
    prune_end: float = field(
        default=0.5, metadata={"help": "Share of the steps at which the ranks are frozen."}
    )
    prune_interval: int = field(
        default=10, metadata={"help": "Optimizer steps between two prunings."}
    )
    ema_beta: float = field(
        default=0.9, metadata={"help": "Weight of the past in the smoothed importance."}
    )
    dem_weight: float = field(
        default=None,  # type: ignore[assignment]  # filled in __post_init__
        metadata={"help": "Weight of the variance penalty until the freeze; 0 if not given."},
    )
    revival: bool = field(
        default=True, metadata={"help": "Pruned components may come back before the freeze."}
    )
    compact: bool = field(
        default=True, metadata={"help": "Remove dead components for real at the freeze."}
    )
    total_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps of the run, if nothing else says it."}
    )
    init_std: float | None = field(
        default=None, metadata={"help": "Draw A and B from N(0, init_std^2); None: see init."}
    )
    init: Init = field(
        default=None,  # type: ignore[arg-type]  # filled in __post_init__
        metadata={"help": "How A, B and the gates start; lora if not given."},
    )
    importance: Importance = field(
        default=None,  # type: ignore[arg-type]  # filled in __post_init__
        metadata={"help": "What components are ranked by; sensitivity if not given."},
    )
    schedule: Schedule = field(
        default="slow-fast", metadata={"help": "Cut slowly first, or fast first."}
    )
    budget: Budget = field(
        default="components", metadata={"help": "What target_r counts: components or parameters."}
    )
    forget_pruned: bool = field(
        default=False, metadata={"help": "Clear the optimizer's state of pruned components."}
    )
    preset: Literal["paper"] | None = field(
        default=None, metadata={"help": "paper: its values for fields left at their default."}
    )
    fused: bool = field(
        default=True, metadata={"help": "Faster, equal path for plain Linear layers."}
    )

    def __post_init__(self) -> None:
        """Check every rule, then let LoraConfig check its own."""
        if self.r is not None:
            raise ValueError(
                f"r={self.r} must not be given: dynlora trains with a rank budget. Set target_r (mean "
                "rank at the end) and, if you like, init_r (rank at the start)."
            )
        self._apply_preset()
        self._check_choices()
        self._check_ranks()
        self._check_schedule()
        self._check_variants()
        self.r = self.init_r
        super().__post_init__()
        self.peft_type = DYNLORA

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> "DynLoraConfig":
        """Read a saved config; a folder with weights is checked now, before PEFT changes a base model.

        Raises:
            AdapterFileError: the folder is damaged or holds something else than a DynLora adapter.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        stored = None
        if (folder / CONFIG_NAME).is_file():
            check_fields(read_config(folder), get_type_hints(cls))
            stored = read_folder(folder)
        config: DynLoraConfig = super().from_pretrained(
            pretrained_model_name_or_path, subfolder=subfolder, **kwargs
        )
        if isinstance(config, DynLoraConfig):
            config.stored = stored
        return config

    def to_dict(self) -> dict[str, Any]:
        """Fields for adapter_config.json, without ``r``, which follows from ``init_r``."""
        return {key: value for key, value in super().to_dict().items() if key != "r"}

    def _check_choices(self) -> None:
        for name, kind in _CHOICES.items():
            value, known = getattr(self, name), get_args(kind)
            if value not in known:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, known))}.")

    def _apply_preset(self) -> None:
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name, value in (_BEST | PRESETS.get(self.preset or "", {})).items():
            if getattr(self, name) == defaults[name]:
                setattr(self, name, value)

    def _check_ranks(self) -> None:
        if not _is_number(self.target_r) or not self.target_r > 0:
            raise ValueError(
                f"target_r={self.target_r!r} must be a number above 0: the mean rank per module at the "
                "end; 0.5, say, is one component for every two modules."
            )
        if self.init_r is None:
            self.init_r = math.ceil(_EXPANSION * self.target_r)
        if not _is_integer(self.init_r) or self.init_r < 1:
            raise ValueError(
                f"init_r={self.init_r!r} must be an integer of at least 1; leave it out for "
                "ceil(1.5 * target_r)."
            )
        for name, rank in (self.rank_pattern or {}).items():
            if not _is_integer(rank) or rank < 0:  # 0 is a module that has lost all components
                raise ValueError(
                    f"rank_pattern={{{name!r}: {rank!r}}} must hold integers of at least 0; name a "
                    "module in exclude_modules to leave it out."
                )
        for name, alpha in (self.alpha_pattern or {}).items():
            if not _is_number(alpha) or not alpha > 0:
                raise ValueError(
                    f"alpha_pattern={{{name!r}: {alpha!r}}} must hold numbers above 0, such as 8."
                )
        if not _is_number(self.lora_alpha) or not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha={self.lora_alpha!r} must be a number above 0, such as 8.")
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout!r} must lie in [0, 1).")
        highest = max([self.init_r, *(self.rank_pattern or {}).values()])
        if self.target_r > highest:
            raise ValueError(
                f"target_r={self.target_r} must not exceed init_r={self.init_r}: pruning only removes "
                "components. Lower target_r, raise init_r, or leave init_r out."
            )
        if self.init_std is not None and not (_is_number(self.init_std) and self.init_std > 0):
            raise ValueError(
                f"init_std={self.init_std!r} must be a number above 0, such as 0.02, or None for the "
                "paper's Kaiming initialisation."
            )

    def _check_schedule(self) -> None:
        if not (
            _is_number(self.prune_start)
            and _is_number(self.prune_end)
            and 0 <= self.prune_start < self.prune_end <= 1
        ):
            raise ValueError(
                f"prune_start={self.prune_start!r}, prune_end={self.prune_end!r} must satisfy "
                "0 <= prune_start < prune_end <= 1: shares of the run; the paper has 0.15 and 0.5."
            )
        if not _is_integer(self.prune_interval) or self.prune_interval < 1:
            raise ValueError(
                f"prune_interval={self.prune_interval!r} must be an integer of at least 1, in "
                "optimizer steps; the paper uses 10 to 100."
            )
        if not _is_number(self.ema_beta) or not 0 <= self.ema_beta < 1:
            raise ValueError(f"ema_beta={self.ema_beta!r} must lie in [0, 1); the paper has 0.9.")
        if not _is_number(self.dem_weight) or not self.dem_weight >= 0:
            raise ValueError(
                f"dem_weight={self.dem_weight!r} must be 0 or more: a negative η would reward uneven "
                "components. 0 switches DEM off; the paper has 0.1 to 0.5."
            )
        if self.total_steps is not None and (
            not _is_integer(self.total_steps) or self.total_steps < 1
        ):
            raise ValueError(
                f"total_steps={self.total_steps!r} must be an integer of at least 1, in optimizer "
                "steps, or None to take it from the Trainer or RankAllocator."
            )

    def _check_variants(self) -> None:
        for name, reason in _REFUSED.items():
            if getattr(self, name, None):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} cannot be combined with dynlora: {reason}. Leave "
                    f"{name} at its default, or use peft.LoraConfig."
                )
        if self.init_lora_weights not in (True, False):
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r} must be True or False: dynlora draws A "
                "and B itself. Use init_std to choose how."
            )


def plain_lora_fields(config: DynLoraConfig) -> dict[str, Any]:
    """The fields that a finished adapter shares with LoraConfig, as keyword arguments for it."""
    own = {f.name for f in dataclasses.fields(DynLoraConfig)}
    shared = {f.name for f in dataclasses.fields(LoraConfig) if f.init and f.name in own}
    return {name: getattr(config, name) for name in shared - {"r", "peft_type"}}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
