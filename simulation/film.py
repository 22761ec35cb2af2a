"""The film of one episode, for `eval.py --video`, in the style of Fig. 4."""

from collections.abc import Sequence
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
from einops import repeat
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_dilation

from config import CAMERAS
from data import normalize_depth

FPS = 20  # the control rate: films run in real time
VIEW, INSET, PANEL = 512, 128, 208  # pixels; imageio resizes sides that are no multiples of 16
PREDICTED, TRUE = (255, 110, 0), (0, 255, 90)  # colours of masks and of text
WHITE = (255, 255, 255)
FONT = ImageFont.load_default(13)
CAPTIONS = {  # a decoder's name: the line above its numbers
    "grasp": "holds the target",
    "pos": "base x y, world (m)",
    "obj": "object x y z, base (m)",
}


def outline(mask: np.ndarray) -> np.ndarray:
    """Return the pixels just outside a mask [H, W]; outlining these hides nothing of the target."""
    return binary_dilation(mask) & ~mask


def draw_masks(rgb: np.ndarray, true: np.ndarray, predicted: np.ndarray | None) -> np.ndarray:
    """Tint the predicted mask (probability above 1/2) and outline the true one; uint8 [H, W, 3]."""
    image = rgb.astype(float)
    if predicted is not None:
        inside = predicted > 0.5
        image[inside] = 0.4 * image[inside] + 0.6 * np.array(PREDICTED)
    image[outline(true)] = TRUE
    return image.astype(np.uint8)


class Film:
    """One episode: a view from outside, the four inputs, the predictions.

    Orange is predicted, green is true. `policy` is the learned policy, or None. Insets from top to
    bottom: head depth, head RGB, hand depth, hand RGB.
    """

    def __init__(self, envs, policy, folder: Path, name: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.envs, self.policy, self.folder, self.name = envs, policy, folder, name
        self.unfinished = folder / f"{name}.part.mp4"
        self.writer = imageio.get_writer(self.unfinished, fps=FPS, codec="libx264", quality=7)

    def add(self, obs: dict, step: int | None) -> None:
        """Append an observation's frame, after `policy.act` on it. Step None: the expert drives."""
        self.writer.append_data(self.draw(obs, step))

    def save(self, success: bool) -> None:
        """Finish the film under its final name."""
        self.writer.close()
        result = "success" if success else "fail"
        self.unfinished.replace(self.folder / f"{self.name}_{result}.mp4")

    def draw(self, obs: dict, step: int | None) -> np.ndarray:
        """Compose uint8 [VIEW, VIEW + INSET + PANEL, 3]."""
        # A policy predicts once per chunk of actions: until the next chunk these stay the same.
        predictions = {} if None in (step, self.policy) else self.policy.predictions
        canvas = np.zeros((VIEW, VIEW + INSET + PANEL, 3), np.uint8)
        canvas[:, :VIEW] = Image.fromarray(self.envs.third_person()).resize((VIEW, VIEW))
        canvas[:, VIEW : VIEW + INSET] = np.concatenate(self.insets(obs, predictions))
        image = Image.fromarray(canvas)
        draw = ImageDraw.Draw(image)
        for i, (text, colour) in enumerate(self.lines(step, self.true(obs), predictions)):
            place = (VIEW + INSET + 8, 8 + 17 * i)
            draw.text(place, text, fill=colour, font=FONT)
        return np.asarray(image)

    def insets(self, obs: dict, predictions: dict) -> list[np.ndarray]:
        """Return each camera's depth as the model reads it and its RGB, uint8 [128, 128, 3]."""
        images = []
        for camera, mask in zip(CAMERAS, self.envs.masks(obs)[0], strict=True):
            data, predicted = obs["sensor_data"][f"fetch_{camera}"], None
            depth = normalize_depth(data["depth"][0]).cpu().numpy()  # [128, 128, 1] in (0, 1]
            if "seg" in predictions and camera in self.policy.model.cfg.cameras:
                predicted = predictions["seg"][0, self.policy.model.cfg.cameras.index(camera)]
            images.append(repeat((255 * depth).astype(np.uint8), "h w 1 -> h w 3"))
            images.append(draw_masks(data["rgb"][0].cpu().numpy(), mask, predicted))
        return images

    def true(self, obs: dict) -> dict[str, np.ndarray]:
        """Return the true values of CAPTIONS, without "obj" if the subtask has no object."""
        grasp = np.ravel(obs["extra"]["is_grasped"][0])
        values = {"grasp": grasp, "pos": self.envs.positions[0]}
        obj = np.asarray(obs["extra"]["obj_pose_wrt_base"][0, :3])
        return values | ({"obj": obj} if obj.any() else {})  # MS-HAB: zeros without an object

    def lines(self, step: int | None, true: dict, predictions: dict) -> list[tuple[str, tuple]]:
        """Return the panel's lines and their colours: each prediction above its true value."""

        def add(values: Sequence[float], kind: str, colour: tuple) -> None:
            numbers = " ".join(f"{value:.2f}" for value in values)
            lines.append((f"  {numbers}  {kind}", colour))

        title = "the expert drives" if step is None else f"step {step}"
        lines = [(self.envs.instructions[0], WHITE), (title, WHITE), ("", WHITE)]
        for key, values in true.items():
            lines.append((CAPTIONS[key], WHITE))
            if key in predictions:
                add(predictions[key][0].ravel()[: len(values)], "predicted", PREDICTED)
            add(values, "true", TRUE)
        lines += [("", WHITE), ("target: outline true", TRUE)]
        if "seg" in predictions:
            lines.append(("target: tint predicted", PREDICTED))
        return lines
