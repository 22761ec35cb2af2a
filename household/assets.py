"""Generate a miniature apartment in the file layout of ReplicaCAD, ReplicaCADRearrange and YCB.

    python -m household.assets --out assets [--seed 0]       # then: MS_ASSET_DIR=assets

ManiSkill-HAB's own, unpatched classes load it: SetTable, TidyHouse and PrepareGroceries, train and val. A seed is a
family of apartments: colours and handles are the same in all its scenes, furniture positions and walls are not. The
scenes, episodes and start poses of val are others than those of train, of the same kind.

Where it differs from the real MS-HAB: one room, furniture of boxes, objects small enough for the gripper and always
reachable from the front; the apple stands on a block in the fridge, and goals lie on a table.
"""

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sapien
import torch
import trimesh
import tyro
from mani_skill.agents.robots.fetch.fetch import Fetch
from transforms3d.quaternions import axangle2quat, mat2quat

from household import furniture as parts
from household.robot import write_light_fetch

# The names must be in mani_skill's metadata/scene_configs.json.
SCENES = dict(
    train=[f"v3_sc0_staging_0{i}.scene_instance.json" for i in range(3)],
    val=[f"v3_sc1_staging_0{i}.scene_instance.json" for i in range(2)],
)
DATASETS = dict(
    set_table="ReplicaCADSetTable",
    tidy_house="ReplicaCADTidyHouse",
    prepare_groceries="ReplicaCADPrepareGroceries",
)
EPISODES = 18  # per task and split; each has three of the nine objects, or apple and bowl
START_POSES = dict(train=64, val=32)  # per episode and subtask

# Half sizes (radius, radius, half height for round things), colour, density. Fetch's fingers open to 10 cm and close
# along y; they reach 3 cm to either side of the tcp, where the palm begins.
OBJECTS = {
    "013_apple": ("ball", (0.036, 0.036, 0.036), (210, 30, 30), 400),
    "024_bowl": ("can", (0.040, 0.040, 0.030), (200, 60, 140), 400),
    "002_master_chef_can": ("can", (0.040, 0.040, 0.042), (40, 70, 170), 400),
    "003_cracker_box": ("box", (0.070, 0.025, 0.042), (220, 60, 30), 300),
    "004_sugar_box": ("box", (0.045, 0.020, 0.042), (235, 205, 40), 400),
    "005_tomato_soup_can": ("can", (0.033, 0.033, 0.042), (200, 40, 60), 500),
    "007_tuna_fish_can": ("can", (0.040, 0.040, 0.025), (60, 120, 190), 500),
    "008_pudding_box": ("box", (0.055, 0.022, 0.038), (150, 85, 40), 400),
    "009_gelatin_box": ("box", (0.045, 0.020, 0.034), (215, 70, 100), 400),
    "010_potted_meat_can": ("box", (0.050, 0.025, 0.040), (50, 70, 200), 500),
}
CLUTTER = tuple(OBJECTS)[1:]  # TidyHouse and PrepareGroceries; SetTable has apple and bowl
SLOTS = (-0.42, 0.0, 0.42)  # where objects stand along a table or counter, metres from its middle

REST = Fetch.keyframes["rest"].qpos
YAW_TABLE, YAW_CUPBOARDS = 0.0, np.pi  # the robot faces the table towards +x, cupboards towards -x
# How far the base starts from the target, and how much that varies; metres, rad.
START_TABLE, START_DRAWER, START_DOOR, START_APPLE = 0.95, 1.35, 1.25, 1.15
VARY_AHEAD, VARY_ASIDE, VARY_YAW = 0.10, 0.08, 0.10
DOOR_ASIDE = 0.12  # towards the handle for opening; for closing towards the hinge, where the open door's outside is

# ReplicaCAD's files are y-up (mani_skill: replicacad/rearrange/scene_builder.py).
Y_UP = axangle2quat([1, 0, 0], np.pi / 2)
# The gripper at rest points down: an upright object's z is the gripper's -x, its y the direction of the fingers.
UPRIGHT_IN_HAND = mat2quat(np.array([[0, 0, -1], [0, 1, 0], [1, 0, 0]]))
PALM_DEPTH = 0.029  # palm to tcp, less than the mesh has: nothing may touch the palm at the start


@dataclass
class Scene:
    """One apartment. Positions are x, y in the simulator's frame, metres."""

    name: str
    split: str
    counter: np.ndarray
    fridge: np.ndarray
    table: np.ndarray


