"""PEFT alone in a bare loop: padded batches, AdamW, gradient clipping; nothing else."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import common

MODES = ("fp32", "bf16", "autocast")
IGNORED = -100  # the label that cross entropy leaves out
Encoded = tuple[list[int], list[int]]  # input ids, labels


def encode(row: common.Row, tokenizer: Any) -> Encoded:
    """A conversation's reply is learned up to its end-of-turn token; of a text, everything."""
    if "text" in row:
        ids = tokenizer(row["text"]).input_ids
        return ids, ids
    render = tokenizer.apply_chat_template
    prompt = render(row["prompt"], tokenize=False, add_generation_prompt=True)
    whole = render(row["prompt"] + row["completion"], tokenize=False).rstrip("\n")
    start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    ids = tokenizer(whole, add_special_tokens=False).input_ids
    return ids, [IGNORED] * start + ids[start:]


def batches(rows: list[Encoded], given: Namespace, pad: int) -> Iterator[dict[str, Any]]:
    """Every epoch in the order of the file, padded on the right."""
    import torch

    for _ in range(given.epochs):
        for first in range(0, len(rows), given.batch_size):
            chosen = rows[first : first + given.batch_size]
            width = max(len(ids) for ids, _ in chosen)
            yield {
                "input_ids": torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in chosen]),
                "labels": torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in chosen]),
                "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in chosen]),
            }


def load(given: Namespace) -> Any:
    """The model with its adapter. In bf16 the adapter is bf16 too; under autocast both are fp32."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(given.seed)
    is_bf16 = given.mode == "bf16"
    lora = LoraConfig(
        r=common.R,
        lora_alpha=common.ALPHA,
        lora_dropout=0.0,
        target_modules=common.PROJECTIONS,
        layers_to_transform=common.adapted_layers(given.model, given.layers),
        task_type="CAUSAL_LM",
    )
    base = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16 if is_bf16 else torch.float32)
    return get_peft_model(base, lora, autocast_adapter_dtype=not is_bf16).train()


def train(model: Any, rows: list[Encoded], given: Namespace, pad: int) -> tuple[list[float], list[float]]:
    """The loop. Returns the loss and the seconds of each step."""
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=common.LR, weight_decay=0.0)
    losses, seconds = [], []
    for batch in batches(rows, given, pad):
        start = time.perf_counter()
        with precision(given.mode):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return losses, seconds


def precision(mode: str) -> AbstractContextManager[Any]:
    import torch

    return torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else nullcontext()


def main() -> None:
    given = common.options(MODES)
    clock = common.Clock()
    import peft  # noqa: F401
    import torch
    import transformers

    torch.set_num_threads(given.threads)
    clock.lap("import_s")
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.model)
    rows = [encode(row, tokenizer) for row in common.read_rows(given.data)]
    model = load(given)
    clock.lap("load_s")
    losses, seconds = train(model, rows, given, tokenizer.pad_token_id)
    clock.lap("train_s")
    model.save_pretrained(given.out)
    tokens = sum(len(ids) for ids, _ in rows)
    common.report(clock, seconds, train_loss=sum(losses) / len(losses), tokens=tokens, dtype=str(model.dtype))


if __name__ == "__main__":
    main()
