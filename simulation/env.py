"""MS-HAB's subtasks as episodes addressed by a seed: the real, unpatched ManiSkill-HAB classes.

    env = SubtaskEnv("set_table", "close", "kitchen_counter", split="val")
    obs = env.reset(seed=7)                  # MS-HAB's own dict, torch, batch of 1
    obs, info = env.step(action)             # action [13] in [-1, 1]

SubtaskEnvs are many of them in one process, on a GPU, which eval.py --envs moves in step.

The apartment is whatever lies in MS_ASSET_DIR: the one `household/assets.py` generates, or the real
ReplicaCAD. MS_ASSET_DIR is read when mani_skill is imported, so it must be set before this file is.
"""

import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import gymnasium
import mani_skill.envs  # noqa: F401  registers the agents and scene builders
import mshab.envs  # noqa: F401  registers the four subtask environments
import numpy as np
import sapien
import torch
from einops import rearrange
from mani_skill import ASSET_DIR
from mani_skill.agents.robots.fetch.fetch import Fetch
from mani_skill.utils import common, sapien_utils
from mshab.envs.planner import Subtask, TaskPlan, plan_data_from_file

import paper
from config import ACTION_DIM, HORIZON, InputError
from simulation.assets import mixed
from storage.files import sha256
from training.checks import require

REARRANGE = ASSET_DIR / "scene_datasets/replica_cad_dataset/rearrange"
REAL_FETCH_URDF = Fetch.urdf_path
LIGHT_FETCH_URDF = ASSET_DIR / "robots/fetch_light/fetch.urdf"  # written by household/robot.py
HOUSEHOLD = ASSET_DIR.parent / "household.json"  # what was generated; a download has none
SENSORS = ("fetch_head", "fetch_hand")  # config.CAMERAS, as MS-HAB names them
BASE_JOINTS = 3  # MS-HAB's qpos leaves out the virtual joints of the base (sequential_task.py)
# The video camera, in the robot's frame at reset, metres: behind its left shoulder, looking ahead.
VIDEO_EYE, VIDEO_LOOK_AT = (-0.9, 1.3, 2.1), (0.8, -0.1, 0.8)
VIDEO_CAMERA = dict(mount=None, width=384, height=384, fov=1.1, shader_pack="minimal")


