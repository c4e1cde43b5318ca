"""Unsloth's CPU backend under TRL's SFTTrainer. What it compiles is set by UNSLOTH_CPU_COMPILE, outside."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

import common

MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "grouped": {"train_sampling_strategy": "group_by_length"},
}
MAX_LENGTH = 1024


def load(given: Namespace) -> tuple[Any, Any]:
    """Model with adapter, tokenizer."""
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(given.model), max_seq_length=MAX_LENGTH, load_in_4bit=False
    )
    adapted = FastLanguageModel.get_peft_model(
        model,
        r=common.R,
        lora_alpha=common.ALPHA,
        lora_dropout=0.0,
        target_modules=common.PROJECTIONS,
        layers_to_transform=common.adapted_layers(given.model, given.layers),
        use_gradient_checkpointing=False,
        random_state=given.seed,
    )
    return adapted, tokenizer


def make_trainer(given: Namespace, callback: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = load(given)
    return SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(common.read_rows(given.data)),
        args=SFTConfig(**(common.trainer_settings(given) | MODES[given.mode])),
        callbacks=[callback],
    )


def main() -> None:
    given = common.options(MODES)
    os.environ["UNSLOTH_FORCE_CPU"] = "1"
    clock = common.Clock()
    import unsloth  # noqa: F401, I001  # it must come before what it patches
    import datasets  # noqa: F401
    import torch
    import transformers
    import trl  # noqa: F401

    torch.set_num_threads(given.threads)
    clock.lap("import_s")
    steps = common.step_clock(transformers.TrainerCallback)
    trainer = make_trainer(given, steps)
    clock.lap("load_s")
    loss = trainer.train().training_loss
    clock.lap("train_s")
    trainer.model.save_pretrained(given.out)
    tokens = common.tokens_of(trainer.train_dataset)
    common.report(clock, steps.seconds, train_loss=loss, tokens=tokens, dtype=str(trainer.model.dtype))


if __name__ == "__main__":
    main()
