"""From file to batch: equations, round trips, live as recorded, errors that name the place."""

import errno
import fcntl
import math
import os
import re
from dataclasses import replace
from unittest.mock import Mock

import h5py
import numpy as np
import pytest
import torch
from files import flip, write_demos
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing

from config import CAMERAS, LABELS, InputError, model_config
from data import (
    ActionStats,
    Frames,
    check_batch,
    make_batch,
    normalize_depth,
    preprocess,
    raw_batch,
    read_cameras,
)
from storage.files import read_json, write_json
from storage.h5 import Demonstrations, open_h5
from storage.pack import Pack, open_data, pack, verify
from storage.tokenizer import build_tokenizer, tokenize
from storage.trajectory import read_rows
from training.order import StepOrder

CFG = model_config("tiny")


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demos")
    write_demos(folder / "set_table/close/kitchen_counter", has_object=False)
    write_demos(folder / "set_table/pick/013_apple", labels=False, seed=1)
    return folder


def batch_of(source, raw):
    stats = Frames(source, 0.1, train=True).stats("controller")
    prompts = tokenize(source.instructions, build_tokenizer(CFG.llm), CFG.llm)
    return make_batch(raw, stats, prompts, CFG)


# --- Images and actions ---


def test_depth_follows_equation_1_and_metres_are_refused():
    near = normalize_depth(torch.tensor([0, 500, 1000, 3000], dtype=torch.int16))
    expected = torch.tensor([1 - math.tanh(mm / 1000) for mm in (0, 500, 1000, 3000)])
    torch.testing.assert_close(near, expected)
    with pytest.raises(ValueError, match="expected integer millimetres"):
        normalize_depth(torch.tensor([0.5]))


def test_a_live_frame_and_the_recorded_one_give_equal_images(demos):
    source = Demonstrations(demos)
    with h5py.File(demos / source.episodes[0].file) as file:
        sensors = {
            name: {kind: torch.from_numpy(sensor[kind][4:5]) for kind in sensor}
            for name, sensor in file["traj_0/obs/sensor_data"].items()
        }
    obs = {"sensor_data": sensors}
    recorded = raw_batch(source.read([4])[:, None])
    live = preprocess(*(pictures[:, None] for pictures in read_cameras(obs)), CFG)
    assert torch.equal(live, preprocess(recorded["rgb"], recorded["depth"], CFG))
    assert live.shape == (1, 4, 3, 64, 64)


def test_views_are_head_rgb_hand_rgb_head_depth_hand_depth():
    rgb = torch.zeros(1, 1, 2, 128, 128, 3, dtype=torch.uint8)
    rgb[:, :, 1] = 255
    depth = torch.zeros(1, 1, 2, 128, 128, dtype=torch.int16)
    depth[:, :, 1] = 32000
    means = preprocess(rgb, depth, CFG).mean((0, 2, 3, 4))
    torch.testing.assert_close(means, torch.tensor([0.0, 1.0, 1.0, 0.0]), rtol=0, atol=1e-4)
    only_hand = preprocess(rgb, depth, replace(CFG, cameras=("hand",), depth=False))
    assert only_hand.shape[1] == 1 and only_hand.mean() == 1


def test_actions_survive_normalisation_and_its_inverse():
    recorded = np.random.default_rng(0).uniform(-1, 1, (500, 13)).astype(np.float32)
    recorded[:, 8] = 0.25  # a joint that never moves
    recorded[:, 9] = 0
    recorded[:3, 9] = -1  # a gripper that closes in 0.6 % of the frames
    actions = torch.from_numpy(recorded)
    percentiles = ActionStats.percentiles(recorded)
    controller = ActionStats.controller(recorded.min(0), recorded.max(0))
    assert (controller.low[7], controller.high[7], controller.low[8]) == (-1, 1, 0.25)
    for stats in (percentiles, controller):
        normal = stats.normalize(actions)
        assert normal.abs().max() <= 1 and (normal[:, 8] == 0).all()
        back, inside = stats.denormalize(normal), normal.abs() < 1
        torch.testing.assert_close(back[inside], actions[inside], rtol=0, atol=1e-6)
        torch.testing.assert_close(back[:, 9], actions[:, 9])
        assert torch.equal(stats.denormalize(torch.rand(5, 13))[:, 8], torch.full((5,), 0.25))
    torch.testing.assert_close(controller.denormalize(controller.normalize(actions)), actions)
    often = np.vstack([recorded, np.ones((20, 13), np.float32)])  # opens: percentiles 0 and 1
    erasing = ActionStats.percentiles(often)
    assert (erasing.denormalize(erasing.normalize(actions))[:3, 9] > -0.01).all()


