"""A checkpoint to and from the Hugging Face hub, with a model card that carries its results.

    python -m tools.publish push --checkpoint RUN/stage2 --repo USER/NAME --results RUN/eval
    python -m tools.publish pull --repo USER/NAME --out RUN/pulled  # for eval.py --checkpoint
    python -m tools.publish lighten --checkpoint RUN/stage2 --out weights/stage2  # half of fp32

What is pushed drives the robot and starts a later stage (--init-from). Adam's moments, twice the
weights, go along only if asked for. One commit holds everything: nobody pulls half of it.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    snapshot_download,
)
from safetensors.torch import load_file

from checkpoint import MOMENTS, hidden, read_manifest, resolve, write
from config import InputError, explained, quoted
from download import GO_ON, reachable
from durable import sha256, sync, write_sealed
from rows import ROWS
from tools.report import code_commit, success_table

CARD = """---
pipeline_tag: robotics
tags: [vision-language-action, maniskill, maniskill-hab, auxvla]
---

# {name}

AuxVLA, a vision-language-action model for mobile manipulation in ManiSkill-HAB: stage {stage}, step
{step}, {row}. Trained on {frames:,} frames of {episodes:,} demonstrations, from {weights}.

## Results

{results}

## Use

```
python -m tools.publish pull --repo {repo} --out RUN/pulled
python eval.py --checkpoint RUN/pulled --out RUN/eval-pulled
```

Instructions it knows: {instructions}.

## Actions

{schema}

## Code

Published from commit {commit}. What the paper leaves open is read as in the rows GAP-1 and up of
that commit's README.md, "Where the paper is silent".
"""
EVALUATED = """Task {task}, {split} split, apartments {where}, code of commit {code}. Success at any
step, with the Wilson 95 % interval; the paper's figures are of the real apartments.

