"""The trained policy: a checkpoint that drives the robot, in eval.py or in a loop of your own.

    policy = Policy.from_checkpoint("RUN/stage2")
    policy.reset()                                        # at the start of an episode
    action = policy.act(obs, "close the kitchen drawer")  # MS-HAB's obs, B environments -> [B, 13]

A stage-1 or stage-2 checkpoint decodes one action at a time; a stage-3 checkpoint denoises eight
and executes two.
"""

import operator
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from tokenizers import Tokenizer
from torch import Tensor

from backbone import halve
from config import ACTION_DIM, CHUNK, HISTORY, InputError
from data import ActionStats, history_steps, make_batch, read_cameras
from model import AuxVLA
from storage.checkpoint import load_weights, model_config_of, read_manifest, resolve
from storage.tokenizer import tokenize
from training.ranks import BF16, check_compiler, device_of


def prepare(model: AuxVLA, device: torch.device, compile: bool) -> AuxVLA:
    """The model as a policy runs it: in bf16 on a GPU. Compiling takes a minute, at first use."""
    if device.type in BF16:
        halve(model)
    if compile:
        check_compiler(device.type)
        # Each length of prompt has shapes of its own, and torch gives up after 8 of them.
        torch._dynamo.config.recompile_limit = 64
        model.prepare_blocks(compile=True)
        model.compiled = True
    return model.to(device).eval()


class Graphs:
    """Calls the parts of AuxVLA.act as CUDA graphs, captured once for each set of shapes.

    A decoding pass launches about 300 small kernels, which takes several times as long as running
    them; a graph is launched once. A later call overwrites the tensors that earlier ones returned.
    """

    def __init__(self):
        self.captured: dict[tuple, tuple] = {}

    def __call__(self, function: Callable, inputs: dict[str, Tensor], *state: object) -> object:
        """function(inputs, *state). `state` is what an earlier graph returned; it is not copied."""
        shapes = ((name, *value.shape) for name, value in inputs.items())
        key = (function.__name__, *map(id, state), *shapes)
        if key not in self.captured:
            static = {name: value.clone() for name, value in inputs.items()}
            self.captured[key] = (*self.capture(lambda: function(static, *state)), static, state)
        graph, outputs, static, _ = self.captured[key]
        for name, value in inputs.items():
            static[name].copy_(value)
        graph.replay()
        return outputs

    def capture(self, run: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, object]:
        # The first calls allocate the workspaces of CUDA libraries outside of the graph.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
        return graph, outputs


