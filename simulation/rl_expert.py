"""MS-HAB's released RL policies, for collect.py --expert rl and eval.py --policy rl.

    hf download arth-shukla/mshab_checkpoints --include "rl/*" --local-dir mshab_checkpoints
    policy = RLPolicy.load(Path("mshab_checkpoints"), "set_table", "close", "kitchen_counter")
    policy.reset()                          # at the start of an episode
    action = policy.act(obs, instruction)   # MS-HAB's obs, B environments -> [B, 13]

The networks are MS-HAB's own (mshab/agents). They read the observation that its wrappers make:
three depth images of both cameras in millimetres, and the state in the simulator's order. PPO's
network itself makes 1 - tanh(mm / 1000) of the depth; SAC's reads the millimetres.
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
FRAMES = 3  # depth images, oldest first (MS-HAB: EnvConfig.frame_stack)
STATE_DIM = QPOS_DIM + QPOS_DIM + 7 + 7 + 3 + 1  # qpos, qvel, hand, object, goal, is_grasped
HEAD = slice(8, 10)  # pan and tilt of the head: MS-HAB holds them still (FetchActionWrapper)
SAC_SIZES = (
    "actor_hidden_dims", "critic_hidden_dims", "critic_layer_norm", "critic_dropout",
    "encoder_pixels_feature_dim", "encoder_state_feature_dim", "cnn_features", "cnn_filters",
    "cnn_strides", "cnn_padding",
)  # fmt: skip
Actor = Callable[[dict], Tensor]  # pixels {input: [B, 3, 128, 128]}, state [B, 42] -> [B, 13]


class RLPolicy:
    """One policy of MS-HAB's, without sampling, for B environments that step together."""

    obs_mode = "depth"  # the images it reads

    def __init__(self, actor: Actor, sha: str):
        self.actor, self.sha = actor, sha
        self.reset()

    @classmethod
    def load(cls, root: Path, task: str, subtask: str, target: str, device="cpu") -> "RLPolicy":
        """Load ROOT/rl/<task>/<subtask>/<target>/, MS-HAB's layout, to the observations' device.

        Raises InputError when a file is missing, would run code, or does not fit the other.
        """
        folder = Path(root) / "rl" / task / subtask / target
        weights = folder / "policy.pt"
        try:
            agent, actor = build(read_algo(folder / "config.yml"))
            load_weights(agent, weights)
        except (InputError, OSError) as error:
            include = f"rl/{task}/{subtask}/{target}/*"
            raise InputError(
                f"{error}. Get the policy by `hf download {HUB} --include "
                f'"{include}" --local-dir {quoted(root)}`, or give another --policies'
            ) from error
        agent.to(device).eval()
        return cls(actor, sha256(weights))

    def reset(self) -> None:
        """Forget the images of the last episode."""
        self.seen: deque[dict[str, Tensor]] = deque(maxlen=FRAMES)

    @torch.no_grad()
    def act(self, obs: dict, instruction: str) -> np.ndarray:
        """Return the next action, float32 [B, 13] in [-1, 1]; the instruction is unused."""
        depth = {key: obs["sensor_data"][camera]["depth"] for key, camera in CAMERAS.items()}
        self.seen.append({key: rearrange(mm, "b h w 1 -> b h w") for key, mm in depth.items()})
        while len(self.seen) < FRAMES:  # an episode begins with copies of its first image
            self.seen.append(self.seen[0])
        pixels = {  # [B, 3, 128, 128] each
            key: torch.stack([images[key] for images in self.seen], dim=1).float()
            for key in CAMERAS
        }
        state = [flatten_state_dict(obs[part], use_torch=True) for part in ("agent", "extra")]
        action = self.actor({"pixels": pixels, "state": torch.cat(state, dim=1).float()})
        action[:, HEAD] = 0
        # The controller would clip them too; clipped here, recorded actions are the executed ones.
        return action.clamp(-1, 1).cpu().numpy()


# --- Files ---


class PlainLoader(yaml.SafeLoader):
    """A safe loader that reads Python objects as None: OmegaConf, with which MS-HAB writes, tags
    paths as such, and the algorithm has none."""


PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def read_algo(path: Path) -> dict:
    """Read `algo` of MS-HAB's config.yml, which names the network and its sizes."""
    try:
        config = yaml.load(path.read_bytes(), PlainLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from error
    algo = config.get("algo") if isinstance(config, dict) else None
    if not isinstance(algo, dict) or algo.get("name") not in ("ppo", "sac"):
        raise InputError(f"{path}: expected algo.name to be ppo or sac, got algo = {algo}")
    return algo


def build(algo: dict) -> tuple[nn.Module, Actor]:
    """Build MS-HAB's network as its evaluate.py does, and its action without sampling."""
    image = (FRAMES, IMAGE_SIZE, IMAGE_SIZE)
    if algo["name"] == "ppo":
        pixels = {key: torch.zeros(1, *image) for key in CAMERAS}
        agent = PPO({"pixels": pixels, "state": torch.zeros(1, STATE_DIM)}, (ACTION_DIM,))
        return agent, lambda obs: agent.get_action(obs, deterministic=True)
    needed = {*SAC_SIZES, "actor_log_std_min", "actor_log_std_max"} - {"critic_dropout"}
    if missing := sorted(key for key in needed if algo.get(key) is None):
        raise InputError(f"the config's algo lacks {', '.join(missing)} of the SAC network")
    # The Dict sorts its keys, as MS-HAB's did in training: SAC's hand camera comes first.
    boxes = spaces.Dict({key: spaces.Box(0, np.inf, image) for key in CAMERAS})
    agent = SAC(
        boxes, (STATE_DIM,), (ACTION_DIM,), **{key: algo.get(key) for key in SAC_SIZES},
        log_std_min=algo["actor_log_std_min"], log_std_max=algo["actor_log_std_max"],
        device="cpu",
    )  # fmt: skip
    return agent, lambda obs: agent.actor(
        obs["pixels"], obs["state"], compute_pi=False, compute_log_pi=False
    )[0]


def load_weights(agent: nn.Module, path: Path) -> None:
    """Fill the network from policy.pt. Raises InputError unless every key and shape is its own."""
    try:
        # A pickle; weights_only builds nothing but tensors and containers.
        state = torch.load(path, map_location="cpu", weights_only=True)["agent"]
    except (RuntimeError, EOFError, LookupError, TypeError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{path}: refused, it is cut off, has no 'agent', or is a pickle of more than tensors, "
            "which could run code"
        ) from error
    try:
        agent.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"{path} does not fit the network of its config.yml: {error}") from error
    if wrong := [key for key, value in state.items() if not value.isfinite().all()]:
        raise InputError(f"{path}: values of {', '.join(wrong)} are not finite")
