"""The reference of the benchmark is the same model; its three verbs run."""

import json

import pytest
import torch
import tyro

from config import model_config
from tools.bench import VERBS, random_batch
from tools.reference import build_pair


def test_the_port_of_transformers_modules_has_our_losses_and_our_gradients():
    torch.manual_seed(0)
    naive, ours = build_pair(model_config("tiny"))
    ours.train_stage(2)
    batch = random_batch(ours.cfg, 3, torch.device("cpu"))
    batch["prompt_mask"][1, 1:6] = False
    losses, theirs = (model(batch, 2) for model in (ours, naive.train()))
    for name, loss in losses.items():
        torch.testing.assert_close(theirs[name], loss, rtol=1e-4, atol=1e-5, msg=name)
    for each in (losses, theirs):
        sum(each.values()).backward()
    for mine, other in zip(ours.vlm.projector.parameters(), naive.projector.parameters()):
        torch.testing.assert_close(other.grad, mine.grad, rtol=1e-3, atol=1e-5)


FLAGS = {
    "loader": ["--rounds", "1", "--batch", "8"],
    "train": ["--rounds", "1", "--batch", "2", "--device", "cpu"],
    "act": ["--queries", "5", "--batches", "1", "2", "--device", "cpu"],
}


@pytest.mark.parametrize("verb", FLAGS)
def test_a_verb_measures_ours_and_the_reference(verb, data, tmp_path, capsys):
    folder = [] if verb == "train" else ["--data", str(data.parent / "demos")]
    args = [verb, *FLAGS[verb], *folder, "--json", str(tmp_path / "new/figures.json")]
    tyro.extras.subcommand_cli_from_dict(VERBS, args=args)
    result = json.loads((tmp_path / "new/figures.json").read_text())
    assert all(figure["median"] > 0 for figure in result["figures"].values())
    assert {"torch", "device", "date"} <= result["about"].keys()
    assert "ours" in capsys.readouterr().out
    if verb == "act":
        assert result["exactness"] == {"tokens": 65, "different": 0}
