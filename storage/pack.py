"""The pack: every frame as a fixed-size record in memory-mapped files, read at memory speed.

    python data.py pack    # data/ -> data/pack; resumable, file by file
    python data.py verify  # every file against its sha256

    PACK/<task>/<subtask>/<target>.npy  [frames] of RECORD, one file per .h5
         summary.npz                    survey [episodes] of SURVEY: labels and ranges;
                                        actions [frames, 13], for percentiles
         pack.json                      episodes, instructions, and the sha256 of every file

MS-HAB's h5 inflates 26 frames for each frame that is read; a pack reads single records. pack.json
is written last: a folder that has it is complete.
"""

from bisect import bisect
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Annotated
from zipfile import BadZipFile

import numpy as np
import tyro
from einops import rearrange
from tqdm import tqdm

from config import InputError, quoted
from storage.files import (
    DamagedError,
    read_json,
    replacing,
    sha256,
    sole_writer,
    well_formed,
    write_json,
)
from storage.h5 import Demonstrations, Episode, Index, h5_files
from storage.trajectory import RECORD, DataError, remarks

FORMAT = f"2 {RECORD.descr}"  # a pack of other records is refused
ABOUT = ("instructions", "action_schema", "qpos_names")
KINDS = {True: "demonstrations that end at their success", False: "whole demonstrations"}


class Pack(Index):
    """Frames as records in memory-mapped files, written by `data.py pack`."""

    blocks = None  # frames are read one by one, unlike those of an h5

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        index = folder / "pack.json"
        try:
            meta = read_json(index)
            if meta.get("format") != FORMAT:
                raise DamagedError(f"{index}: other records than this code reads")
            with well_formed(index):
                episodes = [Episode(**episode) for episode in meta["episodes"]]
                super().__init__(folder, meta["truncate"], episodes, *(meta[n] for n in ABOUT))
                # of each .h5: size, time, sha256, and sha256 of its .npy
                self.sources = {str(file): dict(entry) for file, entry in meta["files"].items()}
                self.hashes = {npy_name(f): entry["packed"] for f, entry in self.sources.items()}
                self.hashes["summary.npz"] = meta["summary"]
                lengths = dict.fromkeys(self.sources, 0)
                for episode in episodes:
                    lengths[episode.file] += episode.length
        except DamagedError as error:
            raise damaged(folder, str(error), [index]) from None
        self.files = [self._map(folder / npy_name(f), length) for f, length in lengths.items()]
        self.file_starts = [0, *accumulate(lengths.values())]  # the first frame of each

    def _map(self, path: Path, frames: int) -> np.ndarray:
        """A file's records as bytes, [frames, size of RECORD], mapped into memory."""
        try:
            records = np.load(path, mmap_mode="r")
            if records.dtype != RECORD or records.shape != (frames,):
                raise ValueError(f"{records.shape} records, expected {frames} of RECORD")
        except (OSError, ValueError, OverflowError, EOFError) as error:
            raise self.damaged(path, error) from None
        return rearrange(records.view(np.ndarray).view(np.uint8), "(n size) -> n size", n=frames)

    def damaged(self, path: Path, error: Exception) -> DataError:
        return damaged(self.folder, f"{path}: cannot be read ({error})", [path], self.truncate)

    def _summary(self, name: str, rows: int) -> np.ndarray:
        """An array of summary.npz, [rows, ...]."""
        path = self.folder / "summary.npz"
        try:
            with np.load(path) as summary:
                if len(summary[name]) != rows:
                    raise ValueError(f"{len(summary[name])} rows of {name}, expected {rows}")
                return summary[name]
        except (OSError, ValueError, LookupError, TypeError, BadZipFile) as error:
            raise self.damaged(path, error) from None

    @property
    def content(self) -> dict[str, str]:
        """{file: sha256}, by which a resumed run sees that its data changed."""
        return self.hashes

    def read_record(self, frame: int) -> np.ndarray:
        """One frame as bytes, [size of RECORD]."""
        file = bisect(self.file_starts, frame) - 1
        return self.files[file][frame - self.file_starts[file]]

    def actions_of(self, episodes: np.ndarray) -> np.ndarray:
        """All actions of these episodes, [n, 13] in [-1, 1]."""
        chosen = np.isin(np.arange(len(self.episodes)), episodes)
        return self._summary("actions", len(self))[np.repeat(chosen, np.diff(self.starts))]

    def survey(self, episodes: np.ndarray) -> np.ndarray:
        """Labels and ranges of these episodes, [n] of SURVEY."""
        return self._summary("survey", len(self.episodes))[episodes]


