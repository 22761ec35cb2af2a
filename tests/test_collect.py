"""Collecting demonstrations: MS-HAB's layout, the same for any number of workers, nothing lost."""

import errno
import io
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from processes import start

from collect import CollectConfig, main
from config import InputError
from storage.recording import Recording, encode

EPISODES = 3
TARGET = ("set_table", "close", "kitchen_counter")


def collect(out: Path, workers: int = 1) -> subprocess.Popen:
    flags = "--expert scripted --task set_table --subtask close --target kitchen_counter"
    flags += f" --episodes {EPISODES} --workers {workers}"
    return start("collect.py", *flags.split(), "--out", out)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """The output of a run that ends with `code`."""
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == code, stderr
    return stdout + stderr


def h5_of(out: Path) -> Path:
    return out / "set_table/close/kitchen_counter.h5"


def contents(path: Path) -> dict:
    """Every dataset of an h5, and the json beside it."""
    found = {"json": json.loads(path.with_suffix(".json").read_text())}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, x: found.update({name: x[:]}) if isinstance(x, h5py.Dataset) else None
        )
    return found


def assert_same(ours: Path, theirs: Path):
    ours, theirs = contents(ours), contents(theirs)
    assert ours.keys() == theirs.keys() and ours.pop("json") == theirs.pop("json")
    for key, array in ours.items():
        assert array.shape == theirs[key].shape
        assert np.array_equal(array, theirs[key]), key


def layout(group: h5py.Group, steps: int) -> list[tuple]:
    """Path, type, shape (T: actions), compression of every dataset, in the order of creation."""
    rows = []
    for key, item in group.items():
        if isinstance(item, h5py.Group):
            rows += [(f"{key}/{row[0]}", *row[1:]) for row in layout(item, steps)]
        else:
            frames = {steps: "T", steps + 1: "T + 1"}[len(item)]
            rows.append(
                (key, item.dtype, frames, *item.shape[1:], item.compression, item.compression_opts)
            )
    return rows


@pytest.fixture(scope="module")
def reference(assets, tmp_path_factory) -> Path:
    """An uninterrupted run of one worker."""
    out = tmp_path_factory.mktemp("reference")
    assert f"succeeded in {EPISODES}/" in finish(collect(out))
    return h5_of(out)


@pytest.fixture(scope="module")
def recorder(reference, tmp_path_factory) -> tuple[Path, dict]:
    """The h5 of MS-HAB's own recorder, and the steps at which the reference's actions succeed."""
    folder = tmp_path_factory.mktemp("mshab")
    # ManiSkill puts rgb and depth in the order of a set of strings; collect.py fixes it for its
    # workers.
    process = start("tests/mshab_recorder.py", folder, 5, reference, PYTHONHASHSEED="0")
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return folder / "mshab.h5", json.loads(stdout.splitlines()[-1])


def test_tree_and_json_are_those_of_mshabs_own_recorder(reference, recorder):
    ours, theirs = (
        json.loads(path.with_suffix(".json").read_text()) for path in (reference, recorder[0])
    )
    first = ours["episodes"][0]
    with h5py.File(reference) as file, h5py.File(recorder[0]) as mshabs:
        rows = layout(file["traj_0"], first["elapsed_steps"])
        expected = layout(mshabs["traj_0"], 5)
    assert [row for row in rows if not row[0].startswith("labels/")] == expected
    assert theirs.keys() <= ours.keys()
    assert theirs["env_info"].keys() == ours["env_info"].keys()
    assert theirs["env_info"]["env_kwargs"].keys() == ours["env_info"]["env_kwargs"].keys()
    assert theirs["episodes"][0].keys() | {"subtask_uid", "instruction", "seed"} <= first.keys()
    assert len(ours["action_schema"]) == 13 and len(ours["qpos_names"]) == 12


def test_the_labels_cover_every_frame(reference):
    with h5py.File(reference) as file:
        for trajectory in file.values():
            frames = len(trajectory["actions"]) + 1
            pos, seg = trajectory["labels/pos"], trajectory["labels/seg"]
            assert pos.shape == (frames, 2) and pos.dtype == np.float32
            assert np.isfinite(pos[:]).all() and np.ptp(pos[:], axis=0).max() > 0.1  # it drove
            for camera in ("fetch_head", "fetch_hand"):
                assert seg[camera].shape == (frames, 128, 128) and seg[camera].dtype == bool
            assert seg["fetch_head"][0].any()  # the drawer is in view at the start
            assert np.ptp(seg["fetch_head"][:].sum((1, 2))) > 0


