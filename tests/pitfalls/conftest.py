"""Two models of one shape live side by side in these tests, which looks like a copy that is averaged."""

from pathlib import Path

import pytest

ANOTHER_MODEL = "ignore:.*tensors outside the model:UserWarning"


def pytest_collection_modifyitems(items):
    """Let the other model be."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings(ANOTHER_MODEL))
