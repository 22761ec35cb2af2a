"""gpu_check measures everything at tiny size on a CPU, and fails when a GPU test does."""

import json

import pytest
import torch

from tools import gpu_check


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Runs gpu_check on tests of one line, without compiling; returns the JSON and the table."""
    monkeypatch.setattr(gpu_check, "TESTS", tmp_path)
    out = tmp_path / "figures.json"

    def run(test: str, capsys) -> tuple[dict, str]:
        (tmp_path / "test_it.py").write_text(f"import pytest\n@pytest.mark.gpu\ndef test(): {test}")
        with torch.compiler.set_stance("force_eager"):
            gpu_check.main(out, preset="tiny", rounds=1)
        return json.loads(out.read_text()), capsys.readouterr().out

    return run


def test_every_figure_of_the_table_is_measured(check, capsys):
    result, printed = check("pass", capsys)
    figures = result["figures"]
    assert {"device", "torch", "commit", "date"} == result["about"].keys()
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
    with pytest.raises(SystemExit, match="a GPU test failed"):
        check("assert False", capsys)
    assert "| out of memory" in capsys.readouterr().out


def test_after_its_time_is_up_nothing_is_measured(check, capsys, monkeypatch):
    monkeypatch.setattr(gpu_check, "LIMIT", 0)
    result, _ = check("pass", capsys)
    assert {c["missing"] for of in result["figures"].values() for c in of.values()} == {
        "no time left"
    }
