"""What `eval.py --video` draws with: an episode's film, and what the page's slider shows of it."""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import imageio.v2 as imageio
import numpy as np
from einops import repeat
from PIL import Image, ImageDraw, ImageFont

from config import CAMERAS
from data import normalize_depth
from durable import write

FPS = 20  # the control rate: films run in real time
VIEW, INSET, PANEL = 512, 128, 208  # pixels; all sums are multiples of 16, as h264 wants them
PREDICTED, TRUE = np.array([255, 110, 0]), np.array([0, 255, 90])  # colours of masks and of text
FONT = ImageFont.load_default(13)
WRITTEN = {
    "grasp": "holds the target",
    "pos": "base x y, world (m)",
    "obj": "object x y z, base (m)",
}  # into films


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


def webp(picture: np.ndarray) -> str:
    """A picture, uint8 [H, W] or [H, W, 3], as WebP in base64."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "WEBP", quality=80)
    return base64.b64encode(file.getvalue()).decode()


def layer(mask: np.ndarray, colour: np.ndarray, alpha: int) -> str:
    """A mask [H, W] as PNG in base64, transparent but for its pixels."""
    file, picture = io.BytesIO(), Image.fromarray(mask.astype(np.uint8), "P")
    picture.putpalette([0, 0, 0, *colour.tolist()])
    picture.save(file, "PNG", transparency=bytes([0, alpha]), optimize=True, bits=1)
    return base64.b64encode(file.getvalue()).decode()


class View(NamedTuple):
    """What one camera sees, [128, 128]; `depth` as the model gets it, in 255 grey levels."""

    rgb: np.ndarray
    depth: np.ndarray
    true: np.ndarray
    predicted: np.ndarray | None  # probability

    def pictures(self) -> dict[str, str]:
        """For the page: the inputs, and a layer for each mask."""
        shown = {"rgb": webp(self.rgb), "depth": webp(self.depth)}
        shown["true"] = layer(outline(self.true), TRUE, 255)
        if self.predicted is not None:
            shown["predicted"] = layer(self.predicted > 0.5, PREDICTED, 150)
        return shown


class Film:
    """One episode in the style of Fig. 4: a view from outside, the four inputs, the predictions.

    `policy` is the learned one, whose `predictions` are drawn, or None. Insets from top to bottom:
    head depth, head RGB, hand depth, hand RGB. Orange is predicted, green is true. Beside the mp4,
    NAME.json has the inputs, masks and numbers of every step: what the slider of the page shows.
    """

    obs_mode = "rgb+depth+segmentation"  # what it draws

    def __init__(self, env, policy, folder: Path, name: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.env, self.policy, self.folder, self.name = env, policy, folder, name
        self.part = folder / f"{name}.part.mp4"
        self.writer = imageio.get_writer(self.part, fps=FPS, codec="libx264", quality=7)
        self.steps: list[dict] = []

    def add(self, obs: dict, step: int):
        """Draw one observation; call after `policy.act` on it."""
        # Within a chunk of actions the policy does not look: its predictions are the chunk's first.
        predictions = {} if self.policy is None else self.policy.predictions
        views, true = self.views(obs, predictions), self.true(obs)
        guesses = {
            key: predictions[key][0].ravel()[: len(value)]
            for key, value in true.items()
            if key in predictions
        }
        self.writer.append_data(self.frame(views, step, true, guesses))
        pictures = {
            f"{camera}_{name}": picture
            for camera, view in views.items()
            for name, picture in view.pictures().items()
        }
        told = {"true": true, "predicted": guesses}
        rounded = {
            which: {key: [round(float(x), 4) for x in each] for key, each in values.items()}
            for which, values in told.items()
        }
        self.steps.append({"step": step, "pictures": pictures} | rounded)

    def save(self, success: bool):
        """Finish both files under their final names."""
        name = f"{self.name}_{'success' if success else 'fail'}"
        about = {"instruction": self.env.instruction, "success": success}
        about |= {"qpos_names": self.env.qpos_names, "steps": self.steps}
        write(self.folder / f"{name}.json", json.dumps(about).encode())
        self.writer.close()
        self.part.replace(self.folder / f"{name}.mp4")

    def views(self, obs: dict, predictions: dict) -> dict[str, View]:
        views = {}
        for camera, mask in zip(CAMERAS, self.env.target_masks(obs), strict=True):
            data, seg = obs["sensor_data"][f"fetch_{camera}"], None
            near = normalize_depth(data["depth"][0]).cpu().numpy()  # [128, 128, 1] in (0, 1]
            if "seg" in predictions and camera in self.policy.model.cfg.cameras:
                seg = predictions["seg"][0, self.policy.model.cfg.cameras.index(camera)]
            depth = (255 * near[..., 0]).astype(np.uint8)
            views[camera] = View(data["rgb"][0].cpu().numpy(), depth, mask, seg)
        return views

    def true(self, obs: dict) -> dict[str, np.ndarray]:
        """What the decoders are to read, by their names."""
        obj = obs["extra"]["obj_pose_wrt_base"][0, :3]
        quantities = {
            "grasp": obs["extra"]["is_grasped"][0],
            "pos": self.env.pos,
            "obj": obj if obj.any() else (),  # MS-HAB writes zeros where a subtask has no object
            "qpos": obs["agent"]["qpos"][0],
        }
        flat = {key: np.asarray(value, float).ravel() for key, value in quantities.items()}
        return {key: value for key, value in flat.items() if len(value)}

    def frame(self, views: dict[str, View], step: int, true: dict, guesses: dict) -> np.ndarray:
        """Compose uint8 [VIEW, VIEW + INSET + PANEL, 3]."""
        canvas = np.zeros((VIEW, VIEW + INSET + PANEL, 3), np.uint8)
        canvas[:, :VIEW] = Image.fromarray(self.env.third_person()).resize((VIEW, VIEW))
        insets = []
        for view in views.values():
            insets.append(repeat(view.depth, "h w -> h w 3"))
            insets.append(draw_masks(view.rgb, view.true, view.predicted))
        canvas[:, VIEW : VIEW + INSET] = np.concatenate(insets)
        image = Image.fromarray(canvas)
        has_mask = any(view.predicted is not None for view in views.values())
        self.caption(ImageDraw.Draw(image), step, true, guesses, has_mask)
        return np.asarray(image)

    def caption(
        self, draw: ImageDraw.ImageDraw, step: int, true: dict, guesses: dict, has_mask: bool
    ):
        """Write every predicted quantity above its true value."""
        lines = [(self.env.instruction, "white"), (f"step {step}", "white"), ("", "white")]
        for key, title in WRITTEN.items():
            if key not in true:
                continue
            lines.append((title, "white"))
            if key in guesses:
                lines.append((f"  {numbers(guesses[key])}  predicted", tuple(PREDICTED)))
            lines.append((f"  {numbers(true[key])}  true", tuple(TRUE)))
        lines += [("", "white"), ("target: outline true", tuple(TRUE))]
        if has_mask:
            lines.append(("target: tint predicted", tuple(PREDICTED)))
        for i, (text, colour) in enumerate(lines):
            draw.text((VIEW + INSET + 8, 8 + 17 * i), text, fill=colour, font=FONT)
