"""What every test starts from: fixed seeds and an eager, quiet transformers."""

import pytest
from transformers import set_seed


@pytest.fixture(autouse=True)
def _seeds():
    set_seed(0)
