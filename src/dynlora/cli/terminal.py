"""What commands share: quiet libraries, one-line errors, exit codes."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

USER_MISTAKE, FAILED, INTERRUPTED = 2, 1, 130  # exit codes


NOISY = ("torchao", "bitsandbytes", "torch.utils._pytree")


def quiet_imports() -> None:
    """No lines of libraries that say at import what they could not load, though nobody asked for it."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """No load reports, progress bars and hints of other libraries between our lines."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # else it warns when we start a process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between libraries, not for our user
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()


def report_error(error: BaseException, *, code: int, debug: bool) -> int:
    """Print ``error`` as one line, or raise it with ``debug``; gives ``code`` back."""
    if debug:
        raise error
    print_error(str(error))
    return code


def print_error(message: str) -> None:
    """One line on stderr."""
    line = " ".join(message.split())
    Console(stderr=True, soft_wrap=True).print(
        Text("dynlora: ", style="bold red") + Text(line), soft_wrap=True
    )
