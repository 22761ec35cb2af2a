"""A checkpoint that train.py wrote, of the tiny model, and what a robot of MS-HAB's sees."""

from pathlib import Path

import torch
from files import write_demos

from checkpoint import newest
from durable import read_sealed, write_sealed
from train import main, parse

SCHEMA = [dict(name=f"joint_{i}", low=-0.1, high=0.1 * i, unit="rad") for i in range(13)]


def train_tiny(folder: Path, row: str = "auxvla-all") -> Path:
    """FOLDER/stage1, the stage's folder; its robot has SCHEMA."""
    write_demos(folder / "data/set_table/close/kitchen_counter", lengths=(9, 9))
    flags = f"--preset tiny --row {row} --stage 1 --steps 1 --batch-size 8 --micro-batch 8"
    paths = ("--data", folder / "data", "--out", folder / "stage1", "--val-frames", 8)
    main(parse([*flags.split(), "--device", "cpu", *map(str, paths)]))
    manifest = newest(folder / "stage1") / "manifest.json"
    write_sealed(manifest, read_sealed(manifest) | {"action_schema": SCHEMA})
    return folder / "stage1"


def observation(seed: int) -> dict:
    """As MS-HAB gives it, of one environment: torch, with a batch dimension."""
    generator = torch.Generator().manual_seed(seed)
    sensors = {}
    for camera in ("fetch_head", "fetch_hand"):
        rgb = torch.randint(0, 256, (1, 128, 128, 3), generator=generator, dtype=torch.uint8)
        depth = torch.randint(0, 9000, (1, 128, 128, 1), generator=generator, dtype=torch.int16)
        sensors[camera] = {"rgb": rgb, "depth": depth}
    return {"sensor_data": sensors}
