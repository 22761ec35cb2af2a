"""What a stage starts from: a checkpoint of this stage, of an earlier one, or public weights."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from config import LABELS, InputError, TrainConfig
from data import ActionStats, Frames
from model import AuxVLA
from storage import checkpoint
from storage.checkpoint import model_config_of, to_json
from storage.files import code_commit
from storage.h5 import label_command
from storage.pretrained import load_pretrained
from storage.tokenizer import build_tokenizer
from training.ranks import Ranks

# Fields of TrainConfig that may differ on resume. None changes an optimizer step, except that steps
# and epochs shift the cool-down; device, compile, shard and micro_batch change only its rounding.
RESUME_MAY_CHANGE = {
    "data", "out", "run_name", "init_from", "resume", "steps", "epochs", "device", "workers",
    "val_every", "val_frames", "pretrained", "log_every", "save_every", "keep", "max_skipped",
    "tracker", "shard", "recompute", "compile", "action_bounds", "micro_batch",
}  # fmt: skip


@dataclass(frozen=True)
class Start:
    """The checkpoint that a stage starts from; without one, public or random weights."""

    folder: Path | None = None
    manifest: dict | None = None
    resumed: bool = False  # the checkpoint is of the same stage: its optimizer and step continue

    @property
    def step(self) -> int:
        return self.manifest["step"] if self.resumed else 0


def choose_start(cfg: TrainConfig, ranks: Ranks) -> Start:
    """The newest checkpoint in --out, else the one of --init-from, else none."""

    def choose() -> Start:
        if folder := checkpoint.resumable(Path(cfg.out), cfg.resume):
            return Start(folder, checkpoint.read_manifest(folder, verify=False), resumed=True)
        if not cfg.init_from:
            return Start()
        folder = checkpoint.resolve(cfg.init_from)
        manifest = checkpoint.read_manifest(folder, moments=False)
        stage, step, of = manifest["stage"], manifest["step"], manifest.get("steps")
        if of and step < of:
            print(f"warning: {folder}: stage {stage} is not finished, step {step} of {of}")
        if stage not in (cfg.stage - 1, cfg.stage):
            print(f"warning: {folder} is of stage {stage}, expected {cfg.stage - 1}")
        return Start(folder, manifest)

    return ranks.on_main(choose)  # the others need not verify it too


def settle_config(cfg: TrainConfig, start: Start, frames: Frames, is_main: bool) -> TrainConfig:
    """Replace the settings that the checkpoint or the data decide, and check the others.

    The default five decoders become those of the checkpoint or, without one, those with labels.
    Raises InputError for a decoder that a flag or a row names and that has no label.
    """
    decoders = cfg.model.decoders
    default = decoders == LABELS and not cfg.row
    if start.folder:
        stored = start.manifest["config"]
        decoders = model_config_of(start.manifest).decoders if default else decoders
        # The weights were trained with these bounds. Older checkpoints had percentiles only.
        bounds = stored.get("action_bounds", "percentiles")
        if bounds != cfg.action_bounds and is_main:
            print(f"action bounds: {bounds}, of the checkpoint")
        init_from = stored["init_from"] if start.resumed else cfg.init_from
        cfg = replace(cfg, action_bounds=bounds, init_from=init_from)
    labelled = dict(zip(LABELS, frames.survey["labelled"].sum(0)))  # frames that have the label
    if lacking := [name for name in decoders if cfg.stage < 3 and not labelled[name]]:
        error = f"no training frame of {cfg.data} has a label for: {', '.join(lacking)}"
        mend = label_command(frames.source.episodes[frames.episode_ids[0]], cfg.data)
        if lacking == ["obj"]:
            mend = "record pick or place; no other subtask has an object (GAP-8)"
        if not default:
            raise InputError(f"{error}. Record labels: {mend}; or train without these decoders")
        if is_main:
            print(f"warning: {error}. These decoders are NOT TRAINED. To train them: {mend}")
    if not start.folder:
        decoders = tuple(name for name in decoders if name not in lacking)
    cfg = replace(cfg, model=replace(cfg.model, decoders=decoders))
    micro_batch = cfg.micro_batch or (8 if cfg.trains_batchnorm else "auto")
    if micro_batch == "auto" and cfg.trains_batchnorm and start.resumed:
        micro_batch = stored["micro_batch"]  # what it was where the run began
    cfg = replace(cfg, micro_batch=micro_batch)
    if start.folder:
        check_config(cfg, start)
    return cfg


def check_config(cfg: TrainConfig, start: Start) -> None:
    """Raise InputError, naming the fields, unless the run may start from the checkpoint."""
    # The checkpoint had the defaults of fields that are newer than itself.
    theirs = to_json(TrainConfig()) | start.manifest["config"]
    theirs |= {"model": to_json(model_config_of(start.manifest))}
    theirs, ours = flat(theirs), flat(to_json(cfg))
    other = [name for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)]
    if start.resumed:
        free = RESUME_MAY_CHANGE - ({"micro_batch"} if cfg.trains_batchnorm else set())  # GAP-17
        wrong = [name for name in other if name.split(".")[0] not in free]
        mend = "Give the same flags, or another --out"
    else:  # A stage needs the same model; the flow head is new unless stage 3 trained one.
        free = ("model.freeze_vision",) + ("model.flow.",) * (start.manifest["stage"] != 3)
        wrong = [name for name in other if name.startswith("model.") and not name.startswith(free)]
        mend = "Give its --row or its --model flags, or another --init-from"
    if cfg.preset != start.manifest["config"].get("preset", cfg.preset):
        mend = f"Give --preset {start.manifest['config']['preset']}"
    if wrong:
        shown = [f"{name}: {ours.get(name)} here, {theirs.get(name)} there" for name in wrong]
        shown = "; ".join(shown[:4]) + "; ..." * (len(wrong) > 4)
        raise InputError(f"{start.folder} was made with another configuration ({shown}). {mend}")


def flat(nested: dict, prefix: str = "") -> dict[str, object]:
    """{"model": {"depth": True}} -> {"model.depth": True}"""
    out = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        out |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return out


def build_model(cfg: TrainConfig, start: Start, is_main: bool) -> tuple[AuxVLA, dict]:
    """The model with its weights; the hashes of public weights' files."""
    torch.manual_seed(cfg.seed)  # the same weights on every rank
    from_file = bool(start.folder or cfg.pretrained)
    model = AuxVLA(cfg.model, flow_head=cfg.stage == 3, meta=from_file)
    if start.folder:
        checkpoint.load_weights(model, start.folder, new=() if start.resumed else ("flow_head.",))
        if is_main:
            print(f"{'resumed' if start.resumed else 'initialised'} from {start.folder}")
        return model, start.manifest["pretrained"]
    if cfg.stage == 2 and not cfg.row and is_main:
        print("warning: stage 2 without --init-from RUN/stage1: naive co-training (Table 2)")
    return model, load_pretrained(model.vlm, cfg.pretrained) if cfg.pretrained else {}


