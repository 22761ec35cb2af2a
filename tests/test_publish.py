"""`tools.publish` with the hub's real client, against a server of its protocol."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import tyro
from hub_server import TOKEN, Hub
from processes import REPOSITORY, start
from safetensors.torch import load_file
from tiny_run import SCHEMA, observation, train_tiny

from checkpoint import load_optimizer, newest, read_manifest
from config import InputError
from durable import read_sealed, sha256
from policy import Policy
from tools.publish import lighten, pull, push

REPO = "user/auxvla-drawer"
PUBLIC = {"README.md", "manifest.json", "model.safetensors", "tokenizer.json"}
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Path:
    return train_tiny(tmp_path_factory.mktemp("run"))


@pytest.fixture
def hub():
    server = Hub({})
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def publish(hub, monkeypatch, tmp_path_factory):
    """Run push or pull with its flags; the hub's client is told what variables tell it."""
    no_login = str(tmp_path_factory.getbasetemp() / "no-token")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", no_login)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)

    def run(command, *flags, token: str = TOKEN, offline: bool = False, url: str = hub.url):
        monkeypatch.setenv("HF_TOKEN", token)
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        given = {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": template}
        for name, value in (given | {"HF_HUB_OFFLINE": offline}).items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        tyro.cli(command, args=[str(flag) for flag in flags])

    return run


@pytest.fixture
def pushed(hub, publish, stage) -> dict[str, bytes]:
    """The files of a repository with the checkpoint."""
    publish(push, "--checkpoint", stage, "--repo", REPO)
    return hub.repositories[REPO]


def test_what_was_pulled_acts_as_what_was_pushed(hub, stage, tmp_path):
    out = tmp_path / "run/pulled"
    given = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf-home"), "HF_TOKEN": TOKEN}
    given |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    for command in (("push", "--checkpoint", stage), ("pull", "--out", out)):
        process = start("-m", "tools.publish", *command, "--repo", REPO, **given)
        shown, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert shown == f"{out}: stage 1, step 1, whole\n"
    assert {path.name for path in out.iterdir()} == PUBLIC - {"README.md"}
    ours, theirs = (Policy.from_checkpoint(path, "cpu") for path in (stage, out))
    for seed in (0, 1):
        actions = [p.act(observation(seed), "close the kitchen drawer") for p in (ours, theirs)]
        assert (actions[0] == actions[1]).all()


def test_a_lightened_checkpoint_is_half_as_large_acts_the_same_and_starts_a_stage(stage, tmp_path):
    out = tmp_path / "weights/stage1"
    lighten(stage, out)
    theirs, ours = newest(stage), newest(out)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (ours, theirs)]
    assert sizes[0] < 0.55 * sizes[1] and not (ours / "optimizer.safetensors").exists()
    rounded = load_file(theirs / "model.safetensors")
    policy = Policy.from_checkpoint(out, "cpu")
    for name, weight in policy.model.state_dict().items():
        expected = rounded[name].bfloat16() if weight.ndim > 1 else rounded[name]
        assert weight.dtype == rounded[name].dtype and (weight == expected).all(), name
    assert policy.act(observation(0), "close the kitchen drawer").shape == (1, 13)
    assert read_manifest(ours)["published_from"] == sha256(theirs / "manifest.json")
    assert (out / "log.jsonl").read_bytes() == (stage / "log.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="is there already"):
        lighten(stage, out)
    optimizer = torch.optim.Adam(policy.model.parameters())
    with pytest.raises(InputError, match=r"has no optimizer.safetensors.* --init-from"):
        load_optimizer(policy.model, optimizer, ours)


def test_adams_moments_stay_here_and_the_manifest_says_of_which_it_is(pushed, stage):
    assert pushed.keys() - {".gitattributes"} == PUBLIC
    original, manifest = newest(stage) / "manifest.json", json.loads(pushed["manifest.json"])
    assert manifest["published_from"] == sha256(original)
    files = read_sealed(original)["files"]
    assert files.keys() - manifest["files"].keys() == {"optimizer.safetensors"}


def test_adams_moments_go_along_when_asked_for(hub, publish, stage, tmp_path):
    publish(push, "--checkpoint", stage, "--repo", REPO, "--optimizer", "--private")
    original = newest(stage)
    assert hub.repositories[REPO]["manifest.json"] == (original / "manifest.json").read_bytes()
    publish(pull, "--repo", REPO, "--out", tmp_path / "all")
    assert read_manifest(tmp_path / "all") == read_manifest(original)
    assert hub.requests[0]["visibility"] == "private"


def test_the_card_has_table_row_actions_commits_and_gaps(hub, publish, stage, tmp_path):
    results = json.loads((REPOSITORY / "results/learn/eval/results.json").read_text())
    results["manifest"]["checkpoint"] = sha256(newest(stage) / "manifest.json")
    (tmp_path / "results.json").write_text(json.dumps(results))
    publish(push, "--checkpoint", stage, "--repo", REPO, "--results", tmp_path)
    card = hub.repositories[REPO]["README.md"].decode()
    assert card.startswith("---\npipeline_tag: robotics\n") and "{" not in card
    assert "| close_drawer | 20/20 = 1.00 [0.84, 1.00], at the end" in card
    assert "paper, AuxVLA + all" in card and "generated by household.assets" in card
    assert "row `auxvla-all` (AuxVLA + all)" in card and "GAP-1" in card
    assert all(f"| {part['name']} | -0.1 | {part['high']} | rad |" in card for part in SCHEMA)
    assert results["manifest"]["git"] in card and "close the kitchen drawer" in card


def test_a_card_without_an_evaluation_says_not_run(pushed):
    assert "## Results\n\nnot run\n" in pushed["README.md"].decode()


def test_results_of_another_checkpoint_are_refused(hub, publish, stage):
    flags = ("--checkpoint", stage, "--repo", REPO, "--results")
    with pytest.raises(InputError, match=r"results.json: is not of .*; python eval.py"):
        publish(push, *flags, REPOSITORY / "results/learn/eval")
    with pytest.raises(InputError, match=r"results.json: not there; python eval.py"):
        publish(push, *flags, "nowhere")
    assert not hub.repositories


def test_a_damaged_checkpoint_is_not_pushed(hub, publish, stage, tmp_path):
    copy = shutil.copytree(newest(stage), tmp_path / "copy")
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer.json: missing or damaged"):
        publish(push, "--checkpoint", copy, "--repo", REPO)
    assert not hub.repositories


def test_a_repository_that_holds_something_is_replaced_only_when_told(pushed, publish, stage):
    pushed["old.safetensors"] = b"of an earlier one"
    before = dict(pushed)
    with pytest.raises(InputError, match=rf"{REPO}: holds README.md.* Give --replace"):
        publish(push, "--checkpoint", stage, "--repo", REPO)
    assert pushed == before
    publish(push, "--checkpoint", stage, "--repo", REPO, "--replace")
    assert pushed.keys() == before.keys() - {"old.safetensors"}


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "manifest.json"])
def test_a_byte_that_differs_is_named_and_nothing_of_it_is_kept(pushed, publish, name, tmp_path):
    whole, middle = pushed[name], len(pushed[name]) // 2
    pushed[name] = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    with pytest.raises(InputError, match=rf"^{REPO}: is no whole checkpoint.*{name}: .*damaged"):
        publish(pull, "--repo", REPO, "--out", tmp_path / "pulled")
    assert not list(tmp_path.iterdir())
    pushed[name] = whole
    publish(pull, "--repo", REPO, "--out", tmp_path / "pulled")
    read_manifest(tmp_path / "pulled")


