"""The trained policy: a checkpoint that drives the robot, in eval.py or in a loop of your own.

    policy = Policy.from_checkpoint("RUN/stage2")
    policy.reset()                                        # at the start of an episode
    action = policy.act(obs, "close the kitchen drawer")  # MS-HAB's obs, B environments -> [B, 13]

B environments that move in step have one instruction, or each its own: a list of B.

A stage-1 or stage-2 checkpoint decodes one action at a time; a stage-3 checkpoint denoises eight
and executes two.
"""

import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from tokenizers import Tokenizer
from torch import Tensor, nn

from config import ACTION_DIM, HISTORY, RECORDED_ACTIONS, InputError
from data import ActionStats, cameras, preprocess_steps
from model import AuxVLA
from storage.checkpoint import load_weights, model_config_of, read_manifest, resolve
from storage.tokenizer import tokenize
from training.ranks import device_of

# --- On a GPU ---

# A decoding pass of one frame is some three hundred small kernels, whose launches take several
# times as long as their work: so a query is launched once, as one CUDA graph.


def halve(model: AuxVLA) -> None:
    """Linear weights in bf16, in place: what autocast would make of them in every query."""
    for part in (model.vlm, model.flow_head):
        for module in part.modules() if part is not None else ():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)


class Graphed:
    """A function of tensors, {name: tensor} -> tensors, captured once for each set of shapes.

    What it returns is overwritten by the next call.
    """

    def __init__(self, run: Callable[[dict[str, Tensor]], object]):
        self.run, self.captured = run, {}

    def __call__(self, inputs: dict[str, Tensor]) -> object:
        key = tuple((name, *value.shape) for name, value in inputs.items())
        if key not in self.captured:
            self.captured[key] = self.capture({name: x.clone() for name, x in inputs.items()})
        graph, held, outputs = self.captured[key]
        for name, value in inputs.items():
            held[name].copy_(value)
        graph.replay()
        return outputs

    def capture(self, held: dict[str, Tensor]) -> tuple[torch.cuda.CUDAGraph, dict, object]:
        # Libraries make their workspaces in the first calls, which must not be part of the graph.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                self.run(held)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.run(held)
        return graph, held, outputs


# --- The policy ---