def test_prompts_have_one_length_and_end_at_the_latents():
    texts = ["close the fridge", "pick up the master chef can"]
    ids, mask = tokenize(texts, build_tokenizer(CFG.llm), CFG.llm)
    assert ids.shape == mask.shape == (2, mask[1].sum())  # as long as the longest
    assert mask[:, 0].all() and mask[:, -1].all() and mask[0].sum() < mask[1].sum()
    assert not torch.equal(ids[0], ids[1]) and ids.max() < CFG.llm.first_action_id
    assert (ids[mask] > 1).all()  # no unknown word
    with pytest.raises(InputError, match="prompt-length"):
        tokenize(["close " * 40], build_tokenizer(CFG.llm), CFG.llm)


def test_a_tokenizer_that_is_absent_offline_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"hf download \S+ tokenizer.json"):
        build_tokenizer(replace(CFG.llm, tokenizer="of/nobody"))


CHAT = ("<|im_start|>", "<|im_end|>")
QWEN = replace(model_config("paper").llm, first_action_id=12)
LLAMA = replace(model_config("openvla").llm, first_action_id=44, prompt_end=(29,))


@pytest.mark.parametrize(
    ("cfg", "own", "added", "named"),
    [
        (QWEN, 10, (*CHAT, "<|extra_0|>", "<|extra_1|>"), None),
        (QWEN, 10, (*CHAT, "<think>"), "13 tokens, 10 of them its own; the action ids begin at 12"),
        (QWEN, 10, (*CHAT, "<think>", "<|extra_0|>"), "<|extra_0|> is 13; the action ids begin at"),
        (QWEN, 12, (), "no token <|im_start|>; no token <|im_end|>"),
        (LLAMA, 300, ("<PAD>",), None),
        (LLAMA, 299, ("<PAD>",), "300 tokens, 299 of them its own; the action ids begin at 44"),
        (replace(LLAMA, prompt_end=(30,)), 300, (), "30 is 'word 30', no lone space"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused_naming_its_tokens(
    cfg, own, added, named, tmp_path
):
    words = {"▁" if i == 29 else f"word {i}": i for i in range(own)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="word 0"))
    tokenizer.add_special_tokens(list(added))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    cfg = replace(cfg, tokenizer=str(tmp_path))
    if named is None:
        assert build_tokenizer(cfg).get_vocab_size() == own + len(added)
    else:
        with pytest.raises(InputError, match=re.escape(named)):
            build_tokenizer(cfg)
        (tmp_path / "tokenizer.json").write_text("{")
        with pytest.raises(InputError, match=r"tokenizer.json: damaged"):
            build_tokenizer(cfg)


def test_a_prompt_begins_with_the_tokenizers_own_token_and_ends_in_the_configured_ids():
    """As OpenVLA's: Llama's <s>, then the images, the sentence, and id 29871."""
    tokenizer, cfg = build_tokenizer(CFG.llm), replace(CFG.llm, prompt_end=(7, 9))
    (plain,) = tokenize(["close the fridge"], tokenizer, CFG.llm)  # no mask: nothing is padded
    tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    (ids,) = tokenize(["close the fridge"], tokenizer, cfg)
    assert ids[0].tolist() == [0, *plain[0].tolist(), 7, 9]


# --- Batches ---


def test_a_batch_is_what_its_documentation_says(demos):
    source = open_data(demos)
    frames = Frames(source, 0.1, train=True)
    batch = batch_of(source, frames[np.arange(6)])
    check_batch(batch, CFG)
    with pytest.raises(ValueError, match=r"batch\['qpos'\]: got \(6, 11\), expected \(6, 12\)"):
        check_batch(batch | {"qpos": batch["qpos"][:, :11]}, CFG)


def test_labels_and_masks_arrive_as_recorded(demos):
    source = open_data(demos)
    records = source.read_episode(0)
    batch = batch_of(source, raw_batch(records[:, None]))
    with h5py.File(demos / source.episodes[0].file) as file:
        group = file[source.episodes[0].trajectory]
        assert np.array_equal(batch["pos"].numpy(), group["labels/pos"][:-1])
        for c, camera in enumerate(CAMERAS):
            masks = group[f"labels/seg/fetch_{camera}"][:-1]
            assert np.array_equal(batch["seg"][:, c].numpy() > 0, masks)
        assert np.array_equal(batch["grasp"].numpy() > 0, group["obs/extra/is_grasped"][:-1])
        assert np.array_equal(records["actions"][0], group["actions"][:8])
    assert batch["action_mask"][-1].tolist() == [1] + [0] * 7
    assert (records["actions"][-1, 1:] == 0).all()


def test_missing_labels_are_flags_and_a_zero_object_pose_is_no_label(demos, tmp_path):
    path = write_demos(tmp_path / "set_table/pick/013_apple", lengths=(9,))
    with h5py.File(path, "r+") as file:
        for key in ("extra/is_grasped", "agent/qpos", "extra/obj_pose_wrt_base"):
            del file[f"traj_0/obs/{key}"]
    source = open_data(demos)
    frames = source.read_episode(0)[0], source.read_episode(3)[0], open_data(tmp_path).read([0])[0]
    close, pick, bare = (dict(zip(LABELS, frame["has"])) for frame in frames)
    assert close == dict(pos=1, grasp=1, qpos=1, obj=0, seg=1)
    assert pick == dict(pos=0, grasp=1, qpos=1, obj=1, seg=0)
    assert bare == dict(pos=1, grasp=0, qpos=0, obj=0, seg=1)


def test_held_out_episodes_are_in_every_file_and_never_trained_on(demos):
    source = open_data(demos)
    train, val = Frames(source, 0.1, train=True), Frames(source, 0.1, train=False)
    assert not set(train.frames) & set(val.frames) and len(train) + len(val) == len(source)
    assert {source.episodes[e].file for e in val.episode_ids} == {e.file for e in source.episodes}


# --- Order ---


def test_batches_depend_neither_on_the_number_of_ranks_nor_on_a_resume():
    def batches(world, first=0, last=124, seed=7):
        orders = [StepOrder(1003, 16, seed, first, last, rank, world) for rank in range(world)]
        return [sorted(np.concatenate(parts).tolist()) for parts in zip(*orders)]

    one = batches(1)  # two epochs of 62 steps
    assert all(batches(world) == one for world in (2, 4, 8))
    assert batches(8, 0, 50) + batches(2, 50, 80) + batches(4, 80) == one
    assert all(len(np.unique(np.concatenate(one[i : i + 62]))) == 992 for i in (0, 62))
    assert one[:62] != one[62:] and batches(1, seed=1) != one


# --- The pack ---


CLOSE = "set_table/close/kitchen_counter.npy"


@pytest.fixture
def packed(demos, tmp_path):
    folder = tmp_path / "my pack"
    pack(str(demos), str(folder))
    return folder


def test_a_pack_holds_every_frame_as_the_files_do(demos, packed):
    source, packs = open_data(demos), open_data(packed)
    assert isinstance(packs, Pack) and len(packs) == len(source)
    rows = np.arange(len(source))
    assert source.read(rows).tobytes() == packs.read(rows).tobytes()
    assert np.array_equal(source.actions_of([2, 4]), packs.actions_of([2, 4]))
    assert source.episodes == packs.episodes and source.instructions == packs.instructions
    verify(str(packed))


def test_an_interrupted_pack_goes_on_and_gives_the_same_bytes(demos, packed, tmp_path, monkeypatch):
    cut, read, original = tmp_path / "cut", [], Demonstrations.read_episode

    def read_episode(self, episode):
        read.append(episode)
        if read == [0, 1, 2, 3, 4]:
            raise KeyboardInterrupt
        return original(self, episode)

    monkeypatch.setattr(Demonstrations, "read_episode", read_episode)
    with pytest.raises(KeyboardInterrupt):
        pack(str(demos), str(cut))
    assert not (cut / "pack.json").exists()
    assert [path.name for path in cut.rglob("*.np*")] == ["kitchen_counter.npy"]
    pack(str(demos), str(cut))
    assert read[5:] == [3, 4, 5]  # the finished file is not read again
    names = {str(path.relative_to(packed)) for path in packed.rglob("*.*")}
    assert names == {".lock", "pack.json", CLOSE, "set_table/pick/013_apple.npy", "summary.npz"}
    for name in names:
        assert name == ".lock" or (packed / name).read_bytes() == (cut / name).read_bytes()


def test_damaged_files_are_named_with_the_command_that_packs_them_again(demos, packed):
    path = packed / CLOSE
    flip(path)
    (packed / "summary.npz").unlink()
    again = f"Pack again: mv '{path}' '{path}.damaged' && python data"
    with pytest.raises(InputError, match=f"npz: missing or damaged, sha256 differs. {again}"):
        verify(str(packed))
    os.truncate(path, path.stat().st_size - 1)
    again += ".py pack --data DATA --out"
    with pytest.raises(InputError, match=rf"counter.npy: cannot be read .*\. {again} '{packed}'"):
        open_data(packed)
    path.unlink()
    pack(str(demos), str(packed))
    verify(str(packed))
    index = packed / "pack.json"
    write_json(index, read_json(index) | {"format": "another"})
    with pytest.raises(InputError, match=r"other records than this code reads. Pack again: mv"):
        open_data(packed)
    with pytest.raises(InputError, match=r"json: not there. Pack again: python"):
        verify(str(packed.parent))


def test_data_with_a_pack_is_read_from_it_unless_a_file_changed_since(tmp_path, capsys):
    path = write_demos(tmp_path / "set_table/close/fridge")
    pack(str(tmp_path))
    assert open_data(tmp_path, truncate=True).folder == tmp_path / "pack"
    write_demos(tmp_path / "set_table/open/fridge")
    again = f"python data.py pack --data {tmp_path} --out {tmp_path / 'pack'}$"
    with pytest.raises(InputError, match=f"pack: set_table/open/fridge.h5 in .*{again}"):
        open_data(tmp_path)
    pack(str(tmp_path))
    assert len(open_data(tmp_path).episodes) == 6
    os.utime(path)
    with pytest.raises(InputError, match=f"pack: set_table/close/fridge.h5 in .*{again}"):
        open_data(tmp_path)
    pack(str(tmp_path))
    assert "already packed" in capsys.readouterr().out and open_data(tmp_path)
    path.unlink()  # to save disk
    assert len(open_data(tmp_path).episodes) == 6


def test_a_file_of_another_content_is_packed_again_and_no_other(tmp_path, monkeypatch):
    paths = [write_demos(tmp_path / f"set_table/{name}/fridge") for name in ("close", "open")]
    pack(str(tmp_path))
    read, original = [], Demonstrations.read_episode
    spy = lambda self, episode: read.append(episode) or original(self, episode)  # noqa: E731
    monkeypatch.setattr(Demonstrations, "read_episode", spy)
    open_h5.cache_clear()
    before = paths[1].stat()
    with h5py.File(paths[1], "r+") as file:
        file["traj_0/actions"][0] = 0.5
    os.utime(paths[1], ns=(before.st_atime_ns, before.st_mtime_ns))  # as nothing had happened
    pack(str(tmp_path))
    assert read == [3, 4, 5] and (open_data(tmp_path).read([36])["actions"][0, 0] == 0.5).all()
    write_demos(tmp_path / "a/close/fridge", lengths=(2, 1))  # comes before the others
    pack(str(tmp_path))
    assert read[3:] == [0, 1]
    packed, source = open_data(tmp_path), Demonstrations(tmp_path, truncate=True)
    assert packed.read(range(75)).tobytes() == source.read(range(75)).tobytes()
    with pytest.raises(InputError, match="is --data too"):
        pack(str(tmp_path), str(tmp_path))


# --- Blocks: frames of MS-HAB's files that are inflated together ---


def test_blocks_are_the_chunk_rows_of_the_files(demos):
    source = Demonstrations(demos)
    for e, episode in enumerate(source.episodes):
        with h5py.File(demos / episode.file) as file:
            rows = file[f"{episode.trajectory}/obs/sensor_data/fetch_head/rgb"].chunks[0]
        inside = source.blocks[source.place(source.blocks)[0] == e] - source.starts[e]
        assert np.array_equal(inside, np.arange(0, episode.length, rows))


def test_an_epoch_of_blocks_has_every_frame_once_and_inflates_every_block_once(
    tmp_path, monkeypatch
):
    for i in range(4):
        write_demos(tmp_path / f"{i}/close/fridge", lengths=(12,) * 20, seed=i)
    frames = Frames(Demonstrations(tmp_path), 0.1, train=True)
    read, original = [], Demonstrations.read_block
    monkeypatch.setattr("storage.h5.READ_AHEAD", 60)
    monkeypatch.setattr("training.order.SHUFFLE_POOL", 40)
    spy = lambda self, block: read.append(block) or original(self, block)  # noqa: E731
    monkeypatch.setattr(Demonstrations, "read_block", spy)
    batches = list(StepOrder(len(frames), 8, 0, 0, len(frames) // 8, 0, 1, frames.blocks))
    for rows in batches:
        frames[rows]
    assert len(np.unique(np.concatenate(batches))) == len(frames)
    assert len(read) == len(set(read)) == len(np.unique(frames.blocks)) > 200
    # A batch mixes episodes: on average fewer than 3 of its 8 frames are of one block.
    together = [np.bincount(frames.blocks[rows]).max() for rows in batches]
    assert np.mean(together) < 3


# --- Chunks ---

MSHAB = dict(compression="gzip", compression_opts=5)
STORED = (
    MSHAB,
    MSHAB | dict(chunks=(7, 50, 48, 2)),  # chunks that do not divide the picture
    MSHAB | dict(shuffle=True),
    MSHAB | dict(fletcher32=True),
    dict(compression="lzf"),
    dict(),
)


@pytest.mark.parametrize("stored", STORED)
def test_any_rows_are_those_that_h5py_reads_and_a_damaged_chunk_is_named(stored, tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (61, 128, 128, 3), dtype=np.uint8)
    pictures[:, :64] = 7  # some of it can be compressed
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("rgb", data=pictures, **stored)
        for first, last in ((0, 61), (0, 1), (26, 52), (5, 40), (60, 61), (25, 27), (30, 30)):
            assert np.array_equal(read_rows(dataset, first, last), pictures[first:last])
        if stored == MSHAB:
            corner = (0, *dataset.chunks[1:])
            _, raw = dataset.id.read_direct_chunk(corner)
            for damaged in (raw[:50], b"?" + raw[1:]):
                dataset.id.write_direct_chunk(corner, damaged)
                with pytest.raises(OSError, match=re.escape(f"/rgb, chunk at {corner}")):
                    read_rows(dataset, 0, 5)


# --- Bad input ---


def put(array, index, value):
    array[index] = value
    return array


HEAD, HAND = "obs/sensor_data/fetch_head/rgb", "obs/sensor_data/fetch_hand"
QPOS, GRASP, SEG = "obs/agent/qpos", "obs/extra/is_grasped", "labels/seg/fetch_hand"
# Key, a change of its values (to None: the key is missing), what the message says after the key.
BAD = [
    (f"{HAND}/rgb", lambda _: None, r"is not there, expected uint8 \[10, 128, 128, 3\]"),
    (f"{HAND}/rgb", lambda x: x[:-4], r"is uint8 \[6, 128, .* for 9 elapsed_steps"),
    (f"{HAND}/depth", lambda x: x.astype(np.float32), "is float32 .* expected integer"),
    (HEAD, lambda x: x.astype(np.uint16), r"is uint16 .*, expected uint8 \["),
    (HEAD, lambda x: x[..., [0, 1, 2, 2]], r"is uint8 \[10, 128, 128, 4\], expected .* 128, 3\]"),
    ("actions", lambda x: put(x, (3, 2), np.nan), r"\[2\] is nan, expected a finite number"),
    ("actions", lambda x: x[:, :12], r"is float32 \[9, 12\].*\[9, 13\].*pd_joint_delta_pos"),
    ("labels/pos", lambda x: put(x, (4, 0), np.nan), r"\[0\] is nan"),
    ("labels/pos", lambda x: x[0, 0], r"is float32 \[\], expected float \[10, 2\]"),
    (QPOS, lambda x: x.astype(np.int64), "is int64 .* expected float"),
    (QPOS, lambda x: np.concatenate([x, x[:, :3]], 1), r"is float32 \[10, 15\], expected float"),
    (GRASP, lambda x: put(x.astype(np.float32), 2, np.nan), "is nan, expected 0 to 1"),
    (SEG, lambda _: None, r"is not there, expected bool"),
    (SEG, lambda x: x[..., None], r"is bool \[10, 128, 128, 1\], expected"),
    (SEG, lambda x: x.astype(np.float64), "is float64"),
    ("success", lambda _: ["no"] * 9, r"is object \[9\], expected number"),
    ("success", lambda _: h5py.Empty("f"), r"is float32 \[\], expected number"),
    ("actions", lambda x: put(x, (3, 2), np.inf), r"\[2\] is inf, expected a finite number"),
    (GRASP, lambda x: put(x.astype(np.float32), 2, 2), "is 2.0, expected 0 to 1"),
]


@pytest.mark.parametrize(("key", "change", "message"), BAD)
def test_bad_demonstrations_are_refused_naming_file_trajectory_and_cause(
    key, change, message, tmp_path
):
    path = write_demos(tmp_path / "set_table/close/kitchen_counter")
    with h5py.File(path, "r+") as file:
        group = file["traj_1"]
        new = change(group[key][:])
        del group[key]
        if new is not None:
            group[key] = new
    source = Demonstrations(tmp_path)
    for read in (source.read_episode, lambda episode: source.survey([episode])):
        with pytest.raises(InputError, match=rf"counter.h5, traj_1.*: {key}.*{message}"):
            read(1)
    assert len(source.read_episode(0)) == 12  # the others are still good


def test_an_h5_that_may_be_intact_is_refused_with_the_command_that_helps(tmp_path, monkeypatch):
    path = write_demos(tmp_path / "close/fridge", lengths=(2,))

    def refused(mend):
        message = rf"fridge.h5: cannot be read \(.*\). The file may be intact: {mend}"
        with pytest.raises(InputError, match=message):
            Demonstrations(tmp_path)

    with open(path) as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        refused(f"fuser -v {path} ")
    mends = {errno.EACCES: f"chmod u.r {path} ", errno.ENOLCK: "export HDF5_USE_FILE_LOCKING=FALSE"}
    for number, mend in mends.items():
        monkeypatch.setattr(h5py, "File", Mock(side_effect=OSError(number, "no")))
        refused(mend)


INVALID = (  # changes of an episode's entry in the .json
    (dict(episode_id=0), "episode_id 0 is there twice"),
    (dict(elapsed_steps=None), r"traj_1 .*: elapsed_steps is None, expected a whole number"),
    (dict(elapsed_steps=9.0), "elapsed_steps is 9.0, expected a whole number"),
    (dict(elapsed_steps=-1), "elapsed_steps is -1, expected a whole number"),
    (dict(control_mode="pd_joint_pos"), "control_mode is 'pd_joint_pos', expected pd_joint_delta"),
    (dict(instruction=None), "instruction is None, expected a sentence"),
    (dict(instruction=" "), "instruction is ' ', expected a sentence"),
)


def test_files_that_are_missing_cut_off_or_contradict_each_other_are_refused(tmp_path):
    def refused(message):
        with pytest.raises(InputError, match=message):
            Demonstrations(tmp_path)

    refused(r"no .h5 demonstrations below it\. Record some: python collect.py")
    for name, schema in (("fridge", ["a"]), ("kitchen_counter", ["b"])):
        path = write_demos(tmp_path / f"set_table/close/{name}", (9,), action_schema=schema)
    sidecar = path.with_suffix(".json")
    refused(r"kitchen_counter.h5: its action_schema \['b'\] differs")
    whole, named = sidecar.read_text(), '{"episodes": [], "qpos_names": "a"}'
    for text in (whole[:-5], "[]", '{"episodes": ["a"]}', named):
        sidecar.write_text(text)
        refused(r"kitchen_counter.json: got .*expected a JSON object with MS-HAB's")
    for change, message in INVALID:
        write_demos(path.with_suffix(""), lengths=(9, 9), entries={1: change})
        refused(f"kitchen_counter.json.*{message}")
    sidecar.unlink()
    refused(r"no kitchen_counter.json beside it")
    write_demos(path.with_suffix(""))
    os.truncate(path, path.stat().st_size // 2)
    refused(r"kitchen_counter.h5: cannot be read .*Download or record it again")


def test_an_episode_of_no_steps_and_trajectories_not_in_the_json_are_skipped_with_a_note(tmp_path):
    changes = {0: dict(control_mode=None), 1: dict(elapsed_steps=0), 2: None}
    write_demos(tmp_path / "close/fridge", lengths=(9, 9, 9), entries=changes)
    demos = Demonstrations(tmp_path, truncate=True)
    assert [(episode.trajectory, episode.length) for episode in demos.episodes] == [("traj_0", 9)]
    assert demos.instructions == ["close the fridge"] and len(demos.read_episode(0)) == 9
    noted = "\n".join(Frames(demos, 0.1, train=True).remarks)
    assert "fridge.h5: 1 episodes of no steps, skipped" in noted
    assert "fridge.h5: one episode, none is held out" in noted
    assert "fridge.h5: 1 trajectories not in its .json, skipped" in noted
