"""Every number of the model and of training, with its source.

    from config import PRESETS  # {"paper": ..., "openvla": ..., "tiny": ..., "tiny-openvla": ...}
    python train.py --help      # the comment beside or above a field is its help text

The preset `paper` is Sec. 4-6 of the paper, 1.3B parameters, on MiniVLA's Prismatic VLM. `openvla`
is the 7B baseline of Table 1. `tiny` trains on two CPU cores. Presets differ in values only.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from typing import Annotated, Literal, NamedTuple

import tyro

# Subscripts of Eq. 4. Config, batch, losses, log and README use these names.
LABELS = ("pos", "grasp", "qpos", "obj", "seg")
LOSSES = ("action", *LABELS, "flow")
CAMERAS = ("head", "hand")  # Fig. 1; MS-HAB's fetch_head and fetch_hand
# GAP-1 (Fig. 2): the paper counts base pose 3, torso 1, arm 7, fingers 2. MS-HAB's controller and
# SG-VLA's README have, in this order: arm 7, gripper 1, head pan and tilt 2, torso lift 1, base
# forward velocity 1, base yaw velocity 1.
ACTION_DIM = 13
BINS = 256  # of each action dimension, uniform on [-1, 1], one token per bin (Prismatic; GAP-3)
QPOS_DIM = 12  # joint positions (Sec. 4.3, Table 5)
DEPTH_SCALE_MM = 1000.0  # Eq. 1
IMAGE_SIZE = 128  # pixels of MS-HAB's cameras, hence of the masks (Table 5)
CHUNK = 8  # actions of the flow head's chunk (Sec. 6.4), stored with every frame
TASKS = ("set_table", "tidy_house", "prepare_groceries")  # Sec. 3
SUBTASKS = ("pick", "place", "open", "close")
HORIZON = 200  # control steps per episode, 20 Hz (MS-HAB: max_episode_steps of all four subtasks)
HISTORY = 4  # past time steps (Sec. 4.2)


class InputError(Exception):
    """A foreseeable mistake in flags, files or folders.

    The message says what was found, what was expected and the command that mends it.
    """


def quoted(*paths: object) -> str:
    """Quote paths for a shell, for the commands that error messages print."""
    return shlex.join(map(str, paths))


class Range(NamedTuple):
    """What a flag accepts (terminal.cli checks it) or a recorded field (`holds` gets an array)."""

    text: str
    holds: Callable[[float], bool]  # False for NaN


Count = Annotated[int, Range("1 to 2^31 - 1", lambda n: 1 <= n < 2**31)]
Whole = Annotated[int, Range("0 or more", lambda n: n >= 0)]
Seed = Annotated[int, Range("0 to 2^31 - 1", lambda n: 0 <= n < 2**31)]
Number = Annotated[float, Range("a finite number", lambda x: -inf < x < inf)]
Positive = Annotated[float, Range("a number above 0", lambda x: 0 < x < inf)]
NotNegative = Annotated[float, Range("a number, 0 or more", lambda x: 0 <= x < inf)]
Share = Annotated[float, Range("0 or more and less than 1", lambda x: 0 <= x < 1)]


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer; of its `depth` blocks the last is not built (backbone.py says why)."""

    width: Count = 1024
    depth: Count = 24
    heads: Count = 16
    mlp: Count = 4096
    registers: Whole = 4  # register tokens
    cls_token: bool = True
    layer_scale: NotNegative | None = 1e-5  # initial value; None: no LayerScale
    mean: tuple[Number, Number, Number] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)

    @property
    def prefix_tokens(self) -> int:
        return int(self.cls_token) + self.registers


DINOV2_L = VisionConfig()  # DINOv2 (Sec. 4.1); L/14 with four registers is Prismatic's
SIGLIP_SO400M = VisionConfig(  # SigLIP (Sec. 4.1); so400m/14 is Prismatic's
    1152, 27, 16, 4304, registers=0, cls_token=False, layer_scale=None,
    mean=(0.5,) * 3, std=(0.5,) * 3,
)  # fmt: skip


