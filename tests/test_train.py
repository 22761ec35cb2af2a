"""Training as a user runs it: stages, resume, two processes, learning, and what it refuses."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from files import write_demos
from safetensors.torch import load_file
from tiny_run import flags, lines, observation, train, weights, write_pack

from config import InputError, user_errors
from data import Frames, make_batch
from model import AuxVLA
from policy import Policy
from storage import checkpoint
from storage.files import read_json, sha256, write_json
from storage.pack import open_data, pack
from storage.tokenizer import build_tokenizer, tokenize
from storage.trajectory import DataError
from training.flags import parse
from training.validation import validate

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pack(tmp_path_factory.mktemp("data"))


def run(*args, **others):
    train(*args, **{"steps": 4} | others)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def stage1(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "stage1"
    run(data, out)
    return out


def test_the_three_stages_follow_each_other_and_stage_3_keeps_the_vlm(data, stage1, tmp_path):
    run(data, tmp_path / "stage2", stage=2, init_from=stage1)
    run(data, tmp_path / "stage3", stage=3, init_from=tmp_path / "stage2")
    two, three = weights(tmp_path / "stage2"), weights(tmp_path / "stage3")
    assert all(torch.equal(three[key], value) for key, value in two.items())
    assert any(key.startswith("flow_head.") for key in three.keys() - two.keys())
    names = {"action", "pos", "grasp", "qpos", "obj", "seg"}
    assert names <= lines(tmp_path / "stage2")[0].keys() and "flow" in lines(tmp_path / "stage3")[0]
    assert {"samples_per_s", "data_wait", "lr", "grad_norm"} <= lines(stage1)[0].keys()


def test_stage_1_moves_the_vlm_bit_for_bit_as_without_decoders(data, tmp_path):
    """Though gradients are clipped at each step: those of the decoders do not scale the VLM's."""
    outs = {tmp_path / "with": ["pos", "grasp", "qpos", "obj", "seg"], tmp_path / "without": []}

    def train_both(steps):
        for out, names in outs.items():
            settings = dict(steps=steps, grad_clip=0.1, cooldown=0, warmup=0)
            train(data, out, "--model.decoders", *names, **settings)

    train_both(steps=1)
    ours, bare = map(checkpoint.newest, outs)
    vlm = [
        {key: tensor for key, tensor in load_file(ours / name).items() if key.startswith("vlm.")}
        for name in ("model.safetensors", "optimizer.safetensors")
    ]
    tokenizer = (bare / "tokenizer.json").read_text()
    checkpoint.write(bare.parent, 1, *vlm, checkpoint.read_manifest(bare), tokenizer, keep=1)
    train_both(steps=4)
    ours, bare = map(weights, outs)
    assert all(torch.equal(ours[key], value) for key, value in bare.items())
    assert min(line["grad_norm"] for line in lines(tmp_path / "without") if "lr" in line) > 0.1


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    """As the release's open and close: no masks, no object, and nothing is ever held."""
    folder = tmp_path_factory.mktemp("unlabelled")
    path = write_demos(folder / "set_table/close/fridge", (30, 8), labels=False, has_object=False)
    with h5py.File(path, "r+") as file:
        file["traj_0/obs/extra/is_grasped"][...] = False
        file["traj_1/obs/extra/is_grasped"][...] = False
    return folder


def test_default_decoders_without_labels_are_left_out_loudly_and_in_later_stages(
    unlabelled, tmp_path, capsys
):
    run(unlabelled, tmp_path / "stage1", action_bounds="percentiles")
    said = capsys.readouterr().out
    assert "has a label for: pos, obj, seg" in said and "NOT TRAINED" in said
    assert "collect.py --expert rl --task set_table --subtask close --target fridge" in said
    assert "grasp never changes in these episodes" in said
    assert re.search(r"grasp_accuracy \S+ \(1\), which never changes", said)
    for stage, before in ((2, "stage1"), (3, "stage2")):
        out = tmp_path / f"stage{stage}"
        run(unlabelled, out, stage=stage, steps=1, init_from=tmp_path / before)
        trained = checkpoint.read_manifest(checkpoint.newest(out))["config"]["model"]["decoders"]
        written = json.loads((out / "config.json").read_text())["model"]["decoders"]
        assert trained == written == ["grasp", "qpos"]
        assert json.loads((out / "config.json").read_text())["action_bounds"] == "percentiles"


