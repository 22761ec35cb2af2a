"""Recorded demonstrations in MS-HAB's own layout (paper Sec. 3).

    <task>/<subtask>/<target>.h5, with a .json beside it

    demos = Demonstrations("DATA")  # every .h5 below the folder, in the order of their names
    demos.read([0, 17])             # structured array of RECORD, one per frame
    demos.read_episode(3)           # all frames of one trajectory

An h5 holds T + 1 observations and T actions per trajectory (MS-HAB: envs/wrappers/record.py); our
frame t is observation t with actions t, t+1, ..., t+7 (trajectory.py). MS-HAB's released files,
collect.py's files and the files of MS-HAB's recorder have this layout. A frame that cannot be read
is a DataError that names file, trajectory and frame.

Three numbers count frames: `frame` counts all frames of a folder, `step` those of one episode, and
a block is the frames of one episode that lie in the same chunks of the h5 (26 frames for 200
steps). HDF5 inflates whole chunks, so blocks are read as a whole and kept.
"""

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path

import h5py
import numpy as np
from einops import rearrange

from config import IMAGE_SIZE, SUBTASKS, TASKS, InputError, quoted
from paper import ARTICULATIONS, HUB_DATASETS, OBJECTS, instruction
from storage.files import mend_of
from storage.trajectory import (
    CONTROL,
    RECORD,
    SURVEY,
    DataError,
    clip,
    read_actions,
    read_frames,
    survey,
)

# Blocks that data.StepOrder mixes, and that a reader keeps (1.4 GB for episodes of 200 steps).
SHUFFLE_POOL, READ_AHEAD = 256, 320


@dataclass(frozen=True)
class Episode:
    file: str  # relative to the folder
    task: str  # MS-HAB's name; "" where the folders do not say
    subtask: str
    trajectory: str  # "traj_3"
    length: int  # actions = frames, up to the first success where it was truncated there
    instruction: int  # row of `instructions`


