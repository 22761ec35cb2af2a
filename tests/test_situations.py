"""Wrong input, wrong flags, odd machines: situation -> exit code and key words of the sentence."""

import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from files import write_demos
from processes import REPOSITORY, attempt, finish, start
from tiny_run import lines, train, weights

from config import InputError
from storage.checkpoint import newest, steps_in
from storage.files import dumps, sole_writer
from training.ranks import STOPS

DRAWER = "set_table/close/kitchen_counter"
TRAIN = (
    "train.py --preset tiny --steps 2 --batch-size 8 --micro-batch 8 --val-frames 8 --device cpu "
)

# --- Flags: nothing is read or written before the sentence ---

FLAGS = {  # command: exit code, words
    "train.py --lr nan": (1, "--lr nan: expected a number above 0"),
    "train.py --weights.seg inf": (1, "--weights.seg inf: expected a number, 0 or more"),
    "train.py --betas 0.9 1": (1, "--betas 1.0: expected 0 or more and less than 1"),
    "train.py --cooldown 2": (1, "--cooldown 2.0: expected 0 to 1"),
    "train.py --val-episodes -0.1": (1, "--val-episodes -0.1: expected 0 or more and less than 1"),
    "train.py --grad-clip -1": (1, "--grad-clip -1.0: expected a number, 0 or more"),
    "train.py --epochs -1 1 1": (1, "--epochs -1: expected 0 or more"),
    "train.py --log-every 0": (1, "--log-every 0: expected 1 to 2^31 - 1"),
    "train.py --steps 0": (1, "--steps 0: expected 1 to 2^31 - 1"),
    "train.py --val-frames 0": (1, "--val-frames 0: expected 1 to 2^31 - 1"),
    "train.py --workers -1": (1, "--workers -1: expected 0 or more"),
    "train.py --seed 4294967296": (1, "--seed 4294967296: expected 0 to 2^31 - 1"),
    "train.py --model.llm.width 0": (1, "--model.llm.width 0: expected 1 to 2^31 - 1"),
    "train.py --model.flow.execute 9": (1, "--model.flow.execute 9: expected 1 to 8"),
    "train.py --model.llm.heads 5": (1, "896 is not a multiple of 10"),
    "train.py --model.flow.width 65": (1, "flow.width: 65 is not a multiple of 2"),
    "train.py --model.decoders pos pos": (1, "expected each of them once"),
    "train.py --out ''": (1, "--out has an empty value: is a variable not set?"),
    "train.py --data=": (1, "--data= has an empty value"),
    "train.py --model.llm.prompt move": (1, "expected {} once, for the instruction"),
    "train.py --model.llm.vocab 9": (1, "vocab 9: expected"),
    "train.py --model.decoder.channels 8 8 8 8 8 8 8 8": (1, "expected 1 to 7 numbers"),
    "train.py --model.latents action_states --model.num-latents 50": (1, "are 13 action states"),
    "train.py --model.dino.std 0 0 0": (1, "--model.dino.std 0.0: expected a number above 0"),
    "train.py --model.dino.mean nan 0 0": (1, "--model.dino.mean nan: expected a finite number"),
    "model.py --preset small": (2, "small"),
    "train.py --tracker wandb": (1, "--tracker wandb is not installed: pip install wandb"),
    "eval.py --episodes 0": (1, "--episodes 0: expected 1 to 2^31 - 1"),
    "eval.py --video -1": (1, "--video -1: expected 0 or more"),
    "eval.py --seed -1": (1, "--seed -1: expected 0 to 2^31 - 1"),
    "collect.py --task set_table --subtask close --target fridge --max-attempts 0": (
        1, "--max-attempts 0: expected 1 to 2^31 - 1",
    ),
    "data.py download --workers 0": (1, "--workers 0: expected 1 to 2^31 - 1"),
    "household/assets.py --out a --seed -1": (1, "--seed -1: expected 0 to 2^31 - 1"),
    "tools/bench.py loader --data a --rounds 0": (1, "--rounds 0: expected 1 to 2^31 - 1"),
    "tools/serve.py --checkpoint a --port 70000": (1, "--port 70000: expected 1 to 65535"),
}  # fmt: skip