def test_a_later_stage_keeps_its_checkpoints_decoders_where_the_data_lack_their_labels(
    unlabelled, stage1, tmp_path, capsys
):
    out = tmp_path / "stage2"
    for steps in (1, 2):  # begun, then resumed
        run(unlabelled, out, stage=2, steps=steps, init_from=stage1)
        assert "has a label for: pos, obj, seg" in capsys.readouterr().out
    trained = checkpoint.read_manifest(checkpoint.newest(out))
    assert trained["step"] == 2 and len(trained["config"]["model"]["decoders"]) == 5
    before, after = weights(stage1), weights(out)
    moved = {key.split(".")[1] for key in after if not torch.equal(after[key], before[key])}
    assert {"grasp", "qpos"} <= moved and not {"pos", "obj"} & moved


def test_the_command_that_records_labels_is_of_the_files_that_are_trained_on(tmp_path, monkeypatch):
    for file in ("close/fridge", "pick/013_apple"):
        write_demos(tmp_path / "MS-HAB-SetTable" / file, (30, 8), labels=False)
    monkeypatch.chdir(tmp_path / "MS-HAB-SetTable")
    wanted = "--task set_table --subtask pick --target 013_apple --out .*MS-HAB-SetTable-labelled "
    with pytest.raises(InputError, match=wanted):
        run(".", tmp_path / "out", row="auxvla-seg-obj")


@pytest.mark.parametrize("asked", [["--row", "auxvla-pos"], ["--model.decoders", "qpos", "seg"]])
def test_a_decoder_that_was_asked_for_and_has_no_label_is_refused(asked, unlabelled, tmp_path):
    with pytest.raises(InputError, match=r"no training frame .* for: (pos|seg)\. Record labels"):
        run(unlabelled, tmp_path / "out", *asked)
    assert not checkpoint.steps_in(tmp_path / "out")


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(data, stage1, tmp_path):
    schedule = dict(stage=3, init_from=stage1, cooldown=0, warmup=0)
    run(data, tmp_path / "straight", steps=6, **schedule)
    run(data, tmp_path / "cut", steps=3, **schedule)
    run(data, tmp_path / "cut", steps=6, **schedule)
    for file in ("model", "optimizer"):
        one, other = weights(tmp_path / "straight", file), weights(tmp_path / "cut", file)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    steps = [line["step"] for line in lines(tmp_path / "cut") if "flow" in line]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_resumed_run_says_what_its_weights_began_with_and_all_its_files_have_one_mode(
    data, stage1, tmp_path
):
    run(data, tmp_path / "out", stage=3, steps=1, init_from=stage1)
    shutil.copytree(stage1, tmp_path / "other")
    run(data, tmp_path / "out", stage=3, steps=2, init_from=tmp_path / "other")
    newest = checkpoint.newest(tmp_path / "out")
    assert newest.name == "step-00000002"
    assert checkpoint.read_manifest(newest)["config"]["init_from"] == str(stage1)
    assert json.loads((tmp_path / "out/config.json").read_text())["init_from"] == str(stage1)
    assert len({path.stat().st_mode for path in newest.iterdir()}) == 1


