"""The way from clone to a row of Table 2 in docs/real-benchmark.md, as it is printed.

Tiny where the real thing is large, and with the real things' quirks: a server of the hub's protocol
that has three steps of the VLM and no latest-checkpoint.pt, demonstrations of 200 steps that stand
still after their success, without masks, base position or names, with actions beyond [-1, 1]; the
apartment in a folder of its own beside the generated one; a few steps of training.
"""

import shutil
from pathlib import Path

import h5py
import numpy as np
from files import datasets
from hub_server import Hub
from originals import STEP, prismatic_components, save_prismatic
from processes import REPOSITORY as ROOT
from processes import run, smaller
from test_pretrained import CFG, PRISM

from config import HORIZON
from paper import HUB_DATASETS
from storage.files import read_json, read_lines, write_json
from tools.reference import build_originals

PAGE = (ROOT / "docs/real-benchmark.md").read_text()
SECTION = PAGE.split("## From clone to a row of Table 2")[1].split("\n## ")[0]
SMALLER = {
    "train.py": "--preset tiny --steps 3 --batch-size 8 --micro-batch 8 --workers 0 --device cpu "
    f"--val-frames 8 --pretrained {PRISM} --model.dino.depth 3 --model.dino.registers 4 "
    "--model.siglip.depth 3 --model.llm.kv-heads 2",
    "eval.py": "--episodes 3 --horizon 3 --columns close_drawer open_fridge --device cpu "
    "--workers 2",
}


def printed() -> list[list[str]]:
    """Return the section's commands, without the download of the apartments, at tiny size."""
    lines = SECTION.split("```")[1].strip().splitlines()
    assert lines[0] == "export MS_ASSET_DIR=$PWD/replica_cad" and "download_asset" in lines[1]
    assert len(lines) == 6
    return [smaller(line, SMALLER) for line in lines[2:]]


def release(path: Path) -> None:
    """Make of a recording what MS-HAB released: 201 observations, raw actions, no labels."""
    with h5py.File(path, "r+") as file:
        for group in file.values():
            del group["labels"]
            missing = HORIZON - len(group["actions"])
            for key, value in datasets(group).items():
                last = value[-1:] * (0 if key == "actions" else 1)
                del group[key]
                value = np.concatenate([value, *[last] * missing])
                group.create_dataset(key, data=value, compression="gzip")
            group["actions"][3, 12] = 12.5
    sidecar = path.with_suffix(".json")
    content = read_json(sidecar)
    for episode in content["episodes"]:
        del episode["instruction"]
        episode["elapsed_steps"] = HORIZON
    write_json(sidecar, {key: content[key] for key in ("env_info", "episodes")})


def repositories(recorded: Path, folder: Path) -> dict[str, dict[str, bytes]]:
    """The hub's: recorded demonstrations of two subtasks, and the VLM as it was uploaded."""
    data, served = shutil.copytree(recorded, folder / "data"), {}
    flags = "--task set_table --subtask open --target fridge --episodes 2"
    run("collect.py", *flags.split(), "--out", data)
    for path in data.rglob("*.h5"):
        release(path)
        for file in (path, path.with_suffix(".json")):
            served[f"{path.parent.name}/{file.name}"] = file.read_bytes()
    vlm = prismatic_components(build_originals(CFG, CFG.image_size), CFG, folder / "parts")
    prism = save_prismatic(vlm, folder / "prism")
    files = {name: (prism / name).read_bytes() for name in ("config.json", STEP)}
    files |= {"README.md": b"", "checkpoints/step-010396-epoch-00-loss=0.6.pt": b"an older step"}
    return {HUB_DATASETS["set_table"]: served, PRISM: files}


def test_five_commands_lead_from_the_released_files_to_a_filled_row(assets, recorded, tmp_path):
    (tmp_path / "replica_cad").symlink_to(assets)
    shutil.copytree(assets, tmp_path / "assets")
    for path in ROOT.glob("*.py"):
        (tmp_path / path.name).symlink_to(path)
    environment = {"HF_HOME": str(tmp_path / "hf-home"), "HF_HUB_OFFLINE": "0"}
    environment |= {"OMP_NUM_THREADS": "1", "MS_ASSET_DIR": str(tmp_path / "replica_cad")}
    output = ""
    with Hub(repositories(recorded, tmp_path / "released")) as hub:
        for command in printed():
            output += run(*command, cwd=tmp_path, HF_ENDPOINT=hub.url, **environment)
            if "download" in command:  # as `hf download` names the folder
                (tmp_path / "data/set_table").rename(tmp_path / "data/MS-HAB-SetTable")
    assert "of action values clipped to [-1, 1], as the controller does" in output
    assert [name for name in hub.fetched if name.endswith(".pt")] == [STEP]
    run_folder = tmp_path / "runs/auxvla-naive"
    trained = read_json(run_folder / "stage2/config.json")
    assert trained["pretrained"] == PRISM
    assert trained["model"]["decoders"] == ["pos", "grasp", "qpos"]
    columns = read_json(run_folder / "eval/results.json")["columns"]
    assert {name: c["n"] for name, c in columns.items()} == {"close_drawer": 3, "open_fridge": 3}
    assert len({line["scene"] for line in read_lines(run_folder / "eval/episodes.jsonl")}) > 1
