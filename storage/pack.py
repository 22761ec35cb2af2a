"""The pack: every frame once, a fixed-size record in a memory-mapped block, read at memory speed.

    python data.py pack --data DATA --out PACK  # resumable
    python data.py verify PACK                  # every file against its sha256

    PACK/frames-00000.bin ...  BLOCK records each
         actions.bin           [frames, 13] float32: each frame's own action, for percentiles
         survey.npy            [episodes] of SURVEY: labels and ranges of each episode
         pack.json             what is in it, and the sha256 of every file and of itself

An h5 of MS-HAB inflates 26 frames for each one that is read; a record of the pack is read alone.
pack.json is written last, so a folder that has it is whole. Training reads a record only after
comparing its checksum: what a disk has changed is an error that names the file.
"""

import hashlib
import io
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from einops import rearrange, reduce
from tqdm import tqdm

from config import ACTION_DIM, InputError, quoted
from storage.files import (
    DamagedError,
    append,
    read_json,
    read_lines,
    sha256,
    sole_writer,
    write,
    write_json,
)
from storage.h5 import Demonstrations, Episode
from storage.trajectory import RECORD, DataError, remarks

BLOCK = 1024  # records per file, 172 MB
_PAD = -RECORD.itemsize % 8
# `sum` is the sum of the record's 64-bit words: no cryptography, but no changed byte escapes it, at
# the speed of memory.
PACKED = np.dtype([("record", RECORD), ("pad", np.uint8, (_PAD,)), ("sum", np.uint64)])


def sums(packed: np.ndarray) -> np.ndarray:
    """The sum of the 64-bit words of each of [n] PACKED, modulo 2^64, without its last, `sum`."""
    words = rearrange(np.frombuffer(packed, np.uint64), "(n w) -> n w", n=len(packed))
    return reduce(words[:, :-1], "n w -> n", "sum")


