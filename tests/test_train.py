"""Training as a user runs it: stages, resume, two processes, learning, and what it refuses."""

import re
import shutil
from dataclasses import fields
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from files import flip, write_demos
from safetensors.torch import load_file
from tiny_run import (
    DEVICES,
    compare,
    fingerprint,
    flags,
    lines,
    observation,
    run_command,
    train,
    weights,
    write_pack,
)
from torch._dynamo.utils import counters

from backbone import FusedVision
from config import InputError, TrainConfig
from data import Frames, make_batch
from model import AuxVLA
from policy import Policy
from storage import checkpoint
from storage.files import read_json, sha256, write_json
from storage.pack import open_data, pack
from storage.terminal import user_errors
from storage.tokenizer import build_tokenizer, tokenize
from training.flags import parse
from training.memory import measure
from training.start import RESUME_MAY_CHANGE
from training.validation import validate


def run(*args, **others):
    train(*args, **{"steps": 4} | others)


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("[!.]*") if path.is_file()}


def manifest_of(out: Path) -> dict:
    return checkpoint.read_manifest(checkpoint.newest(out))


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
    assert {"samples_per_s", "mfu", "data_wait", "lr", "grad_norm"} <= lines(stage1)[0].keys()
    assert 0 < lines(stage1)[0]["mfu"] < 1


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


# --- Labels that are missing ---


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    """As the release's open and close: no masks, no object, and nothing is ever held."""
    folder = tmp_path_factory.mktemp("unlabelled")
    path = write_demos(folder / "set_table/close/fridge", (30, 8), labels=False, has_object=False)
    with h5py.File(path, "r+") as file:
        for trajectory in file.values():
            trajectory["obs/extra/is_grasped"][...] = False
    return folder


def test_default_decoders_without_labels_are_left_out_loudly_and_in_later_stages(
    unlabelled, tmp_path, capsys
):
    run(unlabelled, tmp_path / "stage1", action_bounds="percentiles")
    printed = capsys.readouterr().out
    assert "has a label for: pos, obj, seg" in printed and "NOT TRAINED" in printed
    assert "collect.py --expert rl --task set_table --subtask close --target fridge" in printed
    assert re.search(r"grasp_accuracy \S+ \(1\), which never changes", printed)
    for stage in (2, 3):
        out = tmp_path / f"stage{stage}"
        run(unlabelled, out, stage=stage, steps=1, init_from=tmp_path / f"stage{stage - 1}")
        for config in (manifest_of(out)["config"], read_json(out / "config.json")):
            assert config["model"]["decoders"] == ["grasp", "qpos"]
            assert config["action_bounds"] == "percentiles"


def test_a_later_stage_keeps_its_checkpoints_decoders_where_the_data_lack_their_labels(
    unlabelled, stage1, tmp_path, capsys
):
    out = tmp_path / "stage2"
    for steps in (1, 2):  # begun, then resumed
        run(unlabelled, out, stage=2, steps=steps, init_from=stage1)
        assert "has a label for: pos, obj, seg" in capsys.readouterr().out
    assert manifest_of(out)["step"] == 2
    assert len(manifest_of(out)["config"]["model"]["decoders"]) == 5
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


# --- Resume, and checkpoints that others use ---


@DEVICES
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(device, data, stage1, tmp_path):
    schedule = dict(stage=3, cooldown=0, warmup=0, device=device.type)
    cut, other = tmp_path / "cut", shutil.copytree(stage1, tmp_path / "other")
    run(data, tmp_path / "straight", steps=6, init_from=stage1, **schedule)
    run(data, cut, steps=3, init_from=stage1, **schedule)
    for name in ("resumed", "finished already"):
        run(data, cut, steps=6, init_from=other, run_name=name, **schedule)
    assert {field.name for field in fields(TrainConfig)} >= RESUME_MAY_CHANGE
    steps, again = ([x for x in lines(out) if "flow" in x] for out in (tmp_path / "straight", cut))
    for ours, theirs in zip(steps, again, strict=True):  # a GPU may add up in another order
        assert theirs["flow"] == pytest.approx(ours["flow"], rel=1e-3)
    if device.type == "cpu":
        assert fingerprint(tmp_path / "straight") == fingerprint(cut)
    assert [line["step"] for line in lines(cut) if "flow" in line] == [1, 2, 3, 4, 5, 6]
    for config in (manifest_of(cut)["config"], read_json(cut / "config.json")):
        assert config["init_from"] == str(stage1)  # what its weights began with
    assert len({path.stat().st_mode for path in checkpoint.newest(cut).iterdir()}) == 1


