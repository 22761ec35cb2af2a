"""The apartment in MS_ASSET_DIR, generated or real: its folders, and a sample of its files.

    require(assets())

Unlike env.py it imports no simulator, and follows one plan of each subtask to the files that an
episode of it would load.
"""

import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

from config import SUBTASKS, TASKS, quoted
from paper import OBJECTS, targets
from training.checks import Finding

REPLICA = "data/scene_datasets/replica_cad_dataset"
ASSETS = {  # what mani_skill calls them: a folder that each must have, below MS_ASSET_DIR
    "ReplicaCAD": f"{REPLICA}/configs/scenes",
    "ReplicaCADRearrange": f"{REPLICA}/rearrange/task_plans",
    "ycb": "data/assets/mani_skill2_ycb/models",
}


def assets(name: str | None = None, tasks: tuple[str, ...] = TASKS) -> list[Finding]:
    """Each of the three asset folders, and the files that one episode of each subtask leads to.

    `name` stands for MS_ASSET_DIR.
    """
    name = name or os.environ.get("MS_ASSET_DIR")
    expected = "an apartment, generated or ReplicaCAD"
    if not name:
        known = (Path("assets"), Path("replica_cad"), Path.home() / ".maniskill")
        known = [path.absolute() for path in known if (path / "data").is_dir()]
        mend = export(known[0]) if known else generated("assets")
        return [Finding("missing", "MS_ASSET_DIR", "not set", expected, mend)]
    root = Path(name).absolute()
    if not (root / "data").is_dir():
        near = [*root.parents, *(root.iterdir() if root.is_dir() else ())]
        near = [path for path in near if (path / "data/scene_datasets").is_dir()]
        mend = export(near[0]) if near else generated(root)
        got = f"{root}: no folder data in it"
        return [Finding("missing", "MS_ASSET_DIR", got, expected, mend)]
    if found := mixed(root):
        return found
    broken = {asset: [] for asset in ASSETS}
    for asset, path in sampled(root, tasks):
        if (fault := fault_of(path)) and all(fault not in each for each in broken[asset]):
            broken[asset].append(fault)
    found = []
    for asset, where in ASSETS.items():
        if not (root / where).is_dir():
            mend = rename(root, Path(where)) or fetch(root, asset)
            found.append(Finding("missing", asset, f"no {root / where}", "a folder", mend))
        elif faults := broken[asset]:
            got = f"{len(faults)} files of a sample: {'; '.join(faults[:3])}"
            found.append(Finding("missing", asset, got, "whole files", fetch(root, asset)))
        else:
            got = f"{root / where}: {len([*(root / where).iterdir()])} entries; a sample is whole"
            found.append(Finding("ok", asset, got))
    return found


def mixed(root: Path) -> list[Finding]:
    """Downloaded scenes or objects in the folder of a generated apartment.

    There the simulator would put the generated apartment's simplified robot into real scenes.
    Generated scenes have file names of real ones, but name a table that no real one has.
    """
    marker, ycb = root / "household.json", root / ASSETS["ycb"]
    if not marker.is_file():
        return []
    scenes = [path for path in (root / ASSETS["ReplicaCAD"]).glob("*.json") if content(path)]
    table = {path: f"objects/table_{path.name.partition('.')[0]}".encode() for path in scenes}
    made = [path for path in scenes if table[path] in path.read_bytes()]
    models = [path for path in ycb.glob("*/") if path.name not in sum(OBJECTS.values(), ())]
    real = [*(set(scenes) - set(made)), *models]
    if not real:
        return []
    parts = [marker, root / "data/robots"]
    parts += [folder for folder, ours in ((root / REPLICA, made), (ycb.parent, not models)) if ours]
    parts = [path for path in parts if path.exists()]
    aside, own = f"{root}-generated", f"{root}-real"
    mend = f"mkdir {quoted(aside)} && mv {quoted(*parts, aside)} && mv -T {quoted(root, own)}"
    got = f"{marker} of a generated apartment, and {min(real)} of a download"
    expected = "a folder for each"
    return [Finding("missing", "MS_ASSET_DIR", got, expected, f"{mend} && {export(own)}")]


def export(root: object) -> str:
    return f"export MS_ASSET_DIR={quoted(root)}"