def test_a_checkpoint_downloaded_without_moments_acts_and_starts_a_stage_if_whole(
    data, stage1, tmp_path
):
    shared, moments = tmp_path / "shared", shutil.ignore_patterns("optimizer.safetensors")
    shutil.copytree(checkpoint.newest(stage1), shared, ignore=moments)
    text = "close the kitchen drawer"
    ours, theirs = (Policy.from_checkpoint(path, "cpu") for path in (shared, stage1))
    assert (ours.act(observation(0), text) == theirs.act(observation(0), text)).all()
    run(data, tmp_path / "stage2", stage=2, steps=1, init_from=shared)
    assert lines(tmp_path / "stage2")[0]["step"] == 1
    flip(shared / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors: missing or damaged"):
        Policy.from_checkpoint(shared, "cpu")
    with pytest.raises(InputError, match=r"model\.safetensors: missing or damaged"):
        run(data, tmp_path / "again", stage=2, steps=1, init_from=shared)


def test_an_export_is_half_as_large_starts_a_stage_but_does_not_resume(data, stage1, tmp_path):
    out = tmp_path / "weights/stage1"
    checkpoint.export(stage1, out)
    theirs, ours = checkpoint.newest(stage1), checkpoint.newest(out)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (ours, theirs)]
    assert sizes[0] < 0.55 * sizes[1] and not (ours / "optimizer.safetensors").exists()
    model, original = Policy.from_checkpoint(out, "cpu").model, weights(stage1)
    for name, weight in model.state_dict().items():
        expected = original[name].bfloat16() if weight.ndim > 1 else original[name]
        assert weight.dtype == original[name].dtype and (weight == expected).all(), name
    original = sha256(theirs / "manifest.json")
    assert checkpoint.read_manifest(ours)["published_from"] == original
    assert (out / "log.jsonl").read_bytes() == (stage1 / "log.jsonl").read_bytes()
    run(data, tmp_path / "stage2", stage=2, steps=1, init_from=out)
    with pytest.raises(ValueError, match="is there already"):
        checkpoint.export(stage1, out)
    with pytest.raises(InputError, match=r"has no optimizer.safetensors.* --init-from"):
        checkpoint.load_optimizer(model, torch.optim.Adam(model.parameters()), ours)


@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_take_the_same_step_as_one(stage, data, stage1, tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        "train.py",
    ]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    two = flags(data, tmp_path / "two", steps=2, stage=stage, init_from=stage1)
    subprocess.run([*command, *two], cwd=ROOT, env=env, check=True, timeout=300)
    run(data, tmp_path / "one", steps=2, stage=stage, init_from=stage1)
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two")):
        for key in ("action", "pos", "grasp", "qpos", "obj", "seg", "flow", "grad_norm"):
            if key in one:
                assert two[key] == pytest.approx(one[key], rel=1e-5, abs=1e-6), key
    # Adam's first moment is the gradient times 1 - beta: equal gradients, not only equal losses.
    one, two = weights(tmp_path / "one", "optimizer"), weights(tmp_path / "two", "optimizer")
    assert one.keys() == two.keys()
    for key in one:
        if key.endswith("exp_avg"):
            torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-6)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for key in one:
        if "running" in key:  # of the mask decoders' BatchNorm
            torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-5)


def test_accumulated_micro_batches_take_the_same_step_as_one_batch(data, tmp_path):
    # Without seg: BatchNorm takes its statistics per micro-batch (GAP-17).
    decoders = ["--model.decoders", "pos", "grasp", "qpos", "obj"]
    for size in (8, 2):
        run(data, tmp_path / str(size), *decoders, steps=1, stage=2, micro_batch=size)
    one, many = weights(tmp_path / "8", "optimizer"), weights(tmp_path / "2", "optimizer")
    for key in one:
        torch.testing.assert_close(many[key], one[key], rtol=1e-4, atol=1e-6)


def test_training_learns_the_actions_and_the_labels_of_held_out_frames(data, tmp_path):
    larger = dict(batch_size=16, micro_batch=16, val_frames=64, lr=2e-3)
    run(data, tmp_path / "run", steps=80, stage=2, **larger)
    metrics = json.loads((tmp_path / "run/validation.json").read_text())["metrics"]
    assert metrics["qpos_r2"]["ours"] > 0.5 > metrics["qpos_r2"]["trivial"]
    accuracy = metrics["action_token_accuracy"]
    assert accuracy["ours"] > accuracy["trivial"] + 0.1
    assert metrics["mask_iou_hand"]["ours"] > 0.6
    actions = [line["action"] for line in lines(tmp_path / "run") if "action" in line]
    assert actions[-1] < 0.6 * actions[0]


# --- What it refuses, and what it survives ---


