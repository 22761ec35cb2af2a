"""Episodes of the miniature apartment: object poses, task plans, start poses of the robot.

The files have the layout of ReplicaCADRearrange's episodes and MS-HAB's task plans and spawn data.
Positions are in the simulator's frame, metres; `rng` varies episodes and start poses.
"""

from collections import namedtuple
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sapien
import torch
from mani_skill.agents.robots.fetch.fetch import Fetch
from transforms3d.quaternions import axangle2quat, mat2quat

from household import furniture as parts

EPISODES = 18  # per task and split; each has three of the nine objects, or apple and bowl
START_POSES = dict(train=64, val=32)  # per episode and subtask
CLUTTER = tuple(parts.OBJECTS)[1:]  # TidyHouse and PrepareGroceries; SetTable has apple and bowl
SLOTS = (-0.42, 0.0, 0.42)  # where objects stand along a table or counter, metres from its middle

REST = Fetch.keyframes["rest"].qpos
TO_TABLE, TO_CUPBOARDS = 0.0, np.pi  # the robot's yaw: the table is towards +x, cupboards -x
# Distance of the base to the target at the start, and its variation; metres, rad.
START_TABLE, START_DRAWER, START_DOOR, START_APPLE = 0.95, 1.35, 1.25, 1.15
START_OPEN_DRAWER = START_DRAWER + 0.10  # closing needs no step back
VARY_AHEAD, VARY_ASIDE, VARY_YAW = 0.10, 0.08, 0.06
# Sideways from the fridge's middle: opening starts on the handle's side, closing on the hinge's
# side, in front of the open door's outer face.
DOOR_ASIDE = 0.12
GOAL_CORNERS = [(-0.15, -0.15), (0.15, -0.15), (0.15, 0.15), (-0.15, 0.15)]  # around a goal, m
# The gripper at rest points down: an upright object's z is its -x, and the fingers close along y.
UPRIGHT_IN_HAND = mat2quat(np.array([[0, 0, -1], [0, 1, 0], [1, 0, 0]]))
PALM_DEPTH = 0.029  # palm to tcp, less than in the mesh: nothing may touch the palm at the start

Scene = namedtuple("Scene", "name counter fridge table")  # x, y of each piece of furniture
Episode = namedtuple("Episode", "name scene objects")  # objects: name -> ([x, y, z], yaw)


def write_episode(rearrange: Path, episode: Episode) -> None:
    """Write rearrange/<split>/<task>/episode_<n>.json, the initial poses of the objects."""
    y_up = sapien.Pose(q=axangle2quat([1, 0, 0], np.pi / 2))
    to_simulator = sapien.Pose(q=y_up.q, p=[0, 0, 0.01])
    objects = []
    for name, (position, yaw) in episode.objects.items():
        pose = sapien.Pose(position, axangle2quat([0, 0, 1], yaw))
        # mani_skill's replicacad/rearrange/scene_builder.py places to_simulator * stored * y_up^-1.
        stored = to_simulator.inv() * pose * y_up
        objects.append([f"{name}.object_config.json", stored.to_transformation_matrix().tolist()])
    scene_id = f"data/replica_cad/configs/scenes/{episode.scene.name}"
    content = dict(rigid_objs=objects, ao_states={}, scene_id=scene_id)
    parts.write_json(rearrange / episode.name, content)


def stand_on(name: str, x: float, y: float, surface: float) -> np.ndarray:
    """Return the position of an object that stands on a surface of this height."""
    return np.array([x, y, surface + parts.OBJECTS[name][1][2] + 0.002])


class Surface(NamedTuple):
    """A top with a row of objects near the edge that the robot faces."""

    furniture: str  # a field of Scene
    row: float  # x of the row relative to the furniture, metres
    vary: float  # variation of x, metres
    yaw: float  # of the robot
    height: float

    def draw_position(self, scene: Scene, slot: float, rng) -> tuple[float, float]:
        x, y = getattr(scene, self.furniture) + np.array([self.row, slot])
        return x + rng.uniform(-self.vary, self.vary), y + rng.uniform(-0.06, 0.06)


TABLE = Surface("table", -parts.TABLE_SIZE[0] / 2 + 0.18, 0.05, TO_TABLE, parts.TABLE_SIZE[1])
COUNTER = Surface("counter", -0.15, 0.04, TO_CUPBOARDS, parts.COUNTER_SIZE[1])


