"""Which checkpoints are kept, and what a bad disk or file leads to."""

import os
import re

import pytest
import torch
from processes import run

from storage import checkpoint
from training.log import Saver

SAVE = r"""
import sys
from pathlib import Path
from storage.terminal import user_errors
from storage import checkpoint
with user_errors():
    checkpoint.write(Path(sys.argv[1]), 1, {}, {}, {}, '{"token": "\u0120"}', keep=1)
    print("\u0120", sys.argv[1])
"""


def test_text_is_utf_8_whatever_the_locale(tmp_path):
    out, plain = tmp_path / "é", dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert run("-c", SAVE, out, **plain) == f"Ġ {out}\n"
    assert (checkpoint.newest(out) / "tokenizer.json").read_bytes().decode() == '{"token": "Ġ"}'


def test_any_error_of_the_saving_thread_is_told_at_once_and_ends_the_run(tmp_path, capfd):
    model, nonsense = torch.nn.Linear(2, 2), {"stage": object()}  # which JSON does not know
    saver = Saver(tmp_path, keep=1, is_main=True, step=0)
    saver.save(1, model, torch.optim.Adam(model.parameters()), nonsense, "{}")
    with pytest.raises(TypeError):
        saver.close()
    assert "warning: TypeError: " in capfd.readouterr().err and not [*tmp_path.iterdir()]


def test_the_newest_checkpoints_are_kept_and_damaged_ones_are_not_counted(tmp_path):
    weight = {"weight": torch.ones(2)}

    def save(step: int, keep: int) -> list[str]:
        checkpoint.write(tmp_path, step, weight, weight, {}, "{}", keep)
        return [folder.name[-1] for folder in checkpoint.steps_in(tmp_path)]

    assert [save(step, keep=3) for step in (1, 2, 3, 4)][-1] == ["2", "3", "4"]
    assert (tmp_path / "last").read_text() == "step-00000004"
    for step, name in ((2, "manifest.json"), (4, "model.safetensors")):
        os.truncate(tmp_path / f"step-0000000{step}" / name, 50)
    assert save(5, keep=2) == ["2", "3", "4", "5"]
    assert save(6, keep=2) == ["2", "4", "5", "6"]


def test_a_full_disk_leaves_the_older_checkpoint_whole(small_disk, capsys):
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.Adam(model.parameters())
    saver = Saver(small_disk, keep=2, is_main=True, step=0)
    saver.save(1, model, optimizer, {}, "{}")
    saver.save(2, torch.nn.Linear(1000, 1000), optimizer, {}, "{}")
    assert re.search("earlier checkpoints .* are as they were", str(saver.failed()))
    assert "warning" in capsys.readouterr().err  # training would have gone on
    assert checkpoint.newest(small_disk).name == "step-00000001"
    assert not list(small_disk.glob(".*partial"))
    saver.save(3, model, optimizer, {}, "{}")  # there is room again: the failure is made good
    saver.close()
    assert checkpoint.newest(small_disk).name == "step-00000003"
