"""The paper's own size, in fp32 on a CPU that does nothing else; `make test` leaves it out.

    python -m pytest -rP tests/test_full_size.py  # -rP prints the figures of docs/running.md

Half an hour on two cores, 20 GB of memory, 6 GB of disk.
"""

import json
import os

import pytest
import torch
from originals import STEP, compare, released_components, save_prismatic
from processes import REPOSITORY as ROOT
from processes import finish, start
from test_flow_head import compare_with_joint_pass
from test_model import compare_alone_and_together, compare_cached_decoding, make_padded

from config import LABELS, model_config
from model import VLM, AuxVLA
from storage.pretrained import load_pretrained
from tools.reference import build_originals, save_originals

pytestmark = pytest.mark.slow
PAPER = model_config("paper")


def measure(script, *args):
    """The figures of a script in a process of its own, with the kernel's VmHWM in GB.

    This peak of memory counts the pages of mapped files.
    """
    script += """
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps(figures | {"peak_gb": int(peak.split()[1]) * 1024 / 1e9}))
"""
    process = start("-c", script, *args, PYTHONPATH=os.pathsep.join([str(ROOT), f"{ROOT}/tests"]))
    figures = json.loads(finish(process, seconds=1800))
    print({name: round(value, 1) for name, value in figures.items()})
    return figures


LOAD = """
import json, sys, time
from config import model_config
from model import AuxVLA
from storage.pretrained import load_pretrained
began = time.perf_counter()
model = AuxVLA(model_config("paper"), meta=True)
built = time.perf_counter()
load_pretrained(model.vlm, sys.argv[1])
figures = {"build_s": built - began, "load_s": time.perf_counter() - built}
"""


def test_a_prismatic_file_of_5_gb_loads_within_a_minute_and_12_gb(tmp_path):
    components = released_components(lambda shape: torch.randn(shape) * 0.02)
    path = save_prismatic(components, tmp_path / "prism") / STEP
    del components
    assert path.stat().st_size > 5e9
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk, not from the cache
    os.close(descriptor)
    figures = measure(LOAD, tmp_path / "prism")
    path.unlink()
    # From nothing to the filled model; the file is read twice, once for its sha256.
    assert figures["build_s"] + figures["load_s"] <= 60 and figures["peak_gb"] <= 12


ONE_STEP = """
import json, time, torch
from test_model import AuxVLA, make_batch, model_config
cfg = model_config("paper")
model = AuxVLA(cfg)
parameters = model.train_stage(2)
began = time.perf_counter()
losses = model(make_batch(1, cfg=cfg), 2)
forward = time.perf_counter()
sum(losses.values()).backward()
figures = {"forward_s": forward - began, "backward_s": time.perf_counter() - forward}
figures |= {name: loss.item() for name, loss in losses.items()}
assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
"""


def test_one_stage_2_step_with_all_five_decoders_runs():
    figures = measure(ONE_STEP)
    assert all(0 < figures[name] < 100 for name in ("action", *LABELS))


def test_the_hub_models_give_the_features_and_logits_of_transformers(tmp_path):
    torch.manual_seed(0)
    originals = build_originals(PAPER, dino_image_size=518)
    save_originals(originals, tmp_path)
    vlm = VLM(PAPER).eval()
    load_pretrained(vlm, str(tmp_path))
    for path in tmp_path.glob("*/model.safetensors"):
        path.unlink()
    compare(vlm, originals, PAPER, tolerance=1e-5)


def test_the_exact_relations_of_the_tiny_model_hold():
    """Cached decoding and one pass, a frame alone and in a batch, the expert and a joint pass."""
    torch.manual_seed(0)
    model = AuxVLA(PAPER, flow_head=True).eval()
    compare_cached_decoding(model, make_padded(2, cfg=PAPER), tolerance=1e-5)
    compare_alone_and_together(model, make_padded(2, cfg=PAPER), tolerance=1e-5)
    padded = {key: value[1:] for key, value in make_padded(2, cfg=PAPER).items()}
    compare_with_joint_pass(model, padded, tolerance=1e-5)