@dataclass(frozen=True)
class LLMConfig:
    """Qwen2.5-0.5B (Sec. 4.1)."""

    # hub name or folder; "words": a vocabulary of the instructions' words, without download
    tokenizer: str = "Qwen/Qwen2.5-0.5B"
    tied: bool = True  # embedding and head are one matrix
    qkv_bias: bool = True
    vocab: Count = 151936  # rows of the embedding
    width: Count = 896
    depth: Count = 24
    heads: Count = 14
    kv_heads: Count = 2
    mlp: Count = 4864
    rope_theta: Positive = 1e6
    norm_eps: Positive = 1e-6
    init_std: NotNegative = 0.02  # of weights that no checkpoint provides
    first_action_id: Whole = 151665  # token of bin 0: <|extra_0|> in Prismatic's tokenizer
    prompt: str = (  # Prismatic's prompt for Qwen
        "<|im_start|>system\n"
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n"
        "What action should the robot take to {}?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    prompt_end: tuple[Whole, ...] = ()  # token ids appended after the prompt
    prompt_length: Count = 64  # maximum tokens; prompts are padded to the longest one of the data

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def __post_init__(self):
        if self.prompt.count("{}") != 1 or {"{", "}"} & set(self.prompt.replace("{}", "")):
            raise InputError(f"prompt {self.prompt!r}: expected {{}} once, for the instruction")
        if self.vocab < self.first_action_id + BINS:
            raise InputError(f"vocab {self.vocab}: expected first_action_id + {BINS} or more")


# OpenVLA's LLM and prompt; 29871 is Llama's token of a single space. OpenVLA's config.json names no
# norm_eps, so it is transformers' default.
LLAMA2_7B = LLMConfig(
    "openvla/openvla-7b", tied=False, qkv_bias=False, vocab=32064, width=4096, depth=32, heads=32,
    kv_heads=32, mlp=11008, rope_theta=1e4, first_action_id=31744,
    prompt="In: What action should the robot take to {}?\nOut:", prompt_end=(29871,),
)  # fmt: skip


@dataclass(frozen=True)
class DecoderConfig:
    """Table 5. The MLPs' 512 -> 256 -> 128 are width, width / 2, width / 4."""

    width: Count = 512
    layers: Count = 2  # qpos transformer
    heads: Count = 8  # qpos transformer
    mlp: Count = 2048  # qpos transformer; Table 5 leaves it open
    channels: tuple[Count, ...] = (64, 32, 16, 8)  # inputs of the mask decoder's upsamplings

    @property
    def grid(self) -> int:
        """Side of the mask decoder's first feature map: 8 -> 16 -> 32 -> 64 -> 128 (Table 5)."""
        return IMAGE_SIZE // 2 ** len(self.channels)


@dataclass(frozen=True)
class FlowConfig:
    """The flow-matching action expert, 101.5M parameters in the paper preset (Sec. 4.1, 6.4)."""

    width: Count = 512
    mlp: Count = 2048
    # actions executed of each predicted chunk of 8 (Sec. 6.4)
    execute: Annotated[int, Range("1 to 8", lambda n: 1 <= n <= CHUNK)] = 2
    denoise_steps: Count = 10  # Euler steps (Sec. 6.4)


@dataclass(frozen=True)
class ModelConfig:
    image_size: Count = 224
    patch_size: Count = 14
    depth: bool = True  # depth views beside the RGB views (Table 1)
    cameras: tuple[Literal["head", "hand"], ...] = CAMERAS  # (Table 1: Multiview)
    # GAP-5: of the past 4 time steps read the "actions" (Sec. 6.2, SG-VLA's README) or the "frames"
    # (Sec. 4.2: "observations")
    history: Literal["none", "frames", "actions"] = "none"
    dino: VisionConfig = DINOV2_L
    siglip: VisionConfig = SIGLIP_SO400M
    projector_hidden: Count = 8704  # 4 x the fused width (Prismatic: fused-gelu-mlp)
    llm: LLMConfig = LLMConfig()
    num_latents: Whole = 8  # Table 5: latents [B, 8, 896]; 0: the bare VLM, without decoders
    # GAP-2: learned queries after the prompt, or the states that predict the action tokens
    latents: Literal["queries", "action_states"] = "queries"
    decoders: tuple[Literal[LABELS], ...] = LABELS  # Table 5
    decoder: DecoderConfig = DecoderConfig()
    flow: FlowConfig = FlowConfig()
    # GAP-16 (Sec. 4.1): not stated; the encoders are trained, as in MiniVLA
    freeze_vision: bool = False

    @property
    def num_views(self) -> int:
        """Images per sample: cameras x (rgb, depth) x time steps."""
        steps = 1 + HISTORY if self.history == "frames" else 1
        return len(self.cameras) * (2 if self.depth else 1) * steps

    @property
    def num_queries(self) -> int:
        return self.num_latents if self.latents == "queries" else 0

    @property
    def patches(self) -> int:
        """Patch tokens per image."""
        return (self.image_size // self.patch_size) ** 2

    def __post_init__(self):
        if not self.cameras or self.cameras != tuple(c for c in CAMERAS if c in self.cameras):
            raise InputError(f"cameras {self.cameras}: expected some of {CAMERAS}, in this order")
        if len(set(self.decoders)) < len(self.decoders):
            raise InputError(f"decoders {self.decoders}: expected each of them once")
        if self.decoders and not self.num_latents:
            raise InputError("num_latents 0: decoders need at least 1")
        if self.latents == "action_states" and (n := self.num_latents) > ACTION_DIM:
            raise InputError(f"num_latents {n}: there are {ACTION_DIM} action states")
        if not 1 <= len(self.decoder.channels) <= 7:
            raise InputError(f"decoder.channels {self.decoder.channels}: expected 1 to 7 numbers")
        multiples = {
            "image_size, patch_size": (self.image_size, self.patch_size),
            "dino.width, dino.heads": (self.dino.width, self.dino.heads),
            "siglip.width, siglip.heads": (self.siglip.width, self.siglip.heads),
            "llm.width, twice llm.heads": (self.llm.width, 2 * self.llm.heads),  # RoPE: even
            "llm.heads, llm.kv_heads": (self.llm.heads, self.llm.kv_heads),
            "decoder.width, decoder.heads": (self.decoder.width, self.decoder.heads),
            "decoder.width": (self.decoder.width, 4),  # the MLPs divide it by 4
            "flow.width": (self.flow.width, 2),  # sine and cosine
        }
        for names, (whole, part) in multiples.items():
            if not part or whole % part:
                raise InputError(f"{names}: {whole} is not a multiple of {part}")


@dataclass(frozen=True)
class LossWeights:
    """The lambdas of Eq. 4 (Sec. 6.1). GAP-23: 1 for action and flow, which Eq. 4 leaves out."""

    action: NotNegative = 1.0
    pos: NotNegative = 1.0
    grasp: NotNegative = 5.0
    qpos: NotNegative = 1.0
    obj: NotNegative = 1.0
    seg: NotNegative = 1.0
    flow: NotNegative = 1.0


@dataclass(frozen=True)
class TrainConfig:
    # folder of demonstrations (MS-HAB's layout) or of their pack; DATA/pack is preferred
    data: str = "data"
    # folder of this stage: config.json, log.jsonl, step-NNNNNNNN/, last; unset: runs/RUN/stageN
    out: str = ""
    # name of the run in runs/; unset: the row, or auxvla-all. Under torchrun write --run-name:
    # torchrun reads --run as its own --run-path
    run_name: Annotated[str, tyro.conf.arg(aliases=["--run"])] = ""
    # 1: decoders on detached latents, 2: joint, 3: flow head on the frozen VLM (Sec. 5.2-5.3)
    stage: Literal[1, 2, 3] = 1
    # sets the defaults of other flags: see PRESETS in config.py
    preset: Literal["paper", "openvla", "tiny", "tiny-openvla"] = "paper"
    row: str | None = None  # a row of Tables 1-4 (python paper.py); fixes inputs, data and epochs
    tasks: tuple[Literal[TASKS], ...] = ()  # tasks to train on; unset: all in the data
    subtasks: tuple[Literal[SUBTASKS], ...] = ()  # subtasks to train on; unset: all in the data
    # GAP-25 (Sec. 3): cut each demonstration at its first success; MS-HAB's go on to step 200
    # without moving. For a pack, give the flag to data.py pack
    truncate_at_success: bool = True
    # GAP-23: actions are scaled to [-1, 1] from the controller's bounds, or from the 1st and 99th
    # percentile of the data
    action_bounds: Literal["controller", "percentiles"] = "controller"
    # public weights of the VLM: folder or hub name of a Prismatic checkpoint or of openvla-7b, a
    # folder of the folders of DINOv2, SigLIP and Qwen2.5, or "hub"; unused with --init-from
    pretrained: str | None = "Stanford-ILIAD/prism-qwen25-extra-dinosiglip-224px-0_5b"
    # folder of an earlier stage, or of a checkpoint in it; unset: the run's stage before this one
    init_from: str | None = None
    # auto: continue from the newest whole checkpoint in `out`
    resume: Literal["auto", "never"] = "auto"
    steps: Count | None = None  # optimizer steps of this stage; unset: `epochs` of the data
    epochs: tuple[Whole, Whole, Whole] = (3, 7, 10)  # of stages 1-3 (Sec. 6.3; GAP-14); 0: no stage
    batch_size: Count = 512  # frames per step over all GPUs (Sec. 6.1)
    # frames per GPU and backward pass; gradients accumulate up to batch_size. auto: as many as the
    # memory plan (training/memory.py) allows. Unset: auto, but 8 where BatchNorm is trained,
    # since otherwise a step would depend on the card (GAP-17)
    micro_batch: Count | Literal["auto"] | None = None
    # FSDP: divide weights, gradients and Adam's moments among the GPUs (training/ranks.py)
    shard: bool = False
    recompute: bool = False  # activation checkpointing: less memory, a third more arithmetic
    # torch.compile every block; unset: on a GPU, where Triton finds a C compiler
    compile: bool = False
    lr: Positive = 2e-5  # Adam, constant (Sec. 6.1)
    warmup: Whole = 0  # steps of linear warm-up; the paper has none
    # share of the steps, at the end, during which lr falls linearly to 0; the paper has none
    cooldown: Annotated[float, Range("0 to 1", lambda x: 0 <= x <= 1)] = 0.0
    betas: tuple[Share, Share] = (0.9, 0.999)  # GAP-21: not stated; MiniVLA's
    grad_clip: NotNegative = 1.0  # norm of the gradients; 0: not clipped. GAP-21: MiniVLA's
    weights: LossWeights = LossWeights()  # Eq. 4
    model: ModelConfig = ModelConfig()
    seed: Seed = 0  # weights, order of samples, flow noise
    device: Literal["cpu", "cuda"] | None = None  # unset: a GPU if there is one
    workers: Whole = 4  # loader processes per GPU
    # share of each file's episodes that is held out: at least one, unless the file has one only
    val_episodes: Share = 0.02
    val_every: Count = 1000  # steps between validations; one more at the end
    val_frames: Count = 2048  # held-out frames per validation, spread evenly
    log_every: Count = 10  # steps
    save_every: Count = 1000  # steps; one more at the end
    keep: Count = 2  # newest checkpoints to keep
    max_skipped: Count = 10  # stop after so many steps in a row with a non-finite loss or gradient
    tracker: Literal["tensorboard", "wandb"] | None = None  # beside log.jsonl

    @property
    def trains_batchnorm(self) -> bool:
        return self.stage < 3 and "seg" in self.model.decoders


# Table 1's OpenVLA as published: one camera, RGB, neither latents nor decoders.
_BARE = dict(depth=False, cameras=("head",), num_latents=0, decoders=())
OPENVLA_MODEL = ModelConfig(llm=LLAMA2_7B, **_BARE)

TINY_MODEL = ModelConfig(
    image_size=64, patch_size=32, projector_hidden=384,
    dino=VisionConfig(192, 2, 6, 768, registers=1, layer_scale=1.0),
    siglip=replace(SIGLIP_SO400M, width=192, depth=2, heads=6, mlp=768),
    llm=LLMConfig(
        "words", vocab=512, width=192, depth=4, heads=6, kv_heads=6, mlp=512, rope_theta=1e4,
        init_std=0.06, first_action_id=256,
        prompt="What action should the robot take to {}?", prompt_length=20,
    ),
    decoder=DecoderConfig(width=128, heads=4, mlp=256, channels=(16, 16, 8, 8)),
    flow=FlowConfig(width=128, mlp=512),
)  # fmt: skip

TINY_OPENVLA_MODEL = replace(
    TINY_MODEL, llm=replace(TINY_MODEL.llm, tied=False, qkv_bias=False), **_BARE
)

_TINY_TRAINING = dict(
    pretrained=None, batch_size=32, micro_batch=32, lr=3e-4, warmup=50, cooldown=0.4,
    betas=(0.9, 0.95), workers=0, val_episodes=0.1, val_every=200, save_every=200, val_frames=512,
)  # fmt: skip

# Fields of TrainConfig that each preset changes.
PRESETS: dict[str, dict] = {
    "paper": {},
    "openvla": dict(model=OPENVLA_MODEL, pretrained="openvla/openvla-7b", shard=True),
    "tiny": dict(model=TINY_MODEL, **_TINY_TRAINING),
    "tiny-openvla": dict(model=TINY_OPENVLA_MODEL, shard=True, **_TINY_TRAINING),
}


def model_config(preset: str) -> ModelConfig:
    return PRESETS[preset].get("model", ModelConfig())
