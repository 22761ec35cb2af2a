"""The README's way from clone to a row of Table 2, its commands as they are printed.

Tiny where the real thing is large: a server of the hub's protocol that serves recorded files of two
task types, the generated apartment in the real folders, a tiny model for a few steps.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from hub_server import Hub

from tasks import HUB_DATASETS

ROOT = Path(__file__).parents[1]
SECTION = (ROOT / "README.md").read_text().split("## The real benchmark")[1].split("\n## ")[0]
SMALLER = {
    "train.py": "--preset tiny --steps 3 --batch-size 8 --micro-batch 8 --workers 0 --device cpu "
    "--val-frames 8",
    "eval.py": "--episodes 3 --horizon 3 --columns close_drawer open_fridge --device cpu "
    "--workers 2",
}


def printed() -> list[list[str]]:
    """The section's first commands; the one that downloads the apartments is not run here."""
    lines = SECTION.split("```")[1].strip().splitlines()
    assert len(lines) == 6 and "MS_ASSET_DIR" in lines[0] and "download_asset" in lines[1]
    return [shlex.split(line) for line in lines[2:]]


def smaller(command: list[str]) -> list[str]:
    program = next((name for name in SMALLER if name in command), None)
    command = [word.replace("=8", "=2") for word in command]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    start = torchrun if command[0] == "torchrun" else [sys.executable]
    return [*start, *command[1:], *SMALLER.get(program, "").split()]


def test_five_commands_lead_from_the_released_files_to_a_filled_row(assets, tmp_path):
    released, served = tmp_path / "released", {}
    for subtask, target in (("close", "kitchen_counter"), ("open", "fridge")):
        flags = f"--task set_table --subtask {subtask} --target {target} --episodes 2"
        command = [sys.executable, "collect.py", *flags.split(), "--out", released]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    folder = released / "set_table"
    for path in folder.rglob("*.*"):
        if path.suffix in (".h5", ".json"):
            served[str(path.relative_to(folder))] = path.read_bytes()
    hub = Hub({HUB_DATASETS["set_table"]: served})
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf-home"), "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    for path in ROOT.glob("*.py"):
        (tmp_path / path.name).symlink_to(path)
    for command in map(smaller, printed()):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
    hub.shutdown()
    hub.server_close()
    columns = json.loads((tmp_path / "RUN/eval/results.json").read_text())["columns"]
    assert {name: column["n"] for name, column in columns.items()} == {
        "close_drawer": 3, "open_fridge": 3
    }  # fmt: skip
    lines = (tmp_path / "RUN/eval/episodes.jsonl").read_text().splitlines()
    assert len({json.loads(line)["scene"] for line in lines}) > 1
