"""MS-HAB's files as they are released, and MS-HAB's own programs on files of ours."""

import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from files import write_demos
from processes import run

from config import LABELS, InputError
from data import Frames, normalize_depth, read_cameras
from storage.files import read_json, write_json
from storage.h5 import Demonstrations, h5_files
from storage.pack import open_data, pack
from storage.trajectory import CAMERA_POSE, GRIPPER_POSE, remarks

DRAWER = "set_table/close/kitchen_counter"
POS, SEG = LABELS.index("pos"), LABELS.index("seg")


def remarks_on(source: Demonstrations) -> str:
    episodes = range(len(source.episodes))
    return "\n".join(remarks(source.survey([*episodes]), [e.file for e in source.episodes]))


@pytest.fixture(scope="module")
def released(recorded_by_mshab, tmp_path_factory) -> Path:
    """Five random steps, then the episodes of `recorded` and four steps more, as released."""
    out = tmp_path_factory.mktemp("released")
    (out / DRAWER).parent.mkdir(parents=True)
    for kind in (".h5", ".json"):
        shutil.copy(recorded_by_mshab / f"mshab{kind}", (out / DRAWER).with_suffix(kind))
    return out


def test_a_recording_of_mshabs_own_has_the_labels_of_ours(recorded, recorded_by_mshab, released):
    theirs, ours = Demonstrations(released), Demonstrations(recorded)
    assert theirs.instructions == ours.instructions == ["close the kitchen drawer"]
    read, expected = theirs.read_episode(1), ours.read_episode(0)
    same = read[: len(expected)]
    for name in ("rgb", "depth", "grasp", "qpos", "obj"):
        np.testing.assert_array_equal(same[name], expected[name], name)
    np.testing.assert_allclose(same["pos"], expected["pos"], rtol=0, atol=1e-5)
    simulated = read_json(recorded_by_mshab / "positions.json")["0"]
    np.testing.assert_allclose(read["pos"], simulated[:-1], rtol=0, atol=1e-5)
    lines = remarks_on(theirs)
    assert "base moves" not in lines and "rises" not in lines
    assert read["has"][:, POS].all() and not read["has"][:, SEG].any()
    assert np.ptp(read["pos"], axis=0).max() > 0.1  # it drove


def test_an_episode_truncated_at_its_success_equals_one_that_ended_there(recorded, released):
    whole, ours = Demonstrations(released), Demonstrations(recorded)
    theirs = Demonstrations(released, truncate=True)
    lengths = [episode.length for episode in ours.episodes]
    assert [episode.length for episode in whole.episodes] == [5, *(n + 4 for n in lengths)]
    assert [episode.length for episode in theirs.episodes] == [5, *lengths]  # no success in 5 steps
    read, expected = theirs.read_episode(1), ours.read_episode(0)
    for name in ("rgb", "actions", "action_mask", "frame"):
        np.testing.assert_array_equal(read[name], expected[name], name)
    np.testing.assert_array_equal(theirs.actions_of(np.array([1])), ours.actions_of(np.array([0])))


def test_mshabs_own_training_reads_what_we_wrote_and_learns(recorded, tmp_path):
    command = ("tests/mshab_bc.py", tmp_path, recorded / f"{DRAWER}.h5")
    shown = run(*command, PYTHONHASHSEED="0")
    frames = len(Demonstrations(recorded))
    assert f"{frames} samples at all trajectories per object for 1 objects" in shown
    first, second = map(float, re.findall(r"losses/loss new best at \d: ([\d.e-]+)", shown))
    assert second < first
    weights = torch.load(tmp_path / "bc/models/final_ckpt.pt", weights_only=True)["agent"]
    assert all(weight.isfinite().all() for weight in weights.values())


# --- Without a simulator ---


