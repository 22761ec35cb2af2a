"""The pack: every frame as a fixed-size record in memory-mapped files, read at memory speed.

    python data.py pack    # data/ -> data/pack; resumable, file by file
    python data.py verify  # every file against its sha256

    PACK/<task>/<subtask>/<target>.npy  [frames] of RECORD, one file per .h5
         summary.npz                    survey [episodes] of SURVEY: labels and ranges;
                                        actions [frames, 13], for percentiles
         pack.json                      episodes, instructions, and the sha256 of every file

An h5 of MS-HAB inflates 26 frames for each frame that is read; a pack reads single records.
pack.json is written last: a folder that has it is complete.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from einops import rearrange
from tqdm import tqdm

from config import InputError, quoted
from storage.files import DamagedError, read_json, replacing, sha256, sole_writer, write_json
from storage.h5 import Demonstrations, Episode, Index, h5_files
from storage.trajectory import RECORD, DataError, remarks

FORMAT = str(RECORD.descr)  # a pack of other records is refused
KINDS = {True: "demonstrations that end at their success", False: "whole demonstrations"}


class Pack(Index):
    """Frames as records in memory-mapped files, written by `data.py pack`."""

    blocks = None  # frames are read one by one, unlike those of an h5

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        if not (folder / "pack.json").is_file():
            raise InputError(
                f"{folder}: not a complete pack, it has no pack.json; make one: {command(folder)}"
            )
        try:
            meta = read_json(folder / "pack.json")
        except DamagedError as error:
            raise damaged(folder, str(error)) from None
        if meta.get("format") != FORMAT:
            raise damaged(folder, f"{folder}: packed with other records than this code reads")
        about = (meta[key] for key in ("instructions", "action_schema", "qpos_names"))
        episodes = [Episode(**episode) for episode in meta["episodes"]]
        super().__init__(folder, meta["truncate"], episodes, *about)
        self.hashes, self.sizes = meta["sha256"], meta["sizes"]  # sizes: bytes of each .h5
        self.files = [self._map(folder / npy_name(file)) for file in self.sizes]
        self.file_starts = np.cumsum([0] + [len(file) for file in self.files])

    def _map(self, path: Path) -> np.ndarray:
        """A file's records as bytes, [frames, size of RECORD], mapped into memory."""
        try:
            records = np.load(path, mmap_mode="r")
            if records.dtype != RECORD:
                raise ValueError(f"its records are {records.dtype}")
        except (FileNotFoundError, ValueError, OverflowError, EOFError) as error:
            raise damaged(self.folder, f"{path}: cannot be read ({error})") from None
        return rearrange(records.view(np.uint8), "(n size) -> n size", size=RECORD.itemsize)

    def read(self, frames: list[int] | np.ndarray) -> np.ndarray:
        """Frames by number, [n] of RECORD."""
        out = np.empty((len(frames), RECORD.itemsize), np.uint8)  # bytes: fields are copied slower
        files = np.searchsorted(self.file_starts, frames, side="right") - 1
        for row, (file, record) in enumerate(zip(files, frames - self.file_starts[files])):
            out[row] = self.files[file][record]
        return rearrange(out.view(RECORD), "n 1 -> n")

    def actions_of(self, episodes: np.ndarray) -> np.ndarray:
        """All actions of these episodes, [n, 13] in [-1, 1]."""
        chosen = np.isin(np.arange(len(self.episodes)), episodes)
        with np.load(self.folder / "summary.npz") as summary:
            return summary["actions"][np.repeat(chosen, np.diff(self.starts))]

    def survey(self, episodes: np.ndarray) -> np.ndarray:
        """Labels and ranges of these episodes, [n] of SURVEY."""
        with np.load(self.folder / "summary.npz") as summary:
            return summary["survey"][episodes]


def npy_name(file: str) -> str:
    return str(Path(file).with_suffix(".npy"))


def command(folder: Path, truncate: bool = True, data: Path | str = "DATA") -> str:
    flag = "" if truncate else "--no-truncate-at-success "
    return f"python data.py pack {flag}--data {quoted(data)} --out {quoted(folder)}"


