"""Recorded demonstrations in MS-HAB's own layout (paper Sec. 3).

    <task>/<subtask>/<target>.h5, with a .json beside it

    demos = Demonstrations("DATA")        # every .h5 below the folder, in the order of their names
    demos.read([0, 17])                   # structured array of RECORD, one per frame
    demos.read_episode(3)                 # all frames of one trajectory, each chunk inflated once

An h5 holds T + 1 observations and T actions per trajectory (MS-HAB: envs/wrappers/record.py); frame
t of ours is observation t with actions t, t+1, ..., t+7. MS-HAB's released files, collect.py's and
those of MS-HAB's recorder are read alike. A label that a file lacks, and that cannot be derived, is
marked in `has`; a frame that cannot be read is a DataError naming file, trajectory and frame.
"""

import io
import json
import os
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

import h5py
import numpy as np
from einops import rearrange

from chunks import read_rows
from config import (
    ACTION_DIM,
    CAMERAS,
    IMAGE_SIZE,
    LABELS,
    QPOS_DIM,
    RECORDED_ACTIONS,
    InputError,
)  # fmt: skip
from released import CAMERA_POSE, GRIPPER_POSE, base_position, millimetres, planned_target
from tasks import ARTICULATIONS, OBJECTS, SUBTASKS, instruction