@dataclass
class Policy:
    model: AuxVLA
    stats: ActionStats
    tokenizer: Tokenizer
    manifest: dict  # the checkpoint's: config, action schema, hashes
    device: torch.device
    predict: bool = True  # fill `predictions`; acting is faster without them
    # outputs of the decoders for the last frame that the model has seen
    predictions: dict[str, np.ndarray] = field(default_factory=dict)
    graphs: Graphs = field(default_factory=Graphs)  # on a GPU

    obs_mode = "rgb+depth"  # of the simulator

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, device: str | None = None, compile: bool = False
    ) -> "Policy":
        """`path`: a checkpoint or a stage's folder. InputError for a bad file or a missing GPU."""
        folder = resolve(path)
        manifest = read_manifest(folder, moments=False)
        device = device_of(device)
        model = AuxVLA(model_config_of(manifest), flow_head=manifest["stage"] == 3, meta=True)
        load_weights(model, folder)
        stats = {key: tuple(value) for key, value in manifest["action_stats"].items()}
        tokenizer = Tokenizer.from_buffer((folder / "tokenizer.json").read_bytes())
        model = prepare(model, device, compile)
        policy = cls(model, ActionStats(**stats), tokenizer, manifest, device)
        policy.reset()
        return policy

    def reset(self) -> None:
        """Start an episode: forget the queue of actions, the history, the noise and the draft."""
        self.queue: deque[np.ndarray] = deque()
        steps = HISTORY + 1 if self.model.cfg.history == "frames" else 1
        self.frames: deque[tuple[Tensor, Tensor]] = deque(maxlen=steps)  # rgb, depth; last: now
        self.past: deque[Tensor] = deque(maxlen=HISTORY)  # actions, robot units [B, 13]
        self.noise = torch.Generator().manual_seed(0)  # flow head: the same noise in every episode
        self.draft: Tensor | None = None  # normalised actions [B, 13]

    @torch.no_grad()
    def act(self, obs: dict, instruction: str | Sequence[str]) -> np.ndarray:
        """The next action [B, 13] in robot units, for B environments that step together.

        `instruction` is one sentence for all environments, or a list of B. When the queue of
        actions is empty, the model reads `obs` and fills `predictions`: pos [B, 2], grasp [B]
        probability, qpos [B, 12], obj [B, 7], seg [B, C, 128, 128] probability.
        """
        if self.model.cfg.history == "frames" or not self.queue:
            self.frames.append(read_cameras(obs))
        if not self.queue:
            cfg, batch = self.model.cfg, self.make_batch(instruction)
            noise = None
            if self.model.flow_head:
                noise = torch.randn(1, CHUNK, ACTION_DIM, generator=self.noise)
                # Every environment gets the noise that it would get alone.
                noise = noise.expand(len(batch["images"]), -1, -1).to(self.device)  # [B, 8, 13]
            run = self.graphs if self.device.type == "cuda" else operator.call  # CUDA graphs
            actions, predictions = self.model.act(batch, noise, self.draft, self.predict, run)
            self.draft = actions[:, 0].clone()  # the next step's tokens are often the same
            self.predictions = {name: value.cpu().numpy() for name, value in predictions.items()}
            actions = self.stats.denormalize(actions).clamp(-1, 1).cpu().numpy()
            self.queue.extend(rearrange(actions, "b h a -> h b a")[: cfg.flow.execute])
        action = self.queue.popleft()
        self.past.append(torch.from_numpy(action))
        return action

    def make_batch(self, instruction: str | Sequence[str]) -> dict[str, Tensor]:
        """The batch of the frames in `frames`, made as training makes it from recorded frames."""
        b = len(self.frames[-1][0])
        texts = [instruction] * b if isinstance(instruction, str) else [*instruction]
        if len(texts) != b:
            raise ValueError(f"{len(texts)} instructions for {b} environments: expected 1 or {b}")
        steps = [len(self.frames) - 1]
        if self.model.cfg.history == "frames":
            steps = history_steps(np.array(steps))[0][0]  # [5]
        rgb, depth = zip(*(self.frames[step] for step in steps))
        raw = {"rgb": torch.stack(rgb, dim=1), "depth": torch.stack(depth, dim=1)}  # [B, T, 2, ...]
        raw["instruction"] = torch.arange(b)
        if self.model.cfg.history == "actions":
            (steps,), (exists,) = history_steps(np.array([len(self.past)]))
            actions = [*self.past, torch.zeros(b, ACTION_DIM)]
            raw["past_actions"] = torch.stack([actions[step] for step in steps[:-1]], dim=1)
            raw["past_mask"] = torch.from_numpy(exists[:-1]).expand(b, -1)  # [B, 4]
        prompts = tokenize(texts, self.tokenizer, self.model.cfg.llm)  # [B, L]
        prompts = tuple(prompt.to(self.device) for prompt in prompts)
        return make_batch(raw, self.stats, prompts, self.model.cfg)


def check_schema(env, manifest: dict) -> None:
    """Raise InputError, naming the slot, when a checkpoint is for another robot (GAP-1)."""
    for key, here in (("action_schema", env.action_schema), ("qpos_names", env.qpos_names)):
        trained = manifest[key]
        if trained is None:  # MS-HAB's released files name neither
            print(f"warning: the training data had no {key}: not compared", file=sys.stderr)
            continue
        for slot, (theirs, ours) in enumerate(zip_longest(trained, here)):
            if theirs != ours:
                raise InputError(
                    f"{key}, slot {slot}: the checkpoint was trained on {theirs}, this environment "
                    f"has {ours}. Train on demonstrations that collect.py records here"
                )
