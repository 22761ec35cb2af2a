"""Recorded demonstrations in MS-HAB's own layout (paper Sec. 3).

    <task>/<subtask>/<target>.h5, with a .json beside it

    demos = Demonstrations("DATA")        # every .h5 below the folder, in the order of their names
    demos.read([0, 17])                   # structured array of RECORD, one per frame
    demos.read_episode(3)                 # all frames of one trajectory, each chunk inflated once

An h5 holds T + 1 observations and T actions per trajectory (MS-HAB: envs/wrappers/record.py); frame
t of ours is observation t with actions t, t+1, ..., t+7 (trajectory.py). MS-HAB's released files,
collect.py's and those of MS-HAB's recorder have one layout. `has` marks the labels that a file has
or that can be derived. A frame that cannot be read is a DataError naming file, trajectory, frame.
"""

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
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

# Blocks of frames that the order of samples mixes, and that a reader keeps: 1.4 GB of them when
# episodes have 200 steps.
SHUFFLE_POOL, READ_AHEAD = 256, 320


@dataclass(frozen=True)
class Episode:
    file: str  # relative to the folder
    task: str  # MS-HAB's name; "" where the folders do not say
    subtask: str
    trajectory: str  # "traj_3"
    length: int  # actions = frames, up to the first success where it was truncated there
    instruction: int  # row of `instructions`


def h5_files(folder: Path) -> list[Path]:
    """Every .h5 below a folder, sorted, each file once; links to folders are followed.

    Hidden files and folders are skipped: macOS leaves `._name.h5` beside a file that it copies.
    Of several names of one file, the one whose folders say its task counts.
    """
    found: dict[Path, Path] = {}
    for path in walk(folder, ()):
        known = found.setdefault(path.resolve(), path)
        if not task_and_subtask(known)[0]:
            found[path.resolve()] = path
    return sorted(found.values())


