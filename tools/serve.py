"""A checkpoint behind vla-eval's websocket protocol: its clients drive with the policy.

    python -m tools.serve --checkpoint RUN/stage2 --port 8000

Of the clients at hand, vla-eval's: it says when an episode starts and takes numpy 2, openpi-client
does neither. Where the robot is, `pip install vla-eval` and, in an async function:

    async with vla_eval.connection.Connection("ws://localhost:8000") as policy:
        await policy.start_episode({})
        action = await policy.act(observation)  # {"actions": float32 [13] in [-1, 1]}

An observation is MS-HAB's own, of one environment, and the instruction; other keys are ignored:

    {"sensor_data": {"fetch_head": {"rgb": uint8 [128, 128, 3], "depth": int16 [128, 128, 1] mm},
                     "fetch_hand": the same},
     "task_description": "close the kitchen drawer"}

Each connection has its own episode; several at once take turns at the model.
"""

import io
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Literal

import numpy as np
import torch
import tyro
from PIL import Image

from config import CAMERAS, IMAGE_SIZE, InputError, explained
from data import tokenize
from policy import Policy

PICTURES = {
    "rgb": (np.uint8, (IMAGE_SIZE, IMAGE_SIZE, 3), ""),
    "depth": (np.int16, (IMAGE_SIZE, IMAGE_SIZE, 1), ", millimetres"),
}
LARGEST = 2**22  # bytes of a message; an observation has 0.2 million


@dataclass(frozen=True)
class ServeConfig:
    checkpoint: Path  # RUN/stageN (its newest) or RUN/stageN/step-NNNNNNNN
    host: str = "127.0.0.1"  # 0.0.0.0 lets other machines in, whoever they are
    port: int = 8000  # 0: any that is free
    device: Literal["cpu", "cuda"] | None = None  # default: cuda if there is one
    any_instruction: bool = False  # also those that the checkpoint was not trained on


def from_wire(value: dict):
    """An array or PNG picture of vla-eval's -> numpy; any other dict as it is."""
    if "__image__" in value and value["format"] != "raw":
        picture = Image.open(io.BytesIO(value["data"]), formats=["PNG"])
        if picture.size != (IMAGE_SIZE, IMAGE_SIZE):  # before it is inflated
            raise ValueError(f"a picture of {picture.size} pixels")
        return np.array(picture)
    if "__image__" in value or "__ndarray__" in value:
        flat = np.frombuffer(value["data"], np.dtype(value["dtype"]))
        return flat.reshape(value["shape"]).copy()
    return value


def to_wire(value: np.ndarray) -> dict:
    about = {"__ndarray__": True, "dtype": value.dtype.str, "shape": list(value.shape)}
    return about | {"data": value.tobytes()}


def read(message: bytes | str) -> tuple[str, dict, int]:
    """Type, payload and number of a message. Raises InputError when it is not vla-eval's."""
    import msgpack

    try:
        content = msgpack.unpackb(message, object_hook=from_wire)
        return content["type"], dict(content["payload"]), content["seq"]
    except (ValueError, TypeError, KeyError, OSError, SyntaxError) as error:  # two of them PIL's
        raise InputError(
            f"a message that cannot be read ({error!r}); expected msgpack of type, payload, seq, "
            f"timestamp, its arrays raw or PNG of {IMAGE_SIZE} x {IMAGE_SIZE} pixels (vla-eval, "
            "version 1 of its protocol)"
        ) from None


def cameras_of(payload: dict) -> dict:
    """An observation for Policy.act, B = 1. Raises InputError, naming the key."""
    sensors = {}
    for camera in (f"fetch_{camera}" for camera in CAMERAS):
        sensors[camera] = {}
        for name, (dtype, shape, unit) in PICTURES.items():
            got = payload
            for key in ("sensor_data", camera, name):
                got = got.get(key) if isinstance(got, dict) else None
            array = isinstance(got, np.ndarray)
            if not array or got.dtype != dtype or got.shape != shape:
                shown = f"{got.dtype} {list(got.shape)}" if array else type(got).__name__
                raise InputError(
                    f"observation, sensor_data/{camera}/{name}: got {shown}, expected an array "
                    f"{np.dtype(dtype)} {list(shape)}{unit}"
                )
            sensors[camera][name] = torch.from_numpy(got)[None]
    return {"sensor_data": sensors}


class Server:
    """Answers messages; the model is shared, what an episode remembers is the connection's."""

    def __init__(self, cfg: ServeConfig):
        self.policy = replace(Policy.from_checkpoint(cfg.checkpoint, cfg.device), predict=False)
        self.turn = Lock()
        manifest = self.policy.manifest
        self.known = () if cfg.any_instruction else manifest["instructions"]
        keys = ("stage", "step", "action_schema", "instructions")
        self.about = {key: manifest[key] for key in keys}
        self.about |= {"protocol_version": 1, "model_server": "AuxVLA", "capabilities": {}}

    def instruction_of(self, payload: dict) -> str:
        """Raise InputError unless it is one that the model was trained on, or that fits."""
        text = payload.get("task_description")
        if not isinstance(text, str) or (self.known and text not in self.known):
            raise InputError(
                f"observation, task_description: got {text!r}, expected one of "
                f"{list(self.known)}; tools.serve --any-instruction takes every text"
            )
        try:
            tokenize([text], self.policy.tokenizer, self.policy.model.cfg.llm)
        except ValueError as error:
            raise InputError(f"observation, task_description: too long, {error}") from None
        return text

    def answer(self, policy: Policy, kind: str, payload: dict) -> tuple[str, dict] | None:
        """Type and payload of the answer; None where none is due. Raises InputError."""
        if kind == "hello":
            return "hello", self.about
        if kind == "episode_start":
            policy.reset()
        elif kind == "observation":
            obs, text = cameras_of(payload), self.instruction_of(payload)
            with self.turn:
                return "action", {"actions": to_wire(policy.act(obs, text)[0])}
        elif kind not in ("episode_end", "error"):
            raise InputError(f"a message of type {kind!r}, which vla-eval's protocol has not")
        return None

    def drive(self, connection) -> None:
        """One connection, from its beginning to its end."""
        import msgpack
        from websockets.exceptions import ConnectionClosed

        policy = replace(self.policy)
        policy.reset()
        with suppress(ConnectionClosed):
            for message in connection:
                number = 0
                try:
                    kind, payload, number = read(message)
                    answer = self.answer(policy, kind, payload)
                except InputError as error:
                    print(f"error: {error}", file=sys.stderr)
                    answer = "error", {"error": str(error)}
                if answer:
                    reply = dict(
                        zip(("type", "payload"), answer), seq=number, timestamp=time.time()
                    )
                    connection.send(msgpack.packb(reply))


def main(cfg: ServeConfig):
    if missing := [name for name in ("websockets", "msgpack") if find_spec(name) is None]:
        raise InputError(
            f"serving needs {' and '.join(missing)}, as nothing else here: "
            "pip install websockets msgpack"
        )
    from websockets.sync.server import serve

    server = Server(cfg)
    try:
        listener = serve(server.drive, cfg.host, cfg.port, compression=None, max_size=LARGEST)
    except OSError as error:
        raise InputError(
            f"{cfg.host}, port {cfg.port}: not to be had ({error}); give another --port"
        ) from None
    with listener:
        print(f"serving on ws://{cfg.host}:{listener.socket.getsockname()[1]}", flush=True)
        listener.serve_forever()


if __name__ == "__main__":
    with explained(), suppress(KeyboardInterrupt):
        main(tyro.cli(ServeConfig, description=__doc__))
