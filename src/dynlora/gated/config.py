"""DynLoraConfig: PEFT's LoraConfig with a rank budget instead of a rank, and its PeftType."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_type_hints

from peft import LoraConfig

from dynlora._private import extended_peft_type
from dynlora.adapter_files.format import CONFIG_FILE, VARIANTS, with_dead_excluded
from dynlora.allocation import PAPER, Settings
from dynlora.allocation.settings import check_rules, is_integer, is_number
from dynlora.gated.stored import read_folder
from dynlora.lora.adapter import refuse_variants

Init = Literal["kaiming", "lora"]

_AUTO_START = 16
_EXPANSION = 1.5  # initial over final budget in all runs of the paper (appendix E)
_SETTINGS = {f.name: f.default for f in dataclasses.fields(Settings)}
_DEFAULTS: dict[str, Any] = {
    **_SETTINGS, "target_r": 8, "init": "lora", "lora_alpha": 8, "lora_dropout": 0.0
}  # fmt: skip
_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {**PAPER, "init": "kaiming", "lora_alpha": 8, "lora_dropout": 0.1}
}
"""Fields are None until they are filled from a preset and these, so that a value given always stays."""

_NO_GATES = {
    "lora_bias": "a bias in B belongs to no rank-one component",
    "target_parameters": "bare parameters have no LoRA layer that could hold gates",
    "megatron_config": "an adapter's folder must not choose which code is imported",
}

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
    model until ``target_r`` per module are left on average. All fields of
    ``dynlora.allocation.Settings`` are fields here, ``target_r`` is 8 if not given. The others are
    LoraConfig's, with their meaning there; ``rank_pattern`` sets initial ranks. ``r`` is ``init_r``.

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
        if self.init_r is None:
            is_auto = self.target_r == "auto"
            self.init_r = _AUTO_START if is_auto else math.ceil(_EXPANSION * self.target_r)
        check_rules(self._rules())
        refuse_variants(self, VARIANTS)
        refuse_variants(
            self, _NO_GATES, beside="gates", instead="train a LoraConfig with DynLoraCallback"
        )
        self.r = self.init_r
        super().__post_init__()
        self.peft_type = DYNLORA

    def settings(self) -> Settings:
        """The settings of the run that this config asks for."""
        return Settings(**{name: getattr(self, name) for name in _SETTINGS})

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
            hints = {k: v for k, v in get_type_hints(cls).items() if k not in _SETTINGS}
            stored = read_folder(folder, hints)
        config: DynLoraConfig = super().from_pretrained(
            pretrained_model_name_or_path, subfolder=subfolder, **kwargs
        )
        if isinstance(config, DynLoraConfig):
            config.stored = stored
        return config

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Any:
        """A config of its saved fields, those of an earlier version too."""
        return super().from_peft_type(**with_dead_excluded(kwargs))

    def to_dict(self) -> dict[str, Any]:
        """Fields for adapter_config.json, without ``r``, which follows from ``init_r``."""
        return {key: value for key, value in super().to_dict().items() if key != "r"}

    def _rules(self) -> Iterator[tuple[bool, str]]:
        rank: Any = self.init_r
        yield (
            is_integer(rank) and rank >= 1,
            f"init_r={rank!r} must be an integer of at least 1; leave it out for ceil(1.5 * target_r).",
        )
        yield (
            self.r is None or self.r == rank,
            f"r={self.r} differs from init_r={rank}. Leave r out: it is init_r, the rank at the start; "
            "target_r is the mean rank at the end.",
        )
        for name, value in (self.rank_pattern or {}).items():
            yield (
                is_integer(value) and value >= 1,
                f"rank_pattern={{{name!r}: {value!r}}} must hold integers of at least 1; name a module in "
                "exclude_modules to leave it out.",
            )
        alphas = {"lora_alpha": self.lora_alpha}
        alphas |= {f"alpha_pattern[{n!r}]": v for n, v in (self.alpha_pattern or {}).items()}
        for name, value in alphas.items():
            yield (
                is_number(value) and value > 0,
                f"{name}={value!r} must be a number above 0, such as 8.",
            )
        yield (
            is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1,
            f"lora_dropout={self.lora_dropout!r} must be a number in [0, 1); 0 switches it off.",
        )
        yield (
            self.target_r == "auto"
            or self.target_r <= max(rank, *(self.rank_pattern or {"": 0}).values()),
            f"target_r={self.target_r} must not exceed init_r={rank}: pruning only removes components. "
            "Lower target_r, raise init_r, or leave init_r out.",
        )
        yield (
            self.init in get_args(Init),
            f"init={self.init!r} must be one of {', '.join(map(repr, get_args(Init)))}.",
        )
        yield (
            self.init_std is None or (is_number(self.init_std) and self.init_std > 0),
            f"init_std={self.init_std!r} must be a number above 0, such as 0.02, or None to start as init "
            "says.",
        )
        yield (
            self.init_lora_weights in (True, False),
            f"init_lora_weights={self.init_lora_weights!r} must be True or False: DynLoraConfig draws A "
            "and B itself. Choose how with init or init_std, or use peft.LoraConfig.",
        )
