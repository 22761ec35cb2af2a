"""SetTable's eight subtasks in one episode of MS-HAB's sequential task, for eval.py --chain.

MS-HAB decides when a subtask is done, and whether what was placed still stands there. Its Navigate
subtasks are left out: they succeed anywhere within 2 m, and a policy starts nearer.
"""

import gymnasium
import numpy as np
from mshab.envs.planner import PlanData, TaskPlan

from config import HORIZON
from household.expert import CLOSE, FULL_SPEED, REST_ARM, Motion, ScriptedExpert
from paper import CHAIN
from simulation.env import SubtaskEnvs

HEAD = [4, 6]  # pan and tilt, in the simulator's 15 joints
REST_GRIPPER = -1 / 6  # action: 15 mm, as wide as at every start without an object in the hand
BACK_OFF, DRIVE_UP = 0.5, 0.5  # metres that the robot drives back first, and straight ahead last


class ChainEnv(SubtaskEnvs):
    """One environment, whose `index` is the subtask in progress.

    A seed determines the plan and each subtask's start pose. The plans of one episode are joined;
    an episode whose two goals are closer than 25 cm is left out.
    """

    def _load(self, **address: str) -> tuple[PlanData, dict[str, dict]]:
        joined, starts = {}, {}
        for column in CHAIN.values():
            address |= dict(subtask=column.subtask, target=column.target)
            data, poses = super()._load(**address)
            starts |= poses
            for plan in data.plans:
                name = plan.init_config_name
                joined.setdefault(name, TaskPlan([], plan.build_config_name, name))
                joined[name].subtasks += plan.subtasks
        for name, plan in [*joined.items()]:
            plan.subtasks[-1].remove_obj_id = None  # MS-HAB would remove the bowl at the reset
            goals = [subtask.goal_pos for subtask in plan.subtasks if subtask.type == "place"]
            if np.linalg.norm(np.subtract(*goals)) < 0.25:
                del joined[name]
        return PlanData(data.dataset, [*joined.values()]), starts

    def _make(self, **arguments) -> gymnasium.Env:
        return gymnasium.make("SequentialTask-v0", **arguments)

    def start(self) -> dict[str, np.ndarray]:
        """The start pose of the current subtask: robot_pos [3], robot_qpos [15] and others.

        Of eight drawn poses, a pick uses the one farthest beside the handle, since they are for a
        fridge open at 0.97 of its range and here 0.75 counts as open; others use the first.
        """
        episode, subtask = self.episodes[0], self.mshab.task_plan[self.index]
        poses = self._starts[subtask.composite_subtask_uids[0]]
        rng, beside = np.random.default_rng([episode["seed"], self.index]), np.zeros(8)
        drawn = rng.choice(len(poses["robot_qpos"]), len(beside), replace=False)
        if subtask.type == "pick":
            handle = self.mshab.handle_world_poses[self.index - 1].sp.p
            beside = abs(poses["robot_pos"][drawn, 1].numpy() - handle[1])
        return {key: values[drawn[np.argmax(beside)]].numpy() for key, values in poses.items()}

    def begin(self) -> None:
        """Start the subtask: its steps and MS-HAB's sum of forces count from here."""
        self.elapsed = 0
        self.mshab.subtask_pointer[:] = self.index  # what the drive did does not count
        self.mshab.subtask_steps_left[:] = HORIZON
        self.mshab.robot_cumulative_force[:] = 0

    def step(self, actions: np.ndarray) -> tuple[dict, dict]:
        """`info["success"]`: the current subtask is done."""
        obs, info = super().step(actions)
        return obs, info | dict(success=self.mshab.subtask_pointer > self.index)


def navigate(expert: ScriptedExpert, env: ChainEnv) -> Motion:
    """Drive to the start pose of the current subtask: back off, turn, drive, turn, drive up.

    The arm rests; the hand is closed if it holds an object.
    """
    start = env.start()
    goal, joints = start["robot_pos"][:2], start["robot_qpos"]
    ahead = np.array([np.cos(joints[2]), np.sin(joints[2])])
    here, before, far = env.positions[0], goal - DRIVE_UP * ahead, goal + 1000 * ahead
    gripper = CLOSE if env.mshab.task_plan[env.index].type == "place" else REST_GRIPPER

    def act(forward: float, turning: float) -> np.ndarray:
        drive = np.clip([forward, 2 * turning], [-FULL_SPEED, -1], [FULL_SPEED, 1])
        action = expert.move(REST_ARM, gripper, drive)
        action[8:10] = np.clip(10 * (joints - expert.joints)[HEAD], -1, 1)
        return action

    def bearing(point: np.ndarray) -> float:
        return np.arctan2(*expert.offset(point, 0.0)[::-1])

    def turn(point: np.ndarray) -> Motion:
        while abs(bearing(point)) > 0.02:
            yield act(0.0, bearing(point))

    def drive(point: np.ndarray, along: np.ndarray) -> Motion:
        """Drive until `point` is beside the robot, which steers for the point `along`."""
        while (left := expert.offset(point, 0.0)[0]) > 0.01:
            yield act(3 * left + 0.02, bearing(along))

    while env.index and (
        np.linalg.norm(expert.offset(here, 0.0)) < BACK_OFF
        or (abs(bearing(far)) < 1.5 and expert.offset(before, 0.0)[0] < DRIVE_UP)
    ):
        yield act(-FULL_SPEED, 0.0)
    yield from turn(before)
    yield from drive(before, before)
    yield from turn(far)
    yield from drive(goal, goal + DRIVE_UP * ahead)
    yield from turn(far)
    yield act(0.0, 0.0)
