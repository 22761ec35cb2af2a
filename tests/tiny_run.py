"""Checkpoints of the tiny model, train.py's and an untrained one; what a robot of MS-HAB's sees."""

from pathlib import Path

import torch
from einops import repeat
from files import write_demos
from safetensors.torch import load_file

from config import IMAGE_SIZE, model_config
from model import AuxVLA
from paper import parse
from storage.checkpoint import newest, read_manifest, snapshot, to_json, write
from storage.tokenizer import build_tokenizer
from train import main

SCHEMA = [dict(name=f"joint_{i}", low=-0.1, high=0.1 * i, unit="rad") for i in range(13)]
SEED = torch.Generator().manual_seed(0)


def train_tiny(folder: Path, row: str = "auxvla-all") -> Path:
    """FOLDER/stage1, the stage's folder; its robot has SCHEMA."""
    write_demos(folder / "data/set_table/close/kitchen_counter", lengths=(9, 9))
    flags = f"--preset tiny --row {row} --stage 1 --steps 1 --batch-size 8 --micro-batch 8"
    paths = ("--data", folder / "data", "--out", folder / "stage1", "--val-frames", 8)
    main(parse([*flags.split(), "--device", "cpu", *map(str, paths)]))
    trained = newest(folder / "stage1")
    weights, moments = (load_file(trained / f"{n}.safetensors") for n in ("model", "optimizer"))
    for weight in weights.values():  # so that what it sees decides what it does
        if weight.ndim > 1:
            weight += torch.randn(weight.shape, generator=SEED) * 0.3
    manifest = read_manifest(trained) | {"action_schema": SCHEMA}
    tokenizer = (trained / "tokenizer.json").read_text()
    write(folder / "stage1", 1, weights, moments, manifest, tokenizer, keep=1)
    return folder / "stage1"


def write_untrained(stage: Path, env, instruction: str):
    """A stage's folder with a checkpoint of random weights and all decoders, for env's robot."""
    cfg = model_config("tiny")
    torch.manual_seed(0)
    model = AuxVLA(cfg)
    manifest = {
        "stage": 2,
        "config": {"model": to_json(cfg)},
        "action_stats": {"low": [-1.0] * 13, "high": [1.0] * 13},
        "action_schema": env.action_schema,
        "qpos_names": env.qpos_names,
        "instructions": [instruction],
    }
    tensors = snapshot(model, torch.optim.Adam(model.parameters()), keep=True)
    write(stage, 1, *tensors, manifest, build_tokenizer(cfg.llm).to_str(), keep=1)


def observation(seed: int) -> dict:
    """As MS-HAB gives it, of one environment: torch, with a batch dimension."""
    generator = torch.Generator().manual_seed(seed)
    sensors = {}
    for camera in ("fetch_head", "fetch_hand"):
        rgb = torch.randint(0, 256, (1, 4, 4, 3), generator=generator, dtype=torch.uint8)
        depth = torch.randint(0, 9000, (1, 4, 4, 1), generator=generator, dtype=torch.int16)
        large = {"h": IMAGE_SIZE // 4, "w": IMAGE_SIZE // 4}  # patches of one colour each
        sensors[camera] = {
            name: repeat(small, "b i j c -> b (i h) (j w) c", **large)
            for name, small in (("rgb", rgb), ("depth", depth))
        }
    return {"sensor_data": sensors}
