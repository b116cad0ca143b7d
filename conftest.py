"""What every test of library and lab starts from: fixed seeds, and no deadlines."""

import gc
from importlib.metadata import version

import pytest
from hypothesis import settings
from packaging.version import Version
from transformers import set_seed

settings.register_profile("any-machine", deadline=None)  # a busy one is slow, not wrong
settings.load_profile("any-machine")

# torch's process group of threads is internal, and was tried with this version first
collect_ignore = (
    ["tests/allocator/test_ranks_in_threads.py", "lab/tests/tasks/test_interrupt_in_threads.py"]
    if Version(version("torch")) < Version("2.13")
    else []
)
collect_ignore += [  # need axolotl and vLLM, which nothing here installs; have no doctests
    "src/dynlora/integrations/axolotl.py",
    "tests/helpers/worker_vllm.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Several models of one shape live side by side in tests, which looks like copies of one."""
    for item in items:
        item.add_marker(
            pytest.mark.filterwarnings("ignore:.*tensors outside the model:UserWarning")
        )


def pytest_collection_finish() -> None:
    """What was imported is never garbage: half a million objects, a second to look through.

    Each run of Trainer asks for a collection, and Python makes some of its own.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeds() -> None:
    set_seed(0)