@pytest.mark.parametrize("command", FLAGS)
def test_a_flag_that_cannot_work_is_a_sentence(command, tmp_path):
    expected, words = FLAGS[command]
    code, output = attempt(*shlex.split(command), folder=tmp_path, PYTHONPATH=str(REPOSITORY))
    assert code == expected and words in " ".join(re.sub("[│╭╰─╮╯]", "", output).split())
    assert "Traceback" not in output and [p.name for p in tmp_path.iterdir()] == [".output"]


# --- Recorded files: packing, training and the doctor say the same ---


def changed(key: str, change):
    """A change of a field's values in every trajectory."""

    def apply(h5: Path) -> None:
        with h5py.File(h5, "r+") as file:
            for trajectory in file.values():
                values = change(trajectory[key][:])
                del trajectory[key]
                trajectory[key] = values

    return apply


def entry(**changes):
    return lambda h5: write_demos(h5.with_suffix(""), entries={1: changes})


def put_nan(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float32)
    values[2] = np.nan
    return values


PICTURE = "obs/sensor_data/fetch_hand/rgb"
FILES = {  # situation: its making, words; without words the file can be used
    "actions of float64": (changed("actions", lambda x: x.astype(np.float64)), None),
    "pictures that end early": (changed(PICTURE, lambda x: x[:-4]), "elapsed_steps"),
    "NaN in a label": (
        changed("obs/extra/is_grasped", put_nan), "frame 2: obs/extra/is_grasped is nan",
    ),
    "another number of steps": (entry(elapsed_steps=8), "success is bool [9], expected number [8]"),
    "no number of steps": (entry(elapsed_steps=None), "elapsed_steps is None, expected a whole"),
    "only the held-out episode is damaged": (
        lambda h5: h5py.File(h5, "r+")["traj_2"].pop(PICTURE), "traj_2: " + PICTURE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("situation", FILES)
def test_a_recorded_file_is_used_or_refused_alike_everywhere(situation, tmp_path):
    make, words = FILES[situation]
    make(write_demos(tmp_path / "data" / DRAWER))
    for command in (TRAIN, "tools/doctor.py --for train --preset tiny --data data", "data.py pack"):
        code, output = attempt(*command.split(), folder=tmp_path, PYTHONPATH=str(REPOSITORY))
        assert code == (1 if words else 0), output
        assert not words or (DRAWER in output and words in output)
        assert "Traceback" not in output


# --- A run's folder, its data and their pack, damaged in a way each ---


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """data/ with its pack, and runs/auxvla-all/stage1 with a checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("base")
    write_demos(folder / "data" / DRAWER, has_object=False)
    for command in ("data.py pack", TRAIN):
        assert attempt(*command.split(), folder=folder)[0] == 0
    return folder


def field(name: str, value: object, key: str = "traj_1") -> Callable:
    """Put a value in the place of a trajectory's field, without the pack."""

    def apply(folder: Path) -> None:
        shutil.rmtree(folder / "data/pack")
        with h5py.File(folder / f"data/{DRAWER}.h5", "r+") as file:
            del file[f"{key}/{name}"]
            file[f"{key}/{name}"] = value

    return apply


def edited(path: str, change: Callable[[dict], object]) -> Callable:
    """Change a JSON file by hand."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / path).read_bytes())
        changed = change(content)
        (folder / path).write_text(json.dumps(content if changed is None else changed))
        if path.startswith("data/set_table"):
            shutil.rmtree(folder / "data/pack")

    return apply


def link(folder: Path) -> None:
    (folder / "data/set_table/open").symlink_to(folder / "gone")


def short(path: str, size: int) -> Callable:
    return lambda folder: os.truncate(folder / path, size)


JSON, NPY, STAGE = f"data/{DRAWER}.json", f"data/pack/{DRAWER}.npy", "runs/auxvla-all/stage1"
MANIFEST = f"{STAGE}/step-00000002/manifest.json"
MORE = TRAIN.replace("--steps 2", "--steps 3")
NAN = np.full(9, np.nan, np.float32)
PACK_AGAIN = "Pack again: mv data/pack/"
DAMAGED = {  # situation: its making, command, words
    "success is NaN": (field("success", NAN), TRAIN, "success is nan, expected 0 to 1"),
    "a trajectory is a dataset": (field("", 3.0), "data.py pack", "traj_1 is one array"),
    "half a character": (
        edited(JSON, lambda c: c["episodes"][1].update(instruction="a\ud800")), TRAIN,
        "expected a sentence",
    ),
    "a link leads nowhere": (link, "data.py pack", "set_table/open: a link that leads nowhere"),
    "a pipe is named .h5": (
        lambda folder: os.mkfifo(folder / "data/a.h5"), "data.py pack", "a.h5: a link that leads",
    ),
    "an .npy has other records": (
        lambda folder: np.save(folder / NPY, np.zeros(5)), TRAIN, "(5,) records, expected 36",
    ),
    "the pack has no summary": (
        lambda folder: (folder / "data/pack/summary.npz").unlink(), TRAIN, "summary.npz: cannot be",
    ),
    "the summary is cut off": (short("data/pack/summary.npz", 99), TRAIN, "summary.npz: cannot"),
    "the summary is of less": (
        lambda folder: np.savez(folder / "data/pack/summary.npz", survey=NAN), TRAIN, "9 rows of",
    ),
    "pack.json has words for episodes": (
        edited("data/pack/pack.json", lambda c: c.update(episodes=["a"])), TRAIN, PACK_AGAIN,
    ),
    "a manifest lacks its files": (
        edited(MANIFEST, lambda c: c.pop("files") and None), MORE, "checkpoints is undamaged",
    ),
    "a manifest's step is a word": (
        edited(MANIFEST, lambda c: c.update(step="two")), MORE, "step is 'two'",
    ),
    "a manifest's model is unknown": (
        edited(MANIFEST, lambda c: c["config"]["model"].update(depth="deep")), MORE, "cannot be",
    ),
    "the log has a line of nothing": (
        lambda folder: (folder / STAGE / "log.jsonl").write_text("{}\n"), MORE, "KeyError('step')",
    ),
    "a run in the place of a stage": (
        lambda folder: None, "storage/checkpoint.py export --checkpoint runs/auxvla-all --out a",
        "is a run; give one of its stages: runs/auxvla-all/stage1",
    ),
    "data in the place of a stage": (
        lambda folder: None, "storage/checkpoint.py export --checkpoint data --out a",
        "data: no undamaged checkpoint in it",
    ),
    "another robot's data in the place of the run's": (
        lambda folder: write_demos(folder / "data" / DRAWER, seed=7), MORE, "changed since",
    ),
    "an instruction that was edited since it was packed": (
        lambda folder: os.utime(folder / JSON), MORE, "changed since",
    ),
    "a folder in the place of a file": (
        lambda folder: (folder / STAGE / "config.json").unlink()
        or (folder / STAGE / "config.json").mkdir(), MORE, "Is a directory",
    ),
    "out is a file": (
        lambda folder: (folder / "a").touch(), "data.py pack --out a", "a: File exists. Give",
    ),
}  # fmt: skip


@pytest.mark.parametrize("situation", DAMAGED)
def test_damage_is_a_sentence(situation, base, tmp_path):
    make, command, words = DAMAGED[situation]
    folder = shutil.copytree(base, tmp_path / "copy", symlinks=True)
    make(folder)
    code, output = attempt(*command.split(), folder=folder, PYTHONPATH=str(REPOSITORY))
    assert code == 1 and words in output, output
    assert "Traceback" not in output and "error: " in output


# --- Machines ---


def test_a_file_of_one_episode_trains_and_nothing_of_it_is_held_out(tmp_path):
    write_demos(tmp_path / "data" / DRAWER, lengths=(20,))
    code, output = attempt(*TRAIN.split(), folder=tmp_path)
    assert code == 0 and f"{DRAWER}.h5: one episode, none is held out" in output
    assert "20 frames, 0 held out" in output


def test_signals_to_all_processes_save_the_step_and_stop_in_one_line(tmp_path):
    """All of STOPS at once: one that is not caught would end the run or its loaders."""
    write_demos(tmp_path / "data" / DRAWER, lengths=(30, 30))
    words = shlex.split(TRAIN.replace("--steps 2", "--steps 9999 --workers 2 --log-every 5"))
    process = start(REPOSITORY / words[0], *words[1:], cwd=tmp_path, OMP_NUM_THREADS="1")
    while "5/9999" not in process.stdout.readline():
        assert process.poll() is None
    for number in STOPS:
        os.killpg(process.pid, number)
    output, stage = finish(process, code=75), tmp_path / "runs/auxvla-all/stage1"
    step = re.search(r"stopped by a signal after step (\d+), its checkpoint is in", output)[1]
    assert len(output.splitlines()) < 10 and newest(stage).name == f"step-{int(step):08d}"


def test_ctrl_c_before_the_first_step_is_one_line(tmp_path):
    script = "import os, signal; from storage.terminal import user_errors\n"
    script += "with user_errors(): os.kill(os.getpid(), signal.SIGINT)"
    assert finish(start("-c", script), code=130) == "stopped by Ctrl-C: finished files are kept\n"


def test_a_reader_that_has_gone_ends_a_program_quietly():
    for words in (["paper.py"], ["train.py", "--help"]):
        process = start(*words)
        process.stdout.close()
        assert process.wait(60) == 141 and process.stderr.read() == ""


def test_a_damaged_block_ends_a_run_whose_loaders_run(tmp_path):
    with h5py.File(write_demos(tmp_path / "data" / DRAWER), "r+") as file:
        pictures = file["traj_0/obs/sensor_data/fetch_head/rgb"]
        pictures.id.write_direct_chunk((0, 0, 0, 0), b"?")
    code, output = attempt(*TRAIN.split(), "--workers", "2", folder=tmp_path)
    assert code == 1 and output.strip().splitlines()[-1].startswith("error: data/set_table/close")


def test_a_closed_stdout_is_no_error(tmp_path):
    command = f"{sys.executable} {REPOSITORY}/paper.py >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr


def test_a_run_whose_every_step_was_skipped_fails(data, tmp_path, capsys):
    assert train(data, tmp_path / "out", "--weights.action", "1e308") == 1
    assert "2 steps in a row had a loss" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_not_saved_and_the_run_fails(data, tmp_path, capsys):
    with pytest.raises(InputError, match=r"step 1 is not saved: .* not finite.*lower --lr"):
        train(data, tmp_path / "out", steps=1, lr=1e39, warmup=0, cooldown=0)
    assert not steps_in(tmp_path / "out")
    assert (
        dumps({"loss": float("nan"), "all": [float("inf"), 1.5]})
        == '{"loss": null, "all": [null, 1.5]}'
    )


def test_without_a_clip_gradients_are_as_with_a_huge_one(data, tmp_path, capsys):
    for clip in (0, 1e9):
        train(data, tmp_path / str(clip), grad_clip=clip)
    one, other = (weights(tmp_path / str(clip)) for clip in (0, 1e9))
    assert all(value.equal(other[name]) for name, value in one.items())
    assert lines(tmp_path / "0")[0]["grad_norm"] > 0
    assert capsys.readouterr().out.count("gradients are not clipped") == 1


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with sole_writer(tmp_path):
        pass
    assert "its file system has no locks" in capsys.readouterr().err


def test_tools_start_in_every_folder(tmp_path):
    for words in ([REPOSITORY / "tools/compare.py"], ["-m", "tools.compare"]):
        help_text = finish(start(*words, "--help", cwd=tmp_path, PYTHONPATH=""))
        assert "paired difference" in help_text
