"""What the oldest PEFT that pyproject.toml allows cannot do."""

from importlib.metadata import version

import pytest
from packaging.version import Version

IS_OLDER = Version(version("peft")) < Version("0.21")

saves_biases_of_layers = pytest.mark.skipif(
    IS_OLDER,
    reason="PEFT before 0.21 does not save what bias='lora_only' trains, and dynlora refuses it",
)
LORA_ONLY = pytest.param({"bias": "lora_only"}, marks=saves_biases_of_layers)
SVD = pytest.param(
    "svd", marks=pytest.mark.xfail(IS_OLDER, reason="PEFT before 0.21 applies the scaling twice")
)
