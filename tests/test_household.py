"""The generated apartment, the light robot, and the real MS-HAB environments on them."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mani_skill.agents.robots.fetch.fetch import Fetch
from processes import REPOSITORY, start, wait_for

import paper
from config import InputError
from household.assets import main as generate
from simulation.assets import apartment, check_assets, command_for, plan_files
from simulation.env import REAL_FETCH_URDF, SubtaskEnv, SubtaskEnvs, render_backend
from storage.files import read_json, sha256

REPLICA = "data/scene_datasets/replica_cad_dataset"
REARRANGE = f"{REPLICA}/rearrange"
MODELS = "data/assets/mani_skill2_ycb/models"
LIGHT_ROBOT = "data/robots/fetch_light/fetch.urdf"
SPLITS = ("train", "val")
STILL = np.array([0] * 7 + [-1] + [0] * 5)  # keeps the gripper closed
# (task, subtask, target, split) that are run: every column, every class, every task.
ENVIRONMENTS = [
    ("set_table", "pick", "013_apple", "train"),
    ("set_table", "place", "all", "train"),
    ("set_table", "open", "fridge", "val"),
    ("set_table", "open", "kitchen_counter", "train"),
    ("set_table", "close", "fridge", "train"),
    ("set_table", "close", "kitchen_counter", "val"),
    ("tidy_house", "pick", "all", "val"),
    ("tidy_house", "place", "002_master_chef_can", "train"),
    ("prepare_groceries", "pick", "all", "train"),
]


def hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every file."""
    return {str(p.relative_to(folder)): sha256(p) for p in folder.rglob("*") if p.is_file()}


def start_poses(assets: Path, split: str) -> dict[str, dict]:
    paths = (assets / REARRANGE / "spawn_data").glob(f"*/*/{split}/spawn_data.pt")
    return {uid: poses for path in paths for uid, poses in torch.load(path).items()}


def test_a_seed_decides_the_files_and_a_complete_folder_is_left_alone(assets, tmp_path, capsys):
    same, other, ours = tmp_path / "same", tmp_path / "other", hashes(assets)
    generate(same, seed=0)
    assert hashes(same) == ours
    generate(same, seed=0)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(InputError, match=f"mv {same} {same}-aside"):
        generate(same, seed=1)
    generate(other, seed=1)
    others = hashes(other)
    assert ours.keys() == others.keys()
    different = " ".join(name for name in ours if ours[name] != others[name])
    for part in ("configs/scenes", "task_plans", "fridge.urdf"):
        assert part in different
    assert "fetch_light" not in different


def test_a_killed_run_leaves_no_asset_folder(tmp_path):
    process = start("-m", "household.assets", "--out", tmp_path / "killed")
    wait_for(lambda: list(tmp_path.rglob("*.json")), process)
    process.kill()
    process.communicate()
    assert not (tmp_path / "killed").exists()


def test_val_has_the_scenes_of_train_but_its_own_object_positions_and_starts(assets):
    scenes, episodes, starts = [], [], []
    for split in SPLITS:
        files = (assets / REARRANGE / "task_plans").glob(f"*/*/{split}/*.json")
        plans = [plan for path in files for plan in read_json(path)["plans"]]
        poses = start_poses(assets, split)
        scenes.append({plan["build_config_name"] for plan in plans})
        configs = [read_json(assets / REARRANGE / plan["init_config_name"]) for plan in plans]
        episodes.append({json.dumps(config["rigid_objs"]) for config in configs})
        starts.append({tuple(p) for each in poses.values() for p in each["robot_pos"].tolist()})
        assert {plan["subtasks"][0]["uid"] for plan in plans} == set(poses)
    assert scenes[0] == scenes[1] and len(scenes[0]) == 3
    for train, val in (episodes, starts):
        assert len(val) > 1 and not train & val


def test_every_target_of_every_task_has_plans_and_64_starts_in_train(assets):
    for split, task, subtask in itertools.product(SPLITS, paper.TASKS, paper.SUBTASKS):
        folder = assets / REARRANGE / "task_plans" / task / subtask / split
        names = paper.targets(task, subtask)
        every = ("all",) if names and subtask in ("pick", "place") else ()
        assert {path.stem for path in folder.glob("*.json")} == {*names, *every}
    assert all(len(poses["robot_qpos"]) >= 64 for poses in start_poses(assets, "train").values())


