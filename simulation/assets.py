"""The apartment in MS_ASSET_DIR, generated or real: its files, and a check of them.

This file imports no simulator.
"""

import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

from config import SUBTASKS, TASKS, InputError, quoted
from paper import OBJECTS, targets
from storage.files import sha256

REPLICA = Path("data/scene_datasets/replica_cad_dataset")
YCB = Path("data/assets/mani_skill2_ycb")
REMEDY = (
    "Generate an apartment (`python -m household.assets --out assets && export "
    "MS_ASSET_DIR=$PWD/assets`), or download the real one into a folder of its own (`export "
    "MS_ASSET_DIR=$PWD/replica_cad`, then `python -m mani_skill.utils.download_asset -y X` for "
    "X in ycb, ReplicaCAD, ReplicaCADRearrange, in this order)"
)


def asset_folder() -> Path:
    """MS_ASSET_DIR. Raises InputError when it is not set or has no folder `data`."""
    name = os.environ.get("MS_ASSET_DIR")
    if not name:
        raise InputError(f"MS_ASSET_DIR is not set: no asset folder. {REMEDY}")
    if not Path(name, "data").is_dir():
        raise InputError(f"MS_ASSET_DIR={name}: expected a folder `data` in it. {REMEDY}")
    return Path(name).absolute()


def plan_paths(root: Path, task: str, subtask: str, target: str, split: str) -> tuple[Path, Path]:
    """Paths of the task plans and start poses below `root`."""
    place, rearrange = Path(task, subtask, split), root / REPLICA / "rearrange"
    plans = rearrange / "task_plans" / place / f"{target}.json"
    return plans, rearrange / "spawn_data" / place / "spawn_data.pt"


def plan_files(task: str, subtask: str, target: str, split: str) -> tuple[Path, Path]:
    """MS-HAB's task plans and start poses of a subtask. Raises InputError when one is missing."""
    files = plan_paths(root := asset_folder(), task, subtask, target, split)
    for path in files:
        if not path.is_file():
            raise InputError(f"no {path} (MS_ASSET_DIR={root}). {REMEDY}")
    return files


def apartment(root: Path | None = None) -> str | None:
    """The sha256 that names a generated apartment; None for the real ones.

    Raises InputError when a folder holds a generated apartment and a download: the simulator would
    put the generated robot, whose meshes are light, into real scenes. A generated scene has the
    file name of a real one, but refers to a table that no real scene has.
    """
    root = root or asset_folder()
    marker = root / "household.json"
    if not marker.is_file():
        return None
    models = (root / YCB / "models").glob("*/")
    real = [path for path in models if path.name not in sum(OBJECTS.values(), ())]
    for scene in (root / REPLICA / "configs/scenes").glob("*.json"):
        table = f"objects/table_{scene.name.partition('.')[0]}"
        if not fault_of(scene) and table not in scene.read_text(encoding="utf-8"):
            real.append(scene)
    if real:
        raise InputError(
            f"{marker} is of a generated apartment, {min(real)} of a download: use two folders. "
            f"{REMEDY}"
        )
    return sha256(marker)


def check_assets(root: Path | None = None) -> str:
    """Check a sample of the files: all plans, and the files of one episode of each subtask.

    Raises InputError, with the command that restores the file.
    """
    root = root or asset_folder()
    generated = apartment(root)
    for path in needed_files(root):
        if fault := fault_of(path):
            raise InputError(f"{path}: {fault}. {command_for(root, path)}")
    return f"{root}: {'a generated apartment' if generated else 'ReplicaCAD'}, a sample is complete"


def fault_of(path: Path) -> str | None:
    """Why a file is unusable, by its size and its last bytes; None: no fault found."""
    if not path.is_file() or not path.stat().st_size:
        return "the file is empty" if path.is_file() else "no such file"
    if path.suffix == ".json":
        complete = path.read_bytes().rstrip().endswith((b"}", b"]"))
    else:
        complete = path.suffix != ".pt" or zipfile.is_zipfile(path)
    return None if complete else "the file is cut off"


def command_for(root: Path, path: Path) -> str:
    """The command that restores a missing or damaged file and removes nothing else."""
    marker = root / "household.json"
    if marker.is_file():
        seed = json.loads(marker.read_bytes())["seed"]
        again = f"python -m household.assets --out {quoted(root)} --seed {seed}"
        return f"mv -T {quoted(root)} {quoted(root)}-aside && {again}"
    if "rearrange" in path.relative_to(root).parts or YCB.name in path.parts:
        name = "ycb" if YCB.name in path.parts else "ReplicaCADRearrange"
        download = f"python -m mani_skill.utils.download_asset -y {name}"
        return f"MS_ASSET_DIR={quoted(root)} {download}"
    # mani_skill's download of ReplicaCAD would remove its folder, and ReplicaCADRearrange with it.
    folder = quoted(root / REPLICA)
    return f"hf download haosulab/ReplicaCAD --repo-type dataset --local-dir {folder}"


def needed_files(root: Path) -> Iterator[Path]:
    """All plans and start poses, the objects, and each subtask's first validation episode.

    A caller must stop at a missing file: the names of later files are read from it.
    """
    replica, ycb = root / REPLICA, root / YCB
    yield ycb / "info_pick_v0.json"
    for task in TASKS:
        for model in OBJECTS[task]:
            yield ycb / "models" / model / "collision.ply"
            yield ycb / "models" / model / "textured.obj"
        for subtask in (each for each in SUBTASKS if targets(task, each)):
            names = targets(task, subtask)
            for split in ("train", "val"):
                for name in (*names, "all") if subtask in ("pick", "place") else names:
                    yield from plan_paths(root, task, subtask, name, split)
            plan_file, _ = plan_paths(root, task, subtask, names[0], "val")
            plan = json.loads(plan_file.read_bytes())["plans"][0]
            yield replica / "rearrange" / plan["init_config_name"]
            yield (scene := replica / "configs/scenes" / plan["build_config_name"])
            stage = json.loads(scene.read_bytes())["stage_instance"]["template_name"]
            yield replica / f"stages/{Path(stage).name}.glb"
