"""The reference of the benchmark is the same model; its three verbs run."""

import json

import pytest
import torch
import tyro
from files import write_demos

from config import model_config
from tools.bench import VERBS, random_batch
from tools.reference import build_pair


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    port, ours = build_pair(model_config("tiny"))
    ours.train_stage(2)
    return ours, port.train(), random_batch(ours.cfg, 3, torch.device("cpu"))


def test_the_port_of_transformers_modules_has_our_losses_and_our_gradients(pair):
    ours, naive, batch = pair
    mask = batch["prompt_mask"].clone()
    mask[1, 1:6] = False
    losses, theirs = (model(batch | {"prompt_mask": mask}, 2) for model in (ours, naive))
    for name, loss in losses.items():
        torch.testing.assert_close(theirs[name], loss, rtol=1e-4, atol=1e-5, msg=name)
    for each in (losses, theirs):
        sum(each.values()).backward()
    for mine, other in zip(ours.vlm.projector.parameters(), naive.projector.parameters()):
        torch.testing.assert_close(other.grad, mine.grad, rtol=1e-3, atol=1e-5)


def test_the_port_decodes_our_actions(pair):
    ours, naive, batch = pair
    actions, _ = ours.eval().act(batch)
    assert torch.equal(naive.eval().act(batch)[0], actions)


FLAGS = {
    "loader": ["--rounds", "1", "--batch", "8"],
    "train": ["--rounds", "1", "--batch", "2", "--device", "cpu"],
    "act": ["--queries", "5", "--batches", "1", "2", "--device", "cpu"],
}


@pytest.mark.parametrize("verb", FLAGS)
def test_a_verb_measures_ours_and_the_reference(verb, tmp_path, capsys):
    write_demos(tmp_path / "data/set_table/close/fridge", lengths=(20,) * 4)
    data = [] if verb == "train" else ["--data", str(tmp_path / "data")]
    args = [verb, *FLAGS[verb], *data, "--json", str(tmp_path / "new/figures.json")]
    tyro.extras.subcommand_cli_from_dict(VERBS, args=args)
    result = json.loads((tmp_path / "new/figures.json").read_text())
    assert all(figure["median"] > 0 for figure in result["figures"].values())
    assert {"torch", "device", "date"} <= result["about"].keys()
    assert "ours" in capsys.readouterr().out
    if verb == "act":
        assert result["exactness"] == {"tokens": 65, "different": 0}
