"""What is trained on: the model in Hugging Face's format, the first rows of the data sets, random tokens."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
from pathlib import Path

from engines import WORKS, Work

TOKENS, STEPS = 512, 6  # of step512


def prepare(to: Path) -> None:
    """Write SmolLM2-135M-Instruct, dequantised to float32, as the Hugging Face directory that the peers read."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from lorafit.model import spec

    if to.exists():
        print(f"{to} exists")
        return
    gguf = spec.read("smollm2-135m").path
    partial = to.with_name(to.name + ".partial")
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=plain
    )
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
    os.replace(partial, to)
    print(f"wrote {to}")


def write_rows(name: str, seed: int, given: argparse.Namespace, scratch: Path) -> tuple[Path, Path | None]:
    """The rows of a work, in the order of `seed`, and those it is evaluated on, as files in `scratch`.

    Every engine keeps the order of the file: after twenty steps the loss depends on it more than on who trains.
    """
    work, train = WORKS[name], scratch / f"{name}_{seed}_train.jsonl"
    lines = lines_of(work, given)
    train.write_text("".join(random.Random(seed).sample(lines, len(lines))), encoding="utf-8")
    if not work.is_evaluated:
        return train, None
    test = scratch / f"{name}_test.jsonl"
    test.write_text("".join(first_lines(given.data / f"{work.data}_test.jsonl", given.eval_rows)), encoding="utf-8")
    return train, test


def lines_of(work: Work, given: argparse.Namespace) -> list[str]:
    """The rows of a work as lines of JSON."""
    if work.data is not None:
        return first_lines(given.data / f"{work.data}_train.jsonl", given.rows)
    texts = random_texts(min(given.rows, work.batch * STEPS), given.hf_model)
    return [json.dumps({"text": text}) + "\n" for text in texts]


def first_lines(path: Path, count: int) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return list(itertools.islice(file, count))


def random_texts(count: int, model: Path) -> list[str]:
    """Texts of exactly TOKENS tokens: random words that are one token each, and the token that ends a sequence."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    words = sorted(
        token for token in tokenizer.get_vocab() if token[0] == "Ġ" and token[1:].isascii() and token[1:].isalpha()
    )
    words = [word.replace("Ġ", " ") for word in words]
    words = [word for word, ids in zip(words, tokenizer(words).input_ids, strict=True) if len(ids) == 1]
    source = random.Random(0)
    texts = ["".join(source.choices(words, k=TOKENS - 1)) + tokenizer.eos_token for _ in range(count)]
    if any(len(ids) != TOKENS for ids in tokenizer(texts).input_ids):
        raise SystemExit("a random text has another number of tokens than was meant")
    return texts