@pytest.mark.parametrize(
    ("kind", "farthest"), [(np.int16, 40_000), (np.uint16, 40_000), (np.int32, 100_000)]
)
def test_depth_of_any_integer_type_is_read_and_far_stays_far(kind, farthest, tmp_path):
    # As int16 the last two wrap around; 100 m is the cameras' far plane.
    millimetres = np.array([0, 1, 500, 32767, 32768, farthest])
    with h5py.File(write_demos(tmp_path / DRAWER, lengths=(9,)), "r+") as file:
        sensor = file["traj_0/obs/sensor_data/fetch_hand"]
        depth = sensor["depth"][:].astype(kind)
        depth[3, 0, :6, 0] = millimetres.astype(kind)
        del sensor["depth"]
        sensor["depth"] = depth
    images = [torch.from_numpy(Demonstrations(tmp_path).read([3])["depth"].copy())]
    if kind is np.int16:  # as the simulator gives it
        sensor = {"rgb": torch.zeros(1, 128, 128, 3), "depth": torch.from_numpy(depth[3:4])}
        images.append(
            read_cameras({"sensor_data": {"fetch_head": sensor, "fetch_hand": sensor}})[1]
        )
    expected = torch.tensor([1, 0.999, 1 - np.tanh(0.5), 0, 0, 0], dtype=torch.float32)
    for near in map(normalize_depth, images):
        torch.testing.assert_close(near[0, 1, 0, :6], expected, rtol=0, atol=1e-5)


def test_blocks_of_truncated_episodes_are_those_of_their_file(tmp_path):
    with h5py.File(write_demos(tmp_path / DRAWER, lengths=(60, 60)), "r+") as file:
        file["traj_0/success"][39:50] = True
        file["traj_1/success"][...] = False
    whole, cut = Demonstrations(tmp_path), Demonstrations(tmp_path, truncate=True)
    assert [episode.length for episode in cut.episodes] == [40, 60]
    assert set(cut.blocks[cut.blocks < 40]) == set(whole.blocks[whole.blocks < 40])
    read, expected = cut.read(np.arange(100)), whole.read([*range(40), *range(60, 120)])
    for name in ("rgb", "depth", "pos", "frame"):
        np.testing.assert_array_equal(read[name], expected[name], name)
    assert read["action_mask"][39].tolist() == [1] + 7 * [0]  # later actions are padding
    assert read["action_mask"][32].all() and expected["action_mask"][39].all()


def test_successes_and_targets_that_are_needed_and_missing_are_named(tmp_path):
    with h5py.File(write_demos(tmp_path / DRAWER), "r+") as file:
        del file["traj_1/success"]
    assert len(Demonstrations(tmp_path)) == 36
    with pytest.raises(InputError, match=r"traj_1: success is not there, expected number \[9\]"):
        Demonstrations(tmp_path, truncate=True)
    write_demos(tmp_path / "set_table/pick/all", lengths=(9,))
    with pytest.raises(InputError, match=r"all.h5: no instruction in its .json, and pick/all"):
        Demonstrations(tmp_path)


def test_the_json_says_how_many_episodes_there_are_and_the_h5_may_have_more(tmp_path):
    sidecar = write_demos(tmp_path / DRAWER).with_suffix(".json")
    write_json(sidecar, {"episodes": read_json(sidecar)["episodes"][2:]})
    source = Demonstrations(tmp_path)
    assert [(e.trajectory, e.length) for e in source.episodes] == [("traj_2", 15)]
    assert source.read_episode(0)["frame"].tolist() == list(range(15))


def test_actions_beyond_the_controllers_bounds_are_clipped_and_counted(tmp_path, capsys):
    # As in the release's open and close: raw PPO means as actions, nothing held, no masks.
    path = write_demos(tmp_path / "data" / DRAWER, labels=False, has_object=False)
    with h5py.File(path, "r+") as file:
        for i, group in enumerate(file.values()):
            group["obs/extra/is_grasped"][...] = False
            group["actions"][3, 4], group["actions"][5, 12] = (-5.1, 12.5) if i else (8.25, -1.5)
    source = Demonstrations(tmp_path / "data")
    records = source.read_episode(1)
    assert records["actions"][3, 0, 4] == -1 and records["actions"][0, 5, 12] == 1
    assert np.abs(source.actions_of([0, 1, 2])).max() == 1
    lines = remarks_on(source)
    assert f"{DRAWER}.h5: {6 / (36 * 13):.1%} of action values clipped" in lines
    assert "grasp never changes" in lines
    pack(str(tmp_path / "data"), str(tmp_path / "pack"))
    assert lines.splitlines()[0] in capsys.readouterr().out
    packed = open_data(tmp_path / "pack")
    assert packed.survey([0, 2]).tobytes() == source.survey([0, 2]).tobytes()


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_base_that_moves_less_than_its_action_commands_is_remarked(share, tmp_path):
    with h5py.File(write_demos(tmp_path / DRAWER, lengths=(30,)), "r+") as file:
        file["traj_0/actions"][:, 11] = 0.5  # m/s, at 20 Hz
        file["traj_0/labels/pos"][:] = np.outer(np.arange(31) * share * 0.025, [1, 0])
    remark = "the base moves 0.50 of what action 11 commands"
    assert (remark in remarks_on(Demonstrations(tmp_path))) == (share == 0.5)