@dataclass
class Episode:
    """Where the objects are at the start: name -> x, y, z and yaw."""

    name: str
    scene: Scene
    objects: dict[str, tuple[np.ndarray, float]]


def main(out: Path, seed: int = 0) -> None:
    """Write OUT/data, for MS_ASSET_DIR=OUT. A folder that is complete already is left alone."""
    marker = dict(seed=seed, code=code_version())
    if out.exists() and any(out.iterdir()):
        check_marker(out, marker)
        print(f"{out} is already the generated apartment of seed {seed}: nothing to do")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside OUT, for an atomic rename: OUT is complete or not there, however the run ends.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        apartment = Path(temporary, "apartment")
        generate(apartment / "data", seed)
        parts.write_json(apartment / "household.json", marker)
        apartment.rename(out)
    print(f"wrote {out} (seed {seed}); use it with MS_ASSET_DIR={out.absolute()}")


def code_version() -> str:
    """Hash of the generator's sources."""
    sources = [Path(__file__).with_name(n) for n in ("assets.py", "furniture.py", "robot.py")]
    return hashlib.sha256(b"".join(s.read_bytes() for s in sources)).hexdigest()[:12]


def check_marker(out: Path, expected: dict) -> None:
    path = out / "household.json"
    if not path.is_file():
        raise FileExistsError(f"{out} is not empty and not a generated apartment; choose another --out")
    found = json.loads(path.read_text())
    if found != expected:
        raise FileExistsError(
            f"{out} holds the apartment {found}, not {expected} (code: the generator's version). "
            f"Choose another --out, or remove it: rm -r {out}"
        )


