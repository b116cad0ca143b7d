"""The recipe's section ``adapter``: one set of fields that every method reads what it needs from."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig

from dynlora.allocation import Settings
from dynlora.gated.config import Init

_ELSEWHERE = {
    "r": "write target_r, the mean rank at the end, and init_r, the rank at the start",
    "rank": "it is called target_r",
    "alpha": "it is called lora_alpha",
    "dropout": "it is called lora_dropout",
    "use_rslora": (
        "every method scales by lora_alpha / target_r; for the scale of rsLoRA multiply lora_alpha by "
        "the square root of target_r"
    ),
    "init_lora_weights": (
        "every method starts from PEFT's default; train with another start in a script of your own, "
        "with PEFT's LoraConfig"
    ),
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
    init: Init = "lora"
    init_std: float | None = None
    ranks: dict[str, int] | None = None
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
        if self.bottleneck is not None and self.bottleneck < 1:
            raise ValueError(f"bottleneck={self.bottleneck} must be at least 1.")

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


_OURS = {f.name for f in dataclasses.fields(AdapterOptions)}

NOT_OFFERED: dict[str, str] = {
    f.name: "recipes do not offer this field of LoraConfig; leave it out, or train in a script of your own"
    for f in dataclasses.fields(LoraConfig)
    if f.name not in _OURS
} | _ELSEWHERE
"""Names that people know from PEFT and that are no field here, each with the way out."""