def test_stage_3_without_a_trained_vlm_is_refused(data, tmp_path):
    with pytest.raises(InputError, match="stage 3 starts from stage 2: give --init-from"):
        run(data, tmp_path, stage=3)


def test_a_checkpoint_of_another_model_is_refused_naming_the_difference(data, stage1, tmp_path):
    depth = ["--model.llm.depth", "3"]
    with pytest.raises(InputError, match=r"model.llm.depth: 3 here, 4 there"):
        run(data, tmp_path / "out", *depth, stage=2, init_from=stage1)


def test_another_flow_head_may_stand_on_a_trained_vlm(data, stage1, tmp_path):
    flow = ["--model.flow.width", "64", "--model.freeze-vision"]
    run(data, tmp_path / "out", *flow, stage=3, steps=1, init_from=stage1)
    assert weights(tmp_path / "out")["flow_head.action_in.weight"].shape[0] == 64


def test_a_run_from_before_a_setting_existed_goes_on(data, stage1, tmp_path):
    shutil.copytree(stage1, tmp_path / "out")
    path = checkpoint.newest(tmp_path / "out") / "manifest.json"
    manifest = read_json(path)
    del manifest["config"]["model"]["freeze_vision"], manifest["config"]["cooldown"]
    write_json(path, manifest)
    with pytest.raises(InputError, match=r"cooldown: 0.4 here, 0.0 there"):
        run(data, tmp_path / "out", steps=5)
    run(data, tmp_path / "out", steps=5, cooldown=0)
    assert checkpoint.newest(tmp_path / "out").name == "step-00000005"


def test_a_checkpoint_knows_the_sentences_that_it_was_trained_on_and_no_others(data, tmp_path):
    run(data, tmp_path / "out", row="auxvla-pick-place", steps=1)
    manifest = checkpoint.read_manifest(checkpoint.newest(tmp_path / "out"))
    assert manifest["instructions"] == ["pick up the apple"]
    assert manifest["trained"] == {"frames": 30, "episodes": 1}  # the other one is held out


def test_a_changed_flag_does_not_resume_silently(data, stage1):
    with pytest.raises(InputError, match=r"lr: 0.5 here, 0.0003 there"):
        run(data, stage1, steps=5, lr=0.5)


def test_fewer_steps_than_are_done_are_refused_and_change_nothing(data, stage1, tmp_path):
    shutil.copytree(stage1, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.json*")}
    with pytest.raises(InputError, match=r"step-00000004 is beyond the 2 steps .* --steps 4"):
        run(data, tmp_path / "out", steps=2)
    assert {path: path.read_bytes() for path in (tmp_path / "out").glob("*.json*")} == before
    run(data, tmp_path / "out", steps=4)  # finished; not an error


def test_a_damaged_checkpoint_is_named_and_moved_aside_and_what_is_saved_next_stays(
    data, tmp_path, capsys
):
    run(data, tmp_path, steps=4, save_every=2, cooldown=0)
    newest = checkpoint.newest(tmp_path)
    flip(newest / "model.safetensors")
    assert checkpoint.newest(tmp_path).name == "step-00000002"
    run(data, tmp_path, steps=3, keep=1, cooldown=0)
    assert f"{newest.name}/model.safetensors" in capsys.readouterr().err
    assert [path.name for path in checkpoint.steps_in(tmp_path)] == ["step-00000003"]
    assert (tmp_path / "last").read_text() == "step-00000003"
    assert (tmp_path / "step-00000004.damaged/manifest.json").is_file()


@pytest.mark.parametrize(
    "fault", ["none of its 1 checkpoints is undamaged", "format 9, expected 2"]
)
def test_where_no_checkpoint_can_be_used_nothing_is_begun_anew(fault, data, stage1, tmp_path):
    out = shutil.copytree(stage1, tmp_path / "out")
    (folder,) = checkpoint.steps_in(out)
    if fault.startswith("format"):
        manifest = read_json(folder / "manifest.json")
        write_json(folder / "manifest.json", manifest | {"format": 9})
    else:
        flip(folder / "model.safetensors")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=fault):
        run(data, out)
    before |= {out / ".lock": (out / ".lock").read_bytes()}  # the process that looked
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_step_is_saved_before_the_validation_that_dies(data, tmp_path):
    source = shutil.copytree(data.parent / "demos", tmp_path / "demos")
    with h5py.File(next(source.rglob("*.h5")), "r+") as file:
        last = [*file.values()][-1]["obs/agent/qpos"]
        last[...] = last[...] + np.nan  # held out
    with pytest.raises(DataError, match="qpos is"):
        run(source, tmp_path / "out", steps=2, val_frames=999)
    assert checkpoint.newest(tmp_path / "out").name == "step-00000002"


