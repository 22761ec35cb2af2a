"""Short runs of train.py with the tiny model, their checkpoints, and an observation of MS-HAB."""

from collections.abc import Sequence
from pathlib import Path

import torch
from einops import repeat
from files import write_demos
from processes import run
from pytest import approx, mark, param
from safetensors.torch import load_file

from config import IMAGE_SIZE, ModelConfig, model_config
from data import ActionStats
from model import AuxVLA
from policy import Policy
from storage.checkpoint import newest, read_manifest, snapshot, to_json, write
from storage.files import read_lines, sha256
from storage.pack import pack
from storage.tokenizer import build_tokenizer
from train import main
from training.flags import parse

DEVICES = mark.parametrize(
    "device", [torch.device("cpu"), param(torch.device("cuda"), marks=mark.gpu)], ids=str
)
SCHEMA = [dict(name=f"joint_{i}", low=-0.1, high=0.1 * i, unit="rad") for i in range(13)]


def flags(data: Path, out: Path, **others) -> list[str]:
    """Flags of train.py for two small steps of stage 1 on the CPU; `others` add to them."""
    settings = dict(
        preset="tiny", data=data, out=out, steps=2, batch_size=8, micro_batch=8, device="cpu",
        log_every=1, val_frames=16,
    )  # fmt: skip
    named = (settings | others).items()
    return [word for key, value in named for word in (f"--{key.replace('_', '-')}", str(value))]


def train(data: Path, out: Path, *words: str, **others) -> int:
    """Run train.py in this process; `words` are further flags."""
    return main(parse([*flags(data, out, **others), *words]))


def command(processes: int, words: list[str], torchrun: tuple[str, ...] = ()) -> list[str]:
    """train.py and its flags, behind torchrun if there are more processes or flags of torchrun."""
    torchrun = torchrun or ("--standalone",) * (processes > 1)
    launcher = ["-m", "torch.distributed.run", *torchrun, f"--nproc_per_node={processes}"]
    return [*(launcher if torchrun else []), "train.py", *words]


def run_command(processes: int, *words: str, torchrun: tuple[str, ...] = ()) -> str:
    """Run train.py as a program; what it printed."""
    return run(*command(processes, words, torchrun), OMP_NUM_THREADS="1")


def compare(one: Path, two: Path, every: bool = False, rel: float = 1e-5, atol: float = 1e-6):
    """Assert that two runs took equal steps: losses, gradients, running statistics.

    The gradients are Adam's first moments; `every` compares the other tensors too.
    """
    for name in ("model", "optimizer"):
        ours, theirs = weights(one, name), weights(two, name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key].shape == theirs[key].shape, key
            if every or key.endswith("exp_avg") or "running" in key:
                torch.testing.assert_close(theirs[key], ours[key], rtol=1e-4, atol=atol, msg=key)
    figures = {"action", "pos", "grasp", "qpos", "obj", "seg", "flow", "grad_norm", "val_action"}
    for ours, theirs in zip(lines(one), lines(two), strict=True):
        assert ours.keys() == theirs.keys()
        for key in figures & ours.keys():
            assert theirs[key] == approx(ours[key], rel=rel, abs=1e-6), key


def fingerprint(out: Path) -> tuple[str, str, str]:
    """Step, weights and optimizer of the newest whole checkpoint."""
    folder = newest(out)
    hashes = [sha256(folder / f"{name}.safetensors") for name in ("model", "optimizer")]
    return folder.name, *hashes


def weights(out: Path, name: str = "model") -> dict[str, torch.Tensor]:
    """Tensors of the newest checkpoint in `out`; `name` is model or optimizer."""
    return load_file(newest(Path(out)) / f"{name}.safetensors")


def lines(out: Path) -> list[dict]:
    return read_lines(Path(out) / "log.jsonl")


def write_pack(folder: Path, seed: int = 0) -> Path:
    """A pack of six demonstrations; only two of them have an object."""
    demos = folder / "demos/set_table"
    lengths = (30, 30, 30, 8)
    write_demos(demos / "close/kitchen_counter", lengths, has_object=False, seed=seed)
    write_demos(demos / "pick/013_apple", lengths=(30, 8), seed=seed + 1)
    pack(str(folder / "demos"), str(folder / "pack"))
    return folder / "pack"


def train_tiny(folder: Path, row: str = "auxvla-all") -> Path:
    """FOLDER/stage1, the stage's folder; its robot has SCHEMA."""
    write_demos(folder / "data/set_table/close/kitchen_counter", lengths=(9, 9))
    train(folder / "data", folder / "stage1", row=row, steps=1)
    trained = newest(folder / "stage1")
    tensors, moments = weights(folder / "stage1"), weights(folder / "stage1", "optimizer")
    add_noise(tensors, 0.3)
    manifest = read_manifest(trained) | {"action_schema": SCHEMA}
    tokenizer = (trained / "tokenizer.json").read_text()
    write(folder / "stage1", 1, tensors, moments, manifest, tokenizer, keep=1)
    return folder / "stage1"


def add_noise(weights: dict[str, torch.Tensor], scale: float):
    """Make a model's matrices larger, so that its actions depend on the pictures."""
    generator = torch.Generator().manual_seed(0)
    for weight in weights.values():
        if weight.ndim > 1:
            weight += torch.randn(weight.shape, generator=generator) * scale


def make_policy(cfg: ModelConfig, noise: float = 0.0, **options) -> Policy:
    """A policy with random weights and the controller's bounds."""
    torch.manual_seed(0)
    model = AuxVLA(cfg, **options).eval()
    add_noise(model.state_dict(), noise)
    stats = ActionStats((-1.0,) * 13, (1.0,) * 13)
    policy = Policy(model, stats, build_tokenizer(cfg.llm), {}, torch.device("cpu"))
    policy.reset()
    return policy


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
    tensors = snapshot(model, torch.optim.Adam(model.parameters()), is_main=True)
    write(stage, 1, *tensors, manifest, build_tokenizer(cfg.llm).to_str(), keep=1)


def observation(seed: int) -> dict:
    """MS-HAB's, of one environment: torch, with a batch dimension."""
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


def stacked(trees: Sequence) -> dict | torch.Tensor:
    """Observations of several environments as one batch."""
    if isinstance(trees[0], dict):
        return {key: stacked([tree[key] for tree in trees]) for key in trees[0]}
    return torch.cat(tuple(trees))
