"""Demonstrations in MS-HAB's h5 + json layout, written so that a kill loses no finished episode.

    recording = Recording(Path("DATA/set_table/close"), "kitchen_counter", recipe)
    recording.start()
    recording.add(seed, success, steps, encode(trajectory, header, episode))
    recording.merge()

A successful attempt is one file, <target>.parts/<seed>.part, an h5 with one episode. A failed
attempt is one line of <target>.parts/attempts.jsonl. `merge` makes <target>.h5 and .json of them.
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
from storage.files import append, mend_of, read_lines, replacing, write, write_json

COMPRESSED = ("rgb", "depth", "fetch_head", "fetch_hand")  # images; masks, named by camera
GZIP = dict(compression="gzip", compression_opts=5)  # (MS-HAB: envs/wrappers/record.py)


def encode(trajectory: dict, header: dict, episode: dict) -> bytes:
    """Return an h5 file: the trajectory as traj_0, `header` and `episode` as attributes."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        write_tree(file.create_group("traj_0", track_order=True), trajectory)
        file.attrs["header"], file.attrs["episode"] = json.dumps(header), json.dumps(episode)
    return buffer.getvalue()


def write_tree(group: h5py.Group, tree: dict) -> None:
    """Write a tree of arrays; a list of trees with equal keys becomes one of stacked arrays."""
    for key, value in tree.items():
        if isinstance(value, list) and isinstance(value[0], dict):
            value = {name: [row[name] for row in value] for name in value[0]}
        if isinstance(value, dict):
            write_tree(group.create_group(key, track_order=True), value)
        else:
            compression = GZIP if key in COMPRESSED else {}
            group.create_dataset(key, data=np.asarray(value), **compression)


class Recording:
    """The files of one target.

    `recipe` holds the settings that determine an episode; recipe["seed"] is the first seed. `done`
    maps every attempted seed to its success; `episodes` is the list in the json. Raises InputError
    when the files have another recipe, or when h5 or json is missing or damaged.
    """

    def __init__(self, folder: Path, target: str, recipe: dict):
        self.h5, self.json = folder / f"{target}.h5", folder / f"{target}.json"
        self.parts = folder / f"{target}.parts"
        self.attempts = self.parts / "attempts.jsonl"
        self.recipe, self.episodes, self.done = recipe, [], {}
        if self.json.exists():
            try:
                h5py.File(self.h5).close()
                sidecar = json.loads(self.json.read_bytes())
            except (OSError, ValueError) as error:
                path = getattr(error, "filename", None) or self.h5  # h5py's errors have none
                if mend := mend_of(path, error):
                    raise InputError(f"{error}. {path} may be intact: {mend}") from error
                raise self.incomplete(error) from error
            self.check_recipe(self.json, sidecar)
            self.episodes = sidecar["episodes"]
            self.done = dict.fromkeys(sidecar["failed_seeds"], False)
            self.done |= {episode["seed"]: True for episode in self.episodes}
        elif self.h5.exists() and not self.parts.exists():  # with parts: killed during `merge`
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

    def incomplete(self, reason: object) -> InputError:
        return InputError(
            f"{self.h5} and {self.json.name} are not both complete ({reason}). Move them away, or "
            "give another --out"
        )

    def check_recipe(self, path: Path, found: dict) -> None:
        if found.get("recipe") != self.recipe:
            raise InputError(
                f"{path} has episodes of {found.get('recipe')}, this run records {self.recipe}: "
                "choose another --out"
            )

    def start(self) -> None:
        self.parts.mkdir(parents=True, exist_ok=True)
        if not read_lines(self.attempts):
            append(self.attempts, {"recipe": self.recipe})

    def add(self, seed: int, success: bool, steps: int, part: bytes) -> None:
        if success:
            # Not named .h5: readers open every .h5 below DATA.
            write(self.parts / f"{seed:08d}.part", part)
        else:
            append(self.attempts, {"seed": seed, "success": False, "steps": steps})
        self.done[seed] = success

    def next_seeds(self, running: list[int], episodes: int, number: int) -> list[int]:
        """Return up to `number` of the lowest seeds that are neither attempted nor running.

        A seed is left out when `episodes` lower seeds succeeded or still may: so the kept seeds do
        not depend on the number of workers.
        """
        seeds, lower = [], 0  # lower: how many seeds below `seed` succeeded or still may
        for seed in count(self.recipe["seed"]):
            if len(seeds) == number or lower >= episodes:
                return seeds
            if seed not in self.done and seed not in running:
                seeds.append(seed)
            lower += self.done.get(seed, True)

    def merge(self) -> None:
        """Write the h5, then the json, then remove the parts; a file without json is incomplete."""
        merged = {episode["seed"] for episode in self.episodes}
        parts = {int(part.stem): part for part in self.parts.glob("*.part")}
        header, sources = {}, [*parts.values(), *([self.h5] if merged else [])]
        if shutil.disk_usage(self.parts).free < sum(path.stat().st_size for path in sources):
            # On a full disk h5py would raise RuntimeError, or fail on closing.
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
