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
from contextlib import suppress
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from einops import rearrange
from tqdm import tqdm

from config import InputError, quoted
from storage.files import (
    READ_ERRORS,
    read_json,
    replacing,
    sha256,
    sole_writer,
    well_formed,
    write_json,
)  # fmt: skip
from storage.h5 import Demonstrations, Episode, Index, h5_files, readable
from storage.trajectory import RECORD, remarks

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
                raise InputError(f"{index}: other records than this code reads")
            with well_formed(index):
                episodes = [Episode(**episode) for episode in meta["episodes"]]
                super().__init__(folder, meta["truncate"], episodes, *(meta[n] for n in ABOUT))
                self.sources = meta["files"]  # {.h5: sizes_and_times, sha256, its .npy's sha256}
                # {file: sha256}, by which a resumed run sees that its data changed
                self.content = {npy_name(f): entry["packed"] for f, entry in self.sources.items()}
                self.content["summary.npz"] = meta["summary"]
                lengths = dict.fromkeys(self.sources, 0)
                for episode in episodes:
                    lengths[episode.file] += episode.length
        except InputError as error:
            raise InputError(f"{error}. {pack_again(folder, [index])}") from None
        self.files = [self._map(folder / npy_name(f), length) for f, length in lengths.items()]
        self.file_starts = [0, *accumulate(lengths.values())]  # the first frame of each

    def _map(self, path: Path, frames: int) -> np.ndarray:
        """A file's records as bytes, [frames, size of RECORD], mapped into memory."""
        again = pack_again(self.folder, [path], self.truncate)
        with readable(path, again=again, errors=READ_ERRORS):
            records = np.load(path, mmap_mode="r")
            if records.dtype != RECORD or records.shape != (frames,):
                raise ValueError(f"{records.shape} records, expected {frames} of RECORD")
        return rearrange(records.view(np.ndarray).view(np.uint8), "(n size) -> n size", n=frames)

    def _summary(self, name: str, rows: int) -> np.ndarray:
        """An array of summary.npz, [rows, ...]."""
        path = self.folder / "summary.npz"
        again = pack_again(self.folder, [path], self.truncate)
        with readable(path, again=again, errors=READ_ERRORS), np.load(path) as summary:
            if len(summary[name]) != rows:
                raise ValueError(f"{len(summary[name])} rows of {name}, expected {rows}")
            return summary[name]

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


def pack_again(folder: Path, files: list[Path], truncate: bool = True) -> str:
    """What to do about these damaged files of a pack."""
    moves = [f"mv {quoted(file, f'{file}.damaged')}" for file in files if file.exists()]
    return f"Pack again: {' && '.join([*moves, command(folder, truncate)])}"


def open_data(data: str | Path, truncate: bool | None = None) -> Index:
    """The pack in a folder or in its subfolder pack/, else the demonstrations below it.

    `truncate` ends demonstrations at their success; None accepts either kind of pack. Raises
    InputError if there is no data, if the pack is of the other kind, or if a recording has changed.
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
    files = {str(path.relative_to(data)): sizes_and_times(path) for path in h5_files(data)}
    if new := [n for n, now in files.items() if now.items() - pack.sources.get(n, {}).items()]:
        raise InputError(
            f"{folder}: {', '.join(new)} in {data} changed since, or came later. Pack again (only "
            f"files with another content are): {command(folder, pack.truncate, data)}"
        )
    return pack


def sizes_and_times(path: Path) -> dict[str, str]:
    """Of an .h5 and of its .json, which has the instructions: {".h5": "size time", ...}."""
    files = [each for each in (path, path.with_suffix(".json")) if each.exists()]
    return {each.suffix: f"{each.stat().st_size} {each.stat().st_mtime_ns}" for each in files}


def pack(data: str = "data", out: str | None = None, truncate_at_success: bool = True) -> None:
    """Write every frame below --data into --out once, so that training reads at memory speed.

    Resumable: a finished file is written again only if its .h5 or its episodes changed.

    Args:
        data: folder of demonstrations
        out: folder of the pack; unset: DATA/pack
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
        files[file] = sizes_and_times(path) | {"sha256": sha256(path)}
        files[file]["packed"] = write_records(folder / npy_name(file), source, rows[file])
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

    def episodes(meta: dict, file: str) -> list[dict]:  # `instruction` is 0 in every .npy
        return [e | {"instruction": 0} for e in meta["episodes"] if e["file"] == file]

    with suppress(InputError), well_formed(path):
        meta, kept = read_json(path), {}
        alike = all(meta[name] == about[name] for name in ("format", "truncate"))
        for file, entry in meta["files"].items():
            h5, npy = source.folder / file, path.parent / npy_name(file)
            same = h5.is_file() and npy.is_file() and episodes(meta, file) == episodes(about, file)
            if alike and same and sha256(h5) == entry["sha256"]:
                kept[file] = entry | sizes_and_times(h5)
        return meta, kept
    return {}, {}


def verify(folder: Annotated[str, tyro.conf.Positional] = "data/pack") -> None:
    """Compare every file of the pack in a folder, or in its pack/, with its sha256."""
    folder = Path(folder)
    pack, wrong = Pack(folder if (folder / "pack.json").exists() else folder / "pack"), []
    for name, expected in tqdm(pack.content.items(), "verify", unit="file"):
        path = pack.folder / name
        if not path.is_file() or sha256(path) != expected:
            wrong.append(path)
    if wrong:
        what = f"{', '.join(map(str, wrong))}: missing or damaged, sha256 differs"
        raise InputError(f"{what}. {pack_again(pack.folder, wrong, pack.truncate)}")
    print(f"{folder}: {len(pack):,} frames, no file damaged")
