"""The scripted drive from any pose to a start pose: back off, turn, drive, turn, drive up, turn."""

from collections.abc import Callable

import numpy as np

from household.expert import CLOSE, FULL_SPEED, REST_ARM, Motion, ScriptedExpert

HEAD, FINGER = [4, 6], 13  # in the simulator's 15 joints: pan and tilt, which no skill moves
BACK_OFF, DRIVE_UP = 0.5, 0.5  # metres before the furniture, where the arm turns clear of it


def navigate(expert: ScriptedExpert, start: dict, holding: bool) -> Motion:
    """Drive to `start`, a start pose of MS-HAB's spawn data, with the arm at rest.

    The hand is closed if it holds the object, otherwise as wide as at the start.
    """
    goal, joints = start["robot_pos"][:2], start["robot_qpos"]  # [2], [15]
    ahead = np.array([np.cos(joints[2]), np.sin(joints[2])])
    fingers = expert.agent.controller.controllers["gripper"].config
    width = (joints[FINGER] - fingers.lower) / (fingers.upper - fingers.lower)
    gripper = CLOSE if holding else 2 * width - 1

    def act(forward: float, turning: float) -> np.ndarray:
        drive = np.clip([forward, 2 * turning], [-FULL_SPEED, -1], [FULL_SPEED, 1])
        action = expert.move(REST_ARM, gripper, drive)
        action[8:10] = np.clip(10 * (joints - expert.joints)[HEAD], -1, 1)
        return action

    def bearing(point: np.ndarray) -> float:
        return np.arctan2(*expert.offset(point, 0.0)[::-1])

    def turn(angle: Callable[[], float]) -> Motion:
        while abs(angle()) > 0.02:
            yield act(0.0, angle())

    def drive(point: np.ndarray, along: np.ndarray) -> Motion:
        """Drive until `point` is beside the robot, which steers for the point `along`."""
        while (left := expert.offset(point, 0.0)[0]) > 0.01:
            yield act(3 * left + 0.02, bearing(along))

    def error() -> float:
        return (joints[2] - expert.joints[2] + np.pi) % (2 * np.pi) - np.pi

    before, here = goal - DRIVE_UP * ahead, expert.agent.base_link.pose.sp.p
    while expert.env.index and (
        np.linalg.norm(expert.offset(here, 0.0)) < BACK_OFF
        or (abs(error()) < 1.5 and expert.offset(before, 0.0)[0] < DRIVE_UP)
    ):
        yield act(-FULL_SPEED, 0.0)
    yield from turn(lambda: bearing(before))
    yield from drive(before, before)
    yield from turn(error)
    yield from drive(goal, goal + DRIVE_UP * ahead)
    yield from turn(error)
    yield act(0.0, 0.0)
