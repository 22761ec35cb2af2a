"""`tools.serve` as a user starts it, driven by vla-eval's own client from PyPI."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from processes import REPOSITORY, start
from tiny_run import SCHEMA, observation, train_tiny

from config import InputError
from policy import Policy
from tools.serve import ServeConfig, main

TEXT = "close the kitchen drawer"
CLIENT = ["vla-eval==0.8.0", "websockets==17.4", "msgpack==1.2.4", "anyio==4.16.0"]
CLIENT += ["idna==3.20", "sniffio==1.3.1"]  # what its connection imports; ours has numpy and PIL


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[Path]:
    """A folder with vla-eval, importable meanwhile."""
    folder = tmp_path_factory.mktemp("client")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", folder, *CLIENT]
    done = subprocess.run(["timeout", "60", *pip], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"vla-eval is not to be had from PyPI: {done.stderr[-300:]}")
    sys.path.append(str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Path:
    """Of a policy that acts on what it saw before, too."""
    return train_tiny(tmp_path_factory.mktemp("run"), "base-history")


@contextmanager
def serving(client: Path, stage: Path, *flags: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server's process and address; Ctrl-C must end it without a traceback."""
    command = ("-m", "tools.serve", "--checkpoint", stage, "--port", "0", "--device", "cpu", *flags)
    process = start(*command, PYTHONPATH=os.pathsep.join([str(REPOSITORY), str(client)]))
    try:
        line = process.stdout.readline()
        assert line.startswith("serving on ws://"), process.communicate()
        yield process, line.split()[-1]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0 and "Traceback" not in errors, errors
    finally:
        process.kill()


@pytest.fixture(scope="module")
def address(client, stage) -> Iterator[str]:
    """Of one server for all who come, whatever they do to it."""
    with serving(client, stage) as (_, address):
        yield address


def wire(seed: int, text: str = TEXT) -> dict:
    """What a client sends for MS-HAB's observation."""
    sensors = observation(seed)["sensor_data"]
    plain = {c: {k: v[0].numpy() for k, v in pictures.items()} for c, pictures in sensors.items()}
    return {"sensor_data": plain, "task_description": text, "state": np.zeros(12)}


def expected(stage: Path, seeds: list[int]) -> list[np.ndarray]:
    """The actions of an episode, by the policy itself."""
    policy = Policy.from_checkpoint(stage, "cpu")
    return [policy.act(observation(seed), TEXT)[0] for seed in seeds]


def talk(address: str, conversation):
    """Run `conversation(connection)` with vla-eval's client."""
    from vla_eval.connection import Connection

    async def run():
        async with Connection(address, max_retries=1) as connection:
            return await conversation(connection)

    return asyncio.run(run())


async def episode(connection, seeds: list[int]) -> list[np.ndarray]:
    await connection.start_episode({"task": {"name": TEXT}})
    actions = [(await connection.act(wire(seed)))["actions"] for seed in seeds]
    await connection.end_episode({"success": False})
    return actions


def test_the_client_gets_the_policys_actions_episode_by_episode(address, stage):
    from vla_eval.protocol.numpy_codec import set_image_format

    seeds = [3, 4, 5]
    own = expected(stage, seeds)
    assert (own[1] != expected(stage, seeds[1:])[0]).any()  # what it saw before matters

    async def two_episodes(connection):
        return await episode(connection, seeds), await episode(connection, seeds)

    for pictures in ("raw", "png"):  # one client after the other
        set_image_format(pictures)
        for actions in talk(address, two_episodes):
            assert all(a.dtype == np.float32 and a.shape == (13,) for a in actions)
            np.testing.assert_array_equal(actions, own)


def test_a_client_learns_what_it_talks_to(address):
    async def about(connection):
        return connection.server_info

    told = talk(address, about)
    assert told["instructions"] == [TEXT] and told["action_schema"] == SCHEMA
    assert (told["stage"], told["step"], told["protocol_version"]) == (1, 1, 1)


def test_several_clients_at_once_have_their_own_episodes(address, stage):
    seeds = ([1, 2], [7, 8])
    assert (expected(stage, [1, 7])[1] != expected(stage, [7])[0]).any()

    async def both(one):
        from vla_eval.connection import Connection

        async with Connection(address, max_retries=1) as two:
            got = ([], [])
            for step in range(2):
                for connection, own, actions in zip((one, two), seeds, got):
                    actions.append((await connection.act(wire(own[step])))["actions"])
            return got

    for actions, own in zip(talk(address, both), seeds):
        np.testing.assert_array_equal(actions, expected(stage, own))


