"""What the model knows of frames it never trained on, beside the best constant predictor.

The constant is fitted to the held-out frames themselves (mean, majority), so beating it needs the
pictures. A figure without labels in the data is left out.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from config import CAMERAS, RECORDED_ACTIONS, TrainConfig
from data import ActionStats, Frames, make_batch
from flow_head import draw_noise
from model import AuxVLA, actions_to_bins, label_counts


@torch.no_grad()
def validate(
    model: AuxVLA, frames: Frames, stats: ActionStats, prompts: tuple[Tensor, Tensor],
    cfg: TrainConfig,
) -> tuple[dict, dict]:  # fmt: skip
    """Losses {name: mean} and metrics {name: `figure`} over the held-out frames."""
    device = prompts[0].device
    model.eval()
    rows = np.unique(np.linspace(0, len(frames) - 1, min(cfg.val_frames, len(frames))).astype(int))
    sums: dict[str, float] = {}
    labels: dict[str, float] = {}  # how many values each sum is of
    seen: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(cfg.seed)
    for part in np.array_split(rows, -(-len(rows) // cfg.micro_batch)):
        batch = make_batch(frames[part], stats, prompts, cfg.model)
        counts = label_counts(batch)
        noise, t = draw_noise(len(batch["images"]), RECORDED_ACTIONS, generator)
        batch |= {"noise": noise.to(device), "t": t.to(device)}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            for name, loss in model(batch, cfg.stage).items():
                sums[name] = sums.get(name, 0.0) + loss.item() * counts[name].item()
                labels[name] = labels.get(name, 0.0) + counts[name].item()
            logits, predictions = model.teacher_forced(batch)
            chunk = model.act(batch, batch["noise"])[0] if cfg.stage == 3 else None
        true = actions_to_bins(batch["actions"][:, 0], cfg.model.bins)
        keep = {"bins": logits.argmax(-1), "true_bins": true}
        if cfg.stage == 3:
            keep |= {"chunk": chunk, "true_chunk": batch["actions"], "mask": batch["action_mask"]}
        keep |= {f"pred_{name}": value for name, value in predictions.items()}
        keep |= {
            key: value for key, value in batch.items() if key.removeprefix("has_") in predictions
        }
        for key, value in keep.items():
            seen.setdefault(key, []).append(value.cpu())
    model.train_stage(cfg.stage)
    losses = {name: total / labels[name] for name, total in sums.items() if labels[name]}
    return losses, metrics({key: torch.cat(values) for key, values in seen.items()}, stats)


def metrics(seen: dict[str, Tensor], stats: ActionStats) -> dict[str, dict]:
    out = {"action_token_accuracy": action_accuracy(seen, stats)}
    if "chunk" in seen:
        out["flow_action_error"] = chunk_error(seen)
    per_label = {
        "pos": position_error, "grasp": grasp_accuracy, "qpos": qpos_r2, "obj": object_error,
        "seg": mask_iou,
    }  # fmt: skip
    for name, metric in per_label.items():
        if f"pred_{name}" in seen and seen[f"has_{name}"].any():
            has = seen[f"has_{name}"]
            true = seen[name][has]
            figures = metric(seen[f"pred_{name}"][has], true)
            constant = bool((true == true[0]).all())  # the figure then says nothing of the model
            out |= {key: value | {"constant": constant} for key, value in figures.items()}
    return out


def figure(
    ours: float | Tensor, trivial: float | Tensor, unit: str, higher_is_better: bool, n: int
) -> dict:
    """A metric of n values, and that of the best constant; of labels also `constant` (metrics)."""
    return dict(
        ours=float(ours), trivial=float(trivial), unit=unit, higher_is_better=higher_is_better, n=n
    )


def action_accuracy(seen: dict[str, Tensor], stats: ActionStats) -> dict:
    """Share of exactly right tokens, given the true earlier ones.

    Dimensions that never move in training are left out.
    """
    moving = torch.tensor(stats.high) > torch.tensor(stats.low)
    pred, true = seen["bins"][:, moving], seen["true_bins"][:, moving]
    majority = true.mode(dim=0).values
    return figure(
        (pred == true).float().mean(), (majority == true).float().mean(), "share", True, len(true)
    )


def chunk_error(seen: dict[str, Tensor]) -> dict:
    mask, true = seen["mask"].bool(), seen["true_chunk"]
    error = (seen["chunk"] - true).abs()[mask].mean()
    return figure(
        error, (true - true[mask].mean(0)).abs()[mask].mean(), "of [-1, 1]", False, len(true)
    )


def position_error(pred: Tensor, true: Tensor) -> dict:
    ours, trivial = ((guess - true).norm(dim=-1).mean() * 100 for guess in (pred, true.mean(0)))
    return {"base_position_error": figure(ours, trivial, "cm", False, len(true))}


def grasp_accuracy(pred: Tensor, true: Tensor) -> dict:
    ours, share = ((pred > 0.5) == (true > 0.5)).float().mean(), (true > 0.5).float().mean()
    return {"grasp_accuracy": figure(ours, max(share, 1 - share), "share", True, len(true))}


def qpos_r2(pred: Tensor, true: Tensor) -> dict:
    """R2 pooled over the joints: 1 - summed squared error / summed variance."""
    ours = 1 - (pred - true).square().sum() / (true - true.mean(0)).square().sum().clamp(min=1e-12)
    return {"qpos_r2": figure(ours, 0.0, "R2", True, len(true))}


def object_error(pred: Tensor, true: Tensor) -> dict:
    quaternion = F.normalize(true[:, 3:], dim=-1)
    # The mean rotation: the leading eigenvector of sum q q^T, which does not see the sign of q.
    mean = torch.linalg.eigh(quaternion.T @ quaternion).eigenvectors[:, -1]
    distance = [
        (guess - true[:, :3]).norm(dim=-1).mean() * 100
        for guess in (pred[:, :3], true[:, :3].mean(0))
    ]
    angle = [
        torch.rad2deg(2 * (guess * quaternion).sum(-1).abs().clamp(max=1).acos()).mean()
        for guess in (pred[:, 3:], mean)
    ]
    return {
        "object_distance": figure(*distance, "cm", False, len(true)),
        "object_angle": figure(*angle, "degrees", False, len(true)),
    }


def mask_iou(pred: Tensor, true: Tensor) -> dict:
    """Intersection over union of all held-out pixels, per camera.

    The constant is one mask for every frame: where the target is most often, cut at the best of
    twenty shares of the frames.
    """
    out = {}
    for camera in range(true.shape[1]):
        target = true[:, camera] > 0.5  # [n, 128, 128]
        often = target.float().mean(0)  # [128, 128]
        constants = [often > share for share in torch.linspace(0, often.max(), 21)[:-1]]
        trivial = max(overlap(mask.expand_as(target), target) for mask in constants)
        name = f"mask_iou_{CAMERAS[camera] if true.shape[1] > 1 else 'camera'}"
        ours = overlap(pred[:, camera] > 0.5, target)
        out[name] = figure(ours, trivial, "IoU", True, len(target))
    return out


def overlap(one: Tensor, other: Tensor) -> float:
    """Intersection over union of two stacks of masks, bool."""
    return float((one & other).sum() / (one | other).sum().clamp(min=1))