@dataclass
class Policy:
    model: AuxVLA
    stats: ActionStats
    tokenizer: Tokenizer
    manifest: dict  # the checkpoint's: config, action schema, hashes
    device: torch.device
    seed: int = 0  # of the flow head's noise, from the start of every episode
    predict: bool = True  # fill `predictions`; without, acting is faster
    # of the decoders, for the last frame seen
    predictions: dict[str, np.ndarray] = field(default_factory=dict)
    graphs: dict[bool, Graphed] = field(default_factory=dict)  # by `predict`; of a GPU

    obs_mode = "rgb+depth"  # what it needs of the simulator

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: str | None = None) -> "Policy":
        """From a checkpoint's folder or its stage's.

        Raises FileNotFoundError or CheckpointError, naming the file, InputError for a GPU that is
        not there.
        """
        folder = resolve(path)
        manifest = read_manifest(folder, moments=False)
        device = device_of(device)
        model = AuxVLA(model_config_of(manifest), flow_head=manifest["stage"] == 3)
        load_weights(model, folder)
        stats = {key: tuple(value) for key, value in manifest["action_stats"].items()}
        tokenizer = Tokenizer.from_buffer((folder / "tokenizer.json").read_bytes())
        if device.type == "cuda":
            halve(model)
        policy = cls(model.to(device).eval(), ActionStats(**stats), tokenizer, manifest, device)
        policy.reset()
        return policy

    def reset(self) -> None:
        """Forget the episode: the queue of actions, the history, the noise and the draft."""
        self.queue: deque[np.ndarray] = deque()
        self.seen: deque[tuple[Tensor, Tensor]] = deque(maxlen=HISTORY)
        self.done: deque[Tensor] = deque(maxlen=HISTORY)  # actions, robot units [B, 13]
        self.noise = torch.Generator().manual_seed(self.seed)
        self.draft: Tensor | None = None  # normalised actions [B, 13]

    @torch.no_grad()
    def act(self, obs: dict, instruction: str | Sequence[str]) -> np.ndarray:
        """The next action [B, 13] in robot units, for B environments that move in step.

        `instruction` is that of all of them, or a list with each one's own.

        Unless it has a history, looks at `obs` only when its queue of actions is empty;
        `predictions` then holds what the decoders read in it: pos [B, 2], grasp [B] probability,
        qpos [B, 12], obj [B, 7], seg [B, C, 128, 128] probability.
        """
        if self.model.cfg.history == "frames" or not self.queue:
            now = tuple(picture.to(self.device) for picture in cameras(obs))
        if not self.queue:
            cfg, inputs = self.model.cfg, self.batch(now, instruction)
            if self.model.flow_head:
                noise = torch.randn(1, RECORDED_ACTIONS, ACTION_DIM, generator=self.noise)
                # The same for each: what it would draw in an episode of its own.
                inputs["noise"] = noise.expand(len(now[0]), -1, -1).to(self.device)
            else:
                begin = inputs["images"].new_zeros(len(now[0]), ACTION_DIM)
                inputs["draft"] = begin if self.draft is None else self.draft
            actions, predictions = self.query(inputs)  # [B, H, 13]
            self.draft = actions[:, 0].clone()  # the next step's tokens are often the same
            self.predictions = {name: value.cpu().numpy() for name, value in predictions.items()}
            actions = self.stats.denormalize(actions).clamp(-1, 1).cpu().numpy()
            self.queue.extend(rearrange(actions, "b h a -> h b a")[: cfg.flow.execute])
        action = self.queue.popleft()
        if self.model.cfg.history == "frames":
            self.seen.append(now)
        self.done.append(torch.from_numpy(action))
        return action

    def query(self, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """model.act; on a GPU as one graph."""
        if self.device.type != "cuda":
            return self.run(inputs, self.predict)
        if self.predict not in self.graphs:
            self.graphs[self.predict] = Graphed(partial(self.run, predict=self.predict))
        return self.graphs[self.predict](inputs)

    def run(self, inputs: dict[str, Tensor], predict: bool) -> tuple[Tensor, dict[str, Tensor]]:
        batch = dict(inputs)
        given = {name: batch.pop(name, None) for name in ("noise", "draft")}
        kind, on_gpu = self.device.type, self.device.type == "cuda"
        with torch.autocast(kind, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            return self.model.act(batch, **given, predict=predict)

    def batch(
        self, now: tuple[Tensor, Tensor], instruction: str | Sequence[str]
    ) -> dict[str, Tensor]:
        """What the model reads: `now` is rgb and depth as cameras() gives them."""
        cfg, b = self.model.cfg, len(now[0])
        texts = [instruction] * b if isinstance(instruction, str) else [*instruction]
        if len(texts) != b:
            raise ValueError(f"{len(texts)} instructions for {b} environments: expected 1 or {b}")
        steps, past = [now], {}
        if cfg.history == "frames":  # at the start the first frame stands in (GAP-5)
            steps = [*self.seen, now]
            steps = [steps[0]] * (HISTORY + 1 - len(steps)) + steps
        elif cfg.history == "actions":
            missing = HISTORY - len(self.done)
            actions = [torch.zeros(b, ACTION_DIM)] * missing + list(self.done)
            past = {
                "past_actions": self.stats.normalize(torch.stack(actions, dim=1)).to(self.device),
                "past_mask": (torch.arange(HISTORY) >= missing).expand(b, -1).to(self.device),
            }
        ids, mask = tokenize(texts, self.tokenizer, cfg.llm)  # [B, L]
        return past | {
            "images": preprocess_steps(steps, cfg),
            "prompt_ids": ids.to(self.device),
            "prompt_mask": mask.to(self.device),
        }


def check_schema(env, manifest: dict) -> None:
    """Raise InputError, naming the slot, when a checkpoint is for another robot (GAP-1)."""
    for key, here in (("action_schema", env.action_schema), ("qpos_names", env.qpos_names)):
        trained = manifest[key]
        if trained is None:  # MS-HAB's released files name neither
            print(f"warning: the training data had no {key}: not compared", file=sys.stderr)
            continue
        if len(trained) != len(here):
            raise InputError(f"{key}: {len(trained)} slots in the checkpoint, {len(here)} here")
        for slot, (theirs, ours) in enumerate(zip(trained, here, strict=True)):
            if theirs != ours:
                raise InputError(
                    f"{key}, slot {slot}: the checkpoint was trained on {theirs}, this environment "
                    f"has {ours}. Train on what collect.py records in this environment"
                )