def prepare_data(cfg: TrainConfig, frames: Frames, start: Start) -> tuple[ActionStats, Tokenizer]:
    """Action statistics and tokenizer: those that the checkpoint's weights were trained with."""
    if not start.folder:
        return frames.stats(cfg.action_bounds), build_tokenizer(cfg.model.llm)
    stats = {name: tuple(bounds) for name, bounds in start.manifest["action_stats"].items()}
    text = (start.folder / "tokenizer.json").read_bytes()
    return ActionStats(**stats), Tokenizer.from_buffer(text)


def describe_run(
    cfg: TrainConfig, frames: Frames, stats: ActionStats, pretrained: dict, start: Start,
    steps: int,
) -> dict:  # fmt: skip
    """The checkpoints' manifest without step and hashes. InputError if resumed on other data."""
    data = frames.source
    content = repr(data.content).encode() + frames.survey["actions"].tobytes()
    identity = {  # the order of samples and the held-out episodes depend on these
        "frames": len(data),
        "episodes": len(data.episodes),
        "packed": data.blocks is None,
        "truncated_at_success": data.truncate,
        "sha256": hashlib.sha256(repr(data.episodes).encode()).hexdigest(),
        "content": hashlib.sha256(content).hexdigest(),
    }
    theirs = start.manifest["data"] if start.resumed else {}
    if any(theirs[name] != identity[name] for name in theirs):  # older runs have no content
        raise InputError(
            f"{start.folder}: was trained on {theirs['frames']} frames of {theirs['episodes']} "
            f"episodes, {cfg.data} has {identity['frames']} of {identity['episodes']}, or others. "
            "Give the same data, or another --run-name or --out"
        )
    return {
        "stage": cfg.stage,
        "steps": steps,
        "config": to_json(cfg),
        "action_stats": {"low": stats.low, "high": stats.high},
        "action_schema": data.action_schema,
        "qpos_names": data.qpos_names,
        "instructions": frames.instructions,
        "trained": {"frames": len(frames), "episodes": len(frames.episode_ids)},
        "data": identity,
        "git": code_commit(),
        "torch": torch.__version__,
        "pretrained": pretrained,
    }