def generated(folder: object, seed: int = 0) -> str:
    out = Path(folder).absolute()
    return f"python -m household.assets --out {quoted(out)} --seed {seed} && {export(out)}"


def fetch(root: Path, asset: str) -> str:
    """The command that brings an asset again, and removes nothing else.

    mani_skill's own download of ReplicaCAD would: its folder holds rearrange and, by default,
    rearrange-dataset.
    """
    marker = root / "household.json"
    if marker.is_file():
        again = generated(root, content(marker).get("seed", 0))
        return f"mv -T {quoted(root)} {quoted(root)}-aside && {again}"
    if asset == "ReplicaCAD":
        folder = quoted(root / REPLICA)
        return f"hf download haosulab/ReplicaCAD --repo-type dataset --local-dir {folder}"
    return f"MS_ASSET_DIR={quoted(root)} python -m mani_skill.utils.download_asset -y {asset}"


def rename(root: Path, where: Path) -> str | None:
    """The `mv` for a folder that is there under another name, or one level too deep."""
    part = root
    for depth, name in enumerate(where.parts):
        rest = Path(*where.parts[depth + 1 :])
        if not (part / name).is_dir():
            for other in part.glob("*/"):
                if rest.parts and (other / rest).is_dir():
                    return f"mv {quoted(other, part / name)}"
                if (other / name / rest).is_dir():
                    return f"mv {quoted(other)}/* {quoted(part)}"
            return None
        part /= name
    return None


def fault_of(path: Path) -> str | None:
    """Why a file cannot be used, if that can be seen at its ends."""
    if not path.is_file() or not path.stat().st_size:
        return f"{path}: {'empty' if path.is_file() else 'not there'}"
    if path.suffix == ".json":
        with path.open("rb") as file:
            file.seek(-min(64, path.stat().st_size), os.SEEK_END)
            whole = file.read().rstrip().endswith((b"}", b"]"))
    else:
        whole = path.suffix != ".pt" or zipfile.is_zipfile(path)
    return None if whole else f"{path}: cut off"


def content(path: Path) -> dict:
    """A JSON file; {} when it is broken, which fault_of says."""
    return {} if fault_of(path) else json.loads(path.read_bytes())


def sampled(root: Path, tasks: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """(asset, file): all plans and starts, and what the first validation plan of each leads to."""
    rearrange, models = root / REPLICA / "rearrange", root / ASSETS["ycb"]
    yield "ycb", models.parent / "info_pick_v0.json"
    for task in tasks:
        for model in OBJECTS[task]:
            yield "ycb", models / model / "collision.ply"
            yield "ycb", models / model / "textured.obj"
        for subtask in SUBTASKS:
            names = targets(task, subtask)
            for split in ("train", "val") if names else ():
                plans = rearrange / "task_plans" / task / subtask / split
                every = ("all",) if subtask in ("pick", "place") else ()
                for name in (*names, *every):
                    yield "ReplicaCADRearrange", plans / f"{name}.json"
                starts = rearrange / "spawn_data" / task / subtask / split / "spawn_data.pt"
                yield "ReplicaCADRearrange", starts
            if names and (plan := content(plans / f"{names[0]}.json").get("plans")):
                yield "ReplicaCADRearrange", rearrange / plan[0]["init_config_name"]
                yield from scene_files(root / REPLICA, plan[0]["build_config_name"])


def scene_files(replica: Path, scene: str) -> Iterator[tuple[str, Path]]:
    """A scene and what it is built of, where mani_skill's ReplicaCAD scene builder looks for it."""
    path = replica / "configs/scenes" / scene
    yield "ReplicaCAD", path
    parts = content(path)
    if parts:
        stage = Path(parts["stage_instance"]["template_name"]).name
        yield "ReplicaCAD", replica / f"stages/{stage}.glb"
    for part in parts.get("object_instances", ()):
        config = replica / f"configs/objects/{Path(part['template_name']).name}.object_config.json"
        yield "ReplicaCAD", config
        if asset := content(config).get("render_asset"):
            yield "ReplicaCAD", config.parent / asset
    for part in parts.get("articulated_object_instances", ()):
        name = part["template_name"]
        if "door" not in name:  # skipped by the scene builder
            yield "ReplicaCAD", replica / f"urdf/{name}/{name}.urdf"
