"""A checkpoint behind vla-eval's websocket protocol: its clients drive with the policy.

    pip install vla-eval  # here and where the robot is; nothing else needs it
    python -m tools.serve --checkpoint RUN/stage2 --port 8000

The client, in an async function:

    async with vla_eval.connection.Connection("ws://localhost:8000") as policy:
        await policy.start_episode({})
        action = await policy.act(observation)  # {"actions": float32 [13] in [-1, 1]}

An observation is MS-HAB's own, of one environment, and the instruction; other keys are ignored:

    {"sensor_data": {"fetch_head": {"rgb": uint8 [128, 128, 3], "depth": int16 [128, 128, 1] mm},
                     "fetch_hand": the same},
     "task_description": "close the kitchen drawer"}

Each connection has its own episode; several at once take turns at the model.
"""

import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
import tyro

from config import ACTION_DIM, CAMERAS, IMAGE_SIZE, InputError, user_errors
from policy import Policy

try:
    from vla_eval.model_servers.base import ModelServer
    from vla_eval.model_servers.serve import serve
    from vla_eval.specs import LANGUAGE, RAW, DimSpec
except ImportError:  # main says how to install it
    ModelServer, serve = object, None

PICTURES = {
    "rgb": (np.uint8, (IMAGE_SIZE, IMAGE_SIZE, 3)),
    "depth": (np.int16, (IMAGE_SIZE, IMAGE_SIZE, 1)),  # millimetres
}


@dataclass(frozen=True)
class ServeConfig:
    checkpoint: Path  # RUN/stageN (its newest) or RUN/stageN/step-NNNNNNNN
    host: str = "127.0.0.1"  # 0.0.0.0 lets other machines in, whoever they are
    port: int = 8000
    device: Literal["cpu", "cuda"] | None = None  # default: cuda if there is one
    any_instruction: bool = False  # also those that the checkpoint was not trained on


def cameras_of(observation: dict) -> dict:
    """An observation for Policy.act, B = 1. Raises InputError, naming the key."""
    sensors = {}
    for camera in (f"fetch_{camera}" for camera in CAMERAS):
        sensors[camera] = {}
        for name, (dtype, shape) in PICTURES.items():
            try:
                got = observation["sensor_data"][camera][name]
            except (KeyError, TypeError):  # a dict without the key, or no dict
                got = None
            if getattr(got, "dtype", None) != dtype or got.shape != shape:
                shown = f"{got.dtype} {list(got.shape)}" if hasattr(got, "dtype") else repr(got)
                raise InputError(
                    f"observation, sensor_data/{camera}/{name}: got {shown}, expected an array "
                    f"{np.dtype(dtype)} {list(shape)}"
                )
            sensors[camera][name] = torch.from_numpy(got)[None]
    return {"sensor_data": sensors}


class AuxVLAServer(ModelServer):
    """One model for all clients. vla-eval answers an observation that raises with the error."""

    def __init__(self, cfg: ServeConfig):
        self.policy = replace(Policy.from_checkpoint(cfg.checkpoint, cfg.device), predict=False)
        self.known = None if cfg.any_instruction else self.policy.manifest["instructions"]
        # vla-eval makes a context for each episode of each connection.
        self.episodes: WeakKeyDictionary = WeakKeyDictionary()

    async def on_observation(self, obs: dict, ctx) -> None:
        """Answer with the next action. Raises InputError for what cannot be acted on."""
        text = obs.get("task_description")
        if not isinstance(text, str) or (self.known and text not in self.known):
            raise InputError(
                f"observation, task_description: got {text!r}, expected one of {self.known}; "
                "tools.serve --any-instruction takes every text"
            )
        if ctx not in self.episodes:
            self.episodes[ctx] = replace(self.policy)
            self.episodes[ctx].reset()
        action = self.episodes[ctx].act(cameras_of(obs), text)[0]
        await ctx.send_action({"actions": action})

    def get_action_spec(self) -> dict:
        parts = self.policy.manifest["action_schema"] or ()
        names = ", ".join(f"{part['name']} ({part['unit']})" for part in parts)
        format_ = "pd_joint_delta_pos"
        return {"actions": DimSpec("actions", ACTION_DIM, format_, (-1, 1), description=names)}

    def get_observation_spec(self) -> dict:
        known = "; ".join(self.policy.manifest["instructions"])
        return {"sensor_data": RAW, "task_description": replace(LANGUAGE, description=known)}


def main(cfg: ServeConfig) -> None:
    if serve is None:
        raise InputError("serving needs vla-eval, as nothing else here: pip install vla-eval")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    serve(AuxVLAServer(cfg), cfg.host, cfg.port)


if __name__ == "__main__":
    with user_errors(), suppress(KeyboardInterrupt):
        main(tyro.cli(ServeConfig, description=__doc__))