def walk(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """The .h5 files below a folder; a link to one of the folders `above` is a loop."""
    real = folder.resolve()
    if not folder.is_dir() or real in above:
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            yield from walk(path, (*above, real))
        elif path.suffix == ".h5" and not path.name.startswith("."):
            yield path


def task_and_subtask(path: Path) -> tuple[str, str]:
    """Of <task>/<subtask>/<target>.h5; the task's folder may have the name of its hub dataset."""
    task, subtask = ("", "", *path.absolute().parts)[-3:-1]
    hub = {Path(name).name: task for task, name in HUB_DATASETS.items()}  # MS-HAB-SetTable
    task = hub.get(task, task)
    return task if task in TASKS else "", subtask


def load_sidecar(path: Path) -> dict:
    """The .json beside an .h5. Raises DataError when it is missing or cut off."""
    sidecar = path.with_suffix(".json")
    if not sidecar.is_file():
        raise DataError(
            f"{path}: no {sidecar.name} beside it; MS-HAB's files come in pairs. Download or "
            "record it again."
        )
    try:
        content = json.loads(sidecar.read_bytes())
    except ValueError as error:
        raise DataError(f"{sidecar}: not whole ({error}); download or record it again") from error
    episodes = content.get("episodes") if isinstance(content, dict) else None
    each = episodes if isinstance(episodes, list) and episodes else [None]
    if not all(map(counted, each)) or len({str(e["episode_id"]) for e in each}) < len(each):
        raise DataError(
            f"{sidecar}: expected MS-HAB's `episodes`, at least one, each with its own episode_id "
            "and a whole number of elapsed_steps, at least 1; download or record it again"
        )
    if other := {e.get("control_mode") for e in each} - {CONTROL, None}:
        raise DataError(
            f"{sidecar}: control_mode {', '.join(map(str, other))}, expected {CONTROL}. Record it "
            "with that"
        )
    for entry in each:
        entry["elapsed_steps"] = int(entry["elapsed_steps"])
    return content


def counted(entry: object) -> bool:
    """Does an entry of `episodes` have an id and a number of steps?"""
    steps = entry.get("elapsed_steps") if isinstance(entry, dict) else None
    counts = isinstance(steps, int | float) and steps >= 1 and steps % 1 == 0
    return counts and "episode_id" in entry


class Demonstrations:
    """All demonstrations below a folder; opens in the time it takes to read the .json files.

    MS-HAB's released episodes go on for 200 steps, at rest once they have succeeded: `truncate`
    ends each at its first success, as collect.py does. An episode without one keeps its length.
    """

    def __init__(self, folder: str | Path, truncate: bool = False):
        self.folder, self.truncate = Path(folder), truncate
        paths = h5_files(self.folder)
        if not paths:
            raise InputError(
                f"{self.folder}: no .h5 demonstrations below it; record some: python collect.py "
                f"--out {quoted(self.folder)} ..."
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
                error.file = path  # doctor's command moves it aside
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
                str(path.relative_to(self.folder)), *task_and_subtask(path),
                f"traj_{entry['episode_id']}", entry["elapsed_steps"],
                self.instructions.index(text),
            )  # fmt: skip
            self.recorded.append(episode.length)
            self.episodes.append(episode)
            if self.truncate:
                length = self._first_success(len(self.episodes) - 1)
                self.episodes[-1] = replace(episode, length=length)

    def _first_success(self, episode: int) -> int:
        """Steps up to the first success, that one included; all if there is none."""
        entry = self.episodes[episode]
        group, _, where = self._open(episode)
        with self._reading(episode):
            success = group["success"][:] if "success" in group else None
        if success is None or success.shape != (entry.length,):
            raise DataError(
                f"{where}: success is {getattr(success, 'shape', None)}, expected one for each of "
                f"{entry.length} steps. "
                "Read it whole (--no-truncate-at-success), or record it again"
            )
        return int(np.argmax(success)) + 1 if success.any() else entry.length

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, frames: list[int] | np.ndarray) -> np.ndarray:
        """Frames by number, [n] of RECORD.

        One frame inflates its whole block, 26 frames or so, and the last READ_AHEAD blocks are
        kept: in the order of data.StepOrder, each is inflated once.
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

    def actions_of(self, episodes: np.ndarray) -> np.ndarray:
        """All actions of these episodes, [n, 13] in [-1, 1]."""
        return clip(np.concatenate([self._open(episode)[1] for episode in episodes]))

    def survey(self, episodes: np.ndarray) -> np.ndarray:
        """Labels and ranges of these episodes, [n] of SURVEY."""
        out = np.zeros(len(episodes), SURVEY)
        for row, episode in enumerate(episodes):
            with self._reading(episode):
                out[row] = survey(*self._open(episode))
        return out

    def _open(self, episode: int) -> tuple[h5py.Group, np.ndarray, str]:
        """A trajectory's group, its actions [T, 13] as recorded, and its name for errors."""
        entry = self.episodes[episode]
        where = f"{self.folder / entry.file}, {entry.trajectory}"
        with self._reading(episode):
            group = open_h5(str(self.folder / entry.file), os.getpid())[entry.trajectory]
            actions = read_actions(group, self.recorded[episode], where)
        return group, actions[: entry.length], where

    def _read(self, episode: int, first: int, last: int) -> np.ndarray:
        with self._reading(episode, f", frames {first}..{last - 1}"):
            group, actions, where = self._open(episode)
            out = read_frames(group, actions, first, last, where)
        out["instruction"], out["episode"] = self.episodes[episode].instruction, episode
        return out

    @contextmanager
    def _reading(self, episode: int, frames: str = "") -> Iterator[None]:
        """Turn what h5py raises into a DataError that names the place and what mends it."""
        entry = self.episodes[episode]
        path = self.folder / entry.file
        try:
            yield
        except (OSError, KeyError) as error:
            mend = mend_of(path, error)
            why = (
                f"It may be whole: {mend}"
                if mend
                else "It is damaged, or not what its .json describes in MS-HAB's layout "
                "(obs_mode=rgbd). Download or record it again"
            )
            raise DataError(
                f"{path}, {entry.trajectory}{frames}: cannot be read ({error}). {why}"
            ) from error


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


def label_command(episode: Episode, data: str | Path) -> str:
    """The command that records an episode's file again, beside `data`, with all five labels."""
    where = ("--task", episode.task or "TASK", "--subtask", episode.subtask)
    where = quoted(*where, "--target", Path(episode.file).stem)
    return (
        f"python collect.py --expert rl {where} --out {quoted(f'{Path(data).absolute()}-labelled')}"
        "  # in the real apartments; --expert scripted in a generated one"
    )