class Pack:
    """Frames as fixed-size records in memory-mapped blocks, written by `data.py pack`."""

    blocks = None  # a frame is read alone, unlike in Demonstrations

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "pack.json").is_file():
            raise InputError(
                f"{self.folder}: not a whole pack, it has no pack.json; make one: "
                f"python data.py pack --data DATA --out {quoted(self.folder)}"
            )
        try:
            meta = read_json(self.folder / "pack.json")
        except DamagedError as error:
            raise self.damaged(str(error)) from None
        if meta["record"] != PACKED.itemsize or "survey.npy" not in meta["files"]:
            raise DataError(
                f"{self.folder}: packed with other records than this code reads; pack it again: "
                f"python data.py pack --data DATA --out {quoted(self.folder)}"
            )
        self.episodes = [Episode(**episode) for episode in meta["episodes"]]
        self.instructions, self.hashes = meta["instructions"], meta["files"]
        self.action_schema, self.qpos_names = meta["action_schema"], meta["qpos_names"]
        self.truncate = meta.get("truncated_at_success", False)
        self.starts = np.cumsum([0] + [episode.length for episode in self.episodes])
        self.mapped: dict[int, np.ndarray] = {}
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(self.folder)}
        for number in range(-(-len(self) // BLOCK)):
            expected = min(BLOCK, len(self) - number * BLOCK) * PACKED.itemsize
            if (size := sizes.get(block_name(number), 0)) != expected:
                path = self.folder / block_name(number)
                raise self.damaged(f"{path}: {size} bytes, expected {expected}")

    def damaged(self, what: str) -> DataError:
        aside = quoted(self.folder, f"{self.folder}.damaged")
        again = f"python data.py pack --data DATA --out {quoted(self.folder)}"
        return DataError(f"{what}. Pack again: mv {aside} && {again}")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def block(self, number: int) -> np.ndarray:
        """A block's bytes [BLOCK or the rest, size of PACKED], mapped into memory at first use."""
        if number not in self.mapped:
            mapped = np.memmap(self.folder / block_name(number), np.uint8, "r")
            self.mapped[number] = rearrange(mapped, "(n size) -> n size", size=PACKED.itemsize)
        return self.mapped[number]

    def read(self, frames: list[int] | np.ndarray) -> np.ndarray:
        """Frames by number, [n] of RECORD. Raises DataError, naming the file, if one is damaged."""
        content = np.empty((len(frames), PACKED.itemsize), np.uint8)
        for row, frame in enumerate(frames):
            content[row] = self.block(frame // BLOCK)[frame % BLOCK]
        out = rearrange(content.view(PACKED), "n 1 -> n")
        bad = np.flatnonzero(sums(out) != out["sum"])
        if len(bad):
            number, record = divmod(int(frames[bad[0]]), BLOCK)
            path = self.folder / block_name(number)
            raise self.damaged(f"{path}, record {record}: damaged, its checksum differs")
        return out["record"]

    def actions_of(self, episodes: np.ndarray) -> np.ndarray:
        """All actions of these episodes, [n, 13], robot units."""
        self.verify("actions.bin")
        actions = np.memmap(self.folder / "actions.bin", np.float32, "r")
        actions = rearrange(actions, "(n a) -> n a", a=ACTION_DIM)
        chosen = np.zeros(len(self.episodes), bool)
        chosen[episodes] = True
        return actions[np.repeat(chosen, np.diff(self.starts))]

    def survey(self, episodes: np.ndarray) -> np.ndarray:
        """Labels and ranges of these episodes, [n] of SURVEY."""
        self.verify("survey.npy")
        return np.load(self.folder / "survey.npy")[episodes]

    def verify(self, name: str) -> None:
        """Raise DataError unless a file is what its sha256 says."""
        path = self.folder / name
        if not path.is_file() or sha256(path) != self.hashes[name]:
            raise self.damaged(f"{path}: missing or damaged, its sha256 differs")


def block_name(number: int) -> str:
    return f"frames-{number:05d}.bin"


def packed(records: np.ndarray) -> np.ndarray:
    """[n] of RECORD -> [n] of PACKED, with their checksums."""
    out = np.zeros(len(records), PACKED)
    out["record"] = records
    out["sum"] = sums(out)
    return out


def pack(data: str, out: str, truncate_at_success: bool = True) -> None:
    """Write every frame below --data into --out once, so that training reads at memory speed.

    Resumable: a finished block is not written again, other data than last time starts over.

    Args:
        data: folder of demonstrations
        out: folder of the pack
        truncate_at_success: end each demonstration at its first success (GAP-25)
    """
    source, folder = Demonstrations(data, truncate_at_success), Path(out)
    with sole_writer(folder):
        write_pack(source, folder)


def write_pack(source: Demonstrations, folder: Path) -> None:
    plan = {
        "sizes": {e.file: (source.folder / e.file).stat().st_size for e in source.episodes},
        "episodes": [asdict(e) for e in source.episodes],
        "record": PACKED.itemsize,
        "truncated_at_success": source.truncate,
    }
    progress, final = folder / "progress.jsonl", folder / "pack.json"
    if final.is_file() and is_of(final, plan):
        print(f"{folder}: {len(source):,} frames, already packed")
        return
    begun = read_lines(progress, mend=True)
    if not begun or begun[0] != plan:
        if final.is_file():
            print(f"{folder}: held a pack of other data, which this one replaces")
        final.unlink(missing_ok=True)
        progress.unlink(missing_ok=True)
        append(progress, plan)
        begun = [plan]
    hashes = {line["name"]: line["sha256"] for line in begun[1:]}
    for number, block in enumerate(blocks_of(source, first=len(hashes)), start=len(hashes)):
        content = packed(block).tobytes()
        write(folder / block_name(number), content)
        hashes[block_name(number)] = hashlib.sha256(content).hexdigest()
        append(progress, {"name": block_name(number), "sha256": hashes[block_name(number)]})
    every, file = np.arange(len(source.episodes)), io.BytesIO()
    np.save(file, survey := source.survey(every))
    small = {"actions.bin": source.actions_of(every).tobytes(), "survey.npy": file.getvalue()}
    for name, content in small.items():
        write(folder / name, content)
        hashes[name] = hashlib.sha256(content).hexdigest()
    about = ("instructions", "action_schema", "qpos_names")
    meta = {"files": hashes} | {key: getattr(source, key) for key in about} | plan
    write_json(final, meta)
    progress.unlink()
    for remark in remarks(survey, [e.file for e in source.episodes]):
        print(remark)
    print(
        f"{folder}: {len(source):,} frames of {len(source.episodes):,} episodes, "
        f"{len(hashes) - len(small)} blocks"
    )


def is_of(final: Path, plan: dict) -> bool:
    """Is there a pack of the same data, with every file at its size?"""
    try:
        meta, _ = read_json(final), Pack(final.parent)
    except (DamagedError, DataError):
        return False
    return all(meta.get(key) == value for key, value in plan.items())


def blocks_of(source: Demonstrations, first: int):
    """The records of all frames, BLOCK at a time, from block `first` on."""
    pending, done = np.zeros(0, RECORD), first * BLOCK
    for episode in tqdm(range(len(source.episodes)), desc="pack", unit="episode"):
        start, end = int(source.starts[episode]), int(source.starts[episode + 1])
        if end > done:
            records = source.read_episode(episode)[max(0, done - start) :]
            pending = np.concatenate([pending, records])
        while len(pending) >= BLOCK or (len(pending) and end == len(source)):
            yield pending[:BLOCK]
            pending = pending[BLOCK:]


def verify(folder: Annotated[str, tyro.conf.Positional]) -> None:
    """Read every file of a pack and compare it with its sha256; an error names one that differs."""
    pack = Pack(folder)
    for name in tqdm(pack.hashes, desc="verify", unit="file"):
        pack.verify(name)
    print(f"{folder}: {len(pack):,} frames, every block whole")
