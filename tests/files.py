"""Small files of MS-HAB's exact layout, for tests that need no simulator; damage to files."""

import json
from pathlib import Path

import h5py
import numpy as np


def datasets(file: h5py.Group) -> dict[str, np.ndarray]:
    """Every dataset below a group, by its path."""
    found = {}
    file.visititems(lambda name, item: found.update({name: item}))
    return {name: item[:] for name, item in found.items() if isinstance(item, h5py.Dataset)}


def write_demos(
    path: Path, lengths=(12, 9, 15), labels=True, seed=0, has_object=True, entries=None, **about
) -> Path:
    """Write `path`.h5 and .json with random pictures; labels and actions are functions of them.

    `about` adds to the .json, `entries` {number: changes} to its episodes, and None leaves one out.
    """
    rng, entries = np.random.default_rng(seed), entries or {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path.with_suffix(".h5"), "w", track_order=True) as file:
        for i, length in enumerate(lengths):
            group = file.create_group(f"traj_{i}", track_order=True)
            write_trajectory(group, length, labels, has_object, rng)
    episodes = [
        dict(episode_id=i, episode_seed=[i], elapsed_steps=length, subtask_uid=f"uid-{i}") | change
        for i, length in enumerate(lengths)
        if (change := entries.get(i, {})) is not None
    ]
    content = {"env_info": {}, "episodes": episodes} | about
    path.with_suffix(".json").write_text(json.dumps(content))
    return path.with_suffix(".h5")


def flip(path: Path) -> None:
    """Change one byte of a file."""
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


def write_trajectory(group, length, labels, has_object, rng):
    frames = length + 1
    # One number per frame that pictures, labels and actions share.
    level = rng.uniform(0, 1, frames).astype(np.float32)
    per_pixel = level[:, None, None, None]  # [frames, 1, 1, 1]
    group["actions"] = np.repeat(level[:-1, None] * 2 - 1, 13, 1).astype(np.float32)
    group["success"] = np.arange(length) == length - 1
    group["obs/agent/qpos"] = np.repeat(level[:, None], 12, 1)
    group["obs/extra/is_grasped"] = level > 0.5
    pose = np.zeros((frames, 7), np.float32)
    if has_object:
        pose[:, 0], pose[:, 3] = level, 1
    group["obs/extra/obj_pose_wrt_base"] = pose
    gzip = dict(compression="gzip", compression_opts=5)
    for camera in ("fetch_head", "fetch_hand"):
        rgb = per_pixel * 255 + rng.integers(0, 8, (frames, 128, 128, 3))
        depth = np.broadcast_to((500 + 1000 * per_pixel).astype(np.int16), (frames, 128, 128, 1))
        sensor = group.create_group(f"obs/sensor_data/{camera}")
        sensor.create_dataset("rgb", data=rgb.clip(0, 255).astype(np.uint8), **gzip)
        sensor.create_dataset("depth", data=depth, **gzip)
        if labels:
            mask = np.zeros((frames, 128, 128), bool)
            mask[:, 32:96, 32:96] = level[:, None, None] > 0.3
            group.create_dataset(f"labels/seg/{camera}", data=mask, compression="gzip")
    if labels:
        group["labels/pos"] = np.stack([level, -level], 1)