def test_a_full_disk_ends_packing_without_half_a_block(data, small_disk):
    with pytest.raises(SystemExit, match="No space left"), user_errors():
        pack(str(data.parent / "demos"), str(small_disk / "pack"))
    assert not list((small_disk / "pack").glob("*.tmp"))
    assert not (small_disk / "pack/pack.json").exists()


def test_other_data_than_before_is_not_resumed_on(data, stage1, tmp_path):
    write_demos(tmp_path / "set_table/close/fridge", lengths=(30, 30))
    with pytest.raises(InputError, match="Give the same data"):
        run(tmp_path, stage1, steps=5)


VARIANTS = {
    "one camera without depth": ["--model.cameras", "hand", "--model.no-depth"],
    "no decoders": ["--model.decoders"],
    "frozen vision": ["--model.freeze-vision"],
    "loader processes": ["--workers", "2"],
    "one checkpoint kept": ["--keep", "1", "--save-every", "1"],
    "another seed": ["--seed", "7"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_trains_validates_and_saves(variant, data, tmp_path):
    run(data, tmp_path / "out", *VARIANTS[variant], stage=2, steps=2)
    assert checkpoint.newest(tmp_path / "out").name == "step-00000002"


REFUSED = {
    "steps 0": ["--steps", "0"],
    "log_every": ["--log-every", "0"],
}


@pytest.mark.parametrize("word", REFUSED)
def test_numbers_that_cannot_work_are_refused_before_anything_runs(word, data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(flags(data, tmp_path) + REFUSED[word])
    assert word in re.sub(r"\W*\n\W*", " ", capsys.readouterr().err)


def test_the_validation_loss_is_the_mean_over_labelled_frames(data, tmp_path):
    """Rows are sorted by file, and only one of the two files has objects."""
    cfg = parse(flags(data, tmp_path, stage=2, micro_batch=4))
    source = open_data(data)
    held_out = Frames(source, cfg.val_episodes, train=False)
    prompts = tokenize(source.instructions, build_tokenizer(cfg.model.llm), cfg.model.llm)
    stats = Frames(source, cfg.val_episodes, train=True).stats("controller")
    model = AuxVLA(cfg.model)
    model.train_stage(2)
    losses, _ = validate(model, held_out, stats, prompts, cfg)
    model.eval()
    batch = make_batch(held_out[np.arange(len(held_out))], stats, prompts, cfg.model)
    at_once = model(batch, 2)
    assert len(held_out) == 16 and not batch["has_obj"][:4].all()
    for name, loss in losses.items():
        assert loss == pytest.approx(at_once[name].item(), rel=1e-4), name


def test_a_checkpoint_drives_the_robot_with_nothing_but_itself(data, stage1):
    policy = Policy.from_checkpoint(stage1, device="cpu")
    views = {
        name: {key: torch.cat([value, value]) for key, value in view.items()}
        for name, view in observation(0)["sensor_data"].items()
    }
    action = policy.act({"sensor_data": views}, "close the kitchen drawer")
    assert action.shape == (2, 13) and abs(action).max() <= 1
    assert (
        policy.predictions["seg"].shape == (2, 2, 128, 128)
        and policy.predictions["pos"].shape == (2, 2)
    )  # fmt: skip


def test_too_few_frames_for_a_batch_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match="less than one batch of 512"):
        run(data, tmp_path, batch_size=512)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_a_gpu_that_is_not_there_is_said_in_a_sentence(data, tmp_path):
    with pytest.raises(InputError, match="--device cuda: torch finds no GPU here"):
        run(data, tmp_path, device="cuda")
