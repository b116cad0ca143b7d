"""What every test starts from: fixed seeds and an eager, quiet transformers."""

import pytest
import torch
from hypothesis import settings
from packaging.version import Version
from transformers import set_seed

# torch's process group of threads is internal, and was tried with this version first
collect_ignore = (
    ["test_ranks_in_threads.py"] if Version(torch.__version__) < Version("2.13") else []
)

settings.register_profile("any-machine", deadline=None)  # a busy one is slow, not wrong
settings.load_profile("any-machine")


@pytest.fixture(autouse=True)
def _seeds():
    set_seed(0)
