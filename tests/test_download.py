"""`data.py download` as a user starts it: the hub's real client, a server of its protocol."""

import os
import signal
from pathlib import Path

import pytest
from files import write_demos
from hub_server import Hub
from processes import finish, start

from paper import HUB_DATASETS
from storage.h5 import Demonstrations

CLOSE = ["close/fridge.h5", "close/fridge.json"]


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """Two of SetTable's targets, one of TidyHouse's; MS-HAB's files lack our labels."""
    folder = tmp_path_factory.mktemp("released")
    names = ("set_table/close/fridge", "set_table/pick/024_bowl", "tidy_house/pick/024_bowl")
    for seed, name in enumerate(names):
        write_demos(folder / name, lengths=(9,), labels=False, seed=seed)
    return folder


@pytest.fixture
def hub(released):
    served = {task: {"README.md": b"card"} for task in ("set_table", "tidy_house")}
    for path in sorted(released.rglob("*.*")):
        task, name = str(path.relative_to(released)).split("/", 1)
        served[task][name] = path.read_bytes()
    with Hub({HUB_DATASETS[task]: files for task, files in served.items()}) as server:
        yield server


def download(out: Path, flags: str, endpoint: str, **environment: str):
    hub = dict(HF_ENDPOINT=endpoint, HF_HOME=str(out.parent / "hf-home"), HF_HUB_OFFLINE="0")
    hub["HF_HUB_DOWNLOAD_TIMEOUT"] = "20"
    return start("data.py", "download", "--out", out, *flags.split(), **hub | environment)


def test_what_is_asked_for_arrives_in_the_layout_that_is_read(hub, released, tmp_path):
    out = tmp_path / "data"
    flags = "--tasks set_table tidy_house --targets 024_bowl"
    shown = finish(download(out, flags, hub.url))
    names = ["set_table/pick/024_bowl", "tidy_house/pick/024_bowl"]
    files = [f"{name}.{kind}" for name in names for kind in ("h5", "json")]
    assert sorted(str(p.relative_to(out)) for p in out.glob("*/*/*.*")) == sorted(files)
    assert len(hub.fetched) == 4 and all(name in shown for name in files)
    total = sum((released / name).stat().st_size for name in files)
    assert f"{total / 1e6:.1f} MB  to fetch" in shown
    source, original = Demonstrations(out), Demonstrations(released)
    assert len(source.episodes) == 2 and source.instructions == ["pick up the bowl"]
    assert (source.read_episode(1)["rgb"] == original.read_episode(2)["rgb"]).all()


def test_a_killed_download_goes_on_without_what_is_whole(hub, released, tmp_path):
    out, flags = tmp_path / "data", "--tasks set_table --workers 1"
    hub.stalled = {"pick/024_bowl.h5"}
    process = download(out, flags, hub.url)
    assert hub.halfway.wait(60), finish(process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    whole = [str(path.relative_to(out / "set_table")) for path in out.glob("*/*/*.*")]
    assert sorted(whole) == CLOSE and list(out.rglob("*.incomplete"))

    hub.stalled.clear()
    hub.fetched.clear()
    shown = finish(download(out, flags, hub.url))
    assert hub.fetched == ["pick/024_bowl.h5", "pick/024_bowl.json"]
    assert not list(out.rglob("*.incomplete")) and "set_table/close/fridge.h5  there" in shown
    for path in (released / "set_table").rglob("*.*"):
        assert (out / path.relative_to(released)).read_bytes() == path.read_bytes()


def test_a_disk_that_fills_up_meanwhile_is_no_traceback(hub, small_disk, tmp_path):
    hub.repositories[HUB_DATASETS["set_table"]]["close/fridge.h5"] = bytes(1_500_000)
    hub.stalled = {"close/fridge.h5"}
    flags = "--tasks set_table --subtasks close --workers 1"
    process = download(small_disk / "data", flags, hub.url, HF_HOME=str(tmp_path))
    assert hub.halfway.wait(60), finish(process)
    (small_disk / "ballast").write_bytes(bytes(1_000_000))
    hub.stalled.clear()
    assert "No space left on device" in finish(process, code=1)


def test_a_dry_run_shows_the_sizes_and_an_unknown_target_is_named(hub, released, tmp_path):
    shown = finish(download(tmp_path / "data", "--tasks set_table --dry-run", hub.url))
    size = (released / "set_table/close/fridge.h5").stat().st_size / 1e6
    assert f"{size:.1f} MB  set_table/close/fridge.h5" in shown and "MB free in" in shown
    flags = "--tasks set_table --subtasks close --targets fridge 013_apple"
    shown = finish(download(tmp_path / "data", flags, hub.url), code=1)
    assert "the hub has no ['013_apple']" in shown and hub.fetched == []


def test_a_refused_file_is_named_with_the_login_and_no_way_to_the_hub_is_a_sentence(hub, tmp_path):
    hub.refused = {"pick/024_bowl.h5"}
    shown = finish(download(tmp_path / "data", "--tasks set_table", hub.url), code=1)
    assert "arth-shukla/MS-HAB-SetTable" in shown and "pick/024_bowl.h5" in shown
    assert "hf auth login" in shown and "The same command resumes" in shown
    offline = download(tmp_path / "data", "--tasks set_table", hub.url, HF_HUB_OFFLINE="1")
    assert "unset the `HF_HUB_OFFLINE`" in finish(offline, code=1)
    unreachable = download(tmp_path / "data", "--tasks set_table", "http://127.0.0.1:9")
    assert "not available from the hub" in finish(unreachable, code=1)
