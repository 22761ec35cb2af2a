"""The generated apartment and the simulators that all tests share."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FOLDER = pytest.StashKey[Path]()


def pytest_configure(config):
    # mani_skill reads the variable when any test module imports it, so the variable is set before
    # they are collected, and the folder is filled when a test first asks for it.
    config.stash[FOLDER] = Path(tempfile.mkdtemp(prefix="apartment-"))
    os.environ["MS_ASSET_DIR"] = str(config.stash[FOLDER] / "assets")
    # A shell's background job ignores Ctrl-C, and so would the programs that the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config):
    shutil.rmtree(config.stash[FOLDER])


@pytest.fixture(scope="session")
def assets(pytestconfig) -> Path:
    """The generated apartment of seed 0; MS_ASSET_DIR is this folder."""
    out = pytestconfig.stash[FOLDER] / "assets"
    command = [sys.executable, "-m", "household.assets", "--out", str(out)]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    return out


@pytest.fixture(scope="session")
def simulator(assets) -> Iterator[Callable]:
    """simulator(task, subtask, target, split, obs_mode=..., number=0): made once, then shared."""
    from simulation.env import SubtaskEnvs  # here: most tests need no simulator

    made = []

    @cache
    def get(*address, obs_mode: str = "state_dict", number: int = 0) -> SubtaskEnvs:
        made.append(SubtaskEnvs(*address, obs_mode=obs_mode))
        return made[-1]

    yield get
    for envs in made:
        envs.close()


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A pack of six demonstrations, which lie in demos/ beside it."""
    from tiny_run import write_pack

    return write_pack(tmp_path_factory.mktemp("data"))


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A real file system of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)
