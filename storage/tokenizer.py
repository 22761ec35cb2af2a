"""Instructions -> token ids, with the checkpoint's tokenizer or the tiny preset's words."""

import re
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from config import SUBTASKS, InputError, LLMConfig, ModelConfig, quoted
from paper import ARTICULATIONS, OBJECTS, instruction
from storage.download import reachable

# --- Instructions ---


def build_tokenizer(cfg: LLMConfig) -> Tokenizer:
    """The LLM's tokenizer: from a folder, or from the hub or its cache.

    "words" makes one from the words of the prompt and of every instruction, without download.
    Raises InputError when it is not to be had or is not this LLM's.
    """
    if cfg.tokenizer != "words":
        file = Path(cfg.tokenizer) / "tokenizer.json"
        mend = (
            f"Where there is a network: {quoted('hf', 'download', cfg.tokenizer, file.name)} "
            "--local-dir FOLDER; then give --model.llm.tokenizer FOLDER"
        )
        with reachable(cfg.tokenizer, mend):
            found = file if file.is_file() else hf_hub_download(cfg.tokenizer, file.name)
        tokenizer = Tokenizer.from_file(str(found))
    else:
        names = {name for objects in OBJECTS.values() for name in objects} | set(ARTICULATIONS)
        texts = [instruction(subtask, name) for subtask in SUBTASKS for name in names]
        split = pre_tokenizers.Whitespace()
        text = " ".join([cfg.prompt.format(""), *texts]).lower()
        words = sorted({word for word, _ in split.pre_tokenize_str(text)})
        vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *words])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = split
    check_tokenizer(tokenizer, cfg, cfg.tokenizer)
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, cfg: LLMConfig, source: object) -> None:
    """Raise InputError, naming what was found, unless action ids and prompt fit the tokenizer.

    The action ids follow all its tokens (Qwen2.5), begin at <|extra_0|> (Prismatic's Qwen) or are
    the last of its own vocabulary (Llama), as in Prismatic's ActionTokenizer; those of "words" lie
    anywhere above its tokens. A special token of the prompt is one id; the prompt ends in a space.
    """
    size, own = tokenizer.get_vocab_size(), tokenizer.get_vocab_size(with_added_tokens=False)
    first, extra = cfg.first_action_id, tokenizer.token_to_id("<|extra_0|>")
    special, found = re.findall(r"<\|.*?\|>", cfg.prompt), []
    if cfg.tokenizer == "words":
        special, fits = [], first >= size
    elif extra is None:
        fits = first in (size, own - ModelConfig.bins)
    else:
        fits = first == extra
    if not fits:
        place = "" if extra is None else f", <|extra_0|> is {extra}"
        found = [f"{size} tokens, {own} of them its own{place}; the action ids begin at {first}"]
    found += [f"no token {name}" for name in special if tokenizer.token_to_id(name) is None]
    ends = {id: tokenizer.id_to_token(id) for id in cfg.prompt_end}
    found += [f"{id} is {token!r}, no lone space" for id, token in ends.items() if token != "▁"]
    if found:
        raise InputError(
            f"{source}: the tokenizer of another model: {'; '.join(dict.fromkeys(found))}. Give "
            "the LLM's own, --model.llm.tokenizer HUB-NAME or FOLDER"
        )


def tokenize(
    instructions: list[str], tokenizer: Tokenizer, cfg: LLMConfig
) -> tuple[Tensor, Tensor]:
    """Prompts of one length, the longest's: ids and mask [n, L].

    Padding stands between the first token and the rest, where the images go, so that every prompt
    ends at the latents.
    """
    # Llama's tokenizer begins with its <s>; Qwen's adds nothing.
    prompts = [cfg.prompt.format(text.lower()) for text in instructions]
    prompts = [prompt.lower() if cfg.tokenizer == "words" else prompt for prompt in prompts]
    tokens = [[*tokenizer.encode(prompt).ids, *cfg.prompt_end] for prompt in prompts]
    longest, text = max((len(prompt), text) for prompt, text in zip(tokens, instructions))
    if longest > cfg.prompt_length:
        raise ValueError(
            f"{text!r} needs {longest} tokens; raise llm.prompt_length above {cfg.prompt_length}"
        )
    ids = torch.zeros(len(tokens), longest, dtype=torch.long)
    mask = torch.zeros(len(tokens), longest, dtype=torch.bool)
    for row, (first, *rest) in enumerate(tokens):
        begin = longest - len(rest)
        ids[row, 0], mask[row, 0] = first, True
        ids[row, begin:], mask[row, begin:] = torch.tensor(rest), True
    return ids, mask
