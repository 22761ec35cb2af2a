"""Collecting demonstrations: MS-HAB's layout, the same for any number of workers, nothing lost."""

import errno
import io
import os
import shutil
import subprocess
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from files import datasets
from processes import finish, start, wait_for

from collect import CollectConfig, main
from config import InputError
from storage.files import read_json
from storage.recording import Recording, encode
from tools.replay import main as replay

TARGET = ("set_table", "close", "kitchen_counter")
FILE = Path("set_table/close/kitchen_counter.h5")
ROOT = Path(__file__).parent.parent


def collect(out: Path, workers: int = 1) -> subprocess.Popen:
    flags = "--task set_table --subtask close --target kitchen_counter --episodes 3 --workers"
    return start("collect.py", *flags.split(), workers, "--out", out)


def contents(data: Path) -> dict:
    """Every dataset of a data folder's h5, and the json beside it."""
    with h5py.File(data / FILE) as file:
        return {"json": read_json((data / FILE).with_suffix(".json"))} | datasets(file)


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


def test_tree_and_json_are_those_of_mshabs_own_recorder(recorded, recorded_by_mshab):
    files = recorded / FILE, recorded_by_mshab / "mshab.h5"
    ours, theirs = (read_json(path.with_suffix(".json")) for path in files)
    first = ours["episodes"][0]
    with h5py.File(files[0]) as file, h5py.File(files[1]) as mshabs:
        rows = layout(file["traj_0"], first["elapsed_steps"])
        expected = layout(mshabs["traj_0"], 5)
    assert [row for row in rows if not row[0].startswith("labels/")] == expected
    assert theirs.keys() <= ours.keys()
    assert theirs["env_info"].keys() == ours["env_info"].keys()
    assert theirs["env_info"]["env_kwargs"].keys() == ours["env_info"]["env_kwargs"].keys()
    assert theirs["episodes"][0].keys() | {"subtask_uid", "instruction", "seed"} <= first.keys()
    assert len(ours["action_schema"]) == 13 and len(ours["qpos_names"]) == 12


def test_labels_cover_every_frame_and_actions_succeed_again(recorded, recorded_by_mshab):
    successes = read_json(recorded_by_mshab / "successes.json")
    with h5py.File(recorded / FILE) as file:
        for name, trajectory in file.items():
            actions, success = trajectory["actions"][:], trajectory["success"][:]
            assert np.isfinite(actions).all() and np.abs(actions).max() <= 1
            assert success.nonzero()[0].tolist() == [len(actions) - 1]  # it ends at success
            assert successes[name.removeprefix("traj_")] == [len(actions) - 1]
            frames = len(actions) + 1
            pos, seg = trajectory["labels/pos"], trajectory["labels/seg"]
            assert pos.shape == (frames, 2) and pos.dtype == np.float32
            assert np.isfinite(pos[:]).all() and np.ptp(pos[:], axis=0).max() > 0.1  # it drove
            for camera in ("fetch_head", "fetch_hand"):
                assert seg[camera].shape == (frames, 128, 128) and seg[camera].dtype == bool
            assert seg["fetch_head"][0].any()  # the drawer is in view at the start
            assert np.ptp(seg["fetch_head"][:].sum((1, 2))) > 0


def test_a_killed_run_of_two_workers_goes_on_to_what_one_worker_records(recorded, tmp_path):
    parts = (tmp_path / FILE).with_suffix(".parts")
    process = collect(tmp_path, workers=2)
    wait_for(lambda: list(parts.glob("*.part")), process)
    process.kill()
    _, stderr = process.communicate(timeout=60)  # ends with the last worker, which holds the pipe
    assert "Traceback" not in stderr
    kept = {part: part.stat().st_mtime_ns for part in parts.glob("*.part")}
    assert 0 < len(kept) < 3 and not (tmp_path / FILE).exists()

    process = collect(tmp_path)
    while process.poll() is None and parts.exists():
        times = {part: part.stat().st_mtime_ns for part in kept if part.exists()}
        assert times == {part: kept[part] for part in times}  # none is repeated
        time.sleep(0.01)
    assert "succeeded in 3/" in finish(process)
    np.testing.assert_equal(contents(tmp_path), contents(recorded))
    assert not parts.exists()


