"""What the oldest PEFT that pyproject.toml allows cannot do."""

from importlib.metadata import version

import pytest
from packaging.version import Version

saves_biases_of_layers = pytest.mark.skipif(
    Version(version("peft")) < Version("0.21"),
    reason="PEFT before 0.21 does not save what bias='lora_only' trains, and dynlora refuses it",
)
LORA_ONLY = pytest.param({"bias": "lora_only"}, marks=saves_biases_of_layers)
