"""Recorded demonstrations in MS-HAB's own layout (paper Sec. 3).

    <task>/<subtask>/<target>.h5, with a .json beside it

    demos = Demonstrations("DATA")  # every .h5 below the folder, sorted by path
    demos.read([0, 17])             # [2] of RECORD
    demos.read_episode(3)           # all frames of one trajectory

An h5 holds T + 1 observations and T actions per trajectory (MS-HAB: envs/wrappers/record.py); our
frame t is observation t with actions t, t+1, ..., t+7. MS-HAB's release, MS-HAB's recorder and
collect.py write this layout. An unreadable frame is an InputError that names file and trajectory.

`frame` numbers all frames of a folder; `step`, RECORD's field "frame", those of one episode. A
block is the frames of one episode that share chunks of the h5 (26 frames for 200 steps). HDF5
inflates whole chunks, so blocks are read and cached as a whole.
"""

import io
import json
import os
from bisect import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from itertools import chain
from pathlib import Path

import h5py
import numpy as np

from config import IMAGE_SIZE, SUBTASKS, TASKS, InputError, quoted
from paper import ARTICULATIONS, HUB_DATASETS, OBJECTS, instruction
from storage.files import READ_ERRORS, mend_of
from storage.trajectory import CONTROL, RECORD, SURVEY, Trajectory, clip

SHUFFLE_POOL = 256  # blocks that training.order.StepOrder mixes
READ_AHEAD = 320  # blocks that a reader caches: 1.4 GB for episodes of 200 steps
H5_ERRORS = (OSError, KeyError, RuntimeError)  # of h5py, on a damaged file
AGAIN = "It is damaged or not MS-HAB's (obs_mode=rgbd). Download or record it again"


@dataclass(frozen=True)
class Episode:
    file: str  # relative to the folder
    task: str  # MS-HAB's name; "" where the folders do not say
    subtask: str
    trajectory: str  # "traj_3"
    length: int  # number of actions and of frames; if truncated, up to the first success
    instruction: int  # row of `instructions`


