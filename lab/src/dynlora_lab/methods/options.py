"""The recipe's section ``adapter``: one set of fields that every method reads what it needs from."""

import math
from dataclasses import dataclass

from dynlora.adapter.config import Budget, Importance, Init

from dynlora.allocation import Schedule


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """Budget, schedule and targets of an adapter, the same for every method.

    Attributes:
        target_r: budget at the end: mean rank per adapted module. Methods without ranks choose their
            size so that they have about as many parameters.
        init_r: rank of every module at the start, for the methods that prune; ceil(1.5 · target_r).
        target_modules: which modules, in the words of PEFT; None is PEFT's choice for the model.
        exclude_modules: which of them are left out.
        lora_alpha: scaling is lora_alpha / rank at the start.
        lora_dropout: of the adapter's input, in [0, 1).
        prune_start, prune_end: the pruning window, as shares of the run.
        prune_interval: optimizer steps between two prunings.
        ema_beta: β of Eq. 8.
        dem_weight: η of Eq. 10; 0 is off.
        revival: whether a pruned component may come back before the freeze.
        compact: whether dead components leave the model at the freeze.
        init_std: standard deviation of A and B; None leaves it to ``init``.
        init, importance, schedule, budget, forget_pruned: of ``dynlora``; see DynLoraConfig.
        ranks: of ``lora``: rank by module name, such as a finished run's ``run.json`` holds; modules of
            rank 0 are not adapted; instead of ``target_r`` everywhere.
        bottleneck: width of ``houlsby`` and ``pfeiffer``; None: as wide as the budget allows.
    """

    target_r: float = 8
    init_r: int | None = None
    target_modules: str | list[str] | None = "all-linear"
    exclude_modules: str | list[str] | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    prune_start: float = 0.15
    prune_end: float = 0.5
    prune_interval: int = 10
    ema_beta: float = 0.9
    dem_weight: float = 0.0
    revival: bool = True
    compact: bool = True
    init_std: float | None = None
    init: Init = "lora"
    importance: Importance = "sensitivity"
    schedule: Schedule = "slow-fast"
    budget: Budget = "components"
    forget_pruned: bool = False
    ranks: dict[str, int] | None = None
    bottleneck: int | None = None

    def __post_init__(self) -> None:
        """Check what the methods do not check themselves.

        Raises:
            ValueError: a number is out of its range.
        """
        if not self.target_r > 0:
            raise ValueError(f"target_r={self.target_r} must be above 0: the mean rank at the end.")
        if self.init_r is not None and self.init_r < self.target_r:
            raise ValueError(
                f"init_r={self.init_r} must be at least target_r={self.target_r}; raise it, or leave it "
                "out."
            )
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout} must lie in [0, 1).")
        if not 0 <= self.prune_start < self.prune_end <= 1:
            raise ValueError(
                f"prune_start={self.prune_start}, prune_end={self.prune_end} must satisfy "
                "0 <= prune_start < prune_end <= 1: shares of the run."
            )
        if self.ranks is not None and not any(rank > 0 for rank in self.ranks.values()):
            raise ValueError(
                "ranks must hold a rank above 0; leave it out for target_r everywhere."
            )
        if self.bottleneck is not None and self.bottleneck < 1:
            raise ValueError(f"bottleneck={self.bottleneck} must be at least 1.")

    @property
    def start_r(self) -> int:
        """Rank at the start of the methods that prune."""
        return self.init_r or math.ceil(1.5 * self.target_r)
