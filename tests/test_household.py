"""The generated apartment, the light robot, and the real MS-HAB environments on them."""

import filecmp
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from mani_skill.agents.robots.fetch.fetch import Fetch

import paper
from config import InputError
from household.assets import main as generate
from simulation import env
from simulation.assets import apartment, check_assets, plan_files
from simulation.env import SubtaskEnv, SubtaskEnvs

REPOSITORY = Path(__file__).parents[1]
REPLICA = "data/scene_datasets/replica_cad_dataset"
REARRANGE = f"{REPLICA}/rearrange"
MODELS = "data/assets/mani_skill2_ycb/models"
SPLITS = ("train", "val")
STILL = np.array([0] * 7 + [-1] + [0] * 5)  # closes the gripper
# (task, subtask, target, split) that are run: every column, every class, every task.
ENVIRONMENTS = [
    ("set_table", "pick", "013_apple", "train"),
    ("set_table", "pick", "024_bowl", "val"),
    ("set_table", "place", "all", "train"),
    ("set_table", "open", "fridge", "val"),
    ("set_table", "open", "kitchen_counter", "train"),
    ("set_table", "close", "fridge", "train"),
    ("set_table", "close", "kitchen_counter", "val"),
    ("tidy_house", "pick", "all", "val"),
    ("tidy_house", "place", "002_master_chef_can", "train"),
    ("prepare_groceries", "pick", "all", "train"),
    ("prepare_groceries", "place", "all", "val"),
]


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def task_plans(assets: Path, split: str) -> list[dict]:
    paths = (assets / REARRANGE / "task_plans").glob(f"*/*/{split}/*.json")
    return [plan for path in paths for plan in json.loads(path.read_text())["plans"]]


def start_poses(assets: Path, split: str) -> dict[str, dict]:
    paths = (assets / REARRANGE / "spawn_data").glob(f"*/*/{split}/spawn_data.pt")
    return {uid: spawn for path in paths for uid, spawn in torch.load(path).items()}


