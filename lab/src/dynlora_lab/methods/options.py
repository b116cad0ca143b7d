"""The recipe's section ``adapter``: one set of fields that every method reads what it needs from."""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from peft import LoraConfig

from dynlora.allocation import Settings
from dynlora.gated.config import Init

Placement = Literal["all", "attention", "feed-forward"]

STARTS = ("eva", "gaussian", "lora_ga", "olora", "orthogonal", "pissa")
"""PEFT's names of starts that need nothing beside batches of the training rows."""

OUR_STARTS = ("gradient",)
"""Starts that PEFT does not have."""

_OF_LORA = ("method lora", ("lora",), "none of it; choose method lora, or leave it out.")
_OF_PRUNING = (
    "methods dynlora and dynlora-auto",
    ("dynlora", "dynlora-auto"),
    "no freeze that it could follow; leave it out.",
)
_FIELDS_OF = dict.fromkeys(
    ("init_lora_weights", "use_rslora", "loraplus_lr_ratio", "placement", "ranks"), _OF_LORA
) | {"rate_after": _OF_PRUNING}
"""By field that some methods alone read: what they are called, their names, and what the others lack."""

_ELSEWHERE = {
    "r": "write target_r, the mean rank at the end, and init_r, the rank at the start",
    "rank": "it is called target_r",
    "alpha": "it is called lora_alpha",
    "dropout": "it is called lora_dropout",
    "rank_pattern": "write ranks, the rank by module name, with method lora",
    "bias": "it is 'none'; method bitfit trains the biases",
    "modules_to_save": "the head is trained and saved by itself",
    "task_type": "the recipe's field task decides it",
    "layers_to_transform": "name the layers in target_modules, as a regular expression",
    "layers_pattern": "name the layers in target_modules, as a regular expression",
}