def test_what_cannot_be_acted_on_is_told_and_the_episode_goes_on(address, stage):
    head = wire(3)["sensor_data"]["fetch_head"]
    metres, batched = np.ones((128, 128, 1), np.float32), head["rgb"][None]
    broken = {  # what is told of it: what is sent in the place of the head's pictures
        "rgb: got NoneType, expected an array uint8 [128, 128, 3]": None,
        "depth: got float32 [128, 128, 1], expected an array int16": head | {"depth": metres},
        "rgb: got uint8 [1, 128, 128, 3]": head | {"rgb": batched},
        "(64, 64) pixels": head | {"rgb": np.zeros((64, 64, 3), np.uint8)},
    }

    async def conversation(connection):
        bad = [(told, {"sensor_data": {"fetch_head": sent}}) for told, sent in broken.items()]
        for text in ("wash up", None):
            told = f"task_description: got {text!r}, expected one of ['{TEXT}']"
            bad.append((told, {"task_description": text}))
        for told, change in bad:
            with pytest.raises(RuntimeError, match=re.escape(told)):
                await connection.act(wire(3) | change)
        return [(await connection.act(wire(seed)))["actions"] for seed in (3, 4)]

    np.testing.assert_array_equal(talk(address, conversation), expected(stage, [3, 4]))


def test_bytes_that_are_no_message_are_told_and_the_next_one_is_answered(address):
    import msgpack
    from websockets.sync.client import connect

    array = {"__ndarray__": True, "data": b"12", "dtype": "<i2", "shape": [5]}
    picture = {"__image__": True, "data": b"12", "format": "png"}
    wild = [b"", b"\xc1", "text", msgpack.packb(3), msgpack.packb({"type": "hello"})]
    for payload in (array, array | {"dtype": "O"}, array | {"data": None}, picture):
        wild.append(msgpack.packb({"type": "observation", "payload": payload, "seq": 1}))
    with connect(address, compression=None) as connection:
        for message in wild:
            connection.send(message)
            answer = msgpack.unpackb(connection.recv())
            assert answer["type"] == "error" and "cannot be read" in answer["payload"]["error"]
        connection.send(msgpack.packb({"type": "sing", "payload": {}, "seq": 2}))
        answer = msgpack.unpackb(connection.recv())
        assert "'sing'" in answer["payload"]["error"] and answer["seq"] == 2


def test_whoever_speaks_no_websocket_or_dies_leaves_the_server_to_the_next(address, client, stage):
    host, port = address.removeprefix("ws://").split(":")
    for line in (b"", b"GET / HTTP/1.1\r\n\r\n"):
        with socket.create_connection((host, int(port))) as plain:
            plain.sendall(line)
    code = "import os, signal; from websockets.sync.client import connect; "
    code += f"connection = connect({address!r}); os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(client)})
    actions = talk(address, lambda connection: episode(connection, [1]))
    np.testing.assert_array_equal(actions, expected(stage, [1]))


def test_any_instruction_is_taken_when_told_unless_too_long_and_ctrl_c_ends_it(client, stage):
    async def conversation(connection):
        action = (await connection.act(wire(0, "open the fridge")))["actions"]
        with pytest.raises(RuntimeError, match="too long"):
            await connection.act(wire(0, "open " * 30))
        process.send_signal(signal.SIGINT)  # while a client is connected
        await asyncio.to_thread(process.wait, 30)
        return action

    with serving(client, stage, "--any-instruction") as (process, address):
        assert talk(address, conversation).shape == (13,)


def test_a_port_that_is_taken_is_said(address, stage):
    port = int(address.split(":")[-1])
    with pytest.raises(InputError, match=rf"127.0.0.1, port {port}: not .*; give another --port"):
        main(ServeConfig(stage, port=port, device="cpu"))


def test_what_serving_needs_is_named_with_its_command(stage, monkeypatch):
    for name in ("websockets", "msgpack"):
        monkeypatch.setitem(sys.modules, name, None)  # as if not installed
    with pytest.raises(
        InputError, match=r"needs websockets and .*: pip install websockets msgpack"
    ):
        main(ServeConfig(stage))
