"""gpu_check measures everything at tiny size on a CPU, and fails when a GPU test does."""

import json
from contextlib import nullcontext

import pytest
import torch

from tools import gpu_check


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Runs gpu_check on a test of one line, without compiling; the figures that it has written."""
    monkeypatch.setattr(gpu_check, "TESTS", tmp_path)
    out = tmp_path / "new/figures.json"

    def run(test: str = "pass", raises=None) -> dict:
        (tmp_path / "test_it.py").write_text(f"import pytest\n@pytest.mark.gpu\ndef test(): {test}")
        with torch.compiler.set_stance("force_eager"), raises or nullcontext():
            gpu_check.main(out, preset="tiny", rounds=1)
        return json.loads(out.read_text())["figures"]

    return run


def test_every_figure_of_the_table_is_measured(check, capsys):
    figures, printed = check(), capsys.readouterr().out
    training = [row for row in figures if row.startswith("training")]
    assert len(training) == 3 and len(figures) == 9
    for row, of in figures.items():
        assert all(figure["median"] > 0 for figure in of.values())
        assert [*of] == ["ours", "compiled", "transformers"][: len(of)] and len(of) >= 2
        assert printed.count(f"| {row}") == 1
    for row in training:
        assert figures[row]["ours"]["mfu"] > 0 and figures[row]["ours"]["plan"] > 0


def test_a_gpu_test_that_fails_and_a_gpu_that_is_too_small_are_told(check, capsys, monkeypatch):
    def too_large(*_):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(gpu_check, "measure_step", too_large)
    monkeypatch.setattr(gpu_check, "acting", lambda *_: [])
    check("assert False", pytest.raises(SystemExit, match="is written, but pytest ended with 1"))
    assert "| out of memory" in capsys.readouterr().out


def test_killed_out_of_time_and_without_a_compiler_it_leaves_what_it_has(check, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(gpu_check, "acting", killed)
    monkeypatch.setattr(gpu_check, "LIMIT", 0)
    monkeypatch.setattr(gpu_check, "missing_to_compile", lambda kind: "g++")
    figures = [*check(raises=pytest.raises(KeyboardInterrupt)).values()]
    assert [[*of] for of in figures] == [["ours", "transformers"], ["ours"], ["ours"]]
    assert figures[0]["ours"] == {"missing": "no time left"}


def test_a_folder_that_cannot_be_written_to_is_named_before_the_tests(tmp_path, monkeypatch):
    monkeypatch.delattr(gpu_check, "subprocess")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        gpu_check.main(tmp_path / "file/figures.json", preset="tiny")