def damaged(folder: Path, what: str) -> DataError:
    aside = quoted(folder, f"{folder}.damaged")
    return DataError(f"{what}. Pack again: mv {aside} && {command(folder)}")


def open_data(data: str | Path, truncate: bool | None = None) -> Index:
    """The pack in a folder or in its subfolder pack/, else the demonstrations below it.

    `truncate` ends demonstrations at their success; None takes a pack as it is. Raises InputError
    if there is neither, or if the pack differs in `truncate` or from the .h5 files in `data`.
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
            f"{command(f'{folder}-again', truncate)}"
        )
    sizes = {str(path.relative_to(data)): path.stat().st_size for path in h5_files(data)}
    if new := [file for file, size in sizes.items() if pack.sizes.get(file) != size]:
        raise InputError(
            f"{folder}: lacks {', '.join(new)} as now in {data}. Pack again: "
            f"{command(folder, pack.truncate, data)}"
        )
    return pack


def pack(data: str = "data", out: str | None = None, truncate_at_success: bool = True) -> None:
    """Write every frame below --data into --out once, so that training reads at memory speed.

    Resumable: a finished file is not written again; data other than last time's start over.

    Args:
        data: folder of demonstrations
        out: folder of the pack; default: DATA/pack
        truncate_at_success: end each demonstration at its first success (GAP-25)
    """
    source, folder = Demonstrations(data, truncate_at_success), Path(out or Path(data) / "pack")
    with sole_writer(folder):
        write_pack(source, folder)


def write_pack(source: Demonstrations, folder: Path) -> None:
    rows: dict[str, list[int]] = {}  # episodes of each file
    for row, episode in enumerate(source.episodes):
        rows.setdefault(episode.file, []).append(row)
    about = {
        "format": FORMAT,
        "sizes": {file: (source.folder / file).stat().st_size for file in rows},
        "episodes": [asdict(episode) for episode in source.episodes],
        "instructions": source.instructions,
        "action_schema": source.action_schema,
        "qpos_names": source.qpos_names,
        "truncate": source.truncate,
    }
    final, progress = folder / "pack.json", folder / "progress.json"
    hashes = finished(final, about) or finished(progress, about)
    if len(hashes) == len(rows) + 1:
        print(f"{folder}: {len(Pack(folder)):,} frames, already packed")
        return
    if final.is_file() and not hashes:
        print(f"{folder}: held a pack of other data, which this one replaces")
    final.unlink(missing_ok=True)
    for file in tqdm([file for file in rows if npy_name(file) not in hashes], "pack", unit="file"):
        hashes[npy_name(file)] = write_records(folder / npy_name(file), source, rows[file])
        write_json(progress, about | {"sha256": hashes})
    every = np.arange(len(source.episodes))
    survey = source.survey(every)
    with replacing(folder / "summary.npz") as temporary, open(temporary, "wb") as out:
        np.savez(out, survey=survey, actions=source.actions_of(every))
    hashes["summary.npz"] = sha256(folder / "summary.npz")
    write_json(final, about | {"sha256": hashes})
    progress.unlink(missing_ok=True)
    summary = f"{folder}: {len(source):,} frames of {len(every):,} episodes in {len(rows)} files"
    print(*source.notes, *remarks(survey, [e.file for e in source.episodes]), summary, sep="\n")


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


def finished(path: Path, about: dict) -> dict[str, str]:
    """{name: sha256} of the files that a pack of the same data has finished and still has."""
    try:
        meta = read_json(path)
        same = all(meta.get(key) == value for key, value in about.items())
        return {k: v for k, v in meta["sha256"].items() if same and (path.parent / k).is_file()}
    except (DamagedError, KeyError):
        return {}


def verify(folder: Annotated[str, tyro.conf.Positional] = "data/pack") -> None:
    """Compare every file of a pack with its sha256; an error names the first that differs."""
    pack = Pack(folder)
    for name, expected in tqdm(pack.hashes.items(), "verify", unit="file"):
        path = pack.folder / name
        if not path.is_file() or sha256(path) != expected:
            raise damaged(pack.folder, f"{path}: missing or damaged, its sha256 differs")
    print(f"{folder}: {len(pack):,} frames, no file damaged")
