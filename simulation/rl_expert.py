"""MS-HAB's released RL policies, for collect.py --expert rl and eval.py --policy rl.

    hf download arth-shukla/mshab_checkpoints --include "rl/*" --local-dir mshab_checkpoints
    policy = RLPolicy.load(Path("mshab_checkpoints"), "set_table", "close", "kitchen_counter")
    policy.reset()                          # at the start of an episode
    action = policy.act(obs, instruction)   # MS-HAB's obs, B environments -> [B, 13]

The networks are MS-HAB's own (mshab/agents). They read what MS-HAB's wrappers return: the last
three depth images of each camera in millimetres, and the state in the simulator's order. PPO's
network transforms depth by 1 - tanh(mm / 1000), SAC's reads millimetres.
"""

from collections import deque
from collections.abc import Callable
from inspect import signature
from pathlib import Path

import numpy as np
import torch
import yaml
from einops import rearrange
from gymnasium import spaces
from mani_skill.utils.common import flatten_state_dict
from mshab.agents.ppo.agent import Agent as PPO
from mshab.agents.sac.agent import Agent as SAC
from torch import Tensor, nn

from config import ACTION_DIM, IMAGE_SIZE, QPOS_DIM, InputError, quoted
from storage.files import READ_ERRORS, sha256

HUB = "arth-shukla/mshab_checkpoints"
CAMERAS = {"fetch_head_depth": "fetch_head", "fetch_hand_depth": "fetch_hand"}  # by input
FRAMES = 3  # depth images, oldest first (MS-HAB: EnvConfig.frame_stack)
STATE_DIM = QPOS_DIM + QPOS_DIM + 7 + 7 + 3 + 1  # qpos, qvel, hand, object, goal, is_grasped
HEAD = slice(8, 10)  # pan and tilt of the head: MS-HAB holds them still (FetchActionWrapper)
Actor = Callable[[dict], Tensor]  # pixels {input: [B, 3, 128, 128]}, state [B, 42] -> [B, 13]


class RLPolicy:
    """One of MS-HAB's policies, without sampling, for B environments that step together."""

    obs_mode = "depth"  # the images it reads

    def __init__(self, actor: Actor, sha: str):
        self.actor, self.sha = actor, sha
        self.reset()

    @classmethod
    def load(cls, root: Path, task: str, subtask: str, target: str, device="cpu") -> "RLPolicy":
        """Load ROOT/rl/<task>/<subtask>/<target>/, MS-HAB's layout, to the observations' device.

        Raises InputError when a file is missing, damaged, or not of MS-HAB's layout.
        """
        folder = root / "rl" / task / subtask / target
        weights = folder / "policy.pt"
        try:
            config = yaml.load((folder / "config.yml").read_bytes(), PlainLoader)
            agent, actor = build(config["algo"])
            # A pickle; weights_only builds nothing but tensors and containers.
            state = torch.load(weights, map_location="cpu", weights_only=True)
            agent.load_state_dict(state["agent"])
        except (*READ_ERRORS, yaml.YAMLError) as error:
            raise InputError(
                f"{folder}: no policy of MS-HAB's ({type(error).__name__}: {error}). Get it by "
                f'`hf download {HUB} --include "rl/{task}/{subtask}/{target}/*" --local-dir '
                f"{quoted(root)}`, or give another --policies"
            ) from error
        agent.to(device).eval()
        return cls(actor, sha256(weights))

    def reset(self) -> None:
        """Forget the images of the last episode."""
        self.frames: deque[dict] = deque(maxlen=FRAMES)  # of each frame MS-HAB's sensor_data

    @torch.no_grad()
    def act(self, obs: dict, instruction: str) -> np.ndarray:
        """Return the next action, float32 [B, 13] in [-1, 1]; the instruction is unused."""
        self.frames.append(obs["sensor_data"])
        while len(self.frames) < FRAMES:  # at its start, an episode's first image is repeated
            self.frames.append(self.frames[0])
        pixels = {}  # [B, 3, 128, 128] each
        for key, camera in CAMERAS.items():
            depth = [sensors[camera]["depth"] for sensors in self.frames]
            pixels[key] = rearrange(depth, "t b h w 1 -> b t h w").float()
        state = [flatten_state_dict(obs[part], use_torch=True) for part in ("agent", "extra")]
        action = self.actor({"pixels": pixels, "state": torch.cat(state, dim=1).float()})
        action[:, HEAD] = 0
        # The controller clips too; clipping here makes recorded actions equal the executed ones.
        return action.clamp(-1, 1).cpu().numpy()


class PlainLoader(yaml.SafeLoader):
    """Reads Python objects, such as the paths that MS-HAB writes with OmegaConf, as None."""


PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def build(algo: dict) -> tuple[nn.Module, Actor]:
    """Build MS-HAB's network as its evaluate.py does, and its action without sampling."""
    image = (FRAMES, IMAGE_SIZE, IMAGE_SIZE)
    if algo["name"] == "ppo":
        pixels = {key: torch.zeros(1, *image) for key in CAMERAS}
        agent = PPO({"pixels": pixels, "state": torch.zeros(1, STATE_DIM)}, (ACTION_DIM,))
        return agent, lambda obs: agent.get_action(obs, deterministic=True)
    if algo["name"] != "sac":
        raise ValueError(f"expected algo.name to be ppo or sac, got {algo['name']}")
    # The Dict sorts its keys, as MS-HAB's did in training: SAC's hand camera comes first.
    boxes = spaces.Dict({key: spaces.Box(0, np.inf, image) for key in CAMERAS})
    sizes = {name: algo[name] for name in signature(SAC).parameters if name in algo}
    limits = dict(log_std_min=algo["actor_log_std_min"], log_std_max=algo["actor_log_std_max"])
    agent = SAC(boxes, (STATE_DIM,), (ACTION_DIM,), **sizes, **limits, device="cpu")
    kinds = dict(compute_pi=False, compute_log_pi=False)
    return agent, lambda obs: agent.actor(obs["pixels"], obs["state"], **kinds)[0]
