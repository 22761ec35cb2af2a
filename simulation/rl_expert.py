"""MS-HAB's released RL policies: they drive the robot in collect.py and in eval.py.

    hf download arth-shukla/mshab_checkpoints --include "rl/*" --local-dir mshab_checkpoints
    policy = RLPolicy.load(Path("mshab_checkpoints"), "set_table", "close", "kitchen_counter")
    policy.reset()                          # at the start of an episode
    action = policy.act(obs, instruction)   # MS-HAB's obs, B environments -> [B, 13]

The networks are MS-HAB's own (mshab/agents). They see what its wrappers make of an observation:
depth of both cameras in millimetres, three frames, and the state in the simulator's order. PPO's
network itself makes 1 - tanh(mm / 1000) of the depth; SAC's takes the millimetres.
"""

import pickle
from collections import deque
from collections.abc import Callable
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
from storage.files import sha256

HUB = "arth-shukla/mshab_checkpoints"
CAMERAS = {"fetch_head_depth": "fetch_head", "fetch_hand_depth": "fetch_hand"}  # by input
FRAMES = 3  # depth pictures, oldest first (MS-HAB: EnvConfig.frame_stack)
STATE_DIM = QPOS_DIM + QPOS_DIM + 7 + 7 + 3 + 1  # qpos, qvel, hand, object, goal, is_grasped
HEAD = slice(8, 10)  # pan and tilt of the head: MS-HAB holds them still (FetchActionWrapper)
SAC_SIZES = (
    "actor_hidden_dims", "critic_hidden_dims", "critic_layer_norm", "critic_dropout",
    "encoder_pixels_feature_dim", "encoder_state_feature_dim", "cnn_features", "cnn_filters",
    "cnn_strides", "cnn_padding",
)  # fmt: skip
Actor = Callable[[dict], Tensor]  # pixels {input: [B, 3, 128, 128]}, state [B, 42] -> [B, 13]


class RLPolicy:
    """One policy of MS-HAB's, without sampling, for B environments that move in step."""

    obs_mode = "depth"  # what it needs of the simulator

    def __init__(self, actor: Actor, sha: str):
        self.actor, self.sha = actor, sha
        self.reset()

    @classmethod
    def load(cls, root: Path, task: str, subtask: str, target: str, device="cpu") -> "RLPolicy":
        """From ROOT/rl/<task>/<subtask>/<target>/, MS-HAB's layout; `device` is the observations'.

        Raises InputError when a file is missing, would run code, or does not fit the other.
        """
        folder = Path(root) / "rl" / task / subtask / target
        include = f"rl/{task}/{subtask}/{target}/*"
        remedy = f'Get it by `hf download {HUB} --include "{include}" --local-dir {quoted(root)}`'
        config, weights = folder / "config.yml", folder / "policy.pt"
        for path in (config, weights):
            if not path.is_file():
                raise InputError(f"no {path}. {remedy}, or give another --policies")
        try:
            agent, actor = build(read_algo(config))
            load_strictly(agent, weights)
        except InputError as error:
            raise InputError(f"{error}. {remedy}") from error
        agent.to(device).eval()
        return cls(actor, sha256(weights))

    def reset(self) -> None:
        """Forget the episode: the pictures seen."""
        self.seen: deque[dict[str, Tensor]] = deque(maxlen=FRAMES)

    @torch.no_grad()
    def act(self, obs: dict, instruction: str) -> np.ndarray:
        """The next action, float32 [B, 13] in [-1, 1]; the instruction is unused."""
        depth = {key: obs["sensor_data"][camera]["depth"] for key, camera in CAMERAS.items()}
        self.seen.append({key: rearrange(mm, "b h w 1 -> b h w") for key, mm in depth.items()})
        while len(self.seen) < FRAMES:  # at the start the first picture stands in
            self.seen.append(self.seen[0])
        pixels = {  # [B, 3, 128, 128] each
            key: torch.stack([picture[key] for picture in self.seen], dim=1).float()
            for key in CAMERAS
        }
        state = [flatten_state_dict(obs[part], use_torch=True) for part in ("agent", "extra")]
        action = self.actor({"pixels": pixels, "state": torch.cat(state, dim=1).float()})
        action[:, HEAD] = 0
        # The controller would clip them too; recorded actions are to be the ones that were taken.
        return action.clamp(-1, 1).cpu().numpy()