class SubtaskEnvs:
    """N environments of one subtask of one task that move in step; every scene of a split.

    `target` is an object, an articulation or "all", as MS-HAB names its task plans. With
    `obs_mode="state_dict"` there are no images. ManiSkill simulates several on a GPU alone, by
    `simulation="physx_cuda"`, and only episodes of one cupboard (`cupboards`) at once: it cannot
    view a fridge and a drawer as one. `mshab` is the unwrapped MS-HAB environment, `episodes` says
    what each was started with. Observations are on the simulation's device.

    Raises InputError when MS_ASSET_DIR is not set or lacks the files.
    """

    def __init__(
        self,
        task: str,
        subtask: str,
        target: str,
        split: str = "train",
        obs_mode: str = "rgb+depth+segmentation",
        real_meshes: bool = False,
        simulation: str = "physx_cpu",
        num_envs: int = 1,
    ):
        plan_file, spawn_file = plan_files(task, subtask, target, split)
        self._address = dict(task=task, subtask=subtask, target=target, split=split)
        plan_data = plan_data_from_file(plan_file)
        self._plans, self.num_envs = plan_data.plans, num_envs
        self._starts = torch.load(spawn_file, map_location="cpu", weights_only=True)
        # The file has no name, so that a killed process leaves none behind.
        self._unnamed = tempfile.TemporaryFile()  # noqa: SIM115  as long as we live
        self._start_file = f"/proc/self/fd/{self._unnamed.fileno()}"
        self._write_starts(self._plans[:1])
        light = apartment() is not None and not real_meshes
        Fetch.urdf_path = str(LIGHT_FETCH_URDF) if light else REAL_FETCH_URDF
        # MS-HAB's own arguments (mshab/envs/make.py) without its wrappers, which drop the colours,
        # and without gymnasium's: the horizon is the caller's. It gets one plan: at each reset it
        # reads the episode files of all its plans, and all start poses, seconds with real data.
        self.mshab = gymnasium.make(
            f"{subtask.capitalize()}SubtaskTrain-v0",
            num_envs=num_envs,
            obs_mode=obs_mode,
            sim_backend=simulation,
            render_backend=renderer(),
            robot_uids="fetch",
            control_mode="pd_joint_delta_pos",
            reward_mode="normalized_dense",
            render_mode="rgb_array",
            max_episode_steps=HORIZON,
            task_plans=self._plans[:1],
            scene_builder_cls=plan_data.dataset,
            spawn_data_fp=self._start_file,
            require_build_configs_repeated_equally_across_envs=False,
            add_event_tracker_info=True,
            reconfiguration_freq=0,
            human_render_camera_configs=VIDEO_CAMERA,
        ).unwrapped
        # The other plans, as its constructor would keep them.
        self.mshab.base_task_plans = {(plan.subtasks[0].uid,): plan for plan in self._plans}
        self.mshab.bc_to_task_plans = defaultdict(list)
        for plan in self._plans:
            self.mshab.bc_to_task_plans[plan.build_config_name].append(plan)
        # A set, as MS-HAB's own: its order decides init_config_idx and the order of the objects.
        self._episode_files = {plan.init_config_name for plan in self._plans}
        self._scene_of = {plan.init_config_name: plan.build_config_name for plan in self._plans}
        self.episodes, self.elapsed = [], 0

    def start(self, seeds: Sequence[int]) -> dict:
        """Start an episode in each environment; its seed names a plan and a start (`choose`)."""
        chosen = [self.choose(seed) for seed in seeds]
        plans = [self._plans[plan] for plan, _ in chosen]
        scenes = [plan.build_config_name for plan in plans]
        of_scene, names = self.mshab.bc_to_task_plans, self.mshab.scene_builder.build_configs
        options = dict(
            # Rebuilt every time. On its own, one environment would only ever build the first scene
            # of its plans; and a scene kept from the episode before shows through in a few pixels
            # of the first picture.
            reconfigure=True,
            build_config_idxs=[names.index(scene) for scene in scenes],
            task_plan_idxs=torch.tensor([of_scene[p.build_config_name].index(p) for p in plans]),
            spawn_selection_idxs=[spawn for _, spawn in chosen],
        )
        self._write_starts(plans)
        # A scene has the objects of all its episodes. `unwrapped`: a wrapper would keep the names.
        self.mshab.unwrapped._init_config_names = [
            file for file in self._episode_files if self._scene_of[file] in scenes
        ]
        obs, _ = self.mshab.reset(seed=list(seeds), options=options)
        self.elapsed = 0
        self.episodes = [
            self._address
            | dict(
                seed=seed,
                plan=plan,
                spawn=spawn,
                subtask_uid=plans[i].subtasks[0].uid,
                scene=scenes[i],
                build_config_idx=self.mshab.build_config_idxs[i],
                task_plan_idx=int(self.mshab.task_plan_idxs[i]),
                init_config_idx=self.mshab.init_config_idxs[i],
                spawn_selection_idx=spawn,
            )
            for i, (seed, (plan, spawn)) in enumerate(zip(seeds, chosen, strict=True))
        ]
        # A GPU may have rendered the pictures of a simulation on the CPU.
        return common.to_tensor(obs, device=self.mshab.device)

    def choose(self, seed: int) -> tuple[int, int]:
        """The indices of the plan in its file and of its start pose: a pure function of `seed`."""
        plan, rng = draw_plan(seed, len(self._plans))
        uid = self._plans[plan].subtasks[0].uid
        return plan, int(rng.integers(len(self._starts[uid]["robot_qpos"])))

    def _write_starts(self, plans: Sequence[TaskPlan]) -> None:
        """Write the file of start poses that MS-HAB reads at its next reset: those of `plans`."""
        uids = [plan.subtasks[0].uid for plan in plans]
        torch.save({uid: self._starts[uid] for uid in uids}, self._start_file)

    def move(self, actions: np.ndarray) -> tuple[dict, dict]:
        """Apply to each environment its action, [N, 13] in [-1, 1], 1/20 s.

        `info` has, [N] each, success, fail (force limit, or MS-HAB's horizon used up), reward, and
        what else MS-HAB checks: is_grasped, robot_force and so on.
        """
        actions = np.asarray(actions, np.float32)
        if actions.shape != (self.num_envs, ACTION_DIM):
            raise ValueError(
                f"actions of shape {actions.shape}, expected ({self.num_envs}, {ACTION_DIM})"
            )
        if not np.isfinite(actions).all():
            raise ValueError(f"actions {actions} are not finite, expected values in [-1, 1]")
        obs, reward, _, _, info = self.mshab.step(actions)
        self.elapsed += 1
        obs = common.to_tensor(obs, device=self.mshab.device)
        return obs, info | dict(reward=reward)

    @property
    def instructions(self) -> list[str]:
        """The sentence for each episode's own object or articulation ("all" names neither)."""
        return [paper.instruction(self._address["subtask"], target) for target in self.targets]

    @property
    def targets(self) -> list[str]:
        """Each episode's object (`013_apple`) or articulation (`fridge`), as MS-HAB names it."""
        subtasks = [self._plans[episode["plan"]].subtasks[0] for episode in self.episodes]
        if self._address["subtask"] in ("open", "close"):
            return [subtask.articulation_type for subtask in subtasks]
        return [subtask.obj_id.rpartition("-")[0] for subtask in subtasks]  # 013_apple-0

    @property
    def positions(self) -> np.ndarray:
        """Base x, y in the world frame [N, 2], metres.

        Not `agent.robot.pose`: the root before the base's virtual joints never moves.
        """
        return self.mshab.agent.base_link.pose.p[:, :2].cpu().numpy().astype(np.float32)

    def masks(self, obs: dict) -> np.ndarray:
        """Pixels of the target object (pick, place) or of the link with the handle (open, close).

        Returns bool [N, 2, 128, 128], head camera then hand camera.
        """
        subtask = self.mshab.task_plan[0]
        if self._address["subtask"] in ("open", "close"):
            links = self.mshab.subtask_articulations[0].links
            target = links[subtask.articulation_handle_link_idx]
        else:
            target = self.mshab.subtask_objs[0]
        seen = [obs["sensor_data"][camera]["segmentation"] for camera in SENSORS]
        ids = rearrange(seen, "c n h w 1 -> n c h w")
        wanted = rearrange(target.per_scene_id, "n -> n 1 1 1")
        return (ids.cpu() == wanted.cpu()).numpy()  # a film's pictures have left the GPU already

    @property
    def action_schema(self) -> list[dict]:
        """Name, low, high and unit of each action dimension, as the controller has them.

        An action of -1 means `low`, +1 `high`. Arm and body are offsets from the joint's present
        position, the gripper is a position, the base has velocities.
        """
        schema = []
        for part, controller in self.mshab.agent.controller.controllers.items():
            size = controller.single_action_space.shape[0]
            if part == "base":  # one forward and one turning velocity move the three virtual joints
                names, units = ["base_forward", "base_turn"], ["m/s", "rad/s"]
            else:
                joints = controller.joints[:size]  # the gripper's second finger follows the first
                names = [joint.name for joint in joints]
                delta = " (offset)" if controller.config.use_delta else ""
                units = [("m" if "prismatic" in str(j.type[0]) else "rad") + delta for j in joints]
            low = np.broadcast_to(controller.config.lower, size)
            high = np.broadcast_to(controller.config.upper, size)
            schema += [
                dict(name=name, low=float(lo), high=float(hi), unit=unit)
                for name, lo, hi, unit in zip(names, low, high, units, strict=True)
            ]
        if len(schema) != ACTION_DIM:
            raise ValueError(f"the controller has {len(schema)} dimensions, expected {ACTION_DIM}")
        return schema

    @property
    def qpos_names(self) -> list[str]:
        """The 12 joints of obs["agent"]["qpos"], in its order (head and arm joints alternate)."""
        return [joint.name for joint in self.mshab.agent.robot.active_joints][BASE_JOINTS:]

    def close(self) -> None:
        self.mshab.close()