@pytest.mark.parametrize("rise", [0.0, 0.005, 0.03])  # metres
def test_a_base_that_rises_a_little_is_remarked_and_by_two_centimetres_refused(rise, tmp_path):
    with h5py.File(write_demos(tmp_path / DRAWER, lengths=(9,), labels=False), "r+") as file:
        camera = np.tile(np.eye(4, dtype=np.float32), (10, 1, 1))
        camera[:, 2, 3] = np.linspace(0, rise, 10)
        file["traj_0"][CAMERA_POSE] = camera
        file["traj_0"][GRIPPER_POSE] = np.tile(np.float32([0, 0, 0, 1, 0, 0, 0]), (10, 1))
    source = Demonstrations(tmp_path)
    if rise == 0.03:
        with pytest.raises(InputError, match=r"traj_0: base x, y cannot be derived"):
            source.survey([0])
    else:
        assert ("rises by up to 4.4 mm" in remarks_on(source)) == (rise > 0)


@pytest.mark.parametrize("folder", ["MS-HAB-SetTable", "set_table"])
def test_a_folder_named_as_its_hub_dataset_is_its_task(folder, tmp_path):
    write_demos(tmp_path / folder / "close/fridge")
    for place in (tmp_path, tmp_path / folder):  # also where --data is that folder itself
        frames = Frames(open_data(place), 0.1, True, tasks=("set_table",), subtasks=("close",))
        assert len(frames) == 21


def test_folders_behind_links_are_read_loops_and_hidden_files_are_not(tmp_path):
    write_demos(tmp_path / "disk/fridge")
    write_demos(tmp_path / "data/set_table/open/fridge")
    (tmp_path / "data/set_table/close").symlink_to(tmp_path / "disk")
    (tmp_path / "data/again").symlink_to(tmp_path / "data")
    (tmp_path / "data/a_copy").symlink_to(tmp_path / "data/set_table")
    (tmp_path / "disk/._fridge.h5").write_bytes(b"of another system")
    found = [str(path.relative_to(tmp_path / "data")) for path in h5_files(tmp_path / "data")]
    assert found == ["set_table/close/fridge.h5", "set_table/open/fridge.h5"]
    assert len(Demonstrations(tmp_path / "data")) == 72


def test_a_pack_says_whether_its_episodes_end_at_their_success(tmp_path):
    with h5py.File(write_demos(tmp_path / "data" / DRAWER), "r+") as file:
        file["traj_0/success"][5:] = True
    for name, truncated in (("whole", False), ("cut", True)):
        pack(str(tmp_path / "data"), str(tmp_path / name), truncate_at_success=truncated)
        assert read_json(tmp_path / name / "pack.json")["truncate"] is truncated
    cut = open_data(tmp_path / "cut", truncate=True)
    assert [episode.length for episode in cut.episodes] == [6, 9, 15] and cut.truncate
    files = open_data(tmp_path / "data", truncate=True)
    assert (cut.read(np.arange(30)) == files.read(np.arange(30))).all()
    with pytest.raises(InputError, match=r"a pack of whole .*Give --no-truncate-at-success, or"):
        open_data(tmp_path / "whole", truncate=True)
    with pytest.raises(InputError, match=r"a pack of demonstrations that end .*Drop --no-truncate"):
        open_data(tmp_path / "cut", truncate=False)
