"""TRL's SFTTrainer with a PEFT adapter: its defaults on a CPU in fp32, a bf16 model, or autocast."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import common

# The two fast ways get what is known to help: rows of like length together, AdamW in one kernel.
FAST: dict[str, Any] = {"optim": "adamw_torch_fused", "train_sampling_strategy": "group_by_length"}
MODES: dict[str, dict[str, Any]] = {
    "default": {"bf16": False},
    "bf16": {"bf16": False, **FAST},
    "autocast": {"bf16": True, **FAST},
}


def make_trainer(given: Namespace, callback: Any) -> Any:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    dtype = torch.bfloat16 if given.mode == "bf16" else torch.float32
    lora = LoraConfig(
        r=common.R,
        lora_alpha=common.ALPHA,
        lora_dropout=0.0,
        target_modules=common.PROJECTIONS,
        layers_to_transform=common.adapted_layers(given.model, given.layers),
        task_type="CAUSAL_LM",
    )
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype),
        processing_class=AutoTokenizer.from_pretrained(given.model),
        train_dataset=Dataset.from_list(common.read_rows(given.data)),
        args=SFTConfig(use_cpu=True, **(common.trainer_settings(given) | MODES[given.mode])),
        peft_config=lora,
        callbacks=[callback],
    )


def main() -> None:
    given = common.options(MODES)
    clock = common.Clock()
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
