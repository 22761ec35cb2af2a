"""MS-HAB's files as they are released, and MS-HAB's own programs on files of ours."""

import json
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from files import write_demos
from processes import start

from config import LABELS, InputError
from data import normalize_depth, pack
from demonstrations import DataError, Demonstrations
from env import REARRANGE
from released import CAMERA_POSE, GRIPPER_POSE, base_position
from samples import open_data

DRAWER = "set_table/close/kitchen_counter"
POS, SEG = LABELS.index("pos"), LABELS.index("seg")


def finish(process) -> str:
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return stdout


@pytest.fixture(scope="module")
def collected(assets, tmp_path_factory) -> Path:
    """An episode that collect.py wrote, with all labels."""
    out = tmp_path_factory.mktemp("collected")
    flags = "--task set_table --subtask close --target kitchen_counter --episodes 1"
    finish(start("collect.py", *flags.split(), "--out", out))
    return out


@pytest.fixture(scope="module")
def released(collected, tmp_path_factory) -> Path:
    """Five random steps, then the same episode, as MS-HAB's own recorder writes them.

    It goes on after its success, as the released ones do.
    """
    out = tmp_path_factory.mktemp("released")
    command = ("tests/mshab_recorder.py", out, 5, collected / f"{DRAWER}.h5")
    finish(start(*command, PYTHONHASHSEED="0"))
    (out / DRAWER).parent.mkdir(parents=True)
    for kind in (".h5", ".json"):
        (out / "mshab").with_suffix(kind).rename((out / DRAWER).with_suffix(kind))
    return out


def test_a_recording_of_mshabs_own_has_the_labels_of_ours(collected, released):
    theirs, ours = Demonstrations(released), Demonstrations(collected)
    assert theirs.instructions == ours.instructions == ["close the kitchen drawer"]
    recorded, expected = theirs.read_episode(1), ours.read_episode(0)
    same = recorded[: len(expected)]
    for name in ("rgb", "depth", "grasp", "qpos", "obj"):
        np.testing.assert_array_equal(same[name], expected[name], name)
    np.testing.assert_allclose(same["pos"], expected["pos"], rtol=0, atol=1e-5)
    simulated = json.loads((released / "positions.json").read_text())["0"]
    np.testing.assert_allclose(recorded["pos"], simulated[:-1], rtol=0, atol=1e-5)
    assert recorded["has"][:, POS].all() and not recorded["has"][:, SEG].any()
    assert np.ptp(recorded["pos"], axis=0).max() > 0.1  # it drove


def test_truncated_at_its_success_a_longer_episode_is_the_one_that_ended_there(collected, released):
    whole, ours = Demonstrations(released), Demonstrations(collected)
    theirs = Demonstrations(released, truncate=True)
    length = ours.episodes[0].length
    assert [episode.length for episode in whole.episodes] == [5, length + 4]
    assert [episode.length for episode in theirs.episodes] == [5, length]  # the first has none
    recorded, expected = theirs.read_episode(1), ours.read_episode(0)
    for name in ("rgb", "actions", "action_mask", "frame"):
        np.testing.assert_array_equal(recorded[name], expected[name], name)
    np.testing.assert_array_equal(theirs.actions_of(np.array([1])), ours.actions_of(np.array([0])))


def test_mshabs_own_training_reads_what_we_wrote_and_learns(collected, tmp_path):
    command = ("tests/mshab_bc.py", tmp_path, collected / f"{DRAWER}.h5")
    shown = finish(start(*command, PYTHONHASHSEED="0"))
    frames = len(Demonstrations(collected))
    assert f"{frames} samples at all trajectories per object for 1 objects" in shown
    first, second = map(float, re.findall(r"losses/loss new best at \d: ([\d.e-]+)", shown))
    assert second < first
    weights = torch.load(tmp_path / "bc/models/final_ckpt.pt", weights_only=True)["agent"]
    assert all(weight.isfinite().all() for weight in weights.values())


def test_a_camera_that_sits_elsewhere_gives_no_positions(released):
    with h5py.File(released / f"{DRAWER}.h5") as file:
        obs = {key: file["traj_1/obs"][key][:] for key in (CAMERA_POSE, GRIPPER_POSE)}
    assert base_position(obs, slice(0, 26), "here").shape == (26, 2)
    obs[CAMERA_POSE][:, :3, 3] += 0.1 * obs[CAMERA_POSE][:, :3, 2]
    with pytest.raises(InputError, match=r"^here: base x, y cannot be derived"):
        base_position(obs, slice(0, 26), "here")


# --- Without a simulator ---


@pytest.mark.parametrize("kind", [np.int16, np.uint16, np.int32])
def test_depth_of_any_integer_type_is_read_and_far_stays_far(kind, tmp_path):
    path = write_demos(tmp_path / DRAWER, lengths=(9,))
    millimetres = np.array([0, 1, 500, 32767, 32768, 40000])
    if kind is np.int32:
        millimetres[-1] = 100_000  # the cameras' far plane
    with h5py.File(path, "r+") as file:
        sensor = file["traj_0/obs/sensor_data/fetch_hand"]
        depth = sensor["depth"][:].astype(kind)
        depth[3, 0, :6, 0] = millimetres.astype(kind)  # as int16, the last two wrap around
        del sensor["depth"]
        sensor["depth"] = depth
    read = Demonstrations(tmp_path).read([3])["depth"]
    assert read[0, 1, 0, :6].tolist() == [0, 1, 500, 32767, 32767, 32767]
    near = normalize_depth(torch.from_numpy(read.copy()))
    assert near.min() == 0 and near.max() == 1