"""


def push(
    checkpoint: Path, repo: str, results: Path | None = None, optimizer: bool = False,
    private: bool = False, replace: bool = False,
) -> None:  # fmt: skip
    """Publish a checkpoint with a model card.

    Args:
        checkpoint: RUN/stageN (its newest) or RUN/stageN/step-NNNNNNNN
        repo: USER/NAME on the hub; made if it is not there
        results: folder of its evaluation, whose table the card shows
        optimizer: Adam's moments too, to resume training elsewhere
        private: a repository that is made is for its owner only
        replace: put it in the place of what the repository holds; the history keeps that
    """
    if get_token() is None:
        raise InputError("no token for the hub: hf auth login, or set HF_TOKEN to one that writes")
    folder = resolve(checkpoint)
    manifest, original = read_manifest(folder), sha256(folder / "manifest.json")
    evaluation = read_results(results, original, folder) if results else None
    if MOMENTS in manifest["files"] and not optimizer:
        left = {name: sha for name, sha in manifest["files"].items() if name != MOMENTS}
        manifest |= {"files": left, "published_from": original}
    with TemporaryDirectory() as made, reaching(repo):
        write_sealed(Path(made) / "manifest.json", manifest)
        (Path(made) / "README.md").write_bytes(card(repo, manifest, evaluation).encode())
        paths = {name: folder / name for name in manifest["files"]}
        paths |= {path.name: path for path in Path(made).iterdir()}
        api = HfApi()
        api.create_repo(repo, private=private or None, exist_ok=True)
        there = set(api.list_repo_files(repo)) - {".gitattributes"}  # the hub's own
        if there and not replace:
            raise InputError(
                f"{repo}: holds {', '.join(sorted(there)[:4])} already. Give --replace to put this "
                "in their place, or another --repo"
            )
        files = [CommitOperationAdd(name, path) for name, path in sorted(paths.items())]
        files += [CommitOperationDelete(name) for name in sorted(there - paths.keys())]
        title = f"stage {manifest['stage']}, step {manifest['step']}"
        print(api.create_commit(repo, files, commit_message=title).commit_url)


def pull(repo: str, out: Path) -> None:
    """Fetch what push has published and compare every file with its sha256.

    Args:
        repo: USER/NAME on the hub
        out: the checkpoint's folder, which is not there yet
    """
    if out.exists():
        raise FileExistsError(f"{out}: is there already; give another --out")
    partial = hidden(out, "partial")
    with reaching(repo):
        one = HfApi().model_info(repo).sha
        kinds = ["*.safetensors", "*.json"]
        snapshot_download(repo, revision=one, local_dir=partial, allow_patterns=kinds)
    try:
        manifest = read_manifest(partial)
    except InputError as error:
        shutil.rmtree(partial)  # the same command would take it for fetched
        raise InputError(
            f"{repo}: is no whole checkpoint of tools.publish push ({error}). Nothing of it was "
            "kept; give the same command again, or ask for it to be pushed again"
        ) from error
    shutil.rmtree(partial / ".cache")
    os.replace(partial, out)
    sync(out.parent)
    print(f"{out}: stage {manifest['stage']}, step {manifest['step']}, whole")


def lighten(checkpoint: Path, out: Path) -> None:
    """Copy a stage without Adam's moments and with its matrices in bf16, its logs beside it.

    Args:
        checkpoint: RUN/stageN (its newest) or RUN/stageN/step-NNNNNNNN
        out: the copy's stage folder, which is not there yet
    """
    if out.exists():
        raise FileExistsError(f"{out}: is there already; give another --out")
    folder = resolve(checkpoint)
    manifest = read_manifest(folder)
    weights = {
        name: weight.bfloat16() if weight.is_floating_point() and weight.ndim > 1 else weight
        for name, weight in load_file(folder / "model.safetensors").items()
    }
    about = {key: manifest[key] for key in manifest.keys() - {"format", "step", "files"}}
    about |= {"published_from": sha256(folder / "manifest.json")}
    tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8")
    write(out, manifest["step"], weights, None, about, tokenizer, keep=1)
    for log in ("config.json", "log.jsonl", "validation.json"):
        if (folder.parent / log).is_file():
            shutil.copyfile(folder.parent / log, out / log)
    print(f"{out}: stage {manifest['stage']}, step {manifest['step']}, matrices in bf16")


def read_results(folder: Path, original: str, checkpoint: Path) -> dict:
    """The results.json of an evaluation. Raises InputError unless it is of that manifest."""
    path = folder / "results.json"
    mend = f"python eval.py --checkpoint {quoted(checkpoint)} --out FOLDER"
    if not path.is_file():
        raise InputError(f"{path}: not there; {mend} writes it")
    results = json.loads(path.read_bytes())
    if results.get("manifest", {}).get("checkpoint") != original:
        raise InputError(f"{path}: is not of {checkpoint}, by the sha256 of its manifest; {mend}")
    return results


def card(repo: str, manifest: dict, evaluation: dict | None) -> str:
    """The repository's README.md."""
    row, results = manifest["config"].get("row"), "not run"
    if evaluation:
        about = evaluation["manifest"]
        about["where"] = "generated by household.assets" if about["household"] else "MS-HAB's own"
        about["code"] = about["git"] or "unknown"
        compared = ROWS[about["row"]]
        papers = {compared.label: compared.paper.get(about["task"], {})}
        table = success_table({"ours": evaluation["columns"]}, papers)
        results = EVALUATED.format(**about) + "\n".join(table)
    schema = ["| | | at -1 | at +1 | |", "|---" * 5 + "|"]
    for slot, part in enumerate(manifest["action_schema"] or ()):
        schema.append(
            f"| {slot} | {part['name']} | {part['low']} | {part['high']} | {part['unit']} |"
        )
    trained = manifest.get("trained", manifest["data"])  # older ones counted the held-out ones too
    return CARD.format(
        name=repo.split("/")[1], repo=repo, stage=manifest["stage"], step=manifest["step"],
        row=f"row `{row}` ({ROWS[row].label})" if row else "no row of the paper's tables",
        frames=trained["frames"], episodes=trained["episodes"],
        weights=", ".join(f"`{name}`" for name in manifest["pretrained"]) or "random weights",
        results=results, instructions="; ".join(manifest["instructions"]),
        schema="\n".join(schema) if len(schema) > 2 else "MS-HAB's `pd_joint_delta_pos`.",
        commit=code_commit() or "unknown",
    )  # fmt: skip


@contextmanager
def reaching(repo: str) -> Iterator[None]:
    """download.reachable, for a name that --repo gives."""
    if repo.count("/") != 1:
        raise InputError(f"--repo {repo}: expected USER/NAME")
    with reachable(repo, GO_ON):
        yield


if __name__ == "__main__":
    with explained():
        programs = {"push": push, "pull": pull, "lighten": lighten}
        tyro.extras.subcommand_cli_from_dict(programs, description=__doc__)