@pytest.mark.parametrize("address", ENVIRONMENTS, ids="-".join)
def test_a_seed_is_an_episode_of_mshabs_own_environment(address, assets):
    _, subtask, _, split = address
    env = SubtaskEnv(*address)
    environment, robot = type(env.mshab), type(env.mshab.agent)
    assert environment.__module__ == f"mshab.envs.{subtask}"
    assert environment.__name__ == f"{subtask.capitalize()}SubtaskTrainEnv"
    assert robot.urdf_path == str(assets / LIGHT_ROBOT)
    choices = [env.choose(seed) for seed in range(20)]
    assert choices == [env.choose(seed) for seed in range(20)] and len(set(choices)) > 15
    first = env.reset(0)
    visible = env.masks(env.reset(3)).any()
    cameras = (obs := env.reset(0))["sensor_data"]
    assert (cameras["fetch_hand"]["rgb"] == first["sensor_data"]["fetch_hand"]["rgb"]).all()
    poses = start_poses(assets, split)[env.episodes[0]["subtask_uid"]]["robot_pos"]
    assert env.positions[0] == pytest.approx(poses[env.episodes[0]["spawn"], :2].numpy(), abs=1e-5)
    assert env.instruction == paper.instruction(subtask, env.targets[0])
    assert cameras.keys() == {"fetch_head", "fetch_hand"}
    for camera in cameras.values():
        assert camera["rgb"].shape == (1, 128, 128, 3) and camera["rgb"].dtype == torch.uint8
        assert camera["rgb"].float().std() > 5  # of 255: the pictures are not blank
        for kind in ("depth", "segmentation"):
            assert camera[kind].shape == (1, 128, 128, 1) and camera[kind].dtype == torch.int16
    if address[:3] != ("set_table", "pick", "013_apple"):  # hidden by the arm until it moves
        assert visible or env.masks(obs).any()
    for _ in range(12):
        obs, info = env.step(STILL)
    assert env.elapsed == 12 and not info["success"]
    assert subtask != "place" or obs["extra"]["is_grasped"][0]
    assert env.third_person().shape[2] == 3
    assert len(env.qpos_names) == 12 and len(env.action_schema) == 13
    env.close()


def test_every_scene_is_built(simulator):
    env, scenes = simulator("set_table", "close", "kitchen_counter", "val"), set()
    for seed in range(9):
        env.reset([seed])
        scenes.add(env.episodes[0]["scene"])
    assert len(scenes) == 3


def test_a_reset_reads_the_episode_files_of_its_scene_alone(simulator, monkeypatch):
    address, opened = ("set_table", "close", "fridge", "train"), []

    def spy(path, *args, real=open, **flags):
        opened.append(str(path).partition("rearrange/")[2])
        return real(path, *args, **flags)

    envs = simulator(*address)
    monkeypatch.setattr("builtins.open", spy)
    envs.reset([0])
    plans = read_json(plan_files(*address)[0])["plans"]
    scene_of = {plan["init_config_name"]: plan["build_config_name"] for plan in plans}
    assert {scene_of[name] for name in opened if name in scene_of} == {envs.episodes[0]["scene"]}
    assert len(set(scene_of.values())) == 3


def test_a_missing_asset_folder_is_named_with_its_mend(assets, tmp_path, monkeypatch):
    remedy = "python -m household.assets --out assets.*mani_skill.utils.download_asset"
    monkeypatch.setenv("MS_ASSET_DIR", str(shutil.copytree(assets, tmp_path / "late")))
    with pytest.raises(InputError, match="late was set after mani_skill was imported"):
        SubtaskEnvs("set_table", "close", "fridge")
    shutil.rmtree(tmp_path / "late/data")
    with pytest.raises(InputError, match=f"late: expected a folder `data` in it.*{remedy}"):
        plan_files("set_table", "close", "fridge", "val")
    monkeypatch.delenv("MS_ASSET_DIR")
    with pytest.raises(InputError, match=f"MS_ASSET_DIR is not set.*{remedy}"):
        plan_files("set_table", "close", "fridge", "val")


def test_mesas_driver_draws_where_it_was_chosen_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert render_backend() == "gpu"
    monkeypatch.setenv("VK_ICD_FILENAMES", "/usr/share/vulkan/icd.d/lvp_icd.json")
    assert render_backend() == "cpu"