class SubtaskEnv(SubtaskEnvs):
    """One environment, and what can be seen of it. `episode` says what it was reset to."""

    def start(self, seeds: Sequence[int]) -> dict:
        obs = super().start(seeds)
        base = self.mshab.agent.base_link.pose.sp
        eye, look_at = (base * sapien.Pose(p) for p in (VIDEO_EYE, VIDEO_LOOK_AT))
        camera = self.mshab.scene.human_render_cameras["render_camera"].camera
        camera.set_local_pose(sapien_utils.look_at(eye.p, look_at.p).sp)
        return obs

    def reset(self, seed: int) -> dict:
        """Start the episode of `seed`, which names a plan and a start pose (`choose`)."""
        return self.start([seed])

    def step(self, action: np.ndarray) -> tuple[dict, dict]:
        """Apply one action [13] in [-1, 1]; `info` as of `move`, and elapsed (steps so far)."""
        obs, info = self.move(np.asarray(action)[None])
        checks = {key: value[0].item() for key, value in info.items()}
        return obs, checks | dict(elapsed=self.elapsed)

    @property
    def episode(self) -> dict:
        return self.episodes[0]

    @property
    def instruction(self) -> str:
        return self.instructions[0]

    @property
    def target(self) -> str:
        return self.targets[0]

    @property
    def pos(self) -> np.ndarray:
        return self.positions[0]

    def target_masks(self, obs: dict) -> np.ndarray:
        """Bool [2, 128, 128], as `masks`."""
        return self.masks(obs)[0]

    def third_person(self) -> np.ndarray:
        """A picture from outside, uint8 [H, W, 3]; the goal markers would hide the object."""
        scene = self.mshab.scene
        scene.update_render(update_sensors=False, update_human_render_cameras=True)
        return scene.get_human_render_camera_images()["render_camera"][0].cpu().numpy()


