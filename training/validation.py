"""Losses and metrics on held-out frames, each metric beside a constant predictor's.

The constant is the held-out frames' own mean or majority, so a model that beats it clearly uses the
pictures. Metrics of labels that the data lack are left out.
"""

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from config import CAMERAS, CHUNK, TrainConfig
from data import ActionStats, Frames, make_batch
from decoders import label_counts
from flow_head import draw_noise
from model import AuxVLA, actions_to_bins
from training.ranks import autocast

# A metric: the model's, the best constant's, unit, whether higher is better.
Metric = tuple[float | Tensor, float | Tensor, str, bool]


@torch.no_grad()
def validate(
    model: AuxVLA, frames: Frames, stats: ActionStats, prompts: tuple[Tensor, ...],
    cfg: TrainConfig,
) -> tuple[dict, dict]:  # fmt: skip
    """Losses {name: mean} and metrics {name: dict} over cfg.val_frames of the held-out frames."""
    device = prompts[0].device
    model.eval()
    rows = np.unique(np.linspace(0, len(frames) - 1, min(cfg.val_frames, len(frames))).astype(int))
    sums, labels = defaultdict(float), defaultdict(float)  # of each loss, and their number
    seen: dict[str, list[Tensor]] = defaultdict(list)
    generator = torch.Generator().manual_seed(cfg.seed)
    for part in np.array_split(rows, -(-len(rows) // cfg.micro_batch)):
        batch = make_batch(frames[part], stats, prompts, cfg.model)
        counts = label_counts(batch)
        noise, t = draw_noise(len(batch["images"]), CHUNK, generator)
        batch |= {"noise": noise.to(device), "t": t.to(device)}
        with autocast(device):
            for name, loss in model(batch, cfg.stage).items():
                sums[name] += loss.item() * counts[name].item()
                labels[name] += counts[name].item()
            logits, predictions = model.teacher_forced(batch)
            chunk = model.act(batch, batch["noise"])[0] if cfg.stage == 3 else None
        keep = {"bins": logits.argmax(-1), "true_bins": actions_to_bins(batch["actions"][:, 0])}
        if cfg.stage == 3:
            keep |= {"chunk": chunk, "true_chunk": batch["actions"], "mask": batch["action_mask"]}
        for name, value in predictions.items():
            keep |= {f"pred_{name}": value, name: batch[name], f"has_{name}": batch[f"has_{name}"]}
        for key, value in keep.items():
            seen[key].append(value.cpu())
    model.train_stage(cfg.stage)
    losses = {name: total / labels[name] for name, total in sums.items() if labels[name]}
    return losses, metrics({key: torch.cat(values) for key, values in seen.items()}, stats)


def metrics(seen: dict[str, Tensor], stats: ActionStats) -> dict[str, dict]:
    """{name: ours, trivial, unit, higher_is_better, n, and of labels: are they all equal}."""
    moving = torch.tensor(stats.high) > torch.tensor(stats.low)
    n, tokens = len(seen["bins"]), (seen["bins"][:, moving], seen["true_bins"][:, moving])
    out = to_figures(token_accuracy(*tokens), n=n)
    if "chunk" in seen:
        mask = seen["mask"].bool()
        out |= to_figures(action_error(seen["chunk"][mask], seen["true_chunk"][mask]), n=n)
    for name, function in METRICS.items():
        if f"pred_{name}" in seen and seen[f"has_{name}"].any():
            has = seen[f"has_{name}"]
            true = seen[name][has]
            constant = bool((true == true[0]).all())
            measured = function(seen[f"pred_{name}"][has], true)
            out |= to_figures(measured, n=len(true), constant=constant)
    return out


def to_figures(measured: dict[str, Metric], **more) -> dict[str, dict]:
    return {
        name: dict(ours=float(ours), trivial=float(trivial), unit=unit, higher_is_better=higher)
        | more
        for name, (ours, trivial, unit, higher) in measured.items()
    }


def token_accuracy(pred: Tensor, true: Tensor) -> dict[str, Metric]:
    """Share of correct tokens, given the true earlier ones; [n, dimensions that move]."""
    ours, trivial = ((guess == true).float().mean() for guess in (pred, true.mode(dim=0).values))
    return {"action_token_accuracy": (ours, trivial, "share", True)}


def action_error(pred: Tensor, true: Tensor) -> dict[str, Metric]:
    """Mean absolute error of the flow head's normalised actions, [n, 13]."""
    ours, trivial = ((guess - true).abs().mean() for guess in (pred, true.mean(0)))
    return {"flow_action_error": (ours, trivial, "of [-1, 1]", False)}


def position_error(pred: Tensor, true: Tensor) -> dict[str, Metric]:
    ours, trivial = ((guess - true).norm(dim=-1).mean() * 100 for guess in (pred, true.mean(0)))
    return {"base_position_error": (ours, trivial, "cm", False)}


def grasp_accuracy(pred: Tensor, true: Tensor) -> dict[str, Metric]:
    ours, share = ((pred > 0.5) == (true > 0.5)).float().mean(), (true > 0.5).float().mean()
    return {"grasp_accuracy": (ours, max(share, 1 - share), "share", True)}


def qpos_r2(pred: Tensor, true: Tensor) -> dict[str, Metric]:
    """R2 pooled over the joints: 1 - summed squared error / summed variance."""
    ours = 1 - (pred - true).square().sum() / (true - true.mean(0)).square().sum().clamp(min=1e-12)
    return {"qpos_r2": (ours, 0.0, "R2", True)}


def object_error(pred: Tensor, true: Tensor) -> dict[str, Metric]:
    quaternion = F.normalize(true[:, 3:], dim=-1)
    # The mean rotation is the leading eigenvector of sum q q^T, which ignores the sign of q.
    mean = torch.linalg.eigh(quaternion.T @ quaternion).eigenvectors[:, -1]
    positions, rotations = (pred[:, :3], true[:, :3].mean(0)), (pred[:, 3:], mean)
    distances = [(guess - true[:, :3]).norm(dim=-1).mean() * 100 for guess in positions]
    cosines = [(guess * quaternion).sum(-1).abs().clamp(max=1) for guess in rotations]
    angles = [torch.rad2deg(2 * cosine.acos()).mean() for cosine in cosines]
    angle = (*angles, "degrees", False)
    return {"object_distance": (*distances, "cm", False), "object_angle": angle}


def mask_iou(pred: Tensor, true: Tensor) -> dict[str, Metric]:
    """Intersection over union of all held-out pixels, per camera.

    The constant is one mask for all frames: the pixels in which the target appears more often than
    a threshold, the best of twenty.
    """
    out = {}
    for camera in range(true.shape[1]):
        target = true[:, camera] > 0.5  # [n, 128, 128]
        often = target.float().mean(0)  # [128, 128]
        constants = [often > share for share in torch.linspace(0, often.max(), 21)[:-1]]
        trivial = max(iou(mask.expand_as(target), target) for mask in constants)
        name = f"mask_iou_{CAMERAS[camera] if true.shape[1] > 1 else 'camera'}"
        out[name] = (iou(pred[:, camera] > 0.5, target), trivial, "IoU", True)
    return out


def iou(one: Tensor, other: Tensor) -> float:
    """Intersection over union of two stacks of masks, bool."""
    return float((one & other).sum() / (one | other).sum().clamp(min=1))


METRICS = {
    "pos": position_error, "grasp": grasp_accuracy, "qpos": qpos_r2, "obj": object_error,
    "seg": mask_iou,
}  # fmt: skip
