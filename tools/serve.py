"""A checkpoint as a model server of vla-eval (websocket): its clients drive with the policy.

    pip install vla-eval  # on this machine and on the robot's; nothing else needs it
    python -m tools.serve --checkpoint RUN/stage2 --port 8000

The client, in an async function:

    async with vla_eval.connection.Connection("ws://localhost:8000") as policy:
        await policy.start_episode({})
        action = await policy.act(observation)  # {"actions": float32 [13] in [-1, 1]}

An observation is MS-HAB's own, of one environment, and the instruction; other keys are ignored:

    {"sensor_data": {"fetch_head": {"rgb": uint8 [128, 128, 3], "depth": int16 [128, 128, 1] mm},
                     "fetch_hand": the same},
     "task_description": "close the kitchen drawer"}

Each connection has its own episode. Connections take turns at the one model.
"""

import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch

from config import ACTION_DIM, CAMERAS, IMAGE_SIZE, InputError, Range
from policy import Policy
from storage.terminal import cli, user_errors

try:
    from vla_eval.model_servers.base import ModelServer
    from vla_eval.model_servers.serve import serve
    from vla_eval.specs import LANGUAGE, RAW, DimSpec
except ImportError:  # main says how to install it
    ModelServer, serve = object, None


@dataclass(frozen=True)
class ServeConfig:
    checkpoint: Path  # RUN/stageN (its newest) or RUN/stageN/step-NNNNNNNN
    host: str = "127.0.0.1"  # 0.0.0.0 accepts clients from other machines
    port: Annotated[int, Range("1 to 65535", lambda n: 0 < n < 2**16)] = 8000
    device: Literal["cpu", "cuda"] | None = None  # unset: cuda if there is one
    compile: bool = False  # compile the model's blocks: a minute at the first query, then faster


def read_images(observation: dict) -> dict:
    """Return a client's images as Policy.act takes them, with a batch axis of 1."""
    sensors = {}
    for camera in (f"fetch_{name}" for name in CAMERAS):
        sensors[camera] = {}
        for name, kind, channels in (("rgb", np.uint8, 3), ("depth", np.int16, 1)):  # depth: mm
            image = np.asarray((observation.get("sensor_data", {}).get(camera) or {}).get(name))
            shape = (IMAGE_SIZE, IMAGE_SIZE, channels)
            if image.dtype != kind or image.shape != shape:
                got, expected = f"{image.dtype} {image.shape}", f"{np.dtype(kind)} {shape}"
                where = f"sensor_data/{camera}/{name}"
                raise InputError(f"{where}: got {got}, expected {expected}")
            sensors[camera][name] = torch.from_numpy(image)[None]  # [1, 128, 128, C]
    return {"sensor_data": sensors}


class AuxVLAServer(ModelServer):
    """One model for all clients. vla-eval sends the text of an exception to the client."""

    def __init__(self, cfg: ServeConfig):
        policy = Policy.from_checkpoint(cfg.checkpoint, cfg.device, cfg.compile)
        self.policy = replace(policy, predict=False)
        # vla-eval makes a context for each episode: a policy with the history of that episode.
        self.episodes: WeakKeyDictionary = WeakKeyDictionary()

    async def on_observation(self, obs: dict, ctx) -> None:
        if ctx not in self.episodes:
            self.episodes[ctx] = replace(self.policy)
            self.episodes[ctx].reset()
        action = self.episodes[ctx].act(read_images(obs), obs["task_description"])[0]  # [13]
        await ctx.send_action({"actions": action})

    def get_action_spec(self) -> dict:
        return {"actions": DimSpec("actions", ACTION_DIM, "pd_joint_delta_pos", (-1, 1))}

    def get_observation_spec(self) -> dict:
        trained = "trained on: " + "; ".join(self.policy.manifest["instructions"])
        text = replace(LANGUAGE, description=trained)
        return {"sensor_data": RAW, "task_description": text}


def main(cfg: ServeConfig) -> None:
    if serve is None:
        raise InputError("the server needs the package vla-eval: pip install vla-eval")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    serve(AuxVLAServer(cfg), cfg.host, cfg.port)


if __name__ == "__main__":
    with user_errors(), suppress(KeyboardInterrupt):
        main(cli(ServeConfig, description=__doc__))
