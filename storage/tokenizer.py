"""Instructions -> token ids, with the checkpoint's tokenizer or the tiny preset's words."""

import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from config import BINS, SUBTASKS, InputError, LLMConfig, quoted
from paper import ARTICULATIONS, OBJECTS, instruction
from storage.files import read_json


def build_tokenizer(cfg: LLMConfig) -> Tokenizer:
    """The LLM's tokenizer, from a folder, the hub or its cache; "words" needs no download.

    Raises InputError when it cannot be read or belongs to another model.
    """
    if cfg.tokenizer == "words":
        return build_word_tokenizer(cfg)
    from huggingface_hub import hf_hub_download  # a second; a run from a checkpoint needs no hub

    from storage.download import reachable

    name, file = cfg.tokenizer, Path(cfg.tokenizer, "tokenizer.json")
    remedy = (
        f"Where there is a network: {quoted('hf', 'download', name, file.name)} --local-dir "
        "FOLDER; then give --model.llm.tokenizer FOLDER"
    )
    with reachable(name, remedy):
        found = file if file.is_file() else hf_hub_download(name, file.name)
    read_json(Path(found))  # raises DamagedError where Tokenizer would raise a bare Exception
    tokenizer = Tokenizer.from_file(str(found))
    check_tokenizer(tokenizer, cfg)
    return tokenizer


def build_word_tokenizer(cfg: LLMConfig) -> Tokenizer:
    """One token for each word of the prompt and of every instruction."""
    names = {name for objects in OBJECTS.values() for name in objects} | set(ARTICULATIONS)
    texts = [instruction(subtask, name) for subtask in SUBTASKS for name in names]
    split = pre_tokenizers.Whitespace()
    text = " ".join([cfg.prompt.format(""), *texts]).lower()
    words = sorted({word for word, _ in split.pre_tokenize_str(text)})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, cfg: LLMConfig) -> None:
    """Raise InputError unless the LLM's action ids and prompt fit the tokenizer.

    As in Prismatic's ActionTokenizer the action ids begin at <|extra_0|> (Prismatic's Qwen), follow
    all tokens (Qwen2.5) or are the last of the tokenizer's own vocabulary (Llama). A special token
    of the prompt is one token; `prompt_end` is a space.
    """
    size, own = tokenizer.get_vocab_size(), tokenizer.get_vocab_size(with_added_tokens=False)
    first, extra = cfg.first_action_id, tokenizer.token_to_id("<|extra_0|>")
    wrong = []
    if first not in ((size, own - BINS) if extra is None else (extra,)):
        place = "" if extra is None else f", <|extra_0|> is {extra}"
        wrong = [f"{size} tokens, {own} of them its own{place}; the action ids begin at {first}"]
    special = dict.fromkeys(re.findall(r"<\|.*?\|>", cfg.prompt))
    wrong += [f"no token {name}" for name in special if tokenizer.token_to_id(name) is None]
    ends = {id: tokenizer.id_to_token(id) for id in cfg.prompt_end}
    wrong += [f"{id} is {token!r}, no lone space" for id, token in ends.items() if token != "▁"]
    if wrong:
        raise InputError(
            f"{cfg.tokenizer}: the tokenizer of another model: {'; '.join(wrong)}. Give the LLM's "
            "own, --model.llm.tokenizer HUB-NAME or FOLDER"
        )


def tokenize(instructions: list[str], tokenizer: Tokenizer, cfg: LLMConfig) -> tuple[Tensor, ...]:
    """Prompts padded to the longest: ids [n, L] and, unless all are equally long, mask [n, L].

    A GPU is faster without a mask. Padding follows the first token, where the images are inserted,
    so prompts end at the latents.
    """
    prompts = [cfg.prompt.format(text.lower()) for text in instructions]
    prompts = [prompt.lower() if cfg.tokenizer == "words" else prompt for prompt in prompts]
    tokens = [[*tokenizer.encode(prompt).ids, *cfg.prompt_end] for prompt in prompts]
    longest, text = max((len(prompt), text) for prompt, text in zip(tokens, instructions))
    if longest > cfg.prompt_length:
        raise InputError(
            f"{text[:200]!r} needs {longest} tokens; give --model.llm.prompt-length {longest}"
        )
    rows = [(first, longest - 1 - len(rest), rest) for first, *rest in tokens]
    ids = torch.tensor([[first, *[0] * pad, *rest] for first, pad, rest in rows])
    mask = torch.tensor([[True, *[False] * pad, *[True] * len(rest)] for _, pad, rest in rows])
    return (ids,) if mask.all() else (ids, mask)
