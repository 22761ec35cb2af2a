"""The generated apartment that all tests share."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FOLDER = pytest.StashKey[Path]()


def pytest_configure(config):
    # mani_skill reads the variable once, at its import, which may be that of any test module: so it
    # is set before they are collected, and the folder is filled when a test first asks for it.
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