def generate(data: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tints: dict[tuple, tuple] = {}

    def tint(color):
        """This family's shade of a colour."""
        if color not in tints:
            tints[color] = vary_color(rng, color)
        return tints[color]

    replica_cad = data / "scene_datasets/replica_cad_dataset"
    counter, fridge = parts.kitchen_counter(rng, tint), parts.fridge(rng, tint)
    for cupboard in (counter, fridge):
        parts.write_urdf(replica_cad / f"urdf/{cupboard.name}/{cupboard.name}.urdf", cupboard)
    write_objects(data / "assets/mani_skill2_ycb", tint)
    for split, names in SCENES.items():
        scenes = [write_scene(replica_cad, name, split, rng) for name in names]
        write_set_table(replica_cad / "rearrange", split, scenes, counter, fridge, rng)
        for task in ("tidy_house", "prepare_groceries"):
            write_clutter(replica_cad / "rearrange", task, split, scenes, rng)
    write_light_fetch(data / "robots/fetch_light")


def vary_color(rng: np.random.Generator, color, amount: int = 14) -> tuple[int, int, int]:
    return tuple(int(v) for v in (color + rng.integers(-amount, amount + 1, 3)).clip(0, 255))


def write_objects(folder: Path, tint) -> None:
    infos = {}
    for name, (shape, half, color, density) in OBJECTS.items():
        if shape == "ball":
            mesh = trimesh.creation.icosphere(subdivisions=2, radius=half[0])
        elif shape == "can":
            mesh = trimesh.creation.cylinder(radius=half[0], height=2 * half[2], sections=24)
        else:
            mesh = trimesh.creation.box(np.multiply(half, 2))
        infos[name] = parts.write_ycb_model(folder / "models" / name, mesh, tint(color), density)
    parts.write_json(folder / "info_pick_v0.json", infos)


# --- Scenes and episodes


def write_scene(folder: Path, name: str, split: str, rng: np.random.Generator) -> Scene:
    scene = Scene(
        name,
        split,
        counter=np.array([-2.35, -1.0]) + rng.uniform(-0.1, 0.1, 2),
        fridge=np.array([-2.25, 1.2]) + rng.uniform(-0.1, 0.1, 2),
        table=np.array([1.6, 0.3]) + rng.uniform(-0.2, 0.2, 2),
    )
    stem = name.partition(".")[0]
    floor, *walls = [
        vary_color(rng, color) for color in [(150, 120, 95), *[(200, 200, 195)] * 4]
    ]
    parts.write_glb(folder / f"stages/{stem}.glb", parts.room_boxes(floor, walls))
    table = f"table_{stem}"
    table_color = vary_color(rng, (120, 75, 45))
    parts.write_glb(folder / f"objects/{table}.glb", parts.table_boxes(table_color))
    parts.write_json(
        folder / f"configs/objects/{table}.object_config.json",
        dict(render_asset=f"../../objects/{table}.glb"),
    )

    def instance(template: str, xy: np.ndarray, **kwargs) -> dict:
        x, y = xy.tolist()
        return dict(template_name=template, translation=[x, 0, -y], rotation=[1, 0, 0, 0], **kwargs)

    parts.write_json(
        folder / f"configs/scenes/{name}",
        dict(
            stage_instance=dict(template_name=f"stages/{stem}"),
            object_instances=[instance(f"objects/{table}", scene.table, motion_type="STATIC")],
            articulated_object_instances=[
                instance("fridge", scene.fridge, fixed_base=True),
                instance("kitchen_counter", scene.counter, fixed_base=True),
            ],
        ),
    )
    return scene


def write_episode(folder: Path, episode: Episode) -> None:
    """Write rearrange/<split>/<task>/episode_<n>.json, the initial poses of the objects."""
    to_simulator = sapien.Pose(q=Y_UP, p=[0, 0, 0.01])  # then the inverse of Y_UP, as the loader applies them
    rigid = []
    for name, (position, yaw) in episode.objects.items():
        pose = sapien.Pose(position, axangle2quat([0, 0, 1], yaw))
        stored = to_simulator.inv() * pose * sapien.Pose(q=Y_UP)
        rigid.append([f"{name}.object_config.json", stored.to_transformation_matrix().tolist()])
    scene_id = f"data/replica_cad/configs/scenes/{episode.scene.name}"
    content = dict(rigid_objs=rigid, ao_states={}, scene_id=scene_id)
    parts.write_json(folder / episode.name, content)


def standing(name: str, x: float, y: float, surface: float) -> np.ndarray:
    """Position of an object on a surface at this height."""
    return np.array([x, y, surface + OBJECTS[name][1][2] + 0.002])


def table_slot(scene: Scene, slot: float, rng: np.random.Generator) -> tuple[float, float]:
    """x, y near the edge of the table that the robot faces."""
    x, y = scene.table + [-parts.TABLE_SIZE[0] / 2 + 0.18, slot]
    return x + rng.uniform(-0.05, 0.05), y + rng.uniform(-0.06, 0.06)


def counter_slot(scene: Scene, slot: float, rng: np.random.Generator) -> tuple[float, float]:
    """x, y near the front edge of the counter."""
    x, y = scene.counter + [-0.15, slot]
    return x + rng.uniform(-0.04, 0.04), y + rng.uniform(-0.06, 0.06)


# --- Start poses and task plans


class Plans:
    """The plans and start poses of one task, subtask and split, collected and then written."""

    def __init__(self, task: str, subtask: str, split: str):
        self.task, self.subtask, self.split = task, subtask, split
        self.plans: dict[str, list[dict]] = {}
        self.spawns: dict[str, dict[str, torch.Tensor]] = {}

    def add(self, target: str, episode: Episode, starts: list[dict], **fields) -> None:
        """Add one plan; `starts` are the spawns of `start_pose`, `fields` the subtask's own."""
        number = len(self.plans.setdefault(target, []))
        uid = f"{self.task}-{self.subtask}-{self.split}-{target}-{number}-0"
        self.plans[target].append(
            dict(
                subtasks=[dict(type=self.subtask, uid=uid, **fields)],
                build_config_name=episode.scene.name,
                init_config_name=episode.name,
            )
        )
        self.spawns[uid] = {
            key: torch.tensor(np.stack([start[key] for start in starts]), dtype=torch.float32)
            for key in starts[0]
        }

    def write(self, rearrange: Path, every: bool) -> None:
        """Write one plan file per target, with `every` also all.json, and the start poses."""
        place = Path(self.task, self.subtask, self.split)
        plans = dict(self.plans)
        if every:
            plans["all"] = [plan for target in self.plans.values() for plan in target]
        for target, chosen in plans.items():
            parts.write_json(
                rearrange / "task_plans" / place / f"{target}.json",
                dict(dataset=DATASETS[self.task] + self.split.capitalize(), plans=chosen),
            )
        path = rearrange / "spawn_data" / place / "spawn_data.pt"
        path.parent.mkdir(parents=True)
        torch.save(self.spawns, path)


def start_pose(xy, yaw: float, distance: float, rng: np.random.Generator, **more) -> dict:
    """A start of the robot `distance` metres before `xy`, at rest, facing it; `more` are further keys of the spawn."""
    forward, left = np.array([np.cos(yaw), np.sin(yaw)]), np.array([-np.sin(yaw), np.cos(yaw)])
    ahead, aside = rng.uniform(-1, 1, 2) * [VARY_AHEAD, VARY_ASIDE]
    base = np.asarray(xy) - forward * (distance + ahead) + left * aside
    qpos = REST.copy()
    qpos[2] = yaw + rng.uniform(-VARY_YAW, VARY_YAW)  # the root has x, y; the virtual joint the heading
    return dict(robot_pos=np.append(base, 0.02), robot_qpos=qpos) | more


def holding(start: dict, name: str) -> dict:
    """Put the object between the fingers, each at half its width; its centre at the tcp, or lower if it is tall."""
    _, half_width, half_height = OBJECTS[name][1]
    start["robot_qpos"][-2:] = half_width
    below = max(0.0, half_height - PALM_DEPTH)
    return start | dict(obj_raw_pose_wrt_tcp=np.array([below, 0, 0, *UPRIGHT_IN_HAND]))


def goal_fields(position: np.ndarray) -> dict:
    x, y, z = position.tolist()
    corners = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    return dict(
        goal_pos=[x, y, z],
        goal_rectangle_corners=[[x + 0.15 * dx, y + 0.15 * dy, z] for dx, dy in corners],
    )


def add_place(plans: Plans, name: str, episode: Episode, slot: float, rng) -> None:
    x, y = table_slot(episode.scene, slot, rng)
    starts = [
        holding(start_pose((x, y), YAW_TABLE, START_TABLE, rng), name)
        for _ in range(START_POSES[plans.split])
    ]
    goal = goal_fields(standing(name, x, y, parts.TABLE_SIZE[1]))
    plans.add(name, episode, starts, obj_id=f"{name}-0", **goal)


def write_clutter(rearrange: Path, task: str, split: str, scenes: list[Scene], rng) -> None:
    """TidyHouse: from table to table. PrepareGroceries: from the kitchen counter to the table."""
    pick, place = Plans(task, "pick", split), Plans(task, "place", split)
    on_table = task == "tidy_house"
    yaw = YAW_TABLE if on_table else YAW_CUPBOARDS
    surface = parts.TABLE_SIZE[1] if on_table else parts.COUNTER_SIZE[1]
    for i in range(EPISODES):
        scene = scenes[i % len(scenes)]
        # Each object meets each scene and each slot.
        names = [CLUTTER[(3 * (i // len(scenes)) + i + k) % len(CLUTTER)] for k in (0, 4, 8)]
        slots = dict(zip(names, rng.permutation(SLOTS), strict=True))
        objects = {}
        for name, slot in slots.items():
            x, y = table_slot(scene, slot, rng) if on_table else counter_slot(scene, slot, rng)
            objects[name] = (standing(name, x, y, surface), rng.uniform(-0.3, 0.3))
        episode = Episode(f"{split}/{task}/episode_{i}.json", scene, objects)
        write_episode(rearrange, episode)
        for name, (position, _) in objects.items():
            starts = [
                start_pose(position[:2], yaw, START_TABLE, rng) for _ in range(START_POSES[split])
            ]
            pick.add(name, episode, starts, obj_id=f"{name}-0")
            add_place(place, name, episode, slots[name], rng)
    for plans in (pick, place):
        plans.write(rearrange, every=True)


def write_set_table(rearrange: Path, split: str, scenes: list[Scene], counter, fridge, rng) -> None:
    """The bowl is in the drawer and the apple in the fridge, which are open when they are to be picked."""
    plans = {sub: Plans("set_table", sub, split) for sub in ("pick", "place", "open", "close")}
    for i in range(EPISODES):
        episode = set_table_episode(split, i, scenes[i % len(scenes)], rng)
        write_episode(rearrange, episode)
        add_bowl_and_drawer(plans, episode, counter, rng)
        add_apple_and_fridge(plans, episode, fridge, rng)
        for name in ("013_apple", "024_bowl"):
            add_place(plans["place"], name, episode, rng.choice(SLOTS), rng)
    for subtask, collected in plans.items():
        collected.write(rearrange, every=subtask in ("pick", "place"))


def set_table_episode(split: str, number: int, scene: Scene, rng) -> Episode:
    bowl_x, bowl_y = scene.counter + [-0.18, parts.DRAWER_Z] + rng.uniform(-1, 1, 2) * [0.03, 0.10]
    apple_x, apple_y = scene.fridge + [parts.STAND_X, -parts.STAND_Z]
    objects = {
        "024_bowl": (standing("024_bowl", bowl_x, bowl_y, parts.DRAWER_FLOOR), 0.0),
        "013_apple": (standing("013_apple", apple_x, apple_y, parts.STAND_TOP), 0.0),
    }
    return Episode(f"{split}/set_table/episode_{number}.json", scene, objects)


def opened(cupboard: parts.Furniture, low: float, high: float, rng) -> np.ndarray:
    """Joint positions [dof] with the handle's joint between these fractions of its range."""
    qpos = np.zeros(cupboard.dof)
    qpos[cupboard.handle_joint] = cupboard.upper * rng.uniform(low, high)
    return qpos


def cupboard_fields(cupboard: parts.Furniture) -> dict:
    return dict(
        articulation_type=cupboard.name,
        articulation_id=f"{cupboard.name}-0",
        articulation_handle_link_idx=cupboard.handle_link,
        articulation_handle_active_joint_idx=cupboard.handle_joint,
    )


def add_bowl_and_drawer(plans: dict[str, Plans], episode: Episode, counter, rng) -> None:
    handle = dict(articulation_relative_handle_pos=counter.handle_pos, **cupboard_fields(counter))
    front = episode.scene.counter + [0, parts.DRAWER_Z]
    bowl, _ = episode.objects["024_bowl"]
    pick, open_, close = [], [], []
    for _ in range(START_POSES[plans["pick"].split]):
        qpos = opened(counter, 0.97, 1.0, rng)
        moved = bowl + [qpos[counter.handle_joint], 0, 0]  # the bowl came out with the drawer
        start = start_pose((front[0], moved[1]), YAW_CUPBOARDS, START_DRAWER, rng)
        pick.append(start | dict(articulation_qpos=qpos, obj_raw_pose=[*moved, 1, 0, 0, 0]))
        open_.append(start_pose(front, YAW_CUPBOARDS, START_DRAWER, rng))
        qpos = opened(counter, 0.90, 1.0, rng)
        close.append(
            start_pose(front, YAW_CUPBOARDS, START_DRAWER, rng, articulation_qpos=qpos)
        )
    plans["pick"].add(
        "024_bowl", episode, pick, obj_id="024_bowl-0", articulation_config=cupboard_fields(counter)
    )
    plans["open"].add(counter.name, episode, open_, obj_id="024_bowl-0", **handle)
    plans["close"].add(counter.name, episode, close, remove_obj_id="024_bowl-0", **handle)


def add_apple_and_fridge(plans: dict[str, Plans], episode: Episode, fridge, rng) -> None:
    handle = dict(articulation_relative_handle_pos=fridge.handle_pos, **cupboard_fields(fridge))
    front = episode.scene.fridge
    apple, _ = episode.objects["013_apple"]
    pick, open_, close = [], [], []
    for _ in range(START_POSES[plans["pick"].split]):
        start = start_pose(apple[:2], YAW_CUPBOARDS, START_APPLE, rng)
        qpos = opened(fridge, 0.97, 1.0, rng)
        pick.append(start | dict(articulation_qpos=qpos, obj_raw_pose=[*apple, 1, 0, 0, 0]))
        # In front of the handle; and, for closing, on the side of the door that is to be pushed.
        open_.append(start_pose(front - [0, DOOR_ASIDE], YAW_CUPBOARDS, START_DOOR, rng))
        close_start = start_pose(front + [0, DOOR_ASIDE], YAW_CUPBOARDS, START_DOOR, rng)
        close.append(close_start | dict(articulation_qpos=opened(fridge, 0.75, 0.90, rng)))
    plans["pick"].add(
        "013_apple", episode, pick, obj_id="013_apple-0", articulation_config=cupboard_fields(fridge)
    )
    plans["open"].add(fridge.name, episode, open_, obj_id="013_apple-0", **handle)
    plans["close"].add(fridge.name, episode, close, **handle)


if __name__ == "__main__":
    tyro.cli(main)
