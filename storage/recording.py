"""Demonstrations in MS-HAB's h5 + json layout, in files that are complete at every moment.

    recording = Recording(Path("DATA/set_table/close"), "kitchen_counter", recipe)
    recording.start()
    recording.add(seed, success, steps, encode(trajectory, header, episode))
    recording.merge()

A finished attempt is on disk before it counts: a success as <target>.parts/<seed>.part, an h5 with
one episode; a failure as a line of <target>.parts/attempts.jsonl. `merge` makes <target>.h5 and
.json of them.
"""

import errno
import io
import json
import os
import shutil
from itertools import count
from pathlib import Path

import h5py
import numpy as np

from config import InputError
from storage.files import append, read_lines, replacing, write, write_json

COMPRESSED = ("rgb", "depth", "fetch_head", "fetch_hand")  # images, and the masks named by camera
GZIP = dict(compression="gzip", compression_opts=5)  # (MS-HAB: envs/wrappers/record.py)


def encode(trajectory: dict, header: dict, episode: dict) -> bytes:
    """Return an h5 file: the trajectory as traj_0, `header` and `episode` as attributes."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        write_tree(file.create_group("traj_0", track_order=True), trajectory)
        file.attrs["header"], file.attrs["episode"] = json.dumps(header), json.dumps(episode)
    return buffer.getvalue()


def write_tree(group: h5py.Group, tree: dict) -> None:
    """Write a tree of arrays; a list of equal trees becomes one tree of stacked arrays."""
    for key, value in tree.items():
        if isinstance(value, list):
            value = stack(value)
        if isinstance(value, dict):
            write_tree(group.create_group(key, track_order=True), value)
        else:
            group.create_dataset(key, data=value, **(GZIP if key in COMPRESSED else {}))


def stack(rows: list) -> dict | np.ndarray:
    if isinstance(rows[0], dict):
        return {key: stack([row[key] for row in rows]) for key in rows[0]}
    return np.stack(rows)


class Recording:
    """The files of one target.

    `recipe` holds the settings that determine an episode; recipe["seed"] is the first seed. `done`
    maps every attempted seed to its success; `episodes` is the list in the json. Raises InputError
    when the files have another recipe, or when one of h5 and json is missing or damaged.
    """

    def __init__(self, folder: Path, target: str, recipe: dict):
        self.h5, self.json = folder / f"{target}.h5", folder / f"{target}.json"
        self.parts = folder / f"{target}.parts"
        self.attempts = self.parts / "attempts.jsonl"
        self.recipe, self.episodes, self.done = recipe, [], {}
        if self.json.exists():
            sidecar = self.read_sidecar()
            self.episodes = sidecar["episodes"]
            self.done = dict.fromkeys(sidecar["failed_seeds"], False)
            self.done |= {episode["seed"]: True for episode in self.episodes}
        elif self.h5.exists() and not self.parts.exists():  # with parts: killed between the two
            raise self.incomplete(f"no {self.json.name}")
        merged = len(self.done)
        if lines := read_lines(self.attempts, mend=True):
            first, *failures = lines
            self.check_recipe(self.attempts, first)
            self.done |= {failure["seed"]: False for failure in failures}
            self.done |= {int(part.stem): True for part in self.parts.glob("*.part")}
        if merged and len(self.done) == merged:  # killed before the parts were removed
            shutil.rmtree(self.parts, ignore_errors=True)

    @property
    def successes(self) -> int:
        return sum(self.done.values())

    def read_sidecar(self) -> dict:
        """Read the json of a pair whose h5 opens."""
        try:
            h5py.File(self.h5).close()
            sidecar = json.loads(self.json.read_bytes())
        except (OSError, ValueError) as error:
            raise self.incomplete(error) from error
        self.check_recipe(self.json, sidecar)
        return sidecar

    def incomplete(self, reason: object) -> InputError:
        return InputError(
            f"{self.h5} and {self.json.name} are not both complete ({reason}). Nothing is "
            "replaced: move them away, or give another --out"
        )

    def check_recipe(self, path: Path, found: dict) -> None:
        if found.get("recipe") != self.recipe:
            raise InputError(
                f"{path} has episodes of {found.get('recipe')}, asked for are {self.recipe}: "
                "choose another --out"
            )

    def start(self) -> None:
        self.parts.mkdir(parents=True, exist_ok=True)
        if not read_lines(self.attempts):
            append(self.attempts, {"recipe": self.recipe})

    def add(self, seed: int, success: bool, steps: int, part: bytes) -> None:
        if success:
            # Not .h5: readers take every .h5 below DATA for a complete file.
            write(self.parts / f"{seed:08d}.part", part)
        else:
            append(self.attempts, {"seed": seed, "success": False, "steps": steps})
        self.done[seed] = success

    def next_seed(self, running: list[int], episodes: int) -> int | None:
        """Return the lowest seed not attempted yet; None if `episodes` lower ones succeed or may.

        No episode is recorded in vain, and the kept ones do not depend on the workers.
        """
        seeds = count(self.recipe["seed"])
        seed = next(s for s in seeds if s not in self.done and s not in running)
        hopeful = [*running, *(s for s, success in self.done.items() if success)]
        return seed if sum(s < seed for s in hopeful) < episodes else None

    def merge(self) -> None:
        """Write the h5, then the json that makes it count, then remove the parts."""
        merged = {episode["seed"] for episode in self.episodes}
        parts = {int(part.stem): part for part in self.parts.glob("*.part")}
        header, sources = {}, [*parts.values(), *([self.h5] if merged else [])]
        if shutil.disk_usage(self.parts).free < sum(path.stat().st_size for path in sources):
            # Before h5py meets a full disk: it raises RuntimeError, or fails on closing.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.h5))
        with replacing(self.h5) as path, h5py.File(path, "w") as file:
            if merged:
                with h5py.File(self.h5) as old:
                    for episode in self.episodes:
                        old.copy(f"traj_{episode['episode_id']}", file)
            for seed in sorted(set(parts) - merged):
                number = len(self.episodes)
                with h5py.File(parts[seed]) as part:
                    part.copy("traj_0", file, f"traj_{number}")
                    header = json.loads(part.attrs["header"])
                    episode = json.loads(part.attrs["episode"])
                self.episodes.append({"episode_id": number, **episode})
        failed = sorted(seed for seed, success in self.done.items() if not success)
        header |= {"recipe": self.recipe, "failed_seeds": failed, "episodes": self.episodes}
        write_json(self.json, header)
        shutil.rmtree(self.parts)
