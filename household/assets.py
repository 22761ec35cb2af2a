"""Generate a miniature apartment in the file layout of ReplicaCAD, ReplicaCADRearrange and YCB.

    python -m household.assets --out assets [--seed 0]       # then: MS_ASSET_DIR=assets

ManiSkill-HAB's unpatched classes load it: SetTable, TidyHouse and PrepareGroceries, train and val.
The three scenes of a seed share cupboards; positions and the colours of room and table differ.
Val has the scenes of train, with other episodes and start poses; another seed gives new scenes.

The real apartments differ: here is one room, furniture consists of boxes, objects fit into the
gripper and can be reached from the front, the apple stands on a block in the fridge, and goals lie
on a table.
"""

import tempfile
from functools import cache, partial
from pathlib import Path

import numpy as np

from config import InputError, Seed, quoted
from household import furniture as parts
from household.episodes import Scene, write_clutter, write_set_table
from household.robot import write_light_fetch
from storage.files import read_json
from storage.terminal import cli, user_errors

# The names must be in mani_skill's metadata/scene_configs.json.
SCENES = [f"v3_sc0_staging_0{i}.scene_instance.json" for i in range(3)]
# Change by hand when a generated file changes: results name the apartment by it.
VERSION = "d9abd2d0bb1c"


def main(out: Path, seed: Seed = 0) -> None:
    """Write OUT/data, for MS_ASSET_DIR=OUT. A folder that is complete already is left alone."""
    marker = dict(seed=seed, code=VERSION)
    if out.exists() and any(out.iterdir()):
        path = out / "household.json"
        found = read_json(path) if path.is_file() else "other files"
        if found != marker:
            raise InputError(
                f"{out} holds {found}, expected {marker} (code: the generator's version). "
                f"Choose another --out, or move it aside: mv {quoted(out, f'{out}-aside')}"
            )
        print(f"{out} is already the generated apartment of seed {seed}: nothing to do")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    # Written beside OUT, then renamed: OUT is complete or absent, even after a kill.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        apartment = Path(temporary, "apartment")
        generate(apartment / "data", seed)
        parts.write_json(apartment / "household.json", marker)
        apartment.rename(out)
    print(f"wrote {out} (seed {seed}); use it with MS_ASSET_DIR={out.absolute()}")


def generate(data: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tint = cache(partial(vary_color, rng))  # this seed's shade of a colour
    replica_cad = data / "scene_datasets/replica_cad_dataset"
    counter, fridge = parts.make_counter(rng, tint), parts.make_fridge(rng, tint)
    for cupboard in (counter, fridge):
        parts.write_urdf(replica_cad / "urdf", cupboard)
    parts.write_objects(data / "assets/mani_skill2_ycb", tint)
    scenes = [write_scene(replica_cad, name, rng) for name in SCENES]
    for split in ("train", "val"):
        write_set_table(replica_cad / "rearrange", split, scenes, counter, fridge, rng)
        for task in ("tidy_house", "prepare_groceries"):
            write_clutter(replica_cad / "rearrange", task, split, scenes, rng)
    write_light_fetch(data / "robots/fetch_light")


def vary_color(rng: np.random.Generator, color) -> tuple[int, int, int]:
    return tuple((color + rng.integers(-14, 15, 3)).clip(0, 255).tolist())


def write_scene(folder: Path, name: str, rng: np.random.Generator) -> Scene:
    scene = Scene(
        name,
        counter=np.array([-2.35, -1.0]) + rng.uniform(-0.1, 0.1, 2),
        fridge=np.array([-2.25, 1.2]) + rng.uniform(-0.1, 0.1, 2),
        table=np.array([1.6, 0.3]) + rng.uniform(-0.2, 0.2, 2),
    )
    stem = name.partition(".")[0]
    table = f"table_{stem}"
    floor, *walls = (vary_color(rng, c) for c in [(150, 120, 95), *[(200, 200, 195)] * 4])
    parts.write_glb(folder / f"stages/{stem}.glb", parts.room_boxes(floor, walls))
    wood = vary_color(rng, (120, 75, 45))
    parts.write_glb(folder / f"objects/{table}.glb", parts.table_boxes(wood))
    config = dict(render_asset=f"../../objects/{table}.glb")
    parts.write_json(folder / f"configs/objects/{table}.object_config.json", config)

    def instance(template: str, xy: np.ndarray, **options) -> dict:
        x, y = xy.tolist()
        pose = dict(translation=[x, 0, -y], rotation=[1, 0, 0, 0])
        return dict(template_name=template, **pose, **options)

    content = dict(
        stage_instance=dict(template_name=f"stages/{stem}"),
        object_instances=[instance(f"objects/{table}", scene.table, motion_type="STATIC")],
        articulated_object_instances=[
            instance("fridge", scene.fridge, fixed_base=True),
            instance("kitchen_counter", scene.counter, fixed_base=True),
        ],
    )
    parts.write_json(folder / f"configs/scenes/{name}", content)
    return scene


if __name__ == "__main__":
    with user_errors():
        cli(main)
