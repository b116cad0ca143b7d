"""What every test starts from: fixed seeds and an eager, quiet transformers."""

import pytest
from hypothesis import settings
from transformers import set_seed

settings.register_profile("any-machine", deadline=None)  # a busy one is slow, not wrong
settings.load_profile("any-machine")


@pytest.fixture(autouse=True)
def _seeds():
    set_seed(0)