def npy_name(file: str) -> str:
    return str(Path(file).with_suffix(".npy"))


def command(folder: str | Path, truncate: bool = True, data: str | Path | None = None) -> str:
    """The command that writes the pack; without `data`, from the folder that a pack/ lies in."""
    folder = Path(folder)
    data = data or (folder.parent if folder.name == "pack" else "DATA")
    flag = "" if truncate else "--no-truncate-at-success "
    return f"python data.py pack {flag}--data {quoted(data)} --out {quoted(folder)}"


def damaged(folder: Path, what: str, files: list[Path], truncate: bool = True) -> DataError:
    """The error that names the command which writes these files of a pack again."""
    moves = [f"mv {quoted(file, f'{file}.damaged')}" for file in files if file.exists()]
    return DataError(f"{what}. Pack again: {' && '.join([*moves, command(folder, truncate)])}")


def open_data(data: str | Path, truncate: bool | None = None) -> Index:
    """The pack in a folder or in its subfolder pack/, else the demonstrations below it.

    `truncate` ends demonstrations at their success; None accepts either kind of pack. Raises
    InputError if there is no data, or if the pack is of the other kind or older than an .h5.
    """
    data = Path(data)
    folder = data if (data / "pack.json").is_file() else data / "pack"
    if not (folder / "pack.json").is_file():
        return Demonstrations(data, bool(truncate))
    pack = Pack(folder)
    if truncate not in (None, pack.truncate):
        raise InputError(
            f"{folder}: a pack of {KINDS[pack.truncate]}, expected one of {KINDS[truncate]}. "
            f"{'Give' if truncate else 'Drop'} --no-truncate-at-success, or pack again: "
            f"{command(f'{folder}-again', truncate, data if data != folder else None)}"
        )
    files = {str(path.relative_to(data)): path for path in h5_files(data)}
    packed = {name: pack.sources.get(name, {}).items() for name in files}
    if new := [name for name, path in files.items() if size_and_time(path).items() - packed[name]]:
        raise InputError(
            f"{folder}: {', '.join(new)} in {data} changed since, or came later. Pack again (only "
            f"files with another content are): {command(folder, pack.truncate, data)}"
        )
    return pack


def size_and_time(path: Path) -> dict[str, int]:
    return {"size": path.stat().st_size, "time": path.stat().st_mtime_ns}


def pack(data: str = "data", out: str | None = None, truncate_at_success: bool = True) -> None:
    """Write every frame below --data into --out once, so that training reads at memory speed.

    Resumable: a finished file is written again only if its .h5 has another sha256 by now.

    Args:
        data: folder of demonstrations
        out: folder of the pack; default: DATA/pack
        truncate_at_success: end each demonstration at its first success (GAP-25)
    """
    source, folder = Demonstrations(data, truncate_at_success), Path(out or Path(data) / "pack")
    if folder.resolve() == source.folder.resolve():
        raise InputError(f"--out {folder} is --data too: give another, or none for {data}/pack")
    with sole_writer(folder):
        write_pack(source, folder)