def test_a_correction_begins_where_a_policy_stood_and_ends_at_the_experts_success(
    recorded, tmp_path, capsys
):
    main(CollectConfig(*TARGET, tmp_path, 1, after=ROOT / "weights/stage2"))
    entries = [read_json((data / FILE).with_suffix(".json")) for data in (tmp_path, recorded)]
    assert entries[0]["recipe"].keys() - entries[1]["recipe"].keys() == {"after"}
    (correction, *_), (whole, *_) = (entry["episodes"] for entry in entries)
    assert correction["spawn_selection_idx"] == whole["spawn_selection_idx"]
    assert whole["driven"] == 0 < correction["driven"]
    with h5py.File(tmp_path / FILE) as file, h5py.File(recorded / FILE) as other:
        success = file["traj_0/success"][:]
        assert success.nonzero()[0].tolist() == [len(success) - 1]
        starts = [each["traj_0/labels/pos"][0] for each in (file, other)]
        assert np.linalg.norm(starts[0] - starts[1]) > 0.02
    replay(tmp_path)
    assert "0 of 0 recorded" in capsys.readouterr().out


def test_what_was_recorded_succeeds_again_where_its_plans_are_named(recorded, tmp_path, capsys):
    folder = shutil.copytree(recorded, tmp_path / "my data")
    replay(folder, episodes=1)
    expected = "success, here: success; joints differ by up to 0\n1 of 1 recorded successes"
    assert expected in capsys.readouterr().out
    sidecar = (folder / FILE).with_suffix(".json")
    sidecar.write_text(sidecar.read_text().replace("subtask_uid", "uid"))
    with pytest.raises(InputError, match="subtask_uid is None, expected"):
        replay(folder, episodes=1)


def test_a_file_stays_as_it_is_if_nothing_is_missing_or_nothing_fits(
    assets, recorded, tmp_path, monkeypatch, capsys
):
    data = shutil.copytree(recorded, tmp_path / "data")
    main(CollectConfig(*TARGET, data, 3))
    assert "already there" in capsys.readouterr().out
    other = shutil.copytree(assets, tmp_path / "other")
    (other / "household.json").write_text((assets / "household.json").read_text() + " ")
    monkeypatch.setenv("MS_ASSET_DIR", str(other))
    with pytest.raises(InputError, match=r"has episodes of \{"):
        main(CollectConfig(*TARGET, data, episodes=9))
    assert (data / FILE).read_bytes() == (recorded / FILE).read_bytes()
    with pytest.raises(InputError, match=r"--target 024_bowl: .*\('fridge', 'kitchen_counter'\)"):
        CollectConfig("set_table", "close", "024_bowl")


# --- Files that grow, without a simulator ---

RECIPE = {"expert": "scripted", "split": "train", "seed": 0}


def part(seed: int, frames: int = 3) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (frames, 128, 128, 3), np.uint8)
    return encode({"obs": [{"rgb": image} for image in noise]}, {"env_info": {}}, {"seed": seed})


def record(folder: Path, outcomes: dict[int, bool] | None = None) -> Recording:
    """Open the file of a target, and add an attempt of each seed."""
    growing = Recording(folder, "fridge", RECIPE)
    growing.start()
    for seed, success in (outcomes or {}).items():
        growing.add(seed, success, 200, part(seed))
    return growing


def seeds_in(folder: Path) -> list[int]:
    """The seeds in the json, in order; every trajectory must be the one of its seed."""
    episodes = read_json(folder / "fridge.json")["episodes"]
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
    again = record(tmp_path)
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
    more = record(tmp_path)
    assert more.next_seeds([], episodes=2, number=1) == []
    assert more.next_seeds([], episodes=3, number=1) == [3]
    record(tmp_path, {3: True}).merge()
    assert seeds_in(tmp_path) == [0, 2, 3]
    assert record(tmp_path).done == {0: True, 1: False, 2: True, 3: True}


def test_a_kill_before_the_parts_were_removed_repeats_nothing(tmp_path):
    growing = record(tmp_path, {0: True, 1: True})
    left = shutil.copytree(growing.parts, tmp_path / "left")
    growing.merge()
    left.rename(growing.parts)
    again = Recording(tmp_path, "fridge", RECIPE)
    assert again.done == {0: True, 1: True} and not again.parts.exists()


def test_a_line_cut_off_by_a_full_disk_is_attempted_again(tmp_path):
    growing = record(tmp_path, {0: False, 1: False})
    growing.attempts.write_text(growing.attempts.read_text()[:-5])
    assert record(tmp_path).done == {0: False}
    record(tmp_path, {1: False})
    assert record(tmp_path).done == {0: False, 1: False}


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
        record(tmp_path)
    assert left == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_an_h5_that_a_kill_left_before_its_json_is_made_again(tmp_path):
    growing = record(tmp_path, {0: True})
    (tmp_path / "fridge.h5").write_bytes(b"complete, but not counted yet")
    record(tmp_path).merge()
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
    record(small_disk).merge()
    assert seeds_in(small_disk) == [0, 1, 2]


def test_a_full_disk_ends_the_command_with_a_message(assets, small_disk):
    (small_disk / "ballast").write_bytes(bytes(2 * 1024 * 1024))
    assert "No space left on device" in finish(collect(small_disk), code=1)