@dataclass
class Index:
    """The episodes of a folder, without their frames; Demonstrations and Pack add `read`."""

    folder: Path
    truncate: bool  # do episodes end at their first success?
    episodes: list[Episode] = field(default_factory=list)
    instructions: list[str] = field(default_factory=list)
    action_schema: list[dict] | None = None  # collect.py's files have both, MS-HAB's neither
    qpos_names: list[str] | None = None
    notes: list[str] = field(default_factory=list)  # what was skipped, a sentence each

    @cached_property
    def starts(self) -> np.ndarray:
        """The first frame of each episode, and the number of all frames, [episodes + 1]."""
        return np.cumsum([0] + [episode.length for episode in self.episodes])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def place(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The episode of each frame [n], and the step in it [n]."""
        episodes = np.searchsorted(self.starts, frames, side="right") - 1
        return episodes, frames - self.starts[episodes]


class Demonstrations(Index):
    """All demonstrations below a folder; opens without reading a picture.

    MS-HAB's released episodes go on for 200 steps, at rest once they have succeeded: `truncate`
    ends each at its first success, as collect.py does. An episode without one keeps its length.
    """

    def __init__(self, folder: str | Path, truncate: bool = False):
        super().__init__(Path(folder), truncate)
        self.recorded: list[int] = []  # steps of each episode in its file
        self.cache: dict[int, np.ndarray] = {}  # blocks as bytes, oldest first
        for path in h5_files(self.folder):
            self._add(path)
        if not self.episodes:
            raise InputError(
                f"{self.folder}: no .h5 demonstrations below it; record some: python collect.py "
                f"--out {quoted(self.folder)} ..., or fetch MS-HAB's: python data.py download "
                f"--out {quoted(self.folder)}"
            )
        chunks = (
            start + np.arange(0, episode.length, chunk_rows(steps + 1))
            for start, episode, steps in zip(self.starts, self.episodes, self.recorded)
        )
        self.blocks = np.concatenate([*chunks])  # the first frame of each block

    def _add(self, path: Path) -> None:
        """Append the episodes of a file."""
        sidecar = load_sidecar(path)
        for name in ("action_schema", "qpos_names"):
            theirs, ours = sidecar.get(name), getattr(self, name)
            if ours is not None and theirs is not None and theirs != ours:
                raise DataError(
                    f"{path}: its {name} {theirs} differs from that of the files before it, {ours}"
                )
            setattr(self, name, ours or theirs)
        with readable(path, str(path)):
            unnamed = set(open_h5(str(path), os.getpid()))
        for entry in sidecar["episodes"]:
            unnamed.discard(f"traj_{entry['episode_id']}")
            if entry["elapsed_steps"] == 0:
                self.notes.append(f"{path}, traj_{entry['episode_id']}: no steps, skipped")
                continue
            text = instruction_of(path, entry)
            if text not in self.instructions:
                self.instructions.append(text)
            self.recorded.append(int(entry["elapsed_steps"]))
            episode = Episode(
                str(path.relative_to(self.folder)), *task_and_subtask(path),
                f"traj_{entry['episode_id']}", self.recorded[-1], self.instructions.index(text),
            )  # fmt: skip
            self.episodes.append(episode)
            if self.truncate:
                length = self._first_success(len(self.episodes) - 1)
                self.episodes[-1] = replace(episode, length=length)
        if unnamed:
            self.notes.append(f"{path}: {len(unnamed)} trajectories not in its .json, skipped")

    def _first_success(self, episode: int) -> int:
        """Steps up to and with the first success; all steps if there is none."""
        steps = self.recorded[episode]
        with self._open(episode) as (group, _, where):
            success = group["success"][:] if "success" in group else None
        if success is None or success.shape != (steps,):
            raise DataError(
                f"{where}: success is {getattr(success, 'shape', None)}, expected one for each of "
                f"{steps} steps. Read all steps (--no-truncate-at-success), or record it again"
            )
        return int(np.argmax(success)) + 1 if success.any() else steps

    def read(self, frames: list[int] | np.ndarray) -> np.ndarray:
        """Frames by number, [n] of RECORD.

        In the order of data.StepOrder each block is read once: the last READ_AHEAD are kept.
        """
        out = np.empty((len(frames), RECORD.itemsize), np.uint8)  # bytes: fields are copied slower
        for row, frame in enumerate(frames):
            block = int(np.searchsorted(self.blocks, frame, side="right")) - 1
            if block not in self.cache:
                if len(self.cache) == READ_AHEAD:
                    del self.cache[next(iter(self.cache))]
                self.cache[block] = self.read_block(block)
            out[row] = self.cache[block][frame - self.blocks[block]]
        return rearrange(out.view(RECORD), "n 1 -> n")

    def read_block(self, block: int) -> np.ndarray:
        """The frames of a block as bytes, [n, size of RECORD]."""
        (episode,), (first,) = self.place(self.blocks[block : block + 1])
        last = min(first + chunk_rows(self.recorded[episode] + 1), self.episodes[episode].length)
        records = self.read_steps(int(episode), int(first), int(last))
        return rearrange(records.view(np.uint8), "(n size) -> n size", size=RECORD.itemsize)

    def read_episode(self, episode: int) -> np.ndarray:
        """All frames of an episode, [T] of RECORD."""
        return self.read_steps(episode, 0, self.episodes[episode].length)

    def read_steps(self, episode: int, first: int, last: int) -> np.ndarray:
        """Steps first..last-1 of an episode, [n] of RECORD."""
        with self._open(episode, f", frames {first}..{last - 1}") as (group, actions, where):
            out = read_frames(group, actions, first, last, where)
        out["instruction"], out["episode"] = self.episodes[episode].instruction, episode
        return out

    def actions_of(self, episodes: np.ndarray) -> np.ndarray:
        """All actions of these episodes, [n, 13] in [-1, 1]."""
        found = []
        for episode in episodes:
            with self._open(episode) as (_, actions, _):
                found.append(actions)
        return clip(np.concatenate(found))

    def survey(self, episodes: np.ndarray) -> np.ndarray:
        """Labels and ranges of these episodes, [n] of SURVEY."""
        out = np.zeros(len(episodes), SURVEY)
        for row, episode in enumerate(episodes):
            with self._open(episode) as trajectory:
                out[row] = survey(*trajectory)
        return out

    @contextmanager
    def _open(self, episode: int, frames: str = "") -> Iterator[tuple[h5py.Group, np.ndarray, str]]:
        """A trajectory's group, its actions [T, 13] as recorded, and its name for errors."""
        entry = self.episodes[episode]
        path = self.folder / entry.file
        where = f"{path}, {entry.trajectory}"
        with readable(path, where + frames):
            group = open_h5(str(path), os.getpid())[entry.trajectory]
            yield group, read_actions(group, self.recorded[episode], where)[: entry.length], where


@contextmanager
def readable(path: Path, where: str) -> Iterator[None]:
    """Turn what h5py raises into a DataError that names the place and the remedy."""
    try:
        yield
    except (OSError, KeyError) as error:
        mend = mend_of(path, error)
        why = (
            f"The file may be intact: {mend}"
            if mend
            else "It is damaged, or not what its .json describes in MS-HAB's layout "
            "(obs_mode=rgbd). Download or record it again"
        )
        raise DataError(f"{where}: cannot be read ({error}). {why}") from error


@lru_cache(maxsize=64)
def open_h5(path: str, process: int) -> h5py.File:
    """Open a file once per process: a forked loader process cannot use its parent's handle."""
    return h5py.File(path, "r")


@cache
def chunk_rows(observations: int) -> int:
    """Frames in one of the chunks that h5py chooses for the pictures of so many observations."""
    with h5py.File(io.BytesIO(), "w") as file:
        shape = (observations, IMAGE_SIZE, IMAGE_SIZE, 3)
        return file.create_dataset("rgb", shape, np.uint8, chunks=True).chunks[0]


# --- Files and their .json ---


def h5_files(folder: Path) -> list[Path]:
    """Every .h5 below a folder, sorted, each file once; links to folders are followed.

    Hidden files and folders are skipped: macOS leaves `._name.h5` beside a file that it copies.
    Of several names of one file, the name whose folders say the task counts.
    """
    found: dict[Path, list[Path]] = {}
    for place, folders, names in os.walk(folder, followlinks=True):
        here = Path(place)
        above = {path.resolve() for path in (here, *here.parents)}  # a link to one is a loop
        folders[:] = [f for f in folders if f[0] != "." and (here / f).resolve() not in above]
        for name in names:
            if name.endswith(".h5") and name[0] != ".":
                found.setdefault((here / name).resolve(), []).append(here / name)
    named = lambda path: task_and_subtask(path)[0] != ""  # noqa: E731
    return sorted(max(sorted(paths), key=named) for paths in found.values())


def task_and_subtask(path: Path) -> tuple[str, str]:
    """Of <task>/<subtask>/<target>.h5; the task's folder may have the name of its hub dataset."""
    task, subtask = ("", "", *path.absolute().parts)[-3:-1]
    hub = {Path(name).name: task for task, name in HUB_DATASETS.items()}  # MS-HAB-SetTable
    task = hub.get(task, task)
    return task if task in TASKS else "", subtask


def load_sidecar(path: Path) -> dict:
    """The .json beside an .h5. Raises DataError unless it is MS-HAB's."""
    sidecar = path.with_suffix(".json")
    if not sidecar.is_file():
        raise DataError(
            f"{path}: no {sidecar.name} beside it; MS-HAB's files come in pairs. Download or "
            "record it again"
        )
    with readable(sidecar, str(sidecar)):
        text = sidecar.read_bytes()
    try:
        content = json.loads(text)
        steps = {str(e["episode_id"]): float(e["elapsed_steps"]) for e in content["episodes"]}
        controls = {e.get("control_mode") for e in content["episodes"]} - {CONTROL, None}
        if not steps or len(steps) < len(content["episodes"]):
            raise ValueError("no episodes, or an id twice")
        if not all(n >= 0 and n % 1 == 0 for n in steps.values()):
            raise ValueError(f"elapsed_steps {sorted(steps.values())}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{sidecar}: got {error}; expected MS-HAB's `episodes`, at least one, each with its "
            "own episode_id and a whole number of elapsed_steps. Download or record it again"
        ) from error
    if controls:
        raise DataError(
            f"{sidecar}: control_mode {', '.join(map(str, controls))}, expected {CONTROL}. Record "
            "it with that"
        )
    return content


def instruction_of(path: Path, entry: dict) -> str:
    """The sentence of an episode: recorded, or from its subtask's folder and its file's name.

    Raises DataError when there is neither.
    """
    subtask, target = path.parent.name, path.stem
    if isinstance(entry.get("instruction"), str):
        return entry["instruction"]
    known = (*ARTICULATIONS, *(name for names in OBJECTS.values() for name in names))
    if subtask not in SUBTASKS or target not in known:
        raise DataError(
            f"{path}: no instruction in its .json, and {subtask}/{target} names no subtask of "
            f"{SUBTASKS} and its object or articulation; expected <task>/<subtask>/<target>.h5"
        )
    return instruction(subtask, target)


def label_command(episode: Episode, data: str | Path) -> str:
    """The command that records an episode's file again, beside `data`, with all five labels."""
    where = ("--task", episode.task or "TASK", "--subtask", episode.subtask)
    where = quoted(*where, "--target", Path(episode.file).stem)
    return (
        f"python collect.py --expert rl {where} --out {quoted(f'{Path(data).absolute()}-labelled')}"
        "  # in the real apartments; --expert scripted in a generated one"
    )
