"""The reference of the benchmark is the same model; its three verbs run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from files import write_demos

from config import model_config
from model import AuxVLA
from tools.bench_train import random_batch
from tools.naive import NaivePort, adopt

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    cfg = model_config("tiny")
    naive, ours = NaivePort(cfg), AuxVLA(cfg)
    adopt(naive, ours)
    ours.train_stage(2)
    return ours, naive.train()


def test_the_port_of_transformers_modules_has_our_losses_and_our_gradients(pair):
    batch = random_batch(model_config("tiny"), 3, torch.device("cpu"))
    batch["prompt_mask"][1, 1:6] = False
    losses = [model(batch, 2) for model in pair]
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], loss, rtol=1e-4, atol=1e-5, msg=name)
    for each in losses:
        sum(each.values()).backward()
    ours, naive = pair
    for mine, other in zip(ours.vlm.projector.parameters(), naive.projector.parameters()):
        torch.testing.assert_close(other.grad, mine.grad, rtol=1e-3, atol=1e-5)


def test_the_port_decodes_our_actions(pair):
    ours, naive = (model.eval() for model in pair)
    batch = random_batch(model_config("tiny"), 3, torch.device("cpu"))
    actions, _ = ours.act(batch)
    torch.testing.assert_close(naive.act(batch), actions[:, 0], rtol=0, atol=0)


VERBS = {
    "loader": ["--rounds", "1", "--batch", "8"],
    "train": ["--rounds", "1", "--batch", "2", "--device", "cpu"],
    "act": ["--queries", "5", "--batches", "1", "2", "--exact", "6", "--device", "cpu"],
    "scale": ["--rounds", "1", "--steps", "2", "--batches", "1", "2", "--device", "cpu"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_measures_ours_and_the_reference(verb, tmp_path):
    write_demos(tmp_path / "data/set_table/close/fridge", lengths=(40,) * 8)
    data = [] if verb == "train" else ["--data", tmp_path / "data"]
    data += ["--plot", tmp_path / "plot.png"] if verb == "scale" else []
    command = [sys.executable, "-m", "tools.bench", verb, *VERBS[verb], *data]
    command += ["--json", tmp_path / "figures.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "figures.json").read_text())
    assert all(figure["median"] > 0 for figure in result["figures"].values())
    assert {"torch", "device", "date"} <= result["about"].keys() and "ours" in done.stdout
    if verb == "train":
        ours, theirs = (
            result["kept for the backward pass (MB)"][name] for name in ("ours", "naive port")
        )
        assert ours < theirs and 0 < result["FLOP utilisation"] < 1
    if verb == "act":
        assert result["queries with other actions"] == 0
        assert result["exactness"] == {"frames": 6, "tokens": 78, "different": 0}
        assert sum(result["passes of the LLM per query, batch 1"].values()) == 5
    if verb == "scale":
        assert (tmp_path / "plot.png").stat().st_size > 5000
        assert [len(line) for lines in result["curves"].values() for line in lines.values()] == [
            2, 2, 4, 2, 2
        ]  # fmt: skip