@dataclass
class Index:
    """The episodes of a folder; Demonstrations and Pack add `read_record`, which reads a frame."""

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

    @cached_property
    def content(self) -> dict[str, int]:
        """{file: size in bytes}, by which a resumed run sees that its data changed."""
        files = dict.fromkeys(episode.file for episode in self.episodes)
        return {file: (self.folder / file).stat().st_size for file in files}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def place(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The episode of each frame [n], and the step in it [n]."""
        episodes = np.searchsorted(self.starts, frames, side="right") - 1
        return episodes, frames - self.starts[episodes]

    def read(self, frames: list[int] | np.ndarray) -> np.ndarray:
        """Frames by number, [n] of RECORD."""
        records = [self.read_record(frame) for frame in frames]  # bytes copy faster than fields
        records = np.stack(records).view(RECORD)[:, 0]
        records["episode"], _ = self.place(np.asarray(frames))
        records["instruction"] = [self.episodes[row].instruction for row in records["episode"]]
        return records


class Demonstrations(Index):
    """All demonstrations below a folder; opens without reading a picture.

    MS-HAB's released episodes last 200 steps; the robot rests after the success. `truncate` ends
    each episode at its first success, as collect.py does; a failed episode keeps its length.
    """

    def __init__(self, folder: str | Path, truncate: bool = False):
        super().__init__(Path(folder), truncate)
        self.recorded: list[int] = []  # steps of each episode in its file
        self.cache: dict[int, np.ndarray] = {}  # blocks as bytes, oldest first
        for path in h5_files(self.folder):
            self._add(path)
        if not self.episodes:
            raise InputError(
                f"{self.folder}: no .h5 demonstrations below it. Record some: python collect.py "
                f"--out {quoted(self.folder)} ..., or python data.py download"
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
                raise InputError(f"{path}: its {name} {theirs} differs from earlier files' {ours}")
            setattr(self, name, ours or theirs)
        with readable(path):
            unnamed = set(open_h5(str(path), os.getpid()))
        if empty := [entry["elapsed_steps"] for entry in sidecar["episodes"]].count(0):
            self.notes.append(f"{path}: {empty} episodes of no steps, skipped")
        for entry in sidecar["episodes"]:
            name, steps = f"traj_{entry['episode_id']}", entry["elapsed_steps"]
            unnamed.discard(name)
            if not steps:
                continue
            text = instruction_of(path, entry)
            if text not in self.instructions:
                self.instructions.append(text)
            self.recorded.append(steps)
            length = first_success(path, name, steps) if self.truncate else steps
            file, row = str(path.relative_to(self.folder)), self.instructions.index(text)
            self.episodes.append(Episode(file, *task_and_subtask(path), name, length, row))
        if unnamed:
            self.notes.append(f"{path}: {len(unnamed)} trajectories not in its .json, skipped")

    def read_record(self, frame: int) -> np.ndarray:
        """One frame as bytes. In the order of StepOrder, each block is read from disk once."""
        block = bisect(self.blocks, frame) - 1
        if block not in self.cache:
            if len(self.cache) == READ_AHEAD:
                del self.cache[next(iter(self.cache))]
            self.cache[block] = self.read_block(block)
        return self.cache[block][frame - self.blocks[block]]

    def read_block(self, block: int) -> np.ndarray:
        """The frames of a block as bytes, [n, size of RECORD]."""
        (episode,), (first,) = self.place(self.blocks[block : block + 1])
        last = min(first + chunk_rows(self.recorded[episode] + 1), self.episodes[episode].length)
        records = self.read_steps(int(episode), int(first), int(last))
        return records.view(np.uint8).reshape(-1, RECORD.itemsize)

    def read_episode(self, episode: int) -> np.ndarray:
        """All frames of an episode, [T] of RECORD."""
        return self.read_steps(episode, 0, self.episodes[episode].length)

    def read_steps(self, episode: int, first: int, last: int) -> np.ndarray:
        """Steps first..last-1 of an episode, [n] of RECORD."""
        with self._open(episode, f", frames {first}..{last - 1}") as (trajectory, actions):
            return trajectory.read_frames(actions, first, last)

    def actions_of(self, episodes: np.ndarray) -> np.ndarray:
        """All actions of these episodes, [n, 13] in [-1, 1]."""
        found = []
        for episode in episodes:
            with self._open(episode) as (_, actions):
                found.append(actions)
        return clip(np.concatenate(found))

    def survey(self, episodes: np.ndarray) -> np.ndarray:
        """Labels and ranges of these episodes, [n] of SURVEY."""
        out = np.zeros(len(episodes), SURVEY)
        for row, episode in enumerate(episodes):
            with self._open(episode) as (trajectory, actions):
                out[row] = trajectory.survey(actions)
        return out

    @contextmanager
    def _open(self, episode: int, frames: str = "") -> Iterator[tuple[Trajectory, np.ndarray]]:
        """A trajectory, and its actions [T, 13] as recorded."""
        entry, steps = self.episodes[episode], self.recorded[episode]
        path = self.folder / entry.file
        where = f"{path}, {entry.trajectory}"
        with readable(path, where + frames):
            group = open_h5(str(path), os.getpid())[entry.trajectory]
            trajectory = Trajectory(group, steps, where)
            yield trajectory, trajectory.read("actions", 0, steps)[: entry.length]


@contextmanager
def readable(
    path: Path, where: str | None = None, again: str = AGAIN, errors: tuple = H5_ERRORS
) -> Iterator[None]:
    """Turn an error of reading a file into an InputError with place and remedy."""
    try:
        yield
    except errors as error:
        mend = mend_of(path, error)
        why = f"The file may be intact: {mend}" if mend else again
        raise InputError(f"{where or path}: cannot be read ({error!r}). {why}") from error


def first_success(path: Path, trajectory: str, steps: int) -> int:
    """Steps of a trajectory up to and with its first success; all `steps` if there is none."""
    where = f"{path}, {trajectory}"
    with readable(path, where):
        group = open_h5(str(path), os.getpid())[trajectory]
        success = Trajectory(group, steps, where, only=["success"]).read("success", 0, steps)
    return int(np.argmax(success)) + 1 if success.any() else steps


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

WHOLE = ("a whole number", lambda value: type(value) is int and value >= 0)
# Fields of an episode in the .json: what is expected, and the test of it.
ENTRY = {
    "episode_id": WHOLE,
    "elapsed_steps": WHOLE,
    "control_mode": (CONTROL, lambda value: value in (None, CONTROL)),
    "instruction": ("a sentence", lambda s: isinstance(s, str) and s.strip() and s.isprintable()),
}


def refuse(error: OSError) -> None:
    """Raise InputError for a folder that is there and cannot be listed."""
    if not isinstance(error, NotADirectoryError) and (mend := mend_of(Path(error.filename), error)):
        raise InputError(f"{error.filename}: {error.strerror}. {mend}") from error


def h5_files(folder: Path) -> list[Path]:
    """Every .h5 below a folder, sorted; links to folders are followed, each folder is read once.

    Hidden files are skipped: macOS leaves `._name.h5` beside a file that it copies.
    """
    found, visited = [], set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        if os.path.realpath(place) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(place))
        # Links come last, so that a folder is found under its own name.
        folders.sort(key=lambda name: os.path.islink(os.path.join(place, name)))
        for path in (Path(place, name) for name in names if name[0] != "."):
            if not path.is_file() and (path.is_symlink() or path.suffix == ".h5"):
                raise InputError(f"{path}: a link that leads nowhere, or no regular file; move it")
            found += [path] * (path.suffix == ".h5")
    return sorted(found)


def task_and_subtask(path: Path) -> tuple[str, str]:
    """Task and subtask of a path; the task's folder may have the name of its hub dataset."""
    task, subtask = ("", "", *path.absolute().parts)[-3:-1]
    hub = {Path(name).name: task for task, name in HUB_DATASETS.items()}  # MS-HAB-SetTable
    task = hub.get(task, task)
    return task if task in TASKS else "", subtask


def load_sidecar(path: Path) -> dict:
    """The .json beside an .h5. Raises InputError unless it is MS-HAB's."""
    sidecar = path.with_suffix(".json")
    again = "Download or record it again"
    if not sidecar.is_file():
        raise InputError(f"{path}: no {sidecar.name} beside it. {again}")
    with readable(sidecar):
        text = sidecar.read_bytes()
    try:
        content = json.loads(text)
        entries = [{**entry} for entry in content["episodes"]]
        kwargs = dict((content.get("env_info") or {}).get("env_kwargs") or {})
        for name in ("action_schema", "qpos_names"):
            if not isinstance(content.get(name) or [], list):
                raise TypeError(f"{name} {content[name]!r}, no list")
    except READ_ERRORS as error:
        raise InputError(
            f"{sidecar}: got {error!r}, expected a JSON object with MS-HAB's `episodes`. {again}"
        ) from error
    # What stands for a key that an entry lacks. MS-HAB's release has no instructions.
    absent = {"control_mode": kwargs.get("control_mode"), "instruction": "that of its folder"}
    for i, entry in enumerate(entries):
        for name, (expected, holds) in ENTRY.items():
            got = (absent | entry).get(name)
            if not holds(got):
                where = f"{sidecar}, traj_{entry.get('episode_id')} (entry {i})"
                raise InputError(f"{where}: {name} is {got!r}, expected {expected}. {again}")
    ids = [entry["episode_id"] for entry in entries]
    if len(set(ids)) < len(ids):
        raise InputError(f"{sidecar}: episode_id {max(ids, key=ids.count)} is there twice. {again}")
    if not entries:
        raise InputError(f"{sidecar}: its `episodes` are empty. {again}")
    return content


def instruction_of(path: Path, entry: dict) -> str:
    """The recorded sentence of an episode, else the one for its <subtask>/<target>.h5."""
    subtask, target = path.parent.name, path.stem
    if "instruction" in entry:
        return entry["instruction"]
    if subtask not in SUBTASKS or target not in chain(ARTICULATIONS, *OBJECTS.values()):
        raise InputError(
            f"{path}: no instruction in its .json, and {subtask}/{target} names no subtask of "
            f"{SUBTASKS} and its object or articulation; expected <task>/<subtask>/<target>.h5"
        )
    return instruction(subtask, target)


def label_command(episode: Episode, data: str | Path) -> str:
    """The command that records an episode's file again, beside `data`, with all five labels."""
    flags = ("--task", episode.task or "TASK", "--subtask", episode.subtask)
    flags += ("--target", Path(episode.file).stem, "--out", f"{Path(data).absolute()}-labelled")
    why = "in the real apartments; --expert scripted in a generated one"
    return f"python collect.py --expert rl {quoted(*flags)}  # {why}"