# --- Files ---


class PlainLoader(yaml.SafeLoader):
    """Safe, and does without Python's own objects: OmegaConf, which MS-HAB writes with, tags paths
    as such, and the algorithm has none."""


PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def read_algo(path: Path) -> dict:
    """The part of MS-HAB's config.yml that names the network and its sizes."""
    try:
        config = yaml.load(path.read_bytes(), PlainLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from error
    algo = config.get("algo") if isinstance(config, dict) else None
    if not isinstance(algo, dict) or algo.get("name") not in ("ppo", "sac"):
        raise InputError(f"{path}: expected algo.name to be ppo or sac, got algo = {algo}")
    needed = (*SAC_SIZES, "actor_log_std_min", "actor_log_std_max") if algo["name"] == "sac" else ()
    given = {key for key, value in algo.items() if value is not None or key == "critic_dropout"}
    if missing := [key for key in needed if key not in given]:
        raise InputError(
            f"{path}: algo lacks {', '.join(missing)}, of which the SAC network is made"
        )
    return algo


def build(algo: dict) -> tuple[nn.Module, Actor]:
    """MS-HAB's network as its evaluate.py makes it, and its action without sampling."""
    picture = (FRAMES, IMAGE_SIZE, IMAGE_SIZE)
    if algo["name"] == "ppo":
        pixels = {key: torch.zeros(1, *picture) for key in CAMERAS}
        agent = PPO({"pixels": pixels, "state": torch.zeros(1, STATE_DIM)}, (ACTION_DIM,))
        return agent, lambda obs: agent.get_action(obs, deterministic=True)
    # The Dict sorts its keys, as MS-HAB's did in training: SAC's hand camera comes first.
    boxes = spaces.Dict({key: spaces.Box(0, np.inf, picture) for key in CAMERAS})
    agent = SAC(
        boxes,
        (STATE_DIM,),
        (ACTION_DIM,),
        **{key: algo[key] for key in SAC_SIZES},
        log_std_min=algo["actor_log_std_min"],
        log_std_max=algo["actor_log_std_max"],
        device="cpu",
    )
    return agent, lambda obs: agent.actor(
        obs["pixels"], obs["state"], compute_pi=False, compute_log_pi=False
    )[0]


def load_strictly(agent: nn.Module, path: Path) -> None:
    """Fill the network from policy.pt. Raises InputError unless every key and shape is its own."""
    try:
        # A pickle: only tensors and containers are ever built from it.
        found = torch.load(path, map_location="cpu", weights_only=True)["agent"]
    except (
        RuntimeError, OSError, EOFError, LookupError, TypeError, pickle.UnpicklingError
    ) as error:  # fmt: skip
        raise InputError(
            f"{path}: refused, it is cut off, has no 'agent', or is a pickle of more than tensors, "
            "which could run code"
        ) from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: 'agent' is {describe(found)}, expected a dict of tensors")
    expected = {key: describe(value) for key, value in agent.state_dict().items()}
    found_as = {key: describe(value) for key, value in found.items()}
    wrong = [
        f"{key}: {found_as.get(key, 'missing')}, expected {expected.get(key, 'no such key')}"
        for key in sorted(expected | found_as)
        if expected.get(key) != found_as.get(key)
    ]
    if wrong:
        more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise InputError(
            f"{path} does not fit the network of its config.yml: {'; '.join(wrong[:6])}{more}"
        )
    agent.load_state_dict(found)


def describe(value) -> str:
    """A tensor's shape; what is wrong with it, if it is none or has values that are not finite."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{tuple(value.shape)}" + ("" if value.isfinite().all() else " with values not finite")