@pytest.fixture(scope="module")
def generated(assets, tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("generated")
    generate(folder / "same", seed=0)
    generate(folder / "other", seed=1)
    return folder / "same", folder / "other"


def run(task: str, subtask: str, target: str, split: str) -> dict:
    """The results of an environment's episodes."""
    env = SubtaskEnv(task, subtask, target, split)
    choices = [env.choose(seed) for seed in range(20)]
    first = env.reset(0)
    report = dict(
        split=split,
        environment=type(env.mshab),
        repeatable=choices == [env.choose(seed) for seed in range(20)],
        starts=len(set(choices)),
        robot=type(env.mshab.agent).urdf_path,
        mask=0,
        episodes=[],
        names=env.qpos_names,
        schema=env.action_schema,
    )
    for seed in (3, 0):
        obs = env.reset(seed)
        report["mask"] += int(env.masks(obs).sum())
        words = dict(instruction=env.instruction, target=env.target)
        report["episodes"].append(env.episode | words)
    report["cameras"] = obs["sensor_data"]
    hands = [each["sensor_data"]["fetch_hand"]["rgb"] for each in (first, obs)]
    report["same_start"] = bool((hands[0] == hands[1]).all())
    report["pos"] = env.pos.tolist()
    for _ in range(12):
        obs, info = env.step(STILL)
    report |= dict(elapsed=env.elapsed, success=info["success"], picture=env.third_person())
    report["grasped"] = bool(obs["extra"]["is_grasped"][0])
    env.close()
    return report


@pytest.fixture(scope="module")
def reports(assets) -> list[dict]:
    return [run(*address) for address in ENVIRONMENTS]


def test_the_same_seed_writes_the_same_files(assets, generated):
    same, _ = generated
    assert files(same) == files(assets)
    _, different, unreadable = filecmp.cmpfiles(assets, same, files(same), shallow=False)
    assert not different and not unreadable


def test_another_seed_writes_another_apartment(assets, generated):
    _, other = generated
    assert files(other) == files(assets)
    _, different, _ = filecmp.cmpfiles(assets, other, files(assets), shallow=False)
    assert any("configs/scenes" in name for name in different)
    assert any("task_plans" in name or "episode" in name for name in different)
    assert any(name.endswith("fridge.urdf") for name in different)
    assert not any("fetch_light" in name for name in different)


def test_a_complete_folder_is_left_alone_and_another_seed_refused(generated, capsys):
    same, _ = generated
    generate(same, seed=0)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(InputError, match=f"mv {same} {same}-aside"):
        generate(same, seed=1)


def test_a_killed_run_leaves_no_asset_folder(tmp_path):
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "household.assets", "--out", str(out)]
    process = subprocess.Popen(command, cwd=REPOSITORY)
    while not list(tmp_path.rglob("*.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not out.exists()


def test_val_has_the_scenes_of_train_but_its_own_object_positions_and_starts(assets):
    scenes, episodes, starts = [], [], []
    for split in SPLITS:
        plans = task_plans(assets, split)
        scenes.append({plan["build_config_name"] for plan in plans})
        configs = [assets / REARRANGE / plan["init_config_name"] for plan in plans]
        objects = [json.loads(path.read_text())["rigid_objs"] for path in configs]
        episodes.append({json.dumps(rigid) for rigid in objects})
        poses = start_poses(assets, split)
        starts.append({tuple(p) for s in poses.values() for p in s["robot_pos"].tolist()})
        assert {plan["subtasks"][0]["uid"] for plan in plans} == set(poses)
    assert scenes[0] == scenes[1] and len(scenes[0]) == 3
    for train, val in (episodes, starts):
        assert len(val) > 1 and not train & val


def test_every_target_of_every_task_has_plans_and_64_starts_in_train(assets):
    for split in SPLITS:
        for task in paper.TASKS:
            for subtask in paper.SUBTASKS:
                folder = assets / REARRANGE / "task_plans" / task / subtask / split
                names = paper.targets(task, subtask)
                every = ("all",) if names and subtask in ("pick", "place") else ()
                assert {p.stem for p in folder.glob("*.json")} == {*names, *every}
    assert all(len(spawn["robot_qpos"]) >= 64 for spawn in start_poses(assets, "train").values())


def test_the_environments_are_the_real_mshab_classes(reports):
    expected = {f"{s.capitalize()}SubtaskTrainEnv" for s in paper.SUBTASKS}
    classes = {report["environment"] for report in reports}
    assert {each.__name__ for each in classes} == expected
    assert {each.__module__ for each in classes} == {f"mshab.envs.{s}" for s in paper.SUBTASKS}


def test_every_column_resets_steps_and_renders(reports):
    assert len(reports) == len(ENVIRONMENTS)
    for report in reports:
        assert report["cameras"].keys() == {"fetch_head", "fetch_hand"}
        for camera in report["cameras"].values():
            assert camera["rgb"].shape == (1, 128, 128, 3) and camera["rgb"].dtype == torch.uint8
            assert camera["rgb"].float().std() > 5  # of 255: the pictures are not blank
            for kind in ("depth", "segmentation"):
                assert camera[kind].shape == (1, 128, 128, 1) and camera[kind].dtype == torch.int16
        assert report["elapsed"] == 12 and not report["success"]
        assert report["picture"].shape[2] == 3
        assert len(report["names"]) == 12 and len(report["schema"]) == 13


def test_masks_cover_the_target(reports):
    for address, report in zip(ENVIRONMENTS, reports, strict=True):
        # The arm hides the apple in the fridge until it moves.
        if address[:3] != ("set_table", "pick", "013_apple"):
            assert report["mask"] > 0, address


def test_held_objects_stay_in_the_hand(reports):
    held = [r["grasped"] for e, r in zip(ENVIRONMENTS, reports, strict=True) if e[1] == "place"]
    assert len(held) == 3 and all(held)


def test_a_seed_is_an_episode(reports, assets):
    spawns = {split: start_poses(assets, split) for split in SPLITS}
    for report in reports:
        assert report["repeatable"] and report["same_start"]
        assert report["starts"] > 15  # of 20 seeds
        episode = report["episodes"][-1]
        spawn = spawns[report["split"]][episode["subtask_uid"]]
        start = spawn["robot_pos"][episode["spawn"], :2].tolist()
        assert report["pos"] == pytest.approx(start, abs=1e-5)
        assert episode["instruction"] == paper.instruction(episode["subtask"], episode["target"])


def test_every_scene_of_the_split_is_built(reports):
    assert len({e["scene"] for r in reports for e in r["episodes"] if r["split"] == "train"}) == 3
    assert len({e["scene"] for r in reports for e in r["episodes"] if r["split"] == "val"}) > 1


def test_a_reset_reads_the_episode_files_of_its_scene_alone(simulator, monkeypatch):
    address, opened = ("set_table", "close", "fridge", "train"), []

    def spy(path, *args, real=open, **flags):
        opened.append(str(path).partition("rearrange/")[2])
        return real(path, *args, **flags)

    envs = simulator(*address)
    monkeypatch.setattr("builtins.open", spy)
    envs.reset([0])
    plans = json.loads(plan_files(*address)[0].read_text())["plans"]
    scene_of = {plan["init_config_name"]: plan["build_config_name"] for plan in plans}
    assert {scene_of[name] for name in opened if name in scene_of} == {envs.episodes[0]["scene"]}
    assert len(set(scene_of.values())) == 3


def test_a_missing_asset_folder_is_named_with_the_command_that_mends_it(
    assets, tmp_path, monkeypatch
):
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
    assert env.render_backend() == "gpu"
    monkeypatch.setenv("VK_ICD_FILENAMES", "/usr/share/vulkan/icd.d/lvp_icd.json")
    assert env.render_backend() == "cpu"


def test_a_download_has_the_real_robot(assets, monkeypatch):
    monkeypatch.setattr(env, "apartment", lambda: None)
    SubtaskEnvs("set_table", "close", "fridge", obs_mode="state_dict").close()
    assert Fetch.urdf_path == env.REAL_FETCH_URDF


# --- Faults in the asset folder ---


@pytest.fixture
def copied(assets, tmp_path) -> Path:
    return shutil.copytree(assets, tmp_path / "my assets")


def scene_of_a_download(root: Path) -> None:
    shutil.rmtree(root / REPLICA)  # as mani_skill does first
    for name in ("v3_sc0_staging_00", "v3_sc1_staging_04"):  # the first is a generated one's too
        scene = root / REPLICA / f"configs/scenes/{name}.scene_instance.json"
        scene.parent.mkdir(parents=True, exist_ok=True)
        scene.write_text('{"stage_instance": {"template_name": "stages/Stage"}}')


MIXED = "household.json is of a generated apartment, .*{} of a download.*MS_ASSET_DIR="
FAULTS = {
    "scenes of a download": (scene_of_a_download, MIXED.format("v3_sc0_staging_00.*json")),
    "an object of a download": (
        lambda root: (root / MODELS / "077_rubiks_cube").mkdir(), MIXED.format("077_rubiks_cube")
    ),
    "no object": (
        lambda root: shutil.rmtree(root / MODELS / "024_bowl"),
        "024_bowl/collision.ply: no such file. mv -T .*household.assets .* --seed 0",
    ),
    "an empty stage": (
        lambda root: [os.truncate(path, 0) for path in root.rglob("stages/*.glb")],
        "glb: the file is empty.*household.assets",
    ),
    "starts cut off": (
        lambda root: os.truncate(
            root / REARRANGE / "spawn_data/set_table/close/val/spawn_data.pt", 1000
        ),
        "spawn_data.pt: the file is cut off",
    ),
    "a plan cut off": (
        lambda root: os.truncate(
            root / REARRANGE / "task_plans/set_table/close/val/fridge.json", 1000
        ),
        "fridge.json: the file is cut off",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_apartment_is_named_with_the_command_that_mends_it(name, copied):
    assert "a sample is complete" in check_assets(copied)
    plant, message = FAULTS[name]
    plant(copied)
    with pytest.raises(InputError, match=message):
        check_assets(copied)
    if "download" in name:
        with pytest.raises(InputError, match=message):
            apartment(copied)


def test_the_command_mends_the_apartment(copied):
    shutil.rmtree(copied / MODELS / "024_bowl")
    with pytest.raises(InputError) as error:
        check_assets(copied)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", "-c", str(error.value).partition("no such file. ")[2]]
    subprocess.run(command, cwd=REPOSITORY, env=os.environ | {"PATH": path}, check=True)
    assert check_assets(copied)


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


def test_the_light_robot_has_the_joints_and_collisions_of_the_original(assets, reports):
    light = assets / "data/robots/fetch_light/fetch.urdf"
    assert {report["robot"] for report in reports} == {str(light)}
    site = next(p for p in map(Path, sys.path) if (p / "mani_skill").is_dir())
    original = site / "mani_skill/assets/robots/fetch/fetch.urdf"
    trees = [ElementTree.parse(path).getroot() for path in (light, original)]
    for tag in ("joint", "link/inertial"):
        assert [ElementTree.tostring(e) for e in trees[0].findall(tag)] == [
            ElementTree.tostring(e) for e in trees[1].findall(tag)
        ]
    for ours, theirs in zip(*[tree.findall("link/collision") for tree in trees], strict=True):
        assert ours.find("origin").attrib == theirs.find("origin").attrib
        our_mesh, their_mesh = (e.find("geometry/mesh") for e in (ours, theirs))
        if their_mesh is not None:
            our_path = light.parent / our_mesh.get("filename")
            assert filecmp.cmp(
                our_path, original.parent / their_mesh.get("filename"), shallow=False
            )
    # So that the folder can be moved.
    assert not any(Path(mesh.get("filename")).is_absolute() for mesh in trees[0].iter("mesh"))
