"""The film of one episode, drawn by `eval.py --video` in the style of Fig. 4."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import imageio.v2 as imageio
import numpy as np
from einops import repeat
from PIL import Image, ImageDraw, ImageFont

from config import CAMERAS
from data import normalize_depth

FPS = 20  # the control rate: films run in real time
VIEW, INSET, PANEL = 512, 128, 208  # pixels; h264 wants every sum to be a multiple of 16
PREDICTED, TRUE = np.array([255, 110, 0]), np.array([0, 255, 90])  # colours of masks and of text
FONT = ImageFont.load_default(13)
WRITTEN = {  # a decoder's name: the line above its numbers
    "grasp": "holds the target",
    "pos": "base x y, world (m)",
    "obj": "object x y z, base (m)",
}


def outline(mask: np.ndarray) -> np.ndarray:
    """Return the pixels just outside a mask [H, W]: an outline that hides nothing of the target."""
    padded = np.pad(mask, 1)
    grown = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return grown & ~mask


def draw_masks(rgb: np.ndarray, true: np.ndarray, predicted: np.ndarray | None) -> np.ndarray:
    """Tint the predicted mask (probability above 1/2) and outline the true one; uint8 [H, W, 3]."""
    image = rgb.astype(float)
    if predicted is not None:
        inside = predicted > 0.5
        image[inside] = 0.4 * image[inside] + 0.6 * PREDICTED
    image[outline(true)] = TRUE
    return image.astype(np.uint8)


def numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)


class View(NamedTuple):
    """What one camera sees, [128, 128]."""

    rgb: np.ndarray
    depth: np.ndarray  # as the model gets it, in 255 grey levels
    true: np.ndarray  # the target's mask
    predicted: np.ndarray | None  # probability that a pixel is the target's


class Film:
    """One episode: a view from outside, the four inputs, the predictions.

    `policy` is the learned one, whose `predictions` are drawn, or None. Insets from top to bottom:
    head depth, head RGB, hand depth, hand RGB. Orange is predicted, green is true.
    """

    obs_mode = "rgb+depth+segmentation"  # the observations that a film needs

    def __init__(self, env, policy, folder: Path, name: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.env, self.policy, self.folder, self.name = env, policy, folder, name
        self.part = folder / f"{name}.part.mp4"
        self.writer = imageio.get_writer(self.part, fps=FPS, codec="libx264", quality=7)

    def add(self, obs: dict, step: int):
        """Append the frame of one observation; call after `policy.act` on it."""
        self.writer.append_data(self.draw(obs, step))

    def save(self, success: bool):
        """Finish the film under its final name."""
        self.writer.close()
        self.part.replace(self.folder / f"{self.name}_{'success' if success else 'fail'}.mp4")

    def draw(self, obs: dict, step: int) -> np.ndarray:
        """Compose uint8 [VIEW, VIEW + INSET + PANEL, 3]."""
        # The policy looks once per chunk of actions; until then its last predictions are shown.
        predictions = {} if self.policy is None else self.policy.predictions
        views = self.views(obs, predictions)
        canvas = np.zeros((VIEW, VIEW + INSET + PANEL, 3), np.uint8)
        canvas[:, :VIEW] = Image.fromarray(self.env.third_person()).resize((VIEW, VIEW))
        insets = []
        for view in views:
            insets.append(repeat(view.depth, "h w -> h w 3"))
            insets.append(draw_masks(view.rgb, view.true, view.predicted))
        canvas[:, VIEW : VIEW + INSET] = np.concatenate(insets)
        image = Image.fromarray(canvas)
        draw = ImageDraw.Draw(image)
        lines = self.caption(step, self.true(obs), predictions)
        if any(view.predicted is not None for view in views):
            lines.append(("target: tint predicted", PREDICTED))
        for i, (text, colour) in enumerate(lines):
            place = (VIEW + INSET + 8, 8 + 17 * i)
            draw.text(place, text, fill=tuple(map(int, colour)), font=FONT)
        return np.asarray(image)

    def views(self, obs: dict, predictions: dict) -> list[View]:
        """Return the view of each camera, head and hand."""
        views = []
        for camera, mask in zip(CAMERAS, self.env.target_masks(obs), strict=True):
            data, seg = obs["sensor_data"][f"fetch_{camera}"], None
            near = normalize_depth(data["depth"][0]).cpu().numpy()  # [128, 128, 1] in (0, 1]
            if "seg" in predictions and camera in self.policy.model.cfg.cameras:
                seg = predictions["seg"][0, self.policy.model.cfg.cameras.index(camera)]
            depth = (255 * near[..., 0]).astype(np.uint8)
            views.append(View(data["rgb"][0].cpu().numpy(), depth, mask, seg))
        return views

    def true(self, obs: dict) -> dict[str, np.ndarray]:
        """Return the true values of WRITTEN; without "obj" where the subtask has no object."""
        values = {"grasp": np.ravel(obs["extra"]["is_grasped"][0]), "pos": self.env.pos}
        obj = np.asarray(obs["extra"]["obj_pose_wrt_base"][0, :3])
        return values | ({"obj": obj} if obj.any() else {})  # MS-HAB: zeros without an object

    def caption(self, step: int, true: dict, predictions: dict) -> list[tuple[str, np.ndarray]]:
        """Return the panel's lines and their colours: each prediction above its true value."""
        white = np.array([255, 255, 255])
        lines = [(self.env.instruction, white), (f"step {step}", white), ("", white)]
        for key, values in true.items():
            lines.append((WRITTEN[key], white))
            if key in predictions:
                predicted = predictions[key][0].ravel()[: len(values)]
                lines.append((f"  {numbers(predicted)}  predicted", PREDICTED))
            lines.append((f"  {numbers(values)}  true", TRUE))
        return [*lines, ("", white), ("target: outline true", TRUE)]