def test_blocks_of_truncated_episodes_are_those_of_their_file(tmp_path):
    path = write_demos(tmp_path / DRAWER, lengths=(60, 60))
    with h5py.File(path, "r+") as file:
        file["traj_0/success"][39:50] = True
        file["traj_1/success"][...] = False
    whole, cut = Demonstrations(tmp_path), Demonstrations(tmp_path, truncate=True)
    assert [episode.length for episode in cut.episodes] == [40, 60]
    assert set(cut.blocks[cut.blocks < 40]) == set(whole.blocks[whole.blocks < 40])
    names = ["rgb", "depth", "pos", "frame"]
    read, expected = cut.read(np.arange(100)), whole.read([*range(40), *range(60, 120)])
    assert all((read[name] == expected[name]).all() for name in names)
    assert read["action_mask"][39].tolist() == [1] + 7 * [0]  # none of what came after counts
    assert read["action_mask"][32].all() and expected["action_mask"][39].all()


def test_a_file_without_success_per_step_is_named_where_it_is_to_be_truncated(tmp_path):
    path = write_demos(tmp_path / DRAWER)
    with h5py.File(path, "r+") as file:
        del file["traj_1/success"]
    assert len(Demonstrations(tmp_path)) == 36
    with pytest.raises(DataError, match=r"kitchen_counter.h5, traj_1: success is None"):
        Demonstrations(tmp_path, truncate=True)


def test_the_json_says_how_many_episodes_there_are_and_the_h5_may_have_more(tmp_path):
    path = write_demos(tmp_path / DRAWER)
    sidecar = json.loads(path.with_suffix(".json").read_text())
    sidecar["episodes"] = sidecar["episodes"][2:]
    path.with_suffix(".json").write_text(json.dumps(sidecar))
    source = Demonstrations(tmp_path)
    assert [(e.trajectory, e.length) for e in source.episodes] == [("traj_2", 15)]
    assert source.read_episode(0)["frame"].tolist() == list(range(15))


def test_observations_that_are_too_few_are_named(tmp_path):
    path = write_demos(tmp_path / DRAWER)
    with h5py.File(path, "r+") as file:
        qpos = file["traj_1/obs/agent/qpos"][:-1]
        del file["traj_1/obs/agent/qpos"]
        file["traj_1/obs/agent/qpos"] = qpos
    with pytest.raises(DataError, match="traj_1: 9 observations, expected one more than the 9"):
        Demonstrations(tmp_path).read_episode(1)


def test_the_task_plan_names_the_target_of_each_episode_of_all_h5(assets, tmp_path):
    path = write_demos(tmp_path / "set_table/pick/all", lengths=(9, 9))
    plan = json.loads((REARRANGE / "task_plans/set_table/pick/train/all.json").read_text())
    first = {each["subtasks"][0]["obj_id"]: each["subtasks"][0]["uid"] for each in plan["plans"]}
    sidecar = json.loads(path.with_suffix(".json").read_text())
    for entry, name in zip(sidecar["episodes"], ("024_bowl-0", "013_apple-0")):
        entry["subtask_uid"] = first[name]
    path.with_suffix(".json").write_text(json.dumps(sidecar))
    source = Demonstrations(tmp_path)
    assert source.instructions == ["pick up the bowl", "pick up the apple"]
    assert source.read([0, 9])["instruction"].tolist() == [0, 1]


def test_an_episode_whose_target_nothing_names_is_refused_with_what_would(assets, tmp_path):
    write_demos(tmp_path / "set_table/pick/all", lengths=(9,))
    with pytest.raises(InputError, match=r"all.h5: neither an instruction nor a known target"):
        Demonstrations(tmp_path)
    shutil.rmtree(tmp_path / "set_table")
    path = write_demos(tmp_path / "set_table/pick/013_apple", lengths=(9,))
    sidecar = json.loads(path.with_suffix(".json").read_text())
    del sidecar["episodes"][0]["subtask_uid"]  # as MS-HAB's recorder leaves it
    path.with_suffix(".json").write_text(json.dumps(sidecar))
    assert Demonstrations(tmp_path).instructions == ["pick up the apple"]


def test_a_pack_says_whether_its_episodes_end_at_their_success(tmp_path):
    with h5py.File(write_demos(tmp_path / "data" / DRAWER), "r+") as file:
        file["traj_0/success"][5:] = True
    for name, truncated in (("whole", False), ("cut", True)):
        pack(str(tmp_path / "data"), str(tmp_path / name), truncate_at_success=truncated)
        meta = json.loads((tmp_path / name / "pack.json").read_text())
        assert meta["truncated_at_success"] is truncated
    cut = open_data(tmp_path / "cut", truncate=True)
    assert [episode.length for episode in cut.episodes] == [6, 9, 15] and cut.truncate
    files = open_data(tmp_path / "data", truncate=True)
    assert (cut.read(np.arange(30)) == files.read(np.arange(30))).all()
    with pytest.raises(InputError, match=r"a pack of whole demonstrations"):
        open_data(tmp_path / "whole", truncate=True)
