"""One trajectory in MS-HAB's layout -> frames: checked fields, clipped actions, derived labels.

    trajectory = Trajectory(group, steps, where)           # checks every field against FIELDS
    actions = trajectory.read("actions", 0, steps)         # [T, 13], as recorded
    records = trajectory.read_frames(actions, 0, 26)       # [26] of RECORD
    summary = trajectory.survey(actions)                   # counts and ranges; reads no picture

`where` names file and trajectory and begins the message of every InputError.
"""

import zlib
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import h5py
import numpy as np

from config import ACTION_DIM, CAMERAS, CHUNK, IMAGE_SIZE, LABELS, QPOS_DIM, InputError, Range

# One frame as recorded, neither normalised nor resized: the unit of packs and raw batches.
_PICTURE = (len(CAMERAS), IMAGE_SIZE, IMAGE_SIZE)
RECORD = np.dtype(
    [
        ("rgb", np.uint8, (*_PICTURE, 3)),
        ("depth", np.int16, _PICTURE),  # mm; 0: the ray hit nothing; negative: wrapped, > 32.767 m
        ("seg", np.uint8, (len(CAMERAS), IMAGE_SIZE**2 // 8)),  # target mask, one bit per pixel
        ("actions", np.float32, (CHUNK, ACTION_DIM)),  # in [-1, 1]; 0 past the end
        ("action_mask", np.uint8, (CHUNK,)),  # 0 past the end of the episode
        ("pos", np.float32, (2,)),  # base x, y, metres, world frame
        ("grasp", np.float32, ()),  # 1 while the target is held
        ("qpos", np.float32, (QPOS_DIM,)),  # rad (prismatic: m)
        ("obj", np.float32, (7,)),  # target object in the base frame, metres and wxyz
        ("has", np.uint8, (len(LABELS),)),  # which of config.LABELS this frame has
        ("instruction", np.int32, ()),  # row of `instructions`
        ("episode", np.int32, ()),  # row of `episodes`
        ("frame", np.int32, ()),  # step of the episode
    ]
)

# Counts and ranges of an episode: training chooses decoders and action statistics by them.
VECTORS = {"actions": (ACTION_DIM,), "pos": (2,), "grasp": (), "qpos": (QPOS_DIM,), "obj": (7,)}
SURVEY = np.dtype(
    [
        ("frames", np.int32),
        ("clipped", np.int32),  # action values outside [-1, 1], of frames x 13
        ("rise", np.float32),  # metres by which the derived base position rises
        ("speed", np.float32),  # median of the base's displacement / commanded one; NaN: no command
        ("labelled", np.int32, (len(LABELS),)),  # frames that have each of config.LABELS
        *((name, np.float32, (2, *shape)) for name, shape in VECTORS.items()),  # lowest, highest
    ]
)

CAMERA_POSE = "obs/sensor_param/fetch_hand/cam2world_gl"  # world frame, OpenGL's axes
GRIPPER_POSE = "obs/extra/tcp_pose_wrt_base"  # metres and wxyz
KEYS = {"pos": "labels/pos", "grasp": "obs/extra/is_grasped", "qpos": "obs/agent/qpos"}
KEYS["obj"] = "obs/extra/obj_pose_wrt_base"
# Names of dtypes, as numpy's codes.
_INT, _FLOAT = np.typecodes["AllInteger"], np.typecodes["Float"]
KINDS = dict(uint8="B", integer=_INT, float=_FLOAT, bool="?" + _INT, number="?" + _INT + _FLOAT)


class Field(NamedTuple):
    kind: str  # of KINDS
    shape: tuple[int, ...]  # of one row; T actions have T + 1 observations
    limit: Range = Range("a finite number", np.isfinite)


ZERO_TO_ONE = Range("0 to 1", lambda x: (x >= 0) & (x <= 1))
PER_ACTION = ("actions", "success")  # T rows; the others T + 1
FIELDS = {
    **{f"obs/sensor_data/fetch_{c}/rgb": Field("uint8", (*_PICTURE[1:], 3)) for c in CAMERAS},
    **{f"obs/sensor_data/fetch_{c}/depth": Field("integer", (*_PICTURE[1:], 1)) for c in CAMERAS},
    **{f"labels/seg/fetch_{c}": Field("bool", _PICTURE[1:]) for c in CAMERAS},
    KEYS["grasp"]: Field("number", (), ZERO_TO_ONE),
    KEYS["qpos"]: Field("float", (QPOS_DIM,)), KEYS["obj"]: Field("float", (7,)),
    KEYS["pos"]: Field("float", (2,)), "actions": Field("float", (ACTION_DIM,)),
    "success": Field("number", (), ZERO_TO_ONE),
    CAMERA_POSE: Field("float", (4, 4)), GRIPPER_POSE: Field("float", (7,)),
}  # fmt: skip

# The hand camera in the gripper's frame, metres (mani_skill: agents/robots/fetch/fetch.py).
HAND_CAMERA = np.array([-0.1, 0, 0.1])
# Links look along x with z up, an OpenGL camera along -z with y up.
GL_FROM_LINK = np.array([[0, -1, 0], [0, 0, 1], [-1, 0, 0]])
# Rise of the derived base, metres, at which we warn and at which we refuse the file. A base on a
# floor does not rise: under 2e-6 in generated files; released files, from a GPU, are not measured.
RISE_WARNED, RISE_REFUSED = 1e-3, 2e-2
CONTROL = "pd_joint_delta_pos"
BASE_FORWARD, CONTROL_HZ = 11, 20  # action 11 is the base's forward velocity, -1 to 1 m/s (GAP-1)
SETTLED = 8  # steps in one direction, after which the base has the commanded velocity


class Trajectory:
    """The fields of a trajectory with `steps` actions, all of FIELDS or `only` some.

    InputError for a field of another type or shape; for missing actions, pictures or one of `only`.
    """

    def __init__(self, group: h5py.Group, steps: int, where: str, only: Sequence[str] = ()):
        if not isinstance(group, h5py.Group):
            raise InputError(f"{where} is one array, expected a group. Download or record it again")
        self.fields, self.where, masked = {}, where, "labels/seg" in group
        for key in only or FIELDS:
            kind, shape, _ = FIELDS[key]
            data, expected = group.get(key), [steps + (key not in PER_ACTION), *shape]
            needed = only or key == "actions" or "sensor_data" in key
            if data is None and not (needed or ("labels/seg" in key and masked)):
                continue
            there = isinstance(data, h5py.Dataset)
            if not there or data.shape != tuple(expected) or data.dtype.char not in KINDS[kind]:
                got = f"{data.dtype} {list(data.shape or ())}" if there else "not there"
                raise InputError(
                    f"{where}: {key} is {got}, expected {kind} {expected} for {steps} elapsed_steps"
                    f". Download or record it again (MS-HAB's Fetch, obs_mode=rgbd, {CONTROL})"
                )
            self.fields[key] = data

    def read(self, key: str, first: int, last: int) -> np.ndarray:
        """Rows first..last-1 of a field of numbers, as float32. InputError outside their range."""
        values, limit = self.fields[key][first:last].astype(np.float32), FIELDS[key].limit
        if not (good := limit.holds(values)).all():
            row, *index = np.argwhere(~good)[0].tolist()
            raise InputError(
                f"{self.where}, frame {first + row}: {key}{index or ''} is "
                f"{values[row, *index]}, expected {limit.text}. Download or record it again"
            )
        return values

    def read_frames(self, actions: np.ndarray, first: int, last: int) -> np.ndarray:
        """Frames first..last-1, [n] of RECORD, given the actions [T, 13] as recorded.

        The fields instruction and episode stay 0.
        """
        out, count = np.zeros(last - first, RECORD), len(actions)
        for c, camera in enumerate(CAMERAS):
            sensor, masks = f"obs/sensor_data/fetch_{camera}", f"labels/seg/fetch_{camera}"
            out["rgb"][:, c] = read_rows(self.fields[f"{sensor}/rgb"], first, last)
            depth = read_rows(self.fields[f"{sensor}/depth"], first, last)[..., 0]
            if depth.dtype != np.int16:
                depth = depth.astype(np.int64).clip(-(2**15), 2**15 - 1)
            out["depth"][:, c] = depth
            if masks in self.fields:
                pixels = self.fields[masks][first:last].reshape(len(out), -1)
                out["seg"][:, c] = np.packbits(pixels.astype(bool), axis=-1)
        values, out["has"], _ = self.read_labels(first, last)
        for name, value in values.items():
            out[name] = value
        steps = np.arange(first, last)[:, None] + np.arange(CHUNK)  # [frames, 8]
        out["action_mask"] = steps < count
        out["actions"] = clip(actions)[np.minimum(steps, count - 1)] * out["action_mask"][..., None]
        out["frame"] = np.arange(first, last)
        return out

    def read_labels(self, first: int, last: int) -> tuple[dict[str, np.ndarray], np.ndarray, float]:
        """Labels except masks {name: [n, ...]}, flags `has` [n, 5], metres the base rises by."""
        rise, rows = 0.0, (first, last)
        values = {n: self.read(key, *rows) for n, key in KEYS.items() if key in self.fields}
        if "pos" not in values and {CAMERA_POSE, GRIPPER_POSE} <= self.fields.keys():
            poses = (self.read(key, *rows) for key in (CAMERA_POSE, GRIPPER_POSE))
            values["pos"], rise = base_position(*poses, self.where)
        masks = f"labels/seg/fetch_{CAMERAS[0]}"
        present = [*values, *(["seg"] if masks in self.fields else [])]
        has = np.tile([label in present for label in LABELS], (last - first, 1))
        if "obj" in values:
            # Without an object MS-HAB writes an all-zero pose, quaternion included (GAP-8).
            has[:, LABELS.index("obj")] = np.abs(values["obj"][:, 3:]).sum(-1) > 0
        return values, has, rise

    def survey(self, actions: np.ndarray) -> np.ndarray:
        """The SURVEY of a trajectory with `actions` [T, 13], as recorded."""
        out, count, executed = np.zeros((), SURVEY), len(actions), clip(actions)
        values, has, out["rise"] = self.read_labels(0, count)
        out["frames"], out["labelled"] = count, has.sum(0)
        out["clipped"] = (np.abs(actions) > 1 + 1e-5).sum()
        out["speed"] = relative_speed(executed, values["pos"]) if "pos" in values else np.nan
        if "obj" in values:
            values["obj"] = values["obj"][has[:, LABELS.index("obj")]]
        values["actions"] = executed
        for name in VECTORS:
            seen = values.get(name, np.zeros(0))
            out[name][0] = seen.min(0, initial=np.inf)
            out[name][1] = seen.max(0, initial=-np.inf)
        return out


def read_rows(pictures: h5py.Dataset, first: int, last: int) -> np.ndarray:
    """pictures[first:last], [n, H, W, C], inflated chunk by chunk; OSError on a damaged chunk.

    2.3 times as fast as h5py: MS-HAB's chunks, [26, 32, 32, 1], separate the colours, and HDF5
    copies such chunks byte by byte, which takes longer than inflating them.
    """
    filtered = pictures.shuffle or pictures.fletcher32 or pictures.scaleoffset
    if pictures.compression != "gzip" or filtered:
        return pictures[first:last]
    chunk, kind = pictures.chunks, pictures.dtype
    begin = first // chunk[0] * chunk[0]
    begins, ends = (begin, 0, 0, 0), (last, *pictures.shape[1:])
    size = [-(-(e - b) // c) * c for b, e, c in zip(begins, ends, chunk)]  # whole chunks
    out = np.empty(size, kind)
    for corner in product(*map(range, begins, ends, chunk)):
        try:
            content = zlib.decompress(pictures.id.read_direct_chunk(corner)[1])
            tile = np.frombuffer(content, kind).reshape(chunk)
        except (zlib.error, ValueError) as error:
            raise OSError(f"{pictures.name}, chunk at {corner}: {error}") from error
        t, y, x, c = (slice(at - b, at - b + n) for at, b, n in zip(corner, begins, chunk))
        out[t, y, x, c] = tile
    return out[first - begin : last - begin, : ends[1], : ends[2], : ends[3]]


def clip(actions: np.ndarray) -> np.ndarray:
    """GAP-26 (Sec. 3): MS-HAB's released open and close actions reach from -5 to 12.

    They are unbounded means of PPO policies (mshab issue 56). The controller executed them clipped
    to [-1, 1].
    """
    return actions.clip(-1, 1)


def base_position(camera: np.ndarray, gripper: np.ndarray, where: str) -> tuple[np.ndarray, float]:
    """Base x, y in the world frame, [n, 2] metres, and the metres by which the base rises.

    `camera` [n, 4, 4] is the hand camera's pose in the world, `gripper` [n, 7] the gripper's in the
    base frame. The camera is fixed to the gripper, so both together give the base's pose in the
    world, exact to float32. Raises InputError if the base would rise by 2 cm or more.
    """
    position, w, axis = gripper[:, :3], gripper[:, 3:4], -gripper[:, 4:]  # the inverse rotation
    turn = 2 * np.cross(axis, position)
    from_base = position + w * turn + np.cross(axis, turn)  # base to gripper, gripper's axes
    from_base = (from_base + HAND_CAMERA) @ GL_FROM_LINK.T  # base to camera, camera's axes [n, 3]
    base = camera[:, :3, 3] - np.einsum("nij,nj->ni", camera[:, :3, :3], from_base)  # [n, 3]
    rise = float(np.ptp(base[:, 2]))
    if rise >= RISE_REFUSED:
        raise InputError(
            f"{where}: base x, y cannot be derived from {CAMERA_POSE} and {GRIPPER_POSE}: the base "
            f"would rise by {rise:.3f} m. Record with MS-HAB's own Fetch, or write labels/pos"
        )
    return base[:, :2].astype(np.float32), rise


def relative_speed(actions: np.ndarray, pos: np.ndarray) -> float:
    """Median ratio of the base's displacement to the commanded one; NaN without a command."""
    if len(actions) == 1:
        return np.nan
    commanded = actions[:-1, BASE_FORWARD] / CONTROL_HZ  # [T - 1] metres
    # The base needs some steps to reach its speed: use steps whose last SETTLED commands agree.
    forth, back = commanded > 0.2 / CONTROL_HZ, commanded < -0.2 / CONTROL_HZ
    steps = [np.convolve(each, np.ones(SETTLED))[: len(each)] for each in (forth, back)]
    steady = np.maximum(*steps) == SETTLED
    moved = np.linalg.norm(np.diff(pos, axis=0), axis=-1)  # [T - 1] metres
    return np.median(moved[steady] / np.abs(commanded[steady])) if steady.any() else np.nan


def remarks(surveys: np.ndarray, files: list[str]) -> Iterator[str]:
    """Sentences about oddities in episodes, given surveys [n] and the file of each."""
    names = np.array(files)
    for file in dict.fromkeys(files):
        rows = surveys[names == file]
        if clipped := rows["clipped"].sum():
            share = f"{clipped / (rows['frames'].sum() * ACTION_DIM):.1%}"
            yield f"{file}: {share} of action values clipped to [-1, 1], as the controller does"
        if (rise := rows["rise"].max()) > RISE_WARNED:
            yield f"{file}: the derived base rises by up to {1000 * rise:.1f} mm, expected under 1"
        speed = rows["speed"][np.isfinite(rows["speed"])]
        if len(speed) and not 0.6 < np.median(speed) < 1.6:
            yield (
                f"{file}: the base moves {np.median(speed):.2f} of what action {BASE_FORWARD} "
                f"commands at {CONTROL_HZ} Hz, expected about 1: another controller or other labels"
            )
    for name in ("pos", "grasp", "qpos", "obj"):
        low, high = surveys[name][:, 0].min(0), surveys[name][:, 1].max(0)
        if (low == high).all():
            yield f"{name} never changes in these episodes: its decoder can only learn {low}"
