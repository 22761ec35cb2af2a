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

import numpy as np
import tyro
from einops import rearrange
from tqdm import tqdm

from config import InputError, quoted
from storage.files import DamagedError, read_json, replacing, sha256, sole_writer, write_json
from storage.h5 import Demonstrations, Episode, Index, h5_files
from storage.trajectory import RECORD, DataError, remarks

FORMAT = str(RECORD.descr)  # a pack of other records is refused
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
        except DamagedError as error:
            raise damaged(folder, str(error), [index]) from None
        if meta.get("format") != FORMAT:
            raise damaged(folder, f"{index}: other records than this code reads", [index])
        episodes = [Episode(**episode) for episode in meta["episodes"]]
        super().__init__(folder, meta["truncate"], episodes, *(meta[name] for name in ABOUT))
        self.hashes, self.sizes = meta["sha256"], meta["sizes"]  # sizes: bytes of each .h5
        self.files = [self._map(folder / npy_name(file)) for file in self.sizes]
        self.file_starts = [0, *accumulate(map(len, self.files))]  # the first frame of each

    def _map(self, path: Path) -> np.ndarray:
        """A file's records as bytes, [frames, size of RECORD], mapped into memory."""
        try:
            records = np.asarray(np.load(path, mmap_mode="r")).view(np.uint8)
        except (FileNotFoundError, ValueError, OverflowError, EOFError) as error:
            what = f"{path}: cannot be read ({error})"
            raise damaged(self.folder, what, [path], self.truncate) from None
        return rearrange(records, "(n size) -> n size", size=RECORD.itemsize)

    def read_record(self, frame: int) -> np.ndarray:
        """One frame as bytes, [size of RECORD]."""
        file = bisect(self.file_starts, frame) - 1
        return self.files[file][frame - self.file_starts[file]]

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
            f"{command(f'{folder}-again', truncate)}"
        )
    sizes = {str(path.relative_to(data)): path.stat().st_size for path in h5_files(data)}
    if new := [file for file, size in sizes.items() if pack.sizes.get(file) != size]:
        raise InputError(
            f"{folder}: made from older files of {data}, or without them: {', '.join(new)}. "
            f"Pack again: {command(folder, pack.truncate, data)}"
        )
    return pack


def pack(data: str = "data", out: str | None = None, truncate_at_success: bool = True) -> None:
    """Write every frame below --data into --out once, so that training reads at memory speed.

    Resumable: finished files are not written again, unless the data differ from last time's.

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
        **{name: getattr(source, name) for name in ABOUT},
        "truncate": source.truncate,
    }
    final, progress = folder / "pack.json", folder / "progress.json"
    hashes = finished(final, about) or finished(progress, about)
    if len(hashes) == len(rows) + 1:
        print(f"{folder}: {len(Pack(folder)):,} frames, already packed")
        return
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
    """Compare every file of a pack with its sha256; an error names those that differ."""
    pack, wrong = Pack(folder), []
    for name, expected in tqdm(pack.hashes.items(), "verify", unit="file"):
        path = pack.folder / name
        if not path.is_file() or sha256(path) != expected:
            wrong.append(path)
    if wrong:
        what = f"{', '.join(map(str, wrong))}: missing or damaged, sha256 differs"
        raise damaged(pack.folder, what, wrong, pack.truncate)
    print(f"{folder}: {len(pack):,} frames, no file damaged")
