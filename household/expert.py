"""A scripted demonstrator for MS-HAB's pick, place, open and close in the generated apartment.

    python eval.py --policy expert --columns close_drawer --episodes 50 --stop-at-success --out OUT

The expert reads the simulator's state (object, handle and joint poses) and acts through the robot's
13 action dimensions. A learner can learn its motions from images: each grasp has one arm posture,
so equal situations get equal actions; joints and base arrive together, and no step is idle; a phase
ends at a distance, not after a number of steps, unless the hand is blocked. The hand arrives beside
an object and then moves slowly, so that many frames show how an offset is corrected.

With the arm in its posture, the hand is a point `reach` metres ahead of the base. Driving and
turning move that point in any direction: to an object, or along the arc of a door.
"""

from collections import namedtuple
from collections.abc import Iterator
from itertools import islice

import numpy as np
import sapien
from transforms3d.euler import euler2quat

from simulation.env import SubtaskEnvs

ARM = [5, 7, 8, 9, 10, 11, 12]  # in the simulator's 15 joints, in the order of action[0:7]
TORSO, REST_TORSO, FINGERS = 3, 0.386, [13, 14]
REST_ARM = np.array([-0.370, -1.032, 0.695, 0.955, -0.1, 2.077, 0.0])  # Fetch's rest keyframe
OPEN, CLOSE = 1.0, -1.0  # gripper: an absolute target
Motion = Iterator[np.ndarray]  # actions [13]
FULL_SPEED, ARM_SPEED = 0.5, 0.78  # m/s of the driven hand point; rad/s of a joint
CENTRING = 0.06  # m/s of the hand point near what it grasps
# Steps of the actions of arm and base (forward, turning): finer digits are noise to a learner.
GRID, BASE_GRID = 0.05, np.array([0.05, 0.01])
LIFT = 0.2  # torso action, always: it holds the torso at its stop; MS-HAB allows 1 cm less
# The way to an object ends at most SHORT metres before or behind it, and leaves UNSEEN [forward,
# left] metres uncorrected until the hand camera shows the object.
SHORT, UNSEEN = 0.05, (0.0, 0.10)
# Fractions of the joint's range; MS-HAB's limits (sequential_task.py) are 0.01, 0.9 and 0.75. What
# is open by less than the first fraction is opened to the second.
CLOSED, OPEN_DRAWER, OPEN_FRIDGE = 0.005, (0.91, 0.99), (0.76, 0.92)

# The gripper is `reach` metres ahead of the base, pitched down and rolled by angles in rad. Inverse
# kinematics starts at the arm joints `seed`, the solution nearest to the rest posture.
Posture = namedtuple("Posture", "reach pitch roll seed")
DOWN = Posture(0.70, np.pi / 2, 0.0, (-0.186, -0.404, 0.424, 1.198, -0.512, 0.880, 0.102))
SHELF = Posture(0.80, 1.3, 0.0, (-0.150, -0.750, 0.470, 0.750, -0.390, 1.370, 0.170))
PUSH = Posture(0.78, np.pi / 2, 0.0, (-0.086, 0.037, 0.420, 0.510, -0.483, 1.073, -0.090))
HOOK = Posture(0.75, np.pi / 2, -np.pi / 2, (-0.264, 0.097, 1.038, 0.743, -1.228, 1.145, -1.140))
REACH = Posture(0.80, 1.0, 0.0, (-0.458, -0.798, 1.197, 1.094, -1.008, 1.182, 0.568))
FRONT = Posture(0.90, 0.8, 0.0, (-0.371, -0.656, 1.154, 0.941, -1.199, 0.991, 0.563))