@dataclass(frozen=True, kw_only=True)
class AdapterOptions(Settings):
    """Budget, schedule and targets of an adapter, the same for every method.

    The fields of ``dynlora.allocation.Settings`` with their defaults, and these:

    Attributes:
        target_r: budget at the end: mean rank per adapted module. Methods without ranks choose their
            size so that they have about as many parameters.
        init_r: rank of every module at the start, for the methods that prune; ceil(1.5 · target_r).
        target_modules: which modules, in the words of PEFT; None is PEFT's choice for the model.
        exclude_modules: which of them are left out.
        lora_alpha: every method scales its updates by lora_alpha / target_r for the whole run, at
            whatever rank it starts.
        lora_dropout: of the adapter's input, in [0, 1).
        init, init_std: of the gated methods; see DynLoraConfig.
        init_lora_weights: of ``lora``: PEFT's name of a start, such as ``pissa``, or ``gradient``, which is
            ours; True is PEFT's default.
        use_rslora: of ``lora``: scale by lora_alpha / √target_r.
        loraplus_lr_ratio: of ``lora``: train B at so many times the learning rate, with PEFT's LoRA+.
        placement: of ``lora``: adapt the linear layers of ``attention`` or of the ``feed-forward`` nets
            alone, with as many parameters as ``target_r`` on ``all`` of ``target_modules`` has, to the
            nearest component.
        ranks: of ``lora``: rank by module name, such as a finished run's ``run.json`` holds; modules of
            rank 0 are not adapted; instead of ``target_r`` everywhere.
        rate_after: of ``dynlora`` and ``dynlora-auto``: the learning rate after the freeze, as a multiple
            of what the schedule says.
        bottleneck: width of ``houlsby`` and ``pfeiffer``; None: as wide as the budget allows.
    """

    target_r: float = 8
    init_r: int | None = None
    target_modules: str | list[str] | None = "all-linear"
    exclude_modules: str | list[str] | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    init: Init = "lora"
    init_std: float | None = None
    init_lora_weights: bool | str = True
    use_rslora: bool = False
    loraplus_lr_ratio: float | None = None
    placement: Placement = "all"
    ranks: dict[str, int] | None = None
    rate_after: float = 1.0
    bottleneck: int | None = None

    def __post_init__(self) -> None:
        """Check what the methods do not check themselves.

        Raises:
            ValueError: a number is out of its range.
        """
        super().__post_init__()
        if self.total_steps is not None:
            raise ValueError(
                f"total_steps={self.total_steps} must be left out: training.max_steps or "
                "training.num_train_epochs says how long the run is."
            )
        if self.init_r is not None and self.init_r < self.target_r:
            raise ValueError(
                f"init_r={self.init_r} must be at least target_r={self.target_r}; raise it, or leave it "
                "out."
            )
        if not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha={self.lora_alpha} must be above 0.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout} must lie in [0, 1).")
        if self.ranks is not None and not any(rank > 0 for rank in self.ranks.values()):
            raise ValueError(
                "ranks must hold a rank above 0; leave it out for target_r everywhere."
            )
        if not self.rate_after > 0:
            raise ValueError(f"rate_after={self.rate_after} must be above 0.")
        if self.bottleneck is not None and self.bottleneck < 1:
            raise ValueError(f"bottleneck={self.bottleneck} must be at least 1.")
        self._check_lora()

    def _check_lora(self) -> None:
        """Check the fields of method ``lora``."""
        start = self.init_lora_weights
        if start is not True and not _is_start(start):
            names = ", ".join(sorted(STARTS + OUR_STARTS))
            raise ValueError(
                f"init_lora_weights={start!r} must be true, or one of {names} or "
                "pissa_niter_N; for another start of PEFT's train in a script of your own."
            )
        if self.loraplus_lr_ratio is not None and not self.loraplus_lr_ratio >= 1:
            raise ValueError(
                f"loraplus_lr_ratio={self.loraplus_lr_ratio} must be at least 1; LoRA+ recommends 16."
            )
        if self.placement != "all" and self.ranks is not None:
            raise ValueError(
                f"placement={self.placement!r} and ranks both say which modules are adapted; leave one "
                "of them out."
            )
        if self.use_rslora and (self.placement != "all" or self.ranks is not None):
            raise ValueError(
                "use_rslora=True scales by each module's own rank, so it cannot be used with ranks or "
                "placement; multiply lora_alpha by the square root of target_r instead."
            )

    def refuse_beside(self, method: str) -> None:
        """Refuse fields of one method in a recipe of another, which would ignore them.

        Raises:
            ValueError: names the field and the way out.
        """
        fields = {f.name: f.default for f in dataclasses.fields(self)}
        for name, (whose, methods, lack) in _FIELDS_OF.items():
            value = getattr(self, name)
            if method not in methods and value != fields[name]:
                raise ValueError(f"{name}={value!r} is for {whose}, and {method} has {lack}")

    @property
    def start_r(self) -> int:
        """Rank at the start of the methods that prune."""
        return self.init_r or math.ceil(1.5 * self.target_r)

    def alpha_at(self, rank: float) -> float:
        """PEFT's ``lora_alpha`` with which an adapter of that rank is scaled by lora_alpha / target_r."""
        alpha = self.lora_alpha * rank / self.target_r
        return int(alpha) if alpha == int(alpha) else alpha

    def settings(self) -> dict[str, Any]:
        """The fields of Settings by name, without the length of the run, which the Trainer knows."""
        names = [f.name for f in dataclasses.fields(Settings) if f.name != "total_steps"]
        return {name: getattr(self, name) for name in names}


def _is_start(name: object) -> bool:
    return name in STARTS + OUR_STARTS or re.fullmatch(r"pissa_niter_\d+", str(name)) is not None


_OURS = {f.name for f in dataclasses.fields(AdapterOptions)}

NOT_OFFERED: dict[str, str] = {
    f.name: "recipes do not offer this field of LoraConfig; leave it out, or train in a script of your own"
    for f in dataclasses.fields(LoraConfig)
    if f.name not in _OURS
} | _ELSEWHERE
"""Names that people know from PEFT and that are no field here, each with the way out."""