# One frame as it is recorded: no normalisation, no resize. The unit of the pack and of a loader's
# batch.
_PICTURE = (len(CAMERAS), IMAGE_SIZE, IMAGE_SIZE)
RECORD = np.dtype(
    [
        ("rgb", np.uint8, (*_PICTURE, 3)),
        ("depth", np.int16, _PICTURE),  # millimetres, 0 where nothing was hit
        ("seg", np.uint8, (len(CAMERAS), IMAGE_SIZE**2 // 8)),  # target mask, one bit per pixel
        ("actions", np.float32, (RECORDED_ACTIONS, ACTION_DIM)),  # robot units; 0 past the end
        ("action_mask", np.uint8, (RECORDED_ACTIONS,)),  # 0 past the end of the episode
        ("pos", np.float32, (2,)),  # base x, y, metres, world frame
        ("grasp", np.float32, ()),  # 1 while the target is held
        ("qpos", np.float32, (QPOS_DIM,)),  # rad (prismatic: m)
        ("obj", np.float32, (7,)),  # target object in the base frame, metres and wxyz
        ("has", np.uint8, (len(LABELS),)),  # which of config.LABELS this frame has
        ("instruction", np.int32, ()),  # row of `instructions`
        ("episode", np.int32, ()),  # row of `episodes`
        ("frame", np.int32, ()),  # row inside the episode
    ]
)

# Blocks of frames that the order of samples mixes, and that a reader keeps: 1.4 GB of them when
# episodes have 200 steps.
SHUFFLE_POOL, READ_AHEAD = 256, 320


class DataError(InputError):
    """Demonstrations that cannot be used; the message names file, trajectory and frame."""


@dataclass(frozen=True)
class Episode:
    file: str  # relative to the folder
    trajectory: str  # "traj_3"
    length: int  # actions = frames, up to the first success where it was truncated there
    instruction: int  # row of `instructions`


def load_sidecar(path: Path) -> dict:
    """The .json beside an .h5. Raises DataError when it is missing or cut off."""
    sidecar = path.with_suffix(".json")
    if not sidecar.is_file():
        raise DataError(
            f"{path}: no {sidecar.name} beside it; MS-HAB's files come in pairs. Download or "
            "record it again."
        )
    try:
        content = json.loads(sidecar.read_text())
    except ValueError as error:
        raise DataError(f"{sidecar}: not whole ({error}); download or record it again") from error
    episodes = content.get("episodes") if isinstance(content, dict) else None
    each = episodes if isinstance(episodes, list) and episodes else [None]
    if not all(isinstance(e, dict) and {"episode_id", "elapsed_steps"} <= {*e} for e in each):
        raise DataError(
            f"{sidecar}: expected MS-HAB's `episodes`, at least one, each with episode_id and "
            "elapsed_steps; download or record it again"
        )
    return content


class Demonstrations:
    """All demonstrations below a folder; opens in the time it takes to read the .json files.

    MS-HAB's released episodes go on for 200 steps, at rest once they have succeeded: `truncate`
    ends each at its first success, as collect.py does. An episode without one keeps its length.
    """

    def __init__(self, folder: str | Path, truncate: bool = False):
        self.folder, self.truncate = Path(folder), truncate
        paths = sorted(self.folder.rglob("*.h5"))
        if not paths:
            raise FileNotFoundError(
                f"{self.folder}: no .h5 demonstrations below it; record some: python collect.py "
                f"--out {self.folder} ..."
            )
        self.episodes: list[Episode] = []
        self.recorded: list[int] = []  # steps of each episode in its file
        self.instructions: list[str] = []
        self.action_schema: list[dict] | None = None
        self.qpos_names: list[str] | None = None
        for path in paths:
            try:
                self._index(path)
            except InputError as error:
                error.file = path  # what doctor tells to move aside
                raise
        self.starts = np.cumsum([0] + [e.length for e in self.episodes])
        rows = [
            np.arange(0, episode.length, chunk_rows(steps + 1))
            for episode, steps in zip(self.episodes, self.recorded)
        ]
        # First frame of each block: frames of one episode that lie in the same chunks of its file.
        self.blocks = np.concatenate([start + r for start, r in zip(self.starts, rows)])
        self.inflated: dict[int, np.ndarray] = {}

    def _index(self, path: Path) -> None:
        sidecar = load_sidecar(path)
        for name in ("action_schema", "qpos_names"):
            theirs, ours = sidecar.get(name), getattr(self, name)
            if ours is not None and theirs is not None and theirs != ours:
                raise DataError(
                    f"{path}: its {name} {theirs} differs from that of the files before it, {ours}"
                )
            setattr(self, name, ours or theirs)
        for entry in sidecar["episodes"]:
            text = instruction_of(path, entry)
            if text not in self.instructions:
                self.instructions.append(text)
            episode = Episode(
                str(path.relative_to(self.folder)), f"traj_{entry['episode_id']}",
                entry["elapsed_steps"], self.instructions.index(text),
            )  # fmt: skip
            self.recorded.append(episode.length)
            if self.truncate:
                episode = replace(episode, length=self._first_success(episode))
            self.episodes.append(episode)

    def _first_success(self, entry: Episode) -> int:
        """Steps up to the first success, that one included; all if there is none."""
        success = self._group(entry).get("success")
        if success is None or success.shape != (entry.length,):
            raise DataError(
                f"{self.folder / entry.file}, {entry.trajectory}: success is {success}, expected "
                f"one for each of {entry.length} steps. Read it untruncated, or record it again."
            )
        return int(np.argmax(success[:])) + 1 if np.any(success[:]) else entry.length

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, frames: list[int] | np.ndarray) -> np.ndarray:
        """Frames by number, [n] of RECORD.

        One frame inflates its whole block, 26 frames or so, and the last READ_AHEAD blocks are
        kept: in the order of samples.py, each is inflated once.
        """
        out = np.empty((len(frames), RECORD.itemsize), np.uint8)  # bytes: fields are copied slower
        for row, frame in enumerate(frames):
            block = int(np.searchsorted(self.blocks, frame, side="right")) - 1
            if block not in self.inflated:
                if len(self.inflated) == READ_AHEAD:
                    del self.inflated[next(iter(self.inflated))]  # the oldest
                self.inflated[block] = self._read_block(block)
            out[row] = self.inflated[block][frame - self.blocks[block]]
        return rearrange(out.view(RECORD), "n 1 -> n")

    def _read_block(self, block: int) -> np.ndarray:
        """The frames of a block as bytes, [n, size of RECORD]."""
        first = int(self.blocks[block])
        episode = int(np.searchsorted(self.starts, first, side="right")) - 1
        end = self.blocks[block + 1] if block + 1 < len(self.blocks) else len(self)
        end = min(int(end), int(self.starts[episode + 1]))
        records = self._read(episode, first - self.starts[episode], end - self.starts[episode])
        return rearrange(records.view(np.uint8), "(n size) -> n size", size=RECORD.itemsize)

    def read_episode(self, episode: int) -> np.ndarray:
        """All frames of an episode, [T] of RECORD."""
        return self._read(episode, 0, self.episodes[episode].length)

    def actions(self, episode: int) -> np.ndarray:
        """All actions of an episode, [T, 13], robot units, checked."""
        entry = self.episodes[episode]
        where = f"{self.folder / entry.file}, {entry.trajectory}"
        actions = checked_actions(self._group(entry), self.recorded[episode], where)
        return actions[: entry.length]

    def actions_of(self, episodes: np.ndarray) -> np.ndarray:
        """All actions of these episodes, [n, 13]."""
        return np.concatenate([self.actions(episode) for episode in episodes])

    def _group(self, entry: Episode) -> h5py.Group:
        path = self.folder / entry.file
        try:
            return open_h5(str(path), os.getpid())[entry.trajectory]
        except (OSError, KeyError) as error:
            raise DataError(
                f"{path}, {entry.trajectory}: cannot be opened ({error}). The file is cut off or "
                "is not the one its .json describes; download or record it again."
            ) from error

    def _read(self, episode: int, first: int, last: int) -> np.ndarray:
        entry = self.episodes[episode]
        where = f"{self.folder / entry.file}, {entry.trajectory}"
        try:
            group = self._group(entry)
            actions = checked_actions(group, self.recorded[episode], where)[: entry.length]
            out = read_frames(group, actions, first, last, where)
        except (OSError, KeyError) as error:
            raise DataError(
                f"{where}, frames {first}..{last - 1}: "
                f"{error}. A key is missing or the file is damaged; expected MS-HAB's layout "
                "recorded with obs_mode=rgbd. Download or record it again."
            ) from error
        out["instruction"], out["episode"] = entry.instruction, episode
        return out


def instruction_of(path: Path, entry: dict) -> str:
    """The sentence of an episode: recorded, or from its subtask's folder and its target.

    The target is the file's name, or, if that is none (`all.h5`), what its subtask_uid is planned
    to be. Raises InputError when there is neither.
    """
    subtask, target = path.parent.name, path.stem
    if "instruction" in entry:
        return entry["instruction"]
    if subtask not in SUBTASKS:
        raise DataError(
            f"{path}: no instruction in its .json, and its folder is none of {SUBTASKS}; "
            "expected <task>/<subtask>/<target>.h5"
        )
    if target not in ARTICULATIONS and not any(target in names for names in OBJECTS.values()):
        target = planned_target(entry.get("subtask_uid"), target, str(path))
    return instruction(subtask, target)


@cache
def chunk_rows(observations: int) -> int:
    """Frames in one of the chunks that h5py chooses for the pictures of so many observations."""
    with h5py.File(io.BytesIO(), "w") as file:
        shape = (observations, IMAGE_SIZE, IMAGE_SIZE, 3)
        return file.create_dataset("rgb", shape, np.uint8, chunks=True).chunks[0]


@lru_cache(maxsize=64)
def open_h5(path: str, process: int) -> h5py.File:
    """Open a file once per process: a handle that a forked loader worker inherits is no good."""
    return h5py.File(path, "r")


def checked_actions(group: h5py.Group, steps: int, where: str) -> np.ndarray:
    """The actions of a trajectory of so many steps, [T, 13].

    Raises DataError, beginning with `where`, on another shape, NaN, or values outside [-1, 1].
    """
    actions = group["actions"][:]
    if actions.shape != (steps, ACTION_DIM):
        raise DataError(
            f"{where}: actions {actions.shape}, expected ({steps}, {ACTION_DIM}): "
            "pd_joint_delta_pos of Fetch (arm 7, gripper 1, head and torso 3, base 2). Record with "
            "control_mode=pd_joint_delta_pos."
        )
    bad = ~(np.abs(actions) <= 1 + 1e-5)  # NaN compares false
    if bad.any():
        frame, dim = np.argwhere(bad)[0]
        raise DataError(
            f"{where}, frame {frame}: action {dim} is {actions[frame, dim]}, expected a number in "
            "[-1, 1]"
        )
    return actions


OBSERVED = {
    "grasp": "extra/is_grasped", "qpos": "agent/qpos", "obj": "extra/obj_pose_wrt_base"
}  # fmt: skip


def read_frames(
    group: h5py.Group, actions: np.ndarray, first: int, last: int, where: str
) -> np.ndarray:
    """Frames first..last-1 of one trajectory as RECORD, without instruction and episode.

    `actions` [T, 13] are all that count; errors begin with `where`.
    """
    out, obs = np.zeros(last - first, RECORD), group["obs"]
    counted = [f"sensor_data/fetch_{camera}/depth" for camera in CAMERAS]
    counted += [key for key in OBSERVED.values() if key in obs]
    if (frames := min(len(obs[key]) for key in counted)) <= len(actions):
        raise DataError(
            f"{where}: {frames} observations, expected one more than the {len(actions)} actions. "
            "The file is not whole; download or record it again."
        )
    for c, camera in enumerate(CAMERAS):
        sensor = obs[f"sensor_data/fetch_{camera}"]
        depth = sensor["depth"]
        if not np.issubdtype(depth.dtype, np.integer):
            raise DataError(
                f"{where}: depth is {depth.dtype}, expected integer millimetres. Float metres "
                "would turn into 'everything touches the camera' (Eq. 1); multiply by 1000 and "
                "store as int16."
            )
        out["rgb"][:, c] = read_rows(sensor["rgb"], first, last)
        out["depth"][:, c] = millimetres(read_rows(depth, first, last)[..., 0])
    read_labels(group, slice(first, last), out, where)

    steps = np.arange(first, last)[:, None] + np.arange(RECORDED_ACTIONS)  # [frames, 8]
    out["action_mask"] = steps < len(actions)
    out["actions"] = actions[np.minimum(steps, len(actions) - 1)] * out["action_mask"][..., None]
    out["frame"] = np.arange(first, last)
    for name in ("pos", "qpos", "obj"):
        bad = ~np.isfinite(out[name]).all(-1)
        if bad.any():
            raise DataError(
                f"{where}, frame {first + int(bad.argmax())}: {name} is "
                f"{out[name][bad.argmax()]}, expected finite numbers"
            )
    return out


def read_labels(group: h5py.Group, rows: slice, out: np.ndarray, where: str) -> None:
    """Write the auxiliary labels of a trajectory's rows, and which it has, into `out`."""
    obs, has = group["obs"], dict.fromkeys(LABELS, True)
    for label, key in OBSERVED.items():
        has[label] = key in obs
        if has[label]:
            out[label] = obs[key][rows]
    if "labels/pos" in group:
        out["pos"] = group["labels/pos"][rows]
    elif CAMERA_POSE in obs and GRIPPER_POSE in obs:
        out["pos"] = base_position(obs, rows, where)
    else:
        has["pos"] = False
    has["seg"] = "labels/seg" in group
    if has["seg"]:
        for c, camera in enumerate(CAMERAS):
            masks = group[f"labels/seg/fetch_{camera}"][rows].reshape(len(out), -1)
            out["seg"][:, c] = np.packbits(masks.astype(bool), axis=-1)
    out["has"] = [has[label] for label in LABELS]
    # MS-HAB writes an all-zero pose, quaternion included, where the subtask has no object (GAP-8).
    out["has"][:, LABELS.index("obj")] = np.abs(out["obj"][:, 3:]).sum(-1) > 0