class ScriptedExpert:
    """Acts in one environment; call `reset()` after the environment's. The robot ends at rest."""

    obs_mode = "state_dict"  # no images

    def __init__(self, env: SubtaskEnvs):
        self.env = env

    def reset(self) -> None:
        """Start the skill of the environment's current episode."""
        sim, i = self.env.mshab, self.env.index
        self.agent, self.object, self.goal = sim.agent, sim.subtask_objs[i], sim.subtask_goals[i]
        robot = sim.agent.robot._objs[0]
        self.model = robot.create_pinocchio_model()
        self.gripper_link = robot.links.index(sim.agent.tcp._objs[0])
        subtask, target = sim.task_plan[i].type, self.env.targets[0]
        self.short = np.random.default_rng(self.env.episodes[0]["seed"]).uniform(-SHORT, SHORT)
        if subtask in ("pick", "place"):
            if self.env.elapsed == 0:  # the height at which the object stands
                self.surface = (self.object if subtask == "pick" else self.goal).pose.sp.p[2]
        else:
            self.cupboard = sim.subtask_articulations[i]
            self.joint_index = sim.task_plan[i].articulation_handle_active_joint_idx
            self.joint = self.cupboard._objs[0].active_joints[self.joint_index]
            self.link = self.cupboard.links[sim.task_plan[i].articulation_handle_link_idx]
        cupboard = dict(kitchen_counter="_drawer", fridge="_fridge").get(target, "")
        self.motion = getattr(self, subtask + cupboard)()

    def act(self, obs: dict, instruction: str) -> np.ndarray:
        """Return the next action, float32 [1, 13]; both arguments are unused."""
        return next(self.motion)[None]

    @property
    def joints(self) -> np.ndarray:
        """The simulator's joints [15]: base x, y, yaw, then MS-HAB's 12."""
        return self.agent.robot.qpos[0].numpy().astype(float)

    @property
    def handle(self) -> np.ndarray:
        return self.env.mshab.handle_world_poses[self.env.index].sp.p  # [3]

    @property
    def opening(self) -> float:
        """The opening of drawer or door, as a fraction of its range."""
        low, high = self.joint.limits[0]
        return (float(self.cupboard.qpos[0, self.joint_index]) - low) / (high - low)

    @property
    def axis(self) -> np.ndarray:
        """The joint's axis in the world [3]: a drawer's way out, a door's hinge."""
        return self.joint.global_pose.to_transformation_matrix()[:3, 0]

    def on_arc(self, angle: float, fraction: float = 1.0, outward: float = 0.0) -> np.ndarray:
        """Return the handle's position [3] after the door opens by `angle` rad, at `fraction` of
        its distance from the hinge and `outward` metres off the door."""
        hinge, axis = self.joint.global_pose.p, self.axis
        arm = self.handle - hinge
        arm = arm - axis * (axis @ arm)
        swung = np.cos(angle) * arm + np.sin(angle) * np.cross(axis, arm)
        normal = np.cross(axis, swung) / np.linalg.norm(swung)
        return hinge + fraction * swung + outward * normal

    def in_hand(self, point: np.ndarray, bar=(0.0, 0.0, 0.0)) -> bool:
        """Is `point`, or a point of the bar through it in direction `bar` [3], in the hand?"""
        away = point - self.agent.tcp_pose.sp.p
        return bool(np.linalg.norm(away - np.multiply(bar, np.clip(away @ bar, -0.1, 0.1))) < 0.06)

    def solve_arm(self, posture: Posture, height: float) -> np.ndarray:
        """Return the arm joints [7] that hold the gripper at `height` metres above the floor."""
        above_root = height - self.agent.robot.pose.sp.p[2]
        rotation = euler2quat(posture.roll, posture.pitch, 0)  # about x first
        target = sapien.Pose([posture.reach, 0, above_root], rotation)
        start, free = self.joints, np.zeros(15, int)
        start[: TORSO + 1] = 0, 0, 0, REST_TORSO  # base and torso
        start[ARM], free[ARM] = posture.seed, 1
        solution, _, _ = self.model.compute_inverse_kinematics(
            self.gripper_link, target, start, free, eps=1e-3, max_iterations=200, dt=0.2, damp=1e-3
        )
        return solution[ARM]

    def align_wrist(self, arm: np.ndarray) -> np.ndarray:
        """Turn the wrist of a hand that points down so that it grasps the object's narrow side."""
        size = self.object.get_first_collision_mesh(to_world_frame=False).extents  # [3]
        axes = self.object.pose.sp.to_transformation_matrix()[:3, :3]  # its axes, in columns
        level = np.argsort(np.abs(axes[2]))[:2]
        narrow, wide = sorted(level, key=lambda i: size[i])
        if size[wide] - size[narrow] < 0.01:  # round
            return arm
        base = self.agent.base_link.pose.sp
        sight = (base.inv() * self.object.pose.sp).p  # the base will face along it
        side = base.to_transformation_matrix()[:3, :3].T @ axes[:, narrow]
        turn = np.arctan2(side[1], side[0]) - np.arctan2(sight[1], sight[0]) - np.pi / 2
        turn = (turn + np.pi / 2) % np.pi - np.pi / 2  # the fingers may change places
        return arm - turn * np.eye(7)[6]

    def move(self, arm: np.ndarray, gripper: float, drive=(0.0, 0.0), pace=1.0) -> np.ndarray:
        """Return the action [13] that moves the arm toward the joints `arm` and drives the base.

        All joints arrive together, at `pace` of their full speed and slower over the last 0.1 rad.
        `drive` is the base's velocity (m/s, rad/s).
        """
        delta = arm - self.joints[ARM]
        left = np.abs(delta).max()
        delta = delta * (pace if left > 0.1 else 1.0) / max(left, 0.1)
        base = np.round(np.array([drive[0], drive[1] / np.pi]) / BASE_GRID) * BASE_GRID
        action = [*np.round(delta / GRID) * GRID, gripper, 0, 0, LIFT, *base]
        return np.clip(np.array(action, np.float32), -1, 1)

    def move_base(self, gripper: float, drive) -> np.ndarray:
        """Return the action [13] that moves the base alone.

        The arm's tokens are decoded first: a learner would read the phase in small arm actions.
        """
        return self.move(self.joints[ARM], gripper, drive)

    def offset(self, point: np.ndarray, reach: float, slack=(0.0, 0.0)) -> np.ndarray:
        """Return `point` relative to the hand point, less `slack`; [forward, left] metres."""
        in_base = self.agent.base_link.pose.sp.inv() * sapien.Pose([*point[:2], 0])
        away = in_base.p[:2] - [reach, 0]
        return np.sign(away) * np.maximum(np.abs(away) - slack, 0)

    def drive_to(self, point, reach: float, slack=(0.0, 0.0), pace=1.0) -> tuple[float, float]:
        """Return the forward and turning velocity that push or pull the hand point to `point`.

        `slack` is the offset that the task forgives: uncorrected, since a learner cannot see it.
        """
        velocity = 3.0 * self.offset(point, reach, slack)
        velocity *= pace * min(1.0, FULL_SPEED / max(np.linalg.norm(velocity), 1e-6))
        return velocity[0], velocity[1] / reach

    def bring(self, arm, point, reach, gripper, near=0.02, slack=0.0, speed=FULL_SPEED) -> Motion:
        """Drive until the hand is within `near` metres of `point`; the arm arrives with the base.

        An arm that waits for the base would teach a learner to wait.
        """
        while not self.formed(arm) or np.linalg.norm(self.offset(point, reach, slack)) > near:
            away, left = self.offset(point, reach, slack), np.abs(arm - self.joints[ARM]).max()
            seconds = max(left / ARM_SPEED, np.linalg.norm(away) / speed, 0.2)
            drive = away[0] / seconds, away[1] / seconds / reach
            yield self.move(arm, gripper, drive, pace=left / ARM_SPEED / seconds)

    def retreat(self, point: np.ndarray, distance: float, gripper: float) -> Motion:
        """Fold the arm and back off, at most to `distance` metres from `point`; then keep still."""
        while True:
            gap = np.linalg.norm(self.offset(point, reach=0.0)) - distance
            speed = np.clip(3 * gap, -FULL_SPEED, 0) * (not self.formed(REST_ARM))
            yield self.move(REST_ARM, gripper, (speed, 0))

    def back_off(self, point: np.ndarray, distance: float) -> Motion:
        """Drive back to `distance` metres from `point`, then retreat.

        The way back looks like the way in; the open hand tells them apart.
        """
        while np.linalg.norm(self.offset(point, reach=0.0)) < distance:
            yield self.move_base(OPEN, (-FULL_SPEED, 0))
        yield from self.retreat(point, distance, OPEN)

    def squeeze(self, arm: np.ndarray, gripper: float, thing) -> Motion:
        """Move the fingers until they hold `thing`, have opened by 1 cm, or stop; the arm holds."""
        start, before = self.joints[FINGERS], np.inf
        while np.abs(before - self.joints[FINGERS]).max() > 0.001:
            before = self.joints[FINGERS]
            yield self.move(arm, gripper)
            opened = (self.joints[FINGERS] - start).min() > 0.01
            if opened or (gripper == CLOSE and self.agent.is_grasping(thing)):
                return

    def formed(self, arm: np.ndarray) -> bool:
        """Are the arm's joints at `arm`, and the torso at its height?"""
        return np.abs(np.append(arm, REST_TORSO) - self.joints[[*ARM, TORSO]]).max() <= 0.05

    def lower(self, above, at, point, height, reach, gripper: float, slack=(0, 0)) -> Motion:
        """Bring the hand over `point`, which needs the arm joints `above`, then down to it.

        A hand lower than `height` leaves first: up if it is over the point, otherwise back.
        """
        left = np.abs(at - self.joints[ARM]).max()
        if self.aside(point, slack) > 0.03 or left > np.abs(at - above).max() + 0.05:
            while self.agent.tcp_pose.sp.p[2] < height - 0.04 and self.aside(point) < 0.35:
                over = self.aside(point) < 0.12
                yield self.move(above, gripper) if over else self.move_base(gripper, (-0.3, 0))
            far, short = (slack, 0.0) if slack[0] else (UNSEEN, self.short)
            yield from self.bring(above, point, reach + short, gripper, slack=far)
            yield from self.bring(above, point, reach, gripper, 0.01, slack, CENTRING)
        # A hand that is blocked tries again from above.
        yield from islice(self.bring(at, point, reach, gripper, 0.02, slack, CENTRING), 40)

    def beyond(self, point: np.ndarray) -> np.ndarray:
        """How far the hand is beyond `point`; [forward, left] metres."""
        base = self.agent.base_link.pose.sp.to_transformation_matrix()[:2, :2]
        return base.T @ (self.agent.tcp_pose.sp.p - point)[:2]

    def aside(self, point: np.ndarray, slack=(0, 0)) -> float:
        """Horizontal distance of the hand to `point`, less `slack`; metres."""
        return float(np.linalg.norm(np.maximum(np.abs(self.beyond(point)) - slack, 0)))

    # ---- skills: each but `grasp` ends in `retreat`, which never ends. A skill starts in any state
    # that a policy may have left, and leaves out what is done already.

    def grasp(self) -> Motion:
        """Grasp and lift the object, again if it is lost; return its position and the posture."""
        while True:
            position = self.object.pose.sp.p
            held = self.agent.is_grasping(self.object)
            low = self.surface if held else position[2]
            # High up the gripper cannot point down; in the fridge the elbow must clear the door.
            grip, clear = (DOWN, 0.12) if low < 1.0 else (SHELF, 0.08)
            above, at = (self.solve_arm(grip, low + lift) for lift in (clear, 0.005))
            if held and position[2] > low + clear - 0.03:
                return position, grip
            if not held:
                turned = self.align_wrist(above), self.align_wrist(at)
                yield from self.lower(*turned, position, low + clear, grip.reach, OPEN)
                yield from self.squeeze(turned[1], CLOSE, self.object)
            yield from self.bring(above, position, grip.reach, CLOSE, near=0.1)
            if self.agent.is_grasping(self.object) or self.in_hand(self.object.pose.sp.p):
                return position, grip

    def pick(self) -> Motion:
        position, grip = yield from self.grasp()
        yield from self.retreat(position, grip.reach + 0.2, CLOSE)

    def place(self) -> Motion:
        goal, slack = self.goal.pose.sp.p, (0.05, 0.05)  # MS-HAB forgives 0.15 m
        # At the start it is between the fingers, which do not press yet.
        at_start = self.env.elapsed == 0 and self.in_hand(self.object.pose.sp.p)
        held = at_start or self.agent.is_grasping(self.object)
        if not held and np.linalg.norm(self.object.pose.sp.p - goal) > 0.12:
            yield from self.grasp()  # it was dropped
            held = True
        low = goal[2] + (self.agent.tcp_pose.sp.p - self.object.pose.sp.p)[2]  # of the hand
        above, at = (self.solve_arm(DOWN, low + lift) for lift in (0.12, 0.01))
        if held:
            yield from self.lower(above, at, goal, low + 0.12, DOWN.reach, CLOSE, slack)
            yield from self.squeeze(at, OPEN, self.object)
        while self.aside(self.object.pose.sp.p) < 0.15:  # not up, which looks like the way down
            yield self.move_base(OPEN, (-FULL_SPEED, 0))
        yield from self.retreat(goal, DOWN.reach, OPEN)

    def close_drawer(self) -> Motion:
        """Push the handle with the closed hand, anywhere along the bar."""
        arm, outward, slack = self.solve_arm(PUSH, self.handle[2]), self.axis, (0.11, 0.10)
        ahead, aside = self.offset(self.handle, PUSH.reach)
        in_front = self.formed(arm) and -0.05 < ahead < 0.36 and abs(aside) < 0.12
        if self.opening > CLOSED and not in_front:
            start = self.handle + 0.23 * outward
            yield from self.bring(arm, start, PUSH.reach, CLOSE, slack=slack)
        while self.opening > CLOSED:
            inside = self.handle - 0.4 * outward
            yield self.move_base(CLOSE, self.drive_to(inside, PUSH.reach, slack))
        yield from self.back_off(self.handle, PUSH.reach + 0.4)

    def open_drawer(self) -> Motion:
        """Grasp the bar from above, one finger behind it, and pull; grasp again if it slips."""
        bar, low, slack = np.cross(self.axis, [0, 0, 1]), self.handle[2], (0.0, 0.03)
        above, at = (self.solve_arm(HOOK, low + lift) for lift in (0.10, 0.0))
        while self.opening < OPEN_DRAWER[0]:
            if not (self.in_hand(self.handle, bar) and self.agent.is_grasping(self.link)):
                yield from self.lower(above, at, self.handle, low + 0.10, HOOK.reach, OPEN, slack)
                yield from self.squeeze(at, CLOSE, self.link)
            while self.opening < OPEN_DRAWER[1] and self.in_hand(self.handle, bar):
                outside = self.handle + 0.2 * self.axis
                yield self.move(at, CLOSE, self.drive_to(outside, HOOK.reach, slack))
        if self.in_hand(self.handle, bar):
            yield from self.squeeze(at, OPEN, self.link)
            yield from self.bring(above, self.handle, HOOK.reach, OPEN, near=0.1, slack=slack)
        yield from self.retreat(self.handle, HOOK.reach + 0.1, CLOSE)  # closed: not the way in

    def close_fridge(self) -> Motion:
        """Push the outer side of the door, aiming ahead along its arc."""
        arm = self.solve_arm(REACH, self.handle[2])
        away = np.linalg.norm(self.offset(self.on_arc(0.0, 0.7, 0.10), REACH.reach))
        if self.opening > CLOSED and not (self.formed(arm) and away < 0.15):
            yield from self.bring(arm, self.on_arc(0.0, 0.7, 0.20), REACH.reach, CLOSE, near=0.05)
        while self.opening > CLOSED:
            pace = 1.0 if self.opening > 0.12 else 0.4  # many frames show the last centimetres
            drive = self.drive_to(self.on_arc(-0.4, 0.7, 0.03), REACH.reach, pace=pace)
            yield self.move_base(CLOSE, drive)
        yield from self.back_off(self.handle, REACH.reach + 0.3)

    def open_fridge(self) -> Motion:
        """Grasp the bar and pull it along its arc; grasp again if the bar slips."""
        arm = self.solve_arm(FRONT, self.handle[2])
        while self.opening < OPEN_FRIDGE[0]:
            if not (self.in_hand(self.handle) and self.agent.is_grasping(self.link)):
                if not self.formed(arm) or self.aside(self.handle) > 0.12:
                    while self.beyond(self.handle)[0] > -0.08:  # back to the bar's front
                        yield self.move_base(OPEN, (-0.3, 0))
                    front = self.on_arc(0.0, outward=0.10)
                    yield from self.bring(arm, front, FRONT.reach, OPEN, slack=UNSEEN)
                    yield from self.bring(arm, front, FRONT.reach, OPEN, speed=2 * CENTRING)
                yield from self.bring(arm, self.handle, FRONT.reach, OPEN, speed=0.3)
                yield from self.squeeze(arm, CLOSE, self.link)
            while self.opening < OPEN_FRIDGE[1] and self.in_hand(self.handle):
                yield self.move(arm, CLOSE, self.drive_to(self.on_arc(0.3), FRONT.reach))
        if self.in_hand(self.handle):
            yield from self.squeeze(arm, OPEN, self.link)
        yield from self.retreat(self.handle, FRONT.reach + 0.2, OPEN)
