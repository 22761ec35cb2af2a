"""The layout stays what it is: imports go one way, every file is known, the sums hold."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the bottom up: a file imports files of its own layer or of those above it in this list.
LAYERS = (
    "config",
    "storage/terminal",
    "paper",
    "backbone",
    "decoders flow_head",
    "model",
    "storage/files storage/results storage/trajectory storage/weight_names",
    "storage/download storage/recording storage/tokenizer storage/h5",
    "storage/checkpoint storage/pretrained storage/pack",
    "data",
    "training/flags training/ranks training/order",
    "training/log training/validation training/memory training/start",
    "policy",
    "simulation/assets simulation/plans simulation/workers simulation/film simulation/rl_expert",
    "simulation/env",
    "household/furniture household/robot household/episodes household/expert",
    "simulation/chain",
    "simulation/episodes simulation/demonstrations household/assets",
    "train eval collect",
    "tools/*",
)
TOP_LIMIT, ALL_LIMIT, TESTS_LIMIT, FILE_LIMIT = 2690, 10284, 7502, 350

SOURCES = {
    str(path.relative_to(ROOT).with_suffix("")): path
    for path in sorted(ROOT.rglob("*.py"))
    if path.relative_to(ROOT).parts[0] not in ("tests", ".venv", "runs") and path.stem != "__init__"
}


LAYER_OF = {name: i for i, layer in enumerate(LAYERS) for name in layer.split()}
LAYER_OF |= dict.fromkeys((n for n in SOURCES if n.startswith("tools/")), LAYER_OF.pop("tools/*"))


def imports_of(path: Path) -> set[str]:
    """Files of the project that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.replace(".", "/") for name in names} & set(SOURCES)


def test_every_file_has_a_layer():
    assert set(LAYER_OF) == set(SOURCES)


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_imports_lower_layers_or_its_own_and_nothing_imports_tools(name):
    assert not [other for other in imports_of(SOURCES[name]) if LAYER_OF[other] > LAYER_OF[name]]


def test_no_imports_form_a_cycle():
    left = {name: imports_of(path) for name, path in SOURCES.items()}
    while free := {name for name, needs in left.items() if not needs & set(left)}:
        left = {name: needs for name, needs in left.items() if name not in free}
    assert not left


def test_the_sums_of_lines_hold():
    lines = {name: path.read_text().count("\n") for name, path in SOURCES.items()}
    tests = sum(path.read_text().count("\n") for path in ROOT.glob("tests/*.py"))
    assert sum(n for name, n in lines.items() if "/" not in name) <= TOP_LIMIT
    assert sum(lines.values()) <= ALL_LIMIT and tests <= TESTS_LIMIT
    assert max(lines.values()) <= FILE_LIMIT


def test_no_pickle_is_loaded_but_by_torch_with_weights_only():
    for path in SOURCES.values():
        text = path.read_text()
        assert not re.search(r"pickle\.loads?\(|allow_pickle=True|weights_only=False", text), path
        for call in re.findall(r"torch\.load\((?:[^()]|\([^()]*\))*\)", text):
            assert "weights_only=True" in call, path
    # Prismatic's file, MS-HAB's own start poses, its released policies.
    loads = [path.name for path in SOURCES.values() if "torch.load(" in path.read_text()]
    assert sorted(loads) == ["env.py", "pretrained.py", "rl_expert.py"]