def draw_plan(seed: int, plans: int) -> tuple[int, np.random.Generator]:
    """Which of so many plans an episode's seed names, and the generator that draws its start."""
    rng = np.random.default_rng(seed)
    return int(rng.integers(plans)), rng


def cupboard_of(subtask: Subtask) -> str:
    """The articulation that a subtask opens, closes or picks from (`fridge`); "": none."""
    holder = getattr(subtask, "articulation_config", None) or subtask
    return getattr(holder, "articulation_type", "")


def cupboards(plan_file: Path) -> Callable[[int], str]:
    """The `cupboard_of` the episode of a seed."""
    plans = plan_data_from_file(plan_file).plans
    kinds = [cupboard_of(plan.subtasks[0]) for plan in plans]
    return lambda seed: kinds[draw_plan(seed, len(kinds))[0]]


def renderer() -> str:
    """ManiSkill's render backend: the GPU's, unless there is none or Mesa's driver was chosen."""
    mesa = "lvp" in os.environ.get("VK_ICD_FILENAMES", "")  # a GPU without Vulkan (tools/doctor.py)
    return "gpu" if torch.cuda.is_available() and not mesa else "cpu"


def apartment() -> str | None:
    """Which generated apartment it is, by sha256; None: the real ones, always the same.

    Raises InputError when both are in the folder.
    """
    require(mixed(HOUSEHOLD.parent))
    return sha256(HOUSEHOLD) if HOUSEHOLD.exists() else None


def plan_files(task: str, subtask: str, target: str, split: str) -> tuple[Path, Path]:
    """MS-HAB's task plan and start poses of a subtask.

    Raises InputError, with the command that mends it.
    """
    folder = os.environ.get("MS_ASSET_DIR")
    remedy = (
        "Generate an apartment (`python -m household.assets --out assets && export "
        "MS_ASSET_DIR=$PWD/assets`), or download the real one into a folder of its own (`export "
        "MS_ASSET_DIR=$PWD/replica_cad`, then `python -m mani_skill.utils.download_asset -y X` for "
        "X in ycb, ReplicaCAD, ReplicaCADRearrange, in this order)."
    )
    if not folder:
        raise InputError(f"MS_ASSET_DIR is not set: no asset folder. {remedy}")
    if Path(folder).absolute() / "data" != Path(ASSET_DIR).absolute():
        raise InputError(
            f"MS_ASSET_DIR={folder} was set after mani_skill was imported, which reads "
            f"{ASSET_DIR}. Set it before."
        )
    plan_file = REARRANGE / "task_plans" / task / subtask / split / f"{target}.json"
    spawn_file = REARRANGE / "spawn_data" / task / subtask / split / "spawn_data.pt"
    for path in (plan_file, spawn_file):
        if not path.is_file():
            raise InputError(f"no {path} (MS_ASSET_DIR={folder}). {remedy}")
    return plan_file, spawn_file