def test_a_repository_of_something_else_is_said_to_be(hub, publish, tmp_path):
    hub.repositories["user/bert"] = {"config.json": b"{}"}
    with pytest.raises(InputError, match=r"user/bert: is no .*manifest.json: not there"):
        publish(pull, "--repo", "user/bert", "--out", tmp_path / "pulled")


def test_a_folder_that_is_there_is_left_alone(pushed, publish, tmp_path):
    with pytest.raises(FileExistsError, match="is there already"):
        publish(pull, "--repo", REPO, "--out", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("repo", "setting", "sentence"),
    [
        ("nobody", {}, "--repo nobody: expected USER/NAME"),
        ("user/a--b", {}, "user/a--b: not to be had from the hub"),
        ("user/new", {"token": ""}, "no token for the hub: hf auth login"),
        ("user/new", {"token": "hf_old"}, "hf auth login"),
        ("other/new", {}, "hf auth login, with a token that may"),
        ("user/new", {"offline": True}, "HF_HUB_OFFLINE is set"),
        ("user/new", {"url": NOWHERE}, "once there is a network"),
    ],
)
def test_a_push_that_cannot_be_ends_in_a_sentence(repo, setting, sentence, hub, publish, stage):
    with pytest.raises(InputError, match=sentence):
        publish(push, "--checkpoint", stage, "--repo", repo, **setting)
    assert not hub.repositories


@pytest.mark.parametrize(
    ("repo", "setting", "sentence"),
    [
        ("user/gone", {}, "user/gone: not to be had .*Look at the name"),
        ("user/a--b", {}, "user/a--b: not to be had from the hub"),
        (REPO, {"offline": True}, "HF_HUB_OFFLINE is set"),
        (REPO, {"url": NOWHERE}, "once there is a network"),
    ],
)
def test_a_pull_that_cannot_be_ends_in_a_sentence(
    repo, setting, sentence, pushed, publish, tmp_path
):
    with pytest.raises(InputError, match=sentence):
        publish(pull, "--repo", repo, "--out", tmp_path / "pulled", **setting)
    assert not list(tmp_path.iterdir())


def test_a_pull_that_broke_off_goes_on(pushed, hub, publish, tmp_path):
    hub.refused = {"model.safetensors"}
    with pytest.raises(InputError, match="the same command goes on"):
        publish(pull, "--repo", REPO, "--out", tmp_path / "pulled")
    assert [path.name for path in tmp_path.iterdir()] == [".pulled.partial"]
    hub.refused.clear()
    publish(pull, "--repo", REPO, "--out", tmp_path / "pulled")
    assert [path.name for path in tmp_path.iterdir()] == ["pulled"]
    read_manifest(tmp_path / "pulled")
