"""What commands share: quiet libraries, one-line errors, exit codes."""

import contextlib
import functools
import inspect
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from dynlora.errors import VerificationError

USER_MISTAKE, FAILED, INTERRUPTED = 2, 1, 130  # exit codes

NOISY = ("torchao", "bitsandbytes", "torch.utils._pytree")


def flag(name: str, text: str) -> Any:
    """An option without a value."""
    return typer.Option(name, metavar="", help=text)


Json = Annotated[bool, flag("--json", "Print one JSON object.")]
Debug = Annotated[bool, flag("--debug", "Show the traceback of an error.")]

_DEBUG = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)


def guarded(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with the option ``--debug``; without it, an error is one line on stderr and an exit code."""

    @functools.wraps(verb)
    def run(*, debug: bool, **options: Any) -> None:
        try:
            verb(**options)
        except ModuleNotFoundError as error:
            if debug:
                raise
            print_error(f"this needs {error.name}; pip install 'dynlora[report]'")
            raise typer.Exit(USER_MISTAKE) from error
        except (ValueError, OSError, VerificationError) as error:
            code = FAILED if isinstance(error, VerificationError) else USER_MISTAKE
            raise typer.Exit(report_error(error, code=code, debug=debug)) from error

    signature = inspect.signature(verb)
    parameters = [*signature.parameters.values(), _DEBUG]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # read by typer
    run.__annotations__ = {**verb.__annotations__, "debug": Debug}
    return run


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


def print_json(content: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(content, indent=2, default=str) + "\n")
