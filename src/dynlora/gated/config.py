"""DynLoraConfig: PEFT's LoraConfig with a rank budget instead of a rank, and its PeftType."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_type_hints

from peft import LoraConfig

from dynlora._private import extended_peft_type
from dynlora.adapter_files.folder import read_config
from dynlora.adapter_files.format import CONFIG_FILE
from dynlora.allocation import PAPER, Settings
from dynlora.allocation.settings import is_integer, is_number
from dynlora.gated.adapter_file import check_fields, read_folder

_AUTO_START = 16
_EXPANSION = 1.5  # initial over final budget in all runs of the paper (appendix E)

Init = Literal["kaiming", "lora"]

_DEFAULTS: dict[str, Any] = {
    **{f.name: f.default for f in dataclasses.fields(Settings)},
    "target_r": 8,
    "init": "lora",
    "lora_alpha": 8,
    "lora_dropout": 0.0,
}
_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {**PAPER, "init": "kaiming", "lora_alpha": 8, "lora_dropout": 0.1}
}
"""Fields are None until they are filled from a preset and these, so that a value given always stays."""

_REMOVED: dict[str, Any] = {"schedule": "slow-fast", "forget_pruned": False, "fused": None}
"""Fields that older configs hold, with the only value that is still understood; None for any."""

_REFUSED = {
    "use_dora": "the magnitude of weight-decomposed DoRA (NVIDIA) has no gate",
    "use_qalora": "QA-LoRA pools the inputs of A",
    "use_bdlora": "block-diagonal LoRA has no rank-one components",
    "kasa_config": "KaSA has gates of its own and changes the base weights",
    "monteclora_config": "MonteCLoRA samples its factors",
    "velora_config": "VeLoRA replaces the backward pass of A",
    "arrow_config": "Arrow routes between finished adapters",
    "alora_invocation_tokens": "activated LoRA applies the adapter to a part of the tokens only",
    "lora_bias": "a bias in B belongs to no rank-one component",
    "target_parameters": "bare parameters have no LoRA layer that could hold gates",
    "layer_replication": "replicated layers share weights that pruning would cut twice",
    "ensure_weight_tying": "tied factors belong to two modules at once",
}

_ONLY_STOCK = {"lora_bias", "target_parameters"}
"""Those of them that DynLoraCallback accepts with a stock LoraConfig."""


DYNLORA = extended_peft_type("DYNLORA")


_SettingsFields: Any = dataclasses.make_dataclass(
    "_SettingsFields",
    [(f.name, f.type, field(default=None)) for f in dataclasses.fields(Settings)],
)
"""The knobs of a run as optional fields, so that they are declared in Settings alone."""


@dataclass
class DynLoraConfig(_SettingsFields, LoraConfig):  # type: ignore[misc]  # peft is untyped
    """The paper's parametrisation: a gate in front of every rank-one component, ΔW = s · Σᵢ cᵢ bᵢ aᵢᵀ.

    A module starts with ``init_r`` components; training prunes the least important ones of the whole
    model until ``target_r`` per module are left on average. All other fields are LoraConfig's, with
    their meaning there; ``rank_pattern`` sets initial ranks, 0 in the config that is saved with a module
    that fell to rank 0. ``r`` is ``init_r``.

    All fields of ``dynlora.allocation.Settings`` are fields here; ``target_r`` is 8 if not given.

    Any stock ``LoraConfig`` can be trained in the same way without gates: give the settings to
    DynLoraCallback or RankAllocator instead.

    Args:
        init_r: components per adapted module at the start; ceil(1.5 · target_r) if not given, 16 with
            ``target_r="auto"``.
        init: ``lora``, the default, starts as LoRA does, A by its Kaiming and B = 0, with gates of 1, and
            trains at LoRA's learning rates. ``kaiming`` is the official code's (a = 0 for A and B: B's
            elements have the variance 2 / init_r, hundreds of times A's), with gates of 0.
        init_std: a number draws A and B from N(0, init_std²), with gates of 0; None leaves it to ``init``.
        preset: ``paper`` for the paper's values of the fields that are not given, ``init``,
            ``lora_alpha`` and ``lora_dropout`` included.

    Raises:
        ValueError: a rule is broken, ``r`` differs from ``init_r``, or a LoRA variant is asked for that
            has no gated form.

    Examples:
        >>> DynLoraConfig(target_r=4).init_r
        6
    """

    r: int = field(default=None, metadata={"help": "Components per module at the start: init_r."})  # type: ignore[assignment]  # filled in __post_init__
    lora_alpha: int = field(default=None, metadata={"help": "Scaling is lora_alpha / init_r."})  # type: ignore[assignment]  # likewise
    lora_dropout: float = field(default=None, metadata={"help": "Dropout of the adapter's input."})  # type: ignore[assignment]  # likewise
    adapter_class: ClassVar[Any] = None  # what a RankAllocator handles such an adapter with

    init_r: int | None = None
    init: Init = None  # type: ignore[assignment]  # likewise
    init_std: float | None = None
    preset: Literal["paper"] | None = None

    def __post_init__(self) -> None:
        """Fill in what is not given, check every rule, then let LoraConfig check its own."""
        if self.preset not in {None, "paper"}:
            raise ValueError(f"preset={self.preset!r} must be 'paper' or None.")
        for name, value in {**_DEFAULTS, **_PRESETS.get(self.preset or "", {})}.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.settings()
        self._check_ranks()
        self._check_start()
        self._check_variants()
        self.r = self.init_r  # type: ignore[assignment]  # set by _check_ranks
        super().__post_init__()
        self.peft_type = DYNLORA

    def settings(self) -> Settings:
        """The settings of the run that this config asks for."""
        return Settings(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Settings)})

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
        if (folder / CONFIG_FILE).is_file():
            checked_later = {f.name for f in dataclasses.fields(Settings)}
            hints = {k: v for k, v in get_type_hints(cls).items() if k not in checked_later}
            check_fields(read_config(folder), hints)
            stored = read_folder(folder)
        config: DynLoraConfig = super().from_pretrained(
            pretrained_model_name_or_path, subfolder=subfolder, **kwargs
        )
        if isinstance(config, DynLoraConfig):
            config.stored = stored
        return config

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Any:
        """Build a config from saved fields, without those that older versions had.

        Raises:
            ValueError: such a field has a value that is no longer supported.
        """
        for name, understood in _REMOVED.items():
            value = kwargs.pop(name, understood)
            if understood is not None and value != understood:
                raise ValueError(
                    f"{name}={value!r} was saved by an older dynlora and is no longer supported. Export "
                    "the adapter as a plain LoRA with the version that wrote it."
                )
        return super().from_peft_type(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Fields for adapter_config.json, without ``r``, which follows from ``init_r``."""
        return {key: value for key, value in super().to_dict().items() if key != "r"}

    def _check_ranks(self) -> None:
        if self.init_r is None:
            is_auto = self.target_r == "auto"
            self.init_r = _AUTO_START if is_auto else math.ceil(_EXPANSION * self.target_r)
        if not is_integer(self.init_r) or self.init_r < 1:
            raise ValueError(
                f"init_r={self.init_r!r} must be an integer of at least 1; leave it out for "
                "ceil(1.5 * target_r)."
            )
        if self.r is not None and self.r != self.init_r:
            raise ValueError(
                f"r={self.r} differs from init_r={self.init_r}. Leave r out: it is init_r, the rank at the "
                "start; target_r is the mean rank at the end."
            )
        for name, rank in (self.rank_pattern or {}).items():
            if not is_integer(rank) or rank < 0:  # 0 is a module that has lost all components
                raise ValueError(
                    f"rank_pattern={{{name!r}: {rank!r}}} must hold integers of at least 0; name a "
                    "module in exclude_modules to leave it out."
                )
        for name, alpha in (self.alpha_pattern or {}).items():
            if not is_number(alpha) or not alpha > 0:
                raise ValueError(
                    f"alpha_pattern={{{name!r}: {alpha!r}}} must hold numbers above 0, such as 8."
                )
        if not is_number(self.lora_alpha) or not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha={self.lora_alpha!r} must be a number above 0, such as 8.")
        if not is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ValueError(
                f"lora_dropout={self.lora_dropout!r} must be a number in [0, 1); 0 switches it off."
            )

        highest = max([self.init_r, *(self.rank_pattern or {}).values()])
        if self.target_r != "auto" and self.target_r > highest:
            raise ValueError(
                f"target_r={self.target_r} must not exceed init_r={self.init_r}: pruning only removes "
                "components. Lower target_r, raise init_r, or leave init_r out."
            )

    def _check_start(self) -> None:
        if self.init not in get_args(Init):
            raise ValueError(
                f"init={self.init!r} must be one of {', '.join(map(repr, get_args(Init)))}."
            )
        if self.init_std is not None and not (is_number(self.init_std) and self.init_std > 0):
            raise ValueError(
                f"init_std={self.init_std!r} must be a number above 0, such as 0.02, or None to start as "
                "init says."
            )

    def _check_variants(self) -> None:
        for name, reason in _REFUSED.items():
            if getattr(self, name, None):
                how = "with DynLoraCallback" if name in _ONLY_STOCK else "without dynlora"
                raise ValueError(
                    f"{name}={getattr(self, name)!r} cannot be combined with gates: {reason}. Leave "
                    f"{name} at its default, or train a peft.LoraConfig {how}."
                )
        if self.init_lora_weights not in (True, False):
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r} must be True or False: DynLoraConfig "
                "draws A and B itself. Choose how with init or init_std, or use peft.LoraConfig."
            )


def plain_lora_fields(config: DynLoraConfig) -> dict[str, Any]:
    """The fields that a finished adapter shares with LoraConfig, as keyword arguments for it."""
    own = {f.name for f in dataclasses.fields(DynLoraConfig)}
    shared = {f.name for f in dataclasses.fields(LoraConfig) if f.init and f.name in own}
    return {name: getattr(config, name) for name in shared - {"r", "peft_type"}}