def test_a_download_has_the_real_robot(assets, monkeypatch):
    monkeypatch.setattr("simulation.env.apartment", lambda: None)
    SubtaskEnvs("set_table", "close", "fridge", obs_mode="state_dict").close()
    assert Fetch.urdf_path == REAL_FETCH_URDF


# --- Faults in the asset folder ---


@pytest.fixture
def copied(assets, tmp_path) -> Path:
    return shutil.copytree(assets, tmp_path / "my assets")


def replace_scenes(root: Path) -> None:
    """Replace ReplicaCAD by a download's scenes: one has a generated scene's name, one has not."""
    scenes = root / REPLICA / "configs/scenes"
    shutil.rmtree(root / REPLICA)
    scenes.mkdir(parents=True)
    for name in ("v3_sc0_staging_00", "v3_sc1_staging_04"):
        (scenes / f"{name}.scene_instance.json").write_text("{}")


def remove_bowl(root: Path) -> None:
    shutil.rmtree(root / MODELS / "024_bowl")


def cut(pattern: str, length: int) -> Callable[[Path], None]:
    return lambda root: [os.truncate(path, length) for path in root.rglob(pattern)]


MIXED = "household.json is of a generated apartment, .*{} of a download.*MS_ASSET_DIR="
FAULTS = {
    "scenes of a download": (replace_scenes, MIXED.format("v3_sc0_staging_00.*json")),
    "an object of a download": (
        lambda root: (root / MODELS / "077_rubiks_cube").mkdir(), MIXED.format("077_rubiks_cube")
    ),
    "no object": (
        remove_bowl, "024_bowl/collision.ply: no such file. mv -T .*household.assets .* --seed 0"
    ),
    "an empty stage": (cut("stages/*.glb", 0), "glb: the file is empty.*household.assets"),
    "starts cut off": (cut("close/val/*.pt", 1000), "spawn_data.pt: the file is cut off"),
    "a plan cut off": (cut("close/val/fridge.json", 1000), "fridge.json: the file is cut off"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_apartment_is_named_with_the_command_that_mends_it(name, copied):
    plant, message = FAULTS[name]
    plant(copied)
    for check in (check_assets, apartment) if "download" in name else (check_assets,):
        with pytest.raises(InputError, match=message):
            check(copied)


def test_a_root_named_rearrange_needs_no_rearrange_dataset(tmp_path):
    command = command_for(tmp_path / "rearrange", tmp_path / "rearrange" / REPLICA / "a.glb")
    assert command.startswith("hf download haosulab/ReplicaCAD ")


def test_the_command_mends_the_apartment(copied):
    remove_bowl(copied)
    with pytest.raises(InputError) as error:
        check_assets(copied)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", "-c", str(error.value).partition("no such file. ")[2]]
    subprocess.run(command, cwd=REPOSITORY, env=os.environ | {"PATH": path}, check=True)
    assert "a sample is complete" in check_assets(copied)


@pytest.mark.parametrize(
    ("folder", "command"),
    [
        (MODELS, "MS_ASSET_DIR=.* -y ycb"),
        (f"{REARRANGE}/task_plans", "MS_ASSET_DIR=.* -y ReplicaCADRearrange"),
        (f"{REPLICA}/stages", "hf download haosulab/ReplicaCAD "),
    ],
)
def test_a_download_is_mended_by_a_command_that_removes_nothing_else(folder, command, copied):
    (copied / "household.json").unlink()
    assert "ReplicaCAD, a sample" in check_assets(copied)
    shutil.rmtree(copied / folder)
    with pytest.raises(InputError, match=f"no such file. {command}"):
        check_assets(copied)


def physics(urdf: Path) -> list[bytes]:
    """Joints, inertia and collision shapes of a robot; a mesh file is named by its sha256."""
    root = ElementTree.parse(urdf).getroot()
    # Relative paths: the folder can be moved.
    assert not any(Path(mesh.get("filename")).is_absolute() for mesh in root.iter("mesh"))
    for mesh in root.iterfind("link/collision//mesh"):
        mesh.set("filename", sha256(urdf.parent / mesh.get("filename")))
    tags = ("joint", "link/inertial", "link/collision")
    return [ElementTree.tostring(each) for tag in tags for each in root.findall(tag)]


def test_the_light_robot_has_the_joints_and_collisions_of_the_original(assets):
    assert physics(assets / LIGHT_ROBOT) == physics(Path(REAL_FETCH_URDF))
