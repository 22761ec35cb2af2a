"""The programs as a user starts them."""

import multiprocessing
import os
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
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


def wait_for(condition: Callable[[], object], process: subprocess.Popen, seconds=600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"{process.args}: ended early: {process.communicate()}"
        assert time.monotonic() < deadline, f"{process.args}: nothing happened in {seconds} s"
        time.sleep(0.02)


def smaller(line: str, flags: dict[str, str]) -> list[str]:
    """A printed command for two processes, with further flags of each program that it names."""
    program, *words = shlex.split(line.replace("=8", "=2"))
    launcher = ["-m", "torch.distributed.run"] if program == "torchrun" else []
    return [*launcher, *words, *(flag for word in words for flag in flags.get(word, "").split())]


def workers_of(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(c) for c in children if "spawn_main" in Path(f"/proc/{c}/cmdline").read_text()]


def enter(words: tuple[str, ...], folder: Path, output: str, environment: dict[str, str]) -> None:
    """Become a program: the body of `attempt`'s process."""
    os.chdir(folder)
    os.environ.update(environment)
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.argv = [*words]
    runpy.run_path(str(REPOSITORY / words[0]), run_name="__main__")


def attempt(*words: object, folder: Path, **environment: str) -> tuple[int, str]:
    """Exit code and output of a program, forked from a process that has imported torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "storage.pack", "policy"])
    output = folder / ".output"
    output.unlink(missing_ok=True)
    words = tuple(map(str, words))
    process = context.Process(target=enter, args=(words, folder, str(output), environment))
    process.start()
    process.join(120)
    return process.exitcode, output.read_text()