class Plans:
    """The plans and start poses of one task, subtask and split."""

    def __init__(self, task: str, subtask: str, split: str):
        self.task, self.subtask, self.split = task, subtask, split
        self.plans: dict[str, list[dict]] = {}
        self.spawns: dict[str, dict[str, torch.Tensor]] = {}

    def add(self, target: str, episode: Episode, starts: list[dict], **fields) -> None:
        """Add one plan with the start poses `starts`; `fields` are the subtask's own."""
        plans = self.plans.setdefault(target, [])
        uid = f"{self.task}-{self.subtask}-{self.split}-{target}-{len(plans)}-0"
        plan = dict(
            subtasks=[dict(type=self.subtask, uid=uid, **fields)],
            build_config_name=episode.scene.name,
            init_config_name=episode.name,
        )
        plans.append(plan)
        self.spawns[uid] = {
            key: torch.tensor(np.stack([start[key] for start in starts]), dtype=torch.float32)
            for key in starts[0]
        }

    def write(self, rearrange: Path) -> None:
        """Write one plan file for each target, for objects also all.json, and the start poses."""
        place = Path(self.task, self.subtask, self.split)
        dataset = f"ReplicaCAD{self.task.title().replace('_', '')}{self.split.capitalize()}"
        files = dict(self.plans)
        if self.subtask in ("pick", "place"):
            files["all"] = [plan for plans in self.plans.values() for plan in plans]
        for name, plans in files.items():
            content = dict(dataset=dataset, plans=plans)
            parts.write_json(rearrange / "task_plans" / place / f"{name}.json", content)
        path = rearrange / "spawn_data" / place / "spawn_data.pt"
        path.parent.mkdir(parents=True)
        torch.save(self.spawns, path)


def start_pose(xy, yaw: float, distance: float, rng: np.random.Generator) -> dict:
    """Return a start pose at rest, `distance` metres before `xy` and facing it."""
    c, s = np.cos(yaw), np.sin(yaw)
    forward, left = np.array([c, s]), np.array([-s, c])
    ahead, aside = rng.uniform(-1, 1, 2) * [VARY_AHEAD, VARY_ASIDE]
    base = np.asarray(xy) - forward * (distance + ahead) + left * aside
    qpos = REST.copy()
    # The robot's root is placed at x, y; its virtual joint holds the heading.
    qpos[2] = yaw + rng.uniform(-VARY_YAW, VARY_YAW)
    return dict(robot_pos=np.append(base, 0.02), robot_qpos=qpos)


def add_place(plans: Plans, name: str, episode: Episode, slot: float, rng) -> None:
    """Add a plan to place an object that starts between the fingers."""
    x, y = TABLE.draw_position(episode.scene, slot, rng)
    _, half_width, half_height = parts.OBJECTS[name][1]
    below = max(0.0, half_height - PALM_DEPTH)  # a tall object's centre is below the tcp
    starts = []
    for _ in range(START_POSES[plans.split]):
        start = start_pose((x, y), TO_TABLE, START_TABLE, rng)
        start["robot_qpos"][-2:] = half_width
        starts.append(start | dict(obj_raw_pose_wrt_tcp=np.array([below, 0, 0, *UPRIGHT_IN_HAND])))
    x, y, z = stand_on(name, x, y, TABLE.height).tolist()
    area = [[x + dx, y + dy, z] for dx, dy in GOAL_CORNERS]
    goal = dict(goal_pos=[x, y, z], goal_rectangle_corners=area)
    plans.add(name, episode, starts, obj_id=f"{name}-0", **goal)


