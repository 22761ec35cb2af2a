"""The programs as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def start(
    *command, cwd: Path = REPOSITORY, output=subprocess.PIPE, **environment: str
) -> subprocess.Popen:
    """Start a program with its flags, in a process group of its own; `output` may be a file."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
        stdout=output,
        stderr=output,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, code: int = 0, seconds: float = 600) -> str:
    """What a program prints that ends with `code`, and without a traceback."""
    stdout, stderr = process.communicate(timeout=seconds)
    assert process.returncode == code and "Traceback" not in stderr, stderr
    return stdout + stderr


def run(*command, code: int = 0, **options) -> str:
    return finish(start(*command, **options), code)


def workers_of(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(c) for c in children if "spawn_main" in Path(f"/proc/{c}/cmdline").read_text()]
