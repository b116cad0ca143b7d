"""Start of the command ``dynlora``: commands that only read files do not wait for torch and PEFT.

``import dynlora`` registers the method with PEFT, which takes seconds. For the commands below the package
is put in place without running its ``__init__``; their modules are those that never need it.
"""

import importlib.util
import logging
import sys

LIGHT = frozenset({"inspect", "report", "watch", "--help", "-h", "--version"})

NOISY = ("torchao", "bitsandbytes", "torch.utils._pytree")
for name in NOISY:  # they tell at import what they could not load, even where nobody asked for it
    logging.getLogger(name).setLevel(logging.CRITICAL)


def main() -> None:
    """Entry point of ``dynlora``."""
    if set(sys.argv[1:2]) <= LIGHT:
        _place_package()
    from dynlora.cli.main import main as run

    run()


def _place_package() -> None:
    spec = importlib.util.find_spec("dynlora")
    if spec is not None:
        sys.modules["dynlora"] = importlib.util.module_from_spec(spec)
