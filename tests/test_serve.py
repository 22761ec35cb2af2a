"""`tools.serve`: its answers, and the program as a user starts it, driven by vla-eval's client."""

import asyncio
import os
import re
import signal
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import start, wait_for
from tiny_run import observation, train_tiny

from config import InputError
from policy import Policy
from tools.serve import AuxVLAServer, ServeConfig, main

TEXT = "close the kitchen drawer"


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Path:
    """A checkpoint whose policy reads past actions, too."""
    return train_tiny(tmp_path_factory.mktemp("run"), "base-history")


def wire(seed: int) -> dict:
    """An observation as a client sends it."""
    sensors = observation(seed)["sensor_data"]
    arrays = {c: {k: v[0].numpy() for k, v in images.items()} for c, images in sensors.items()}
    return {"sensor_data": arrays, "task_description": TEXT, "state": np.zeros(12)}


def expected(stage: Path, seeds: list[int]) -> list[np.ndarray]:
    """The actions of an episode, by the policy itself."""
    policy = Policy.from_checkpoint(stage, "cpu")
    return [policy.act(observation(seed), TEXT)[0] for seed in seeds]


class Episode:
    """What vla-eval gives a server for an episode of a connection: it keeps what is sent."""

    def __init__(self, server: AuxVLAServer):
        self.server, self.sent = server, []

    async def send_action(self, action: dict):
        self.sent.append(action["actions"])

    def see(self, observation: dict):
        asyncio.run(self.server.on_observation(observation, self))


def test_a_server_compiles_on_demand(stage):
    server = AuxVLAServer(ServeConfig(stage, device="cpu", compile=True))
    assert server.policy.model.compiled


def test_several_episodes_at_once_each_get_the_policys_actions(stage):
    server = AuxVLAServer(ServeConfig(stage, device="cpu"))
    episodes = {(1, 2): Episode(server), (7, 8): Episode(server)}
    assert (expected(stage, [1, 7])[1] != expected(stage, [7])[0]).any()  # the past matters
    for step in range(2):
        for seeds, episode in episodes.items():
            episode.see(wire(seeds[step]))
    for seeds, episode in episodes.items():
        assert all(a.dtype == np.float32 and a.shape == (13,) for a in episode.sent)
        np.testing.assert_array_equal(episode.sent, expected(stage, seeds))
    episodes.clear()
    del episode
    assert not server.episodes


def test_an_unusable_observation_is_refused_and_the_episode_goes_on(stage):
    head = wire(3)["sensor_data"]["fetch_head"]
    metres, stacked = np.ones((128, 128, 1), np.float32), head["rgb"][None]
    bad = {  # message: what the client sends instead
        "fetch_head/rgb: got object (), expected uint8 (128, 128, 3)": None,
        "depth: got float32 (128, 128, 1), expected int16": head | {"depth": metres},
        "rgb: got uint8 (1, 128, 128, 3)": head | {"rgb": stacked},
    }
    bad = {message: {"sensor_data": {"fetch_head": sent}} for message, sent in bad.items()}
    episode = Episode(AuxVLAServer(ServeConfig(stage, device="cpu")))
    del (bare := wire(3))["sensor_data"]
    with pytest.raises(InputError, match=re.escape("rgb: got object (), expected uint8")):
        episode.see(bare)
    for message, change in bad.items():
        with pytest.raises(InputError, match=re.escape(message)):
            episode.see(wire(3) | change)
    for seed in (3, 4):
        episode.see(wire(seed))
    np.testing.assert_array_equal(episode.sent, expected(stage, [3, 4]))


def test_a_missing_vla_eval_is_named_with_the_command_that_installs_it(stage, monkeypatch):
    monkeypatch.setattr("tools.serve.serve", None)  # as if it were not installed
    with pytest.raises(InputError, match="needs the package vla-eval: pip install"):
        main(ServeConfig(stage))


def test_vla_evals_client_drives_episode_by_episode_and_ctrl_c_ends_the_server(stage):
    connections = pytest.importorskip("vla_eval.connection")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    seeds = [3, 4, 5]

    async def drive():
        async with connections.Connection(f"ws://127.0.0.1:{port}") as policy:
            episodes = []
            for _ in range(2):
                await policy.start_episode({"task": {"name": TEXT}})
                episodes.append([(await policy.act(wire(seed)))["actions"] for seed in seeds])
                await policy.end_episode({"success": False})
            with pytest.raises(RuntimeError, match="expected uint8"):
                await policy.act(wire(3) | {"sensor_data": {}})
            return policy.server_info, episodes

    flags = ("--checkpoint", stage, "--port", port, "--device", "cpu")
    process = start("-m", "tools.serve", *flags, PYTHONPATH=os.pathsep.join(sys.path))
    try:
        wait_for(lambda: not socket.socket().connect_ex(("127.0.0.1", port)), process)
        about, episodes = asyncio.run(drive())
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    for actions in episodes:
        np.testing.assert_array_equal(actions, expected(stage, seeds))
    assert about["observation_spec"]["task_description"]["description"] == f"trained on: {TEXT}"