def write_clutter(rearrange: Path, task: str, split: str, scenes: list[Scene], rng) -> None:
    """Write pick and place. TidyHouse picks from the table, PrepareGroceries from the counter."""
    pick, place = Plans(task, "pick", split), Plans(task, "place", split)
    top = TABLE if task == "tidy_house" else COUNTER
    for i in range(EPISODES):
        scene = scenes[i % len(scenes)]
        # Every object occurs in every scene and at every slot.
        names = [CLUTTER[(3 * (i // len(scenes)) + i + k) % len(CLUTTER)] for k in (0, 4, 8)]
        slots = dict(zip(names, rng.permutation(SLOTS), strict=True))
        objects = {}
        for name, slot in slots.items():
            position = stand_on(name, *top.draw_position(scene, slot, rng), top.height)
            objects[name] = (position, rng.uniform(-0.3, 0.3))
        episode = Episode(f"{split}/{task}/episode_{i}.json", scene, objects)
        write_episode(rearrange, episode)
        for name, (position, _) in objects.items():
            number = START_POSES[split]
            starts = [start_pose(position[:2], top.yaw, START_TABLE, rng) for _ in range(number)]
            pick.add(name, episode, starts, obj_id=f"{name}-0")
            add_place(place, name, episode, slots[name], rng)
    pick.write(rearrange)
    place.write(rearrange)


def write_set_table(rearrange: Path, split: str, scenes: list[Scene], counter, fridge, rng) -> None:
    """Write SetTable: the bowl is in the drawer, the apple in the fridge, both open for a pick."""
    plans = {sub: Plans("set_table", sub, split) for sub in ("pick", "place", "open", "close")}
    for i in range(EPISODES):
        scene = scenes[i % len(scenes)]
        bowl = scene.counter + rng.uniform([-0.21, -0.10], [-0.15, 0.10]) + [0, parts.DRAWER_Z]
        apple = scene.fridge + np.array([parts.STAND_X, -parts.STAND_Z])
        objects = {
            "024_bowl": (stand_on("024_bowl", *bowl, parts.DRAWER_FLOOR), 0.0),
            "013_apple": (stand_on("013_apple", *apple, parts.STAND_TOP), 0.0),
        }
        episode = Episode(f"{split}/set_table/episode_{i}.json", scene, objects)
        write_episode(rearrange, episode)
        add_cupboard(plans, episode, counter, "024_bowl", bowl_starts, rng)
        add_cupboard(plans, episode, fridge, "013_apple", apple_starts, rng)
        for name in ("013_apple", "024_bowl"):
            add_place(plans["place"], name, episode, rng.choice(SLOTS), rng)
    for each in plans.values():
        each.write(rearrange)


def add_cupboard(plans: dict[str, Plans], episode: Episode, cupboard, name, starts, rng) -> None:
    """Add plans to pick the object `name` from the open cupboard, to open and to close it.

    `starts` draws the start poses of the three plans.
    """
    number, object_id = START_POSES[plans["pick"].split], f"{name}-0"
    pick, open_, close = zip(*(starts(episode, cupboard, rng) for _ in range(number)))
    fields = dict(
        articulation_type=cupboard.name,
        articulation_id=f"{cupboard.name}-0",
        articulation_handle_link_idx=cupboard.handle_link,
        articulation_handle_active_joint_idx=cupboard.handle_joint,
    )
    handle = dict(articulation_relative_handle_pos=cupboard.handle_pos, **fields)
    removed = dict(remove_obj_id=object_id) if name == "024_bowl" else {}
    plans["pick"].add(name, episode, pick, obj_id=object_id, articulation_config=fields)
    plans["open"].add(cupboard.name, episode, open_, obj_id=object_id, **handle)
    plans["close"].add(cupboard.name, episode, close, **removed, **handle)


def draw_opening(cupboard: parts.Furniture, low: float, high: float, rng) -> np.ndarray:
    """Return joint positions with the handle's joint between two fractions of its range."""
    qpos, upper = np.zeros(len(cupboard.links) - 1), cupboard.links[cupboard.handle_link].upper
    qpos[cupboard.handle_joint] = upper * rng.uniform(low, high)
    return qpos


def bowl_starts(episode: Episode, counter, rng) -> tuple[dict, dict, dict]:
    """Return start poses to pick the bowl, to open and to close the drawer."""
    front = episode.scene.counter + np.array([0, parts.DRAWER_Z])
    qpos = draw_opening(counter, 0.97, 1.0, rng)
    # The drawer carries the bowl.
    bowl = episode.objects["024_bowl"][0] + np.array([qpos[counter.handle_joint], 0, 0])
    pick = start_pose((front[0], bowl[1]), TO_CUPBOARDS, START_DRAWER, rng)
    pick |= dict(articulation_qpos=qpos, obj_raw_pose=[*bowl, 1, 0, 0, 0])
    open_ = start_pose(front, TO_CUPBOARDS, START_DRAWER, rng)
    qpos = draw_opening(counter, 0.90, 1.0, rng)
    close = start_pose(front, TO_CUPBOARDS, START_OPEN_DRAWER, rng)
    return pick, open_, close | dict(articulation_qpos=qpos)


def apple_starts(episode: Episode, fridge, rng) -> tuple[dict, dict, dict]:
    """Return start poses to pick the apple, to open and to close the fridge."""
    front, aside = episode.scene.fridge, np.array([0, DOOR_ASIDE])
    apple, _ = episode.objects["013_apple"]
    # Away from the open door, whose edge would meet the robot's upper arm.
    pick = start_pose(apple[:2] - aside, TO_CUPBOARDS, START_APPLE, rng)
    qpos = draw_opening(fridge, 0.97, 1.0, rng)
    pick |= dict(articulation_qpos=qpos, obj_raw_pose=[*apple, 1, 0, 0, 0])
    open_ = start_pose(front - aside, TO_CUPBOARDS, START_DOOR, rng)
    close = start_pose(front + aside, TO_CUPBOARDS, START_DOOR, rng)
    return pick, open_, close | dict(articulation_qpos=draw_opening(fridge, 0.75, 0.90, rng))