def test_a_run_from_before_a_setting_existed_goes_on(data, stage1, tmp_path):
    out = shutil.copytree(stage1, tmp_path / "out")
    path = checkpoint.newest(out) / "manifest.json"
    manifest = read_json(path)
    del manifest["config"]["model"]["freeze_vision"], manifest["config"]["cooldown"]
    write_json(path, manifest)
    with pytest.raises(InputError, match=r"cooldown: 0.4 here, 0.0 there"):
        run(data, out, steps=5)
    run(data, out, steps=5, cooldown=0)
    assert checkpoint.newest(out).name == "step-00000005"


def test_an_export_acts_and_starts_a_stage_if_whole_but_does_not_resume(data, stage1, tmp_path):
    out = tmp_path / "weights/stage1"
    checkpoint.export(stage1, out)
    theirs, ours = checkpoint.newest(stage1), checkpoint.newest(out)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (ours, theirs)]
    assert sizes[0] < 0.55 * sizes[1] and not (ours / "optimizer.safetensors").exists()
    assert manifest_of(out)["published_from"] == sha256(theirs / "manifest.json")
    assert (out / "log.jsonl").read_bytes() == (stage1 / "log.jsonl").read_bytes()
    with pytest.raises(InputError, match="is there already"):
        checkpoint.export(stage1, out)

    policy, original = Policy.from_checkpoint(out, "cpu"), weights(stage1)
    for name, weight in policy.model.state_dict().items():
        expected = original[name].bfloat16() if weight.ndim > 1 else original[name]
        assert weight.dtype == original[name].dtype and (weight == expected).all(), name
    action = policy.act(observation(0), "close the kitchen drawer")
    assert action.shape == (1, 13) and abs(action).max() <= 1
    shapes = {name: tuple(value.shape) for name, value in policy.predictions.items()}
    assert shapes["seg"] == (1, 2, 128, 128) and shapes["pos"] == (1, 2)

    run(data, tmp_path / "stage2", stage=2, steps=1, init_from=out)
    assert lines(tmp_path / "stage2")[0]["step"] == 1
    with pytest.raises(InputError, match=r"has no optimizer.safetensors.* --init-from"):
        checkpoint.load_optimizer(policy.model, torch.optim.Adam(policy.model.parameters()), ours)
    flip(ours / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors: missing or damaged"):
        Policy.from_checkpoint(ours, "cpu")
    with pytest.raises(InputError, match="no undamaged checkpoint in it"):
        run(data, tmp_path / "again", stage=2, steps=1, init_from=out)


def test_another_flow_head_may_stand_on_a_trained_vlm(data, stage1, tmp_path):
    flow = ["--model.flow.width", "64", "--model.freeze-vision"]
    run(data, tmp_path / "out", *flow, stage=3, steps=1, init_from=stage1)
    assert weights(tmp_path / "out")["flow_head.action_in.weight"].shape[0] == 64


def test_a_checkpoint_knows_the_sentences_that_it_was_trained_on_and_no_others(data, tmp_path):
    run(data, tmp_path / "out", row="auxvla-pick-place", steps=1)
    manifest = manifest_of(tmp_path / "out")
    assert manifest["instructions"] == ["pick up the apple"]
    assert manifest["trained"] == {"frames": 30, "episodes": 1}  # the other one is held out


# --- Steps ---


@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_take_the_same_step_as_one(stage, data, stage1, tmp_path):
    settings = dict(steps=2, stage=stage, init_from=stage1)
    run_command(2, *flags(data, tmp_path / "two", **settings))
    run(data, tmp_path / "one", **settings)
    compare(tmp_path / "one", tmp_path / "two")


def test_accumulated_micro_batches_take_the_same_step_as_one_batch(data, tmp_path):
    # Without seg: BatchNorm takes its statistics per micro-batch (GAP-17).
    decoders = ["--model.decoders", "pos", "grasp", "qpos", "obj"]
    for size in (8, 2):
        run(data, tmp_path / str(size), *decoders, steps=1, stage=2, micro_batch=size)
    compare(tmp_path / "8", tmp_path / "2")


def test_auto_is_the_whole_batch_here_and_settled_on_resume_where_batchnorm_is_trained(
    data, stage1, tmp_path
):
    """Where none is, the number may change."""
    for stage, decoders in ((2, ["seg", "pos"]), (2, ["pos"]), (3, ["seg", "pos"])):
        out = tmp_path / f"{stage}{decoders[0]}"
        words = ["--model.decoders", *decoders] if stage == 2 else []
        start = dict(stage=stage, init_from=stage1) if stage == 3 else dict(stage=2)
        run(data, out, *words, **start, steps=1, micro_batch=4, cooldown=0)
        run(data, out, *words, **start, steps=2, micro_batch="auto", cooldown=0)
        batchnorm = stage == 2 and "seg" in decoders
        assert manifest_of(out)["config"]["micro_batch"] == (4 if batchnorm else 8)
        if batchnorm:
            with pytest.raises(InputError, match="micro_batch: 2 here, 4 there"):
                run(data, out, *words, **start, steps=3, micro_batch=2, cooldown=0)


@pytest.mark.parametrize("recompute", [[], ["--recompute"]])
def test_each_kind_of_block_is_compiled_once_for_each_size(recompute, data, tmp_path, monkeypatch):
    """Two sizes of micro-batch, and a validation after each step; with a compiler that is quick."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    settings = dict(batch_size=10, micro_batch=4, val_every=1)
    run(data, tmp_path, "--compile", *recompute, steps=3, stage=2, **settings)
    kinds = 4  # blocks of DINOv2 and SigLIP, layers of the LLM, its last layer
    assert counters["stats"]["unique_graphs"] == 2 * kinds


def test_blocks_are_compiled_by_default_on_a_gpu_and_never_without_a_compiler(monkeypatch):
    for name in ("PATH", "CC", "CXX"):
        monkeypatch.setenv(name, "")
    words = flags(Path("data"), Path("out"))
    with pytest.raises(InputError, match=r"--compile needs g\+\+: apt-get install"):
        parse([*words, "--compile"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("training.ranks.find_spec", lambda name: True)
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    on_gpu = [*words, "--device", "cuda"]
    assert not parse(on_gpu).compile
    monkeypatch.setenv("CC", "cc")
    assert parse(on_gpu).compile and not parse([*on_gpu, "--no-compile"]).compile
    assert not parse(words).compile


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_on_a_gpu_two_runs_are_equal_and_a_compiled_one_nearly(stage, data, stage1, tmp_path):
    for name, flag in (("one", "no-compile"), ("two", "no-compile"), ("compiled", "compile")):
        settings = dict(stage=stage, steps=10, init_from=stage1, device="cuda")
        run(data, tmp_path / name, f"--{flag}", **settings)
    one, *others = (lines(tmp_path / name) for name in ("one", "two", "compiled"))
    for other, tolerance in zip(others, (1e-3, 1e-2)):
        for ours, theirs in zip(one, other, strict=True):
            for name in {"action", "pos", "qpos", "seg", "flow"} & ours.keys():
                assert theirs[name] == pytest.approx(ours[name], rel=tolerance, abs=tolerance)


def test_stage_3_with_a_bf16_vlm_trains_resumes_and_acts(data, stage1, tmp_path, monkeypatch):
    """As on a GPU: the frozen VLM has bf16 weights, the flow head fp32 ones, under autocast."""
    settings = dict(stage=3, init_from=stage1, cooldown=0, warmup=0)
    run(data, tmp_path / "fp32", steps=2, **settings)
    forward, mixed = FusedVision.forward, []

    def spy(vision, images):
        mixed.append(torch.is_autocast_enabled("cpu"))
        return forward(vision, images)

    monkeypatch.setattr(FusedVision, "forward", spy)
    monkeypatch.setattr("training.ranks.BF16", {"cpu"})
    measure.cache_clear()
    for name, parts in (("straight", [4]), ("cut", [2, 4])):
        for steps in parts:
            run(data, tmp_path / name, steps=steps, **settings)
    measure.cache_clear()
    assert not any(mixed)
    assert fingerprint(tmp_path / "straight") == fingerprint(tmp_path / "cut")
    for name, weight in weights(tmp_path / "cut").items():
        half = name.startswith("vlm.") and weight.is_floating_point()
        assert weight.dtype == (torch.bfloat16 if half else weight.dtype), name
        assert name.startswith("vlm.") or weight.dtype != torch.bfloat16, name
    for ours, theirs in zip(lines(tmp_path / "fp32"), lines(tmp_path / "cut")):
        for name in {"flow", "val_flow"} & ours.keys():
            assert theirs[name] == pytest.approx(ours[name], rel=2e-2)
    policy = Policy.from_checkpoint(tmp_path / "cut", "cpu")
    assert np.isfinite(policy.act(observation(0), "close the kitchen drawer")).all()


def test_training_learns_the_actions_and_the_labels_of_held_out_frames(data, tmp_path):
    larger = dict(batch_size=16, micro_batch=16, val_frames=64, lr=2e-3)
    run(data, tmp_path / "run", steps=80, stage=2, **larger)
    metrics = read_json(tmp_path / "run/validation.json")["metrics"]
    assert metrics["qpos_r2"]["ours"] > 0.5 > metrics["qpos_r2"]["trivial"]
    accuracy = metrics["action_token_accuracy"]
    assert accuracy["ours"] > accuracy["trivial"] + 0.1
    assert metrics["mask_iou_hand"]["ours"] > 0.6


def test_other_inputs_and_loader_processes_train_and_frozen_encoders_stay(data, tmp_path):
    words, saved = ["--model.cameras", "hand", "--model.no-depth", "--model.freeze-vision"], []
    for steps in (1, 2):  # begun, then resumed
        run(data, tmp_path, *words, stage=2, steps=steps, workers=2, cooldown=0)
        saved.append(weights(tmp_path))
    before, after = saved
    assert manifest_of(tmp_path)["step"] == 2
    moved = {key.split(".")[1] for key in after if not torch.equal(after[key], before[key])}
    assert {"projector", "llm"} <= moved and "vision" not in moved


def test_a_later_stage_scales_actions_as_its_checkpoint_does(data, unlabelled, tmp_path):
    run(unlabelled, tmp_path / "1", action_bounds="percentiles", steps=1)
    run(data, tmp_path / "2", stage=2, init_from=tmp_path / "1", steps=1)
    one, two = (manifest_of(tmp_path / name)["action_stats"] for name in ("1", "2"))
    assert one == two


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
    assert len(held_out) == 16 and not batch["has_obj"][:4].all()
    at_once = {name: loss.item() for name, loss in model(batch, 2).items()}
    assert losses == pytest.approx(at_once, rel=1e-4)


# --- What it refuses, and what it survives ---

REFUSED = {  # message: further flags
    "stage 3 starts from stage 2: give --init-from": dict(stage=3),
    "model.llm.depth: 3 here, 4 there": {"stage": 2, "init_from": "STAGE1", "model.llm.depth": 3},
    r"no training frame .* for: pos\. Record labels": dict(data="UNLABELLED", row="auxvla-pos"),
    r"for: seg\. Record labels": {"data": "UNLABELLED", "model.decoders": "seg"},
    "a training batch of 512": dict(batch_size=512),
    "--device cuda: torch finds no GPU here": dict(device="cuda"),
    "lr: 0.5 here, 0.0003 there": dict(out="COPY", steps=5, lr=0.5),
    "step-00000004 is beyond the 2 steps .* --steps 4": dict(out="COPY", steps=2),
    "holds step-00000004": dict(out="COPY", steps=5, resume="never"),
    r"on 136 .* 136 of 6, or others\. Give the same": dict(out="COPY", data="CHANGED", steps=5),
    "none of its 1 checkpoints is undamaged": dict(out="COPY", steps=5),
    "format 9, expected 2": dict(out="COPY", steps=5),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_work_is_refused_and_changes_nothing(
    message, data, unlabelled, stage1, tmp_path
):
    if "no GPU" in message and torch.cuda.is_available():
        pytest.skip("here is a GPU")
    copy = shutil.copytree(stage1, tmp_path / "copy")
    manifest = checkpoint.newest(copy) / "manifest.json"
    if message.startswith("format"):
        write_json(manifest, read_json(manifest) | {"format": 9})
    if "or others" in message:
        write_pack(tmp_path / "changed", seed=5)
    if message.startswith("none"):
        flip(manifest.with_name("model.safetensors"))
    before, folders = files_of(tmp_path), {"STAGE1": stage1, "COPY": copy}
    folders |= {"UNLABELLED": unlabelled, "CHANGED": tmp_path / "changed/pack"}
    settings = {name: folders.get(value, value) for name, value in REFUSED[message].items()}
    with pytest.raises(InputError, match=message):
        run(**dict(data=data, out=tmp_path / "out") | settings)
    assert files_of(tmp_path) == before


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


def test_a_step_is_saved_before_the_validation_that_dies(data, tmp_path):
    source = shutil.copytree(data.parent / "demos", tmp_path / "demos")
    with h5py.File(next(source.rglob("*.h5")), "r+") as file:
        pictures = [*file.values()][-1]["obs/sensor_data/fetch_head/rgb"]  # held out
        pictures.id.write_direct_chunk((0, 0, 0, 0), b"?")
    with pytest.raises(InputError, match="rgb, chunk at"):
        run(source, tmp_path / "out", steps=2, val_frames=999)
    assert checkpoint.newest(tmp_path / "out").name == "step-00000002"


def test_a_full_disk_ends_packing_without_half_a_block(data, small_disk):
    with pytest.raises(SystemExit, match="No space left"), user_errors():
        pack(str(data.parent / "demos"), str(small_disk / "pack"))
    assert not list((small_disk / "pack").glob("*.tmp"))
    assert not (small_disk / "pack/pack.json").exists()
