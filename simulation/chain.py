"""SetTable's eight subtasks in one episode of MS-HAB's sequential task, never reset in between.

    envs = ChainEnv("set_table", split="val", obs_mode="state_dict")
    obs = envs.reset([7])
    envs.index = 0                   # `instructions`, `masks` and `start` are now of this subtask
    ...                              # drive to envs.start() (household/navigation.py)
    envs.begin()
    obs, info = envs.step(actions)   # info["success"]: the subtask is done

MS-HAB decides when a subtask is done and whether what was placed still stands there. Two parts of
its own SetTable are left out: the Navigate subtasks, which succeed anywhere within 2 m, farther
than a policy starts, and the removal of the bowl at the reset, for closing an empty drawer.
"""

import gymnasium
import numpy as np
from mshab.envs.planner import TaskPlan

from config import HORIZON
from paper import CHAIN
from simulation.env import SubtaskEnvs, load_plans


class ChainEnv(SubtaskEnvs):
    """One environment. A seed determines the plan and the start pose of each subtask."""

    def __init__(self, task: str, split: str, obs_mode: str):
        super().__init__(task, "chain", "all", split, obs_mode)

    def _load(self) -> tuple[list[TaskPlan], dict[str, dict], str]:
        """Join the plans of an episode, in the order of CHAIN."""
        joined, starts = {}, {}
        for column in CHAIN.values():
            address = self._address | dict(subtask=column.subtask, target=column.target)
            plans, poses, dataset = load_plans(**address)
            starts |= poses
            for plan in plans:
                name = plan.init_config_name
                joined.setdefault(name, TaskPlan([], plan.build_config_name, name))
                joined[name].subtasks += plan.subtasks
        for plan in joined.values():
            plan.subtasks[-1].remove_obj_id = None
        return [*filter(goals_apart, joined.values())], starts, dataset

    def _make(self, **arguments) -> gymnasium.Env:
        return gymnasium.make("SequentialTask-v0", **arguments)

    def start(self) -> dict[str, np.ndarray]:
        """The start pose of the current subtask: robot_pos [3], robot_qpos [15] and others.

        Of eight that are drawn, a pick has the one that looks farthest past the opened handle.
        MS-HAB's fridge counts as open at 0.75 of its range, and the poses are for one at 0.97.
        """
        plan, seed = self._plans[self.episodes[0]["plan"]], self.episodes[0]["seed"]
        poses = self._starts[plan.subtasks[self.index].uid]
        rng = np.random.default_rng([seed, self.index])
        drawn = rng.choice(len(poses["robot_qpos"]), 8, replace=False)
        poses, best = {key: values[drawn].numpy() for key, values in poses.items()}, 0
        if plan.subtasks[self.index].type == "pick":
            handle, yaw = (
                self.mshab.handle_world_poses[self.index - 1].sp.p,
                poses["robot_qpos"][:, 2],
            )
            x, y, _ = (handle - poses["robot_pos"]).T
            best = np.argmax(abs(y * np.cos(yaw) - x * np.sin(yaw)))  # the handle's distance aside
        return {key: values[best] for key, values in poses.items()}

    def begin(self) -> None:
        """Start the subtask: its steps and MS-HAB's sum of forces count from here."""
        self.elapsed = 0
        self.mshab.subtask_pointer[:] = self.index  # the drive has done no subtask
        self.mshab.subtask_steps_left[:] = HORIZON
        self.mshab.robot_cumulative_force[:] = 0

    def step(self, actions: np.ndarray) -> tuple[dict, dict]:
        obs, info = super().step(actions)
        return obs, info | dict(success=self.mshab.subtask_pointer > self.index)


def goals_apart(plan: TaskPlan) -> bool:
    """Do two objects have room at their goals? The goals of single subtasks may coincide."""
    apple, bowl = (np.array(each.goal_pos) for each in plan.subtasks if each.type == "place")
    return bool(np.linalg.norm(apple - bowl) > 0.25)
