"""What every program has in common: how its flags are read and checked, and how it ends.

with user_errors():
    main(cli(CollectConfig, description=__doc__))
"""

import errno
import functools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import get_args, get_type_hints

import tyro

from config import InputError, Range

# What a full disk, a read-only one, or missing permissions raise.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def user_errors() -> Iterator[None]:
    """The end of every program: a foreseeable error is one line on stderr, without a traceback.

    Exit codes: 1 after an InputError or an error of a file or disk, 130 after Ctrl-C, 141 if the
    reader of stdout has gone (`| head`).
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115  None: closed by `>&-`
        # Paths print in every locale, and a log file shows each line at once.
        stream.reconfigure(encoding="utf-8", errors="surrogateescape", line_buffering=True)
        setattr(sys, name, stream)
    try:
        try:
            for flag, word in zip(sys.argv, sys.argv[1:]):
                if not word or (word.startswith("--") and word.endswith("=")):
                    raise InputError(f"{word or flag} has an empty value: is a variable not set?")
            yield
        finally:
            for child in multiprocessing.active_children():  # loaders ignore Python's own SIGTERM
                child.kill()
            sys.stdout.flush()
    except InputError as error:
        # A DataLoader worker's message follows its traceback.
        text = str(error).strip()
        if "DataLoader worker" in text:
            text = text.splitlines()[-1].partition("Error: ")[2]
        raise SystemExit(f"error: {text}") from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it again
        raise SystemExit(141) from None
    except KeyboardInterrupt:
        print("stopped by Ctrl-C: finished files are kept", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        if error.errno is None:
            raise
        disk = error.errno in DISK_ERRORS
        mend = "Free space or change the permissions" if disk else "Mend or move this file"
        raise SystemExit(
            f"error: {error}. Finished files are kept. {mend}, then give the same command again"
        ) from None


def cli(program: Callable | dict[str, Callable], **options) -> object:
    """tyro's cli of a config class, a function or {verb: function}; then checks every Range."""
    if isinstance(program, dict):
        verbs = {name: checked(verb) for name, verb in program.items()}
        return tyro.extras.subcommand_cli_from_dict(verbs, **options)
    if not is_dataclass(program):
        return tyro.cli(checked(program), **options)
    config = tyro.cli(program, **options)
    check_ranges(vars(config), program)
    return config


def checked(function: Callable) -> Callable:
    @functools.wraps(function)
    def run(*args, **values):
        check_ranges(values, function)
        return function(*args, **values)

    return run


def check_ranges(values: dict, annotated: Callable, prefix: str = "--") -> None:
    """Raise InputError, naming the flag, for a number outside the Range of its annotation."""
    hints = get_type_hints(annotated, include_extras=True)
    for name, value in values.items():
        flag, limit = prefix + name.replace("_", "-"), range_of(hints[name])
        if is_dataclass(value):
            check_ranges(vars(value), type(value), f"{flag}.")
        for each in value if isinstance(value, tuple) else (value,):
            if limit and isinstance(each, int | float) and not limit.holds(each):
                raise InputError(f"{flag} {each}: expected {limit.text}")


def range_of(annotation: object) -> Range | None:
    """The Range in an annotation, also inside of a union or a tuple."""
    for inner in get_args(annotation):
        if found := inner if isinstance(inner, Range) else range_of(inner):
            return found
    return None