def test_recorded_actions_are_in_range_and_succeed_again_from_the_seed(reference, recorder):
    with h5py.File(reference) as file:
        for name, trajectory in file.items():
            actions, success = trajectory["actions"][:], trajectory["success"][:]
            assert np.isfinite(actions).all() and np.abs(actions).max() <= 1
            assert success.nonzero()[0].tolist() == [len(actions) - 1]  # it ends at success
            assert recorder[1][name.removeprefix("traj_")] == [len(actions) - 1]


def test_a_killed_run_of_two_workers_goes_on_to_what_one_worker_records(reference, tmp_path):
    parts = h5_of(tmp_path).with_suffix(".parts")
    process = collect(tmp_path, workers=2)
    while not list(parts.glob("*.part")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    _, stderr = process.communicate(timeout=60)  # ends with the last worker, which holds the pipe
    assert "Traceback" not in stderr
    kept = {part: part.stat().st_mtime_ns for part in parts.glob("*.part")}
    assert 0 < len(kept) < EPISODES and not h5_of(tmp_path).exists()

    process = collect(tmp_path, workers=1)
    while process.poll() is None and parts.exists():
        times = {part: part.stat().st_mtime_ns for part in kept if part.exists()}
        assert times == {part: kept[part] for part in times}  # none is repeated
        time.sleep(0.01)
    assert f"succeeded in {EPISODES}/" in finish(process)
    assert_same(h5_of(tmp_path), reference)
    assert not parts.exists()


def test_asking_again_does_nothing(reference, capsys):
    before = reference.read_bytes()
    main(CollectConfig(*TARGET, reference.parents[2], EPISODES))
    assert "already there" in capsys.readouterr().out and reference.read_bytes() == before


def test_what_was_recorded_succeeds_again_where_its_plans_are_named(assets, reference, tmp_path):
    folder = shutil.copytree(reference.parents[2], tmp_path / "my data")
    command = ("-m", "tools.replay", "--data", folder, "--episodes", 1)
    expected = "success, here: success; joints differ by up to 0\n1 of 1 recorded successes"
    assert expected in finish(start(*command))
    sidecar = folder / "set_table/close/kitchen_counter.json"
    sidecar.write_text(sidecar.read_text().replace("subtask_uid", "uid"))
    message = finish(start(*command), code=1)
    assert "subtask_uid is None, expected" in message and "Traceback" not in message


def test_episodes_of_another_apartment_are_not_added_to_a_file(
    assets, reference, tmp_path, monkeypatch
):
    shutil.copytree(reference.parents[2], tmp_path / "data")
    other = shutil.copytree(assets, tmp_path / "other")
    (other / "household.json").write_text((assets / "household.json").read_text() + " ")
    monkeypatch.setenv("MS_ASSET_DIR", str(other))
    with pytest.raises(InputError, match=r"has episodes of \{"):
        main(CollectConfig(*TARGET, tmp_path / "data", episodes=9))
    assert_same(h5_of(tmp_path / "data"), reference)


def test_a_target_of_another_task_is_refused():
    with pytest.raises(InputError, match=r"--target 024_bowl: .*\('fridge', 'kitchen_counter'\)"):
        CollectConfig("set_table", "close", "024_bowl")


# --- Files that grow, without a simulator ---

RECIPE = {"expert": "scripted", "split": "train", "seed": 0}


def recording(folder: Path) -> Recording:
    made = Recording(folder, "fridge", RECIPE)
    made.start()
    return made


def part(seed: int, frames: int = 3) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (frames, 128, 128, 3), np.uint8)
    return encode({"obs": [{"rgb": image} for image in noise]}, {"env_info": {}}, {"seed": seed})


def record(folder: Path, outcomes: dict[int, bool]) -> Recording:
    growing = recording(folder)
    for seed, success in outcomes.items():
        growing.add(seed, success, 200, part(seed))
    return growing


def seeds_in(folder: Path) -> list[int]:
    """The seeds in the json, in order; every trajectory must be the one of its seed."""
    episodes = json.loads((folder / "fridge.json").read_text())["episodes"]
    with h5py.File(folder / "fridge.h5") as file:
        assert len(file) == len(episodes)
        for episode in episodes:
            with h5py.File(io.BytesIO(part(episode["seed"]))) as expected:
                rgb = file[f"traj_{episode['episode_id']}/obs/rgb"][:]
                np.testing.assert_array_equal(rgb, expected["traj_0/obs/rgb"][:])
    return [episode["seed"] for episode in episodes]


