"""The generated apartment, the simulators and the demonstrations that all tests share."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from processes import run

FOLDER = pytest.StashKey[Path]()


def pytest_configure(config):
    # mani_skill reads the variable when any test module imports it, so the variable is set before
    # they are collected, and the folder is filled when a test first asks for it.
    config.stash[FOLDER] = Path(tempfile.mkdtemp(prefix="apartment-"))
    os.environ["MS_ASSET_DIR"] = str(config.stash[FOLDER] / "assets")
    # A shell's background job ignores Ctrl-C, and so would the programs that the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


def pytest_unconfigure(config):
    shutil.rmtree(config.stash[FOLDER])


@pytest.fixture(scope="session")
def assets(pytestconfig) -> Path:
    """The generated apartment of seed 0; MS_ASSET_DIR is this folder."""
    out = pytestconfig.stash[FOLDER] / "assets"
    run("-m", "household.assets", "--out", out)
    return out


@pytest.fixture(scope="session")
def recorded(assets, tmp_path_factory) -> Path:
    """A data folder: three episodes of closing the drawer, recorded by one worker."""
    out = tmp_path_factory.mktemp("recorded")
    flags = "--task set_table --subtask close --target kitchen_counter --episodes 3"
    assert "succeeded in 3/" in run("collect.py", *flags.split(), "--out", out)
    return out


@pytest.fixture(scope="session")
def recorded_by_mshab(recorded, tmp_path_factory) -> Path:
    """The folder of tests/mshab_recorder.py: five random steps, then the episodes of `recorded`."""
    out = tmp_path_factory.mktemp("mshab")
    demonstrations = recorded / "set_table/close/kitchen_counter.h5"
    # ManiSkill puts rgb and depth in the order of a set of strings; collect.py fixes the order for
    # its workers.
    run("tests/mshab_recorder.py", out, 5, demonstrations, PYTHONHASHSEED="0")
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
