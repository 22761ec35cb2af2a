"""The pack: every frame once, a fixed-size record in a memory-mapped block, read at memory speed.

    python data.py pack --data DATA --out PACK
    python data.py verify PACK

An h5 of MS-HAB inflates 26 frames for each one that is read; a record of the pack is read alone.
pack.json is written last, so a folder that has it is whole; it carries the sha256 of every block.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tqdm import tqdm

from demonstrations import RECORD, DataError, Demonstrations, Episode
from recording import replacing

BLOCK = 1024  # records per file, 169 MB


class Pack:
    """Frames as fixed-size records in memory-mapped blocks, written by `data.py pack`."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "pack.json").is_file():
            raise FileNotFoundError(
                f"{self.folder}: not a whole pack, it has no pack.json; make one: "
                f"python data.py pack --data DATA --out {self.folder}"
            )
        meta = json.loads((self.folder / "pack.json").read_text())
        if meta["record"] != record_layout():
            raise DataError(
                f"{self.folder}: packed with other records than this code reads; pack it again"
            )
        self.episodes = [Episode(**episode) for episode in meta["episodes"]]
        self.instructions, self.hashes = meta["instructions"], meta["sha256"]
        self.action_schema, self.qpos_names = meta["action_schema"], meta["qpos_names"]
        self.starts = np.cumsum([0] + [episode.length for episode in self.episodes])
        self.blocks = []
        for name in self.hashes:
            expected = min(BLOCK, len(self) - len(self.blocks) * BLOCK)
            size = (self.folder / name).stat().st_size if (self.folder / name).is_file() else 0
            if size != expected * RECORD.itemsize:
                raise DataError(
                    f"{self.folder / name}: {size} bytes, expected {expected * RECORD.itemsize}; "
                    "pack it again"
                )
            self.blocks.append(np.memmap(self.folder / name, RECORD, "r"))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, frames: list[int] | np.ndarray) -> np.ndarray:
        """Frames by number, [n] of RECORD."""
        out = np.empty(len(frames), RECORD)
        for row, frame in enumerate(frames):
            out[row] = self.blocks[frame // BLOCK][frame % BLOCK]
        return out

    def actions(self, episode: int) -> np.ndarray:
        """All actions of an episode, [T, 13], robot units."""
        frames = range(self.starts[episode], self.starts[episode + 1])
        return np.stack(
            [self.blocks[frame // BLOCK][frame % BLOCK]["actions"][0] for frame in frames]
        )


def record_layout() -> list:
    return json.loads(json.dumps(np.lib.format.dtype_to_descr(RECORD)))


def write_durably(path: Path, content: bytes) -> None:
    """Whole or absent, also when the disk fills up or the process is killed."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def pack(data: str, out: str) -> None:
    """Write every frame below --data into --out once, so that training reads at memory speed.

    Resumable.
    """
    source, folder = Demonstrations(data), Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {e.file: (source.folder / e.file).stat().st_size for e in source.episodes}
    plan = {
        "sizes": sizes,
        "episodes": [asdict(e) for e in source.episodes],
        "record": record_layout(),
    }
    plan_file, done_file = folder / "plan.json", folder / "blocks.json"
    # Other data than last time: start over.
    if not plan_file.is_file() or json.loads(plan_file.read_text()) != plan:
        (folder / "pack.json").unlink(missing_ok=True)
        write_durably(done_file, b"{}")
        write_durably(plan_file, json.dumps(plan).encode())
    if (folder / "pack.json").is_file():
        print(f"{folder}: {len(source):,} frames, already packed")
        return
    hashes, pending = json.loads(done_file.read_text()), np.zeros(0, RECORD)
    done = len(hashes) * BLOCK  # frames in the blocks of an earlier, interrupted run
    for episode in tqdm(range(len(source.episodes)), desc="pack", unit="episode"):
        start, end = int(source.starts[episode]), int(source.starts[episode + 1])
        if end > done:
            pending = np.concatenate(
                [pending, source.read_episode(episode)[max(0, done - start) :]]
            )
        while len(pending) >= BLOCK or (len(pending) and end == len(source)):
            content = pending[:BLOCK].tobytes()
            name = f"frames-{len(hashes):05d}.bin"
            write_durably(folder / name, content)
            hashes[name] = hashlib.sha256(content).hexdigest()
            write_durably(done_file, json.dumps(hashes).encode())
            pending = pending[BLOCK:]
    meta = {
        "sha256": hashes,
        "instructions": source.instructions,
        "action_schema": source.action_schema,
    }
    meta |= {"qpos_names": source.qpos_names, **plan}
    write_durably(folder / "pack.json", json.dumps(meta).encode())
    print(
        f"{folder}: {len(source):,} frames of {len(source.episodes):,} episodes, "
        f"{len(hashes)} blocks"
    )


def verify(folder: Annotated[str, tyro.conf.Positional]) -> None:
    """Read every block of a pack and compare it with its checksum.

    DataError names the first that differs.
    """
    pack = Pack(folder)
    for name, expected in tqdm(pack.hashes.items(), desc="verify", unit="block"):
        with open(pack.folder / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise DataError(
                    f"{pack.folder / name}: damaged, its checksum differs; "
                    "delete the pack and pack it again"
                )
    print(f"{folder}: {len(pack):,} frames, every block whole")