def test_the_first_successes_in_seed_order_are_kept_whoever_is_faster(tmp_path):
    growing = record(tmp_path, {0: True, 3: True, 2: False})
    assert growing.next_seeds([1], episodes=2, number=1) == []  # 1 may yet be the second
    assert growing.next_seeds([1], episodes=3, number=1) == []
    again = recording(tmp_path)
    assert again.done == {0: True, 3: True, 2: False}
    assert again.next_seeds([], episodes=3, number=1) == [1]  # the gap that a kill left
    again.add(1, False, 200, b"")
    assert again.next_seeds([], episodes=2, number=1) == []  # 0 and 3
    assert again.next_seeds([], episodes=3, number=1) == [4]
    assert again.next_seeds([4], episodes=5, number=4) == [5, 6]  # no more than are wanted
    assert again.next_seeds([], episodes=9, number=2) == [4, 5]


def test_asking_for_more_adds_to_the_file(tmp_path):
    record(tmp_path, {0: True, 1: False, 2: True}).merge()
    assert seeds_in(tmp_path) == [0, 2]
    with pytest.raises(InputError, match="choose another --out"):
        Recording(tmp_path, "fridge", RECIPE | {"seed": 5})
    more = recording(tmp_path)
    assert more.next_seeds([], episodes=2, number=1) == []
    assert more.next_seeds([], episodes=3, number=1) == [3]
    more.add(3, True, 90, part(3))
    more.merge()
    assert seeds_in(tmp_path) == [0, 2, 3]
    assert recording(tmp_path).done == {0: True, 1: False, 2: True, 3: True}


def test_a_kill_before_the_parts_were_removed_repeats_nothing(tmp_path):
    growing = record(tmp_path, {0: True, 1: True})
    left = {path.name: path.read_bytes() for path in growing.parts.iterdir()}
    growing.merge()
    growing.parts.mkdir()
    for name, content in left.items():
        (growing.parts / name).write_bytes(content)
    again = Recording(tmp_path, "fridge", RECIPE)
    assert again.done == {0: True, 1: True} and not again.parts.exists()


def test_a_line_cut_off_by_a_full_disk_is_attempted_again(tmp_path):
    growing = record(tmp_path, {0: False, 1: False})
    growing.attempts.write_text(growing.attempts.read_text()[:-5])
    again = recording(tmp_path)
    assert again.done == {0: False}
    again.add(1, False, 200, b"")
    assert recording(tmp_path).done == {0: False, 1: False}


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda h5: h5.with_suffix(".json").unlink(), "no fridge.json"),
        (lambda h5: h5.unlink(), "fridge.h5 and fridge.json are not both complete"),
        (lambda h5: os.truncate(h5, 1000), "not both complete.*truncated"),
        (lambda h5: os.truncate(h5.with_suffix(".json"), 100), "not both complete"),
    ],
)
def test_half_of_a_pair_is_refused_and_not_replaced(tmp_path, damage, message):
    record(tmp_path, {0: True, 1: True}).merge()
    damage(tmp_path / "fridge.h5")
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=message):
        recording(tmp_path)
    assert left == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_an_h5_that_a_kill_left_before_its_json_is_made_again(tmp_path):
    growing = record(tmp_path, {0: True})
    (tmp_path / "fridge.h5").write_bytes(b"complete, but not counted yet")
    recording(tmp_path).merge()
    assert growing.done == {0: True} and seeds_in(tmp_path) == [0]


def test_a_full_disk_leaves_finished_episodes_and_nothing_half_written(small_disk):
    growing = record(small_disk, {0: True, 1: True, 2: True})  # 147 kB each
    with pytest.raises(OSError, match="No space left") as error:
        growing.add(3, True, 200, part(3, frames=40))
    assert error.value.errno == errno.ENOSPC
    names = {"attempts.jsonl", "00000000.part", "00000001.part", "00000002.part"}
    assert {path.name for path in growing.parts.iterdir()} == names

    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1_200_000))
    with pytest.raises(OSError, match="No space left"):
        growing.merge()
    assert {path.name for path in small_disk.iterdir()} == {"fridge.parts", "ballast"}

    ballast.unlink()
    again = recording(small_disk)
    again.merge()
    assert seeds_in(small_disk) == [0, 1, 2]


def test_a_full_disk_ends_the_command_with_a_message(assets, small_disk):
    (small_disk / "ballast").write_bytes(bytes(2 * 1024 * 1024))
    message = finish(collect(small_disk), code=1)
    assert "No space left on device" in message and "Traceback" not in message
