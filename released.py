"""What MS-HAB's released files leave to the reader: base position, types of depth, targets.

    position = base_position(obs, slice(0, 26), where)   # [26, 2], which the release does not store
    depth = millimetres(depth)                           # int16, of whatever integer type it is
    target = planned_target("set_table-pick-train-12-0", "all", where)   # "024_bowl"

The layout of the files is demonstrations.py's.
"""

import json
import os
from functools import cache
from pathlib import Path

import h5py
import numpy as np

from config import InputError

CAMERA_POSE = "sensor_param/fetch_hand/cam2world_gl"  # [T + 1, 4, 4], world frame, OpenGL's axes
GRIPPER_POSE = "extra/tcp_pose_wrt_base"  # [T + 1, 7] metres and wxyz
# The hand camera in the gripper's frame, metres (mani_skill: agents/robots/fetch/fetch.py).
HAND_CAMERA = np.array([-0.1, 0, 0.1])
# Links look along x with z up, an OpenGL camera along -z with y up.
GL_FROM_LINK = np.array([[0, -1, 0], [0, 0, 1], [-1, 0, 0]])
LEVEL = 1e-3  # metres: a base that drives on a floor stays at one height


def base_position(obs: h5py.Group, rows: slice, where: str) -> np.ndarray:
    """Base x, y in the world frame, [n, 2] metres, exact to float32.

    The hand camera's pose is known in the world, the gripper's in the base frame, and the camera is
    fixed to the gripper: so the base is known in the world. Raises InputError, beginning with
    `where`, when the base would not stay level: the camera is not where Fetch has it.
    """
    camera, gripper = obs[CAMERA_POSE][rows], obs[GRIPPER_POSE][rows]
    position, w, axis = gripper[:, :3], gripper[:, 3:4], -gripper[:, 4:]  # the inverse rotation
    turn = 2 * np.cross(axis, position)
    from_base = position + w * turn + np.cross(axis, turn)  # base to gripper, gripper's axes
    from_base = (from_base + HAND_CAMERA) @ GL_FROM_LINK.T  # base to camera, camera's axes [n, 3]
    base = camera[:, :3, 3] - np.einsum("nij,nj->ni", camera[:, :3, :3], from_base)  # [n, 3]
    if np.ptp(base[:, 2]) > LEVEL:
        raise InputError(
            f"{where}: base x, y cannot be derived from {CAMERA_POSE} and {GRIPPER_POSE}: the base "
            f"would rise by {np.ptp(base[:, 2]):.3f} m. Expected Fetch's hand camera at "
            f"{HAND_CAMERA} m of its gripper; record with MS-HAB's own Fetch, or write labels/pos"
        )
    return base[:, :2]


def millimetres(depth: np.ndarray) -> np.ndarray:
    """Depth in millimetres of any integer type as int16; what does not fit is as far as int16 goes.

    So are the negative numbers of an int16, which has wrapped around beyond 32.767 m.
    """
    depth = depth.view(np.uint16) if depth.dtype == np.int16 else depth
    return np.minimum(depth, np.uint16(np.iinfo(np.int16).max)).astype(np.int16)


def planned_target(uid: str | None, plan: str, where: str) -> str:
    """The object (`013_apple`) or articulation (`fridge`) of a subtask, from MS-HAB's task plans.

    `uid` is the .json's subtask_uid, <task>-<subtask>-<split>-..., and `plan` the name of
    the plan's file. Raises InputError, beginning with `where`, when the assets lack it.
    """
    task, subtask, split, *_ = [*(uid or "").split("-"), "", ""]
    rearrange = "data/scene_datasets/replica_cad_dataset/rearrange"
    folder = Path(os.environ.get("MS_ASSET_DIR", ""), rearrange, "task_plans", task, subtask, split)
    found = planned_targets(folder / f"{plan}.json")
    if uid not in found:
        raise InputError(
            f"{where}: neither an instruction nor a known target, and no subtask {uid!r} in "
            f"{folder / plan}.json (MS_ASSET_DIR={os.environ.get('MS_ASSET_DIR')}). Expected the "
            "name of an object or articulation as the file's name, or subtask_uid in its .json and "
            "MS_ASSET_DIR set to MS-HAB's assets (`python -m mani_skill.utils.download_asset "
            "ReplicaCADRearrange`)"
        )
    return found[uid]


@cache
def planned_targets(plan: Path) -> dict[str, str]:
    """Subtask uid -> target, of all subtasks of a task plan; empty if there is no such file."""
    plans = json.loads(plan.read_text())["plans"] if plan.is_file() else []
    subtasks = [subtask for each in plans for subtask in each["subtasks"]]
    return {
        subtask["uid"]: subtask["articulation_type"]
        if subtask["type"] in ("open", "close")
        else subtask["obj_id"].rpartition("-")[0]  # 013_apple-0
        for subtask in subtasks
    }