def write_pack(source: Demonstrations, folder: Path) -> None:
    rows: dict[str, list[int]] = {}  # episodes of each file
    for row, episode in enumerate(source.episodes):
        rows.setdefault(episode.file, []).append(row)
    about = {
        "format": FORMAT,
        "truncate": source.truncate,
        "episodes": [asdict(episode) for episode in source.episodes],
        **{name: getattr(source, name) for name in ABOUT},
    }
    final, progress, summary = folder / "pack.json", folder / "progress.json", "summary.npz"
    last, files = unchanged(progress if progress.exists() else final, about, source)
    same = files.keys() == rows.keys() and all(last.get(name) == about[name] for name in about)
    if same and "summary" in last and (folder / summary).is_file():
        write_json(final, last | {"files": {file: files[file] for file in rows}})  # new times
        print(f"{folder}: {len(Pack(folder)):,} frames, already packed")
        return
    write_json(progress, about | {"files": files})
    final.unlink(missing_ok=True)
    for file in tqdm([file for file in rows if file not in files], "pack", unit="file"):
        path = source.folder / file
        entry = size_and_time(path) | {"sha256": sha256(path)}
        entry["packed"] = write_records(folder / npy_name(file), source, rows[file])
        files[file] = entry
        write_json(progress, about | {"files": files})
    every = np.arange(len(source.episodes))
    survey = source.survey(every)
    with replacing(folder / summary) as temporary, open(temporary, "wb") as out:
        np.savez(out, survey=survey, actions=source.actions_of(every))
    about |= {"files": {file: files[file] for file in rows}, "summary": sha256(folder / summary)}
    write_json(final, about)
    progress.unlink(missing_ok=True)
    line = f"{folder}: {len(source):,} frames of {len(every):,} episodes in {len(rows)} files"
    print(*source.notes, *remarks(survey, [e.file for e in source.episodes]), line, sep="\n")


def write_records(path: Path, source: Demonstrations, episodes: list[int]) -> str:
    """Write the frames of these episodes as a .npy, one episode at a time; returns its sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (sum(source.episodes[row].length for row in episodes),)
    header = np.lib.format.header_data_from_array_1_0(np.empty(0, RECORD)) | {"shape": shape}
    with replacing(path) as temporary, open(temporary, "wb") as out:
        np.lib.format.write_array_header_1_0(out, header)
        for row in episodes:
            out.write(source.read_episode(row).tobytes())
    return sha256(path)


def unchanged(path: Path, about: dict, source: Demonstrations) -> tuple[dict, dict[str, dict]]:
    """A pack's .json, and {file: entry with its present time} of the .h5 whose .npy may stay."""

    def episodes(meta: dict) -> dict[str, list[dict]]:
        by_file: dict[str, list[dict]] = {}
        for entry in meta["episodes"]:  # the records do not have the instruction's row
            by_file.setdefault(entry["file"], []).append(entry | {"instruction": 0})
        return by_file

    try:
        meta, kept = read_json(path), {}
        with well_formed(path):
            if any(meta[name] != about[name] for name in ("format", "truncate")):
                return {}, {}
            before, now = episodes(meta), episodes(about)
            for file in meta["files"].keys() & now.keys():
                h5, entry = source.folder / file, meta["files"][file]
                same = before[file] == now[file] and sha256(h5) == entry["sha256"]
                if same and (path.parent / npy_name(file)).is_file():
                    kept[file] = entry | size_and_time(h5)
        return meta, kept
    except DamagedError:
        return {}, {}


def verify(folder: Annotated[str, tyro.conf.Positional] = "data/pack") -> None:
    """Compare every file of the pack in a folder, or in its pack/, with its sha256."""
    folder = Path(folder)
    pack, wrong = Pack(folder if (folder / "pack.json").exists() else folder / "pack"), []
    for name, expected in tqdm(pack.hashes.items(), "verify", unit="file"):
        path = pack.folder / name
        if not path.is_file() or sha256(path) != expected:
            wrong.append(path)
    if wrong:
        what = f"{', '.join(map(str, wrong))}: missing or damaged, sha256 differs"
        raise damaged(pack.folder, what, wrong, pack.truncate)
    print(f"{folder}: {len(pack):,} frames, no file damaged")
