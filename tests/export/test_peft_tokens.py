"""Trained rows of tokens in PEFT's format: PEFT reads ours, we read PEFT's, and what is damaged is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft as real_peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from lorafit.config import LoRAConfig
from lorafit.export import peft
from lorafit.lora.tokens import attach_rows, make_room, token_rows
from tests import tiny
from tests.export.adapters import adapted, refused, rewrite, rewrite_tensors

CONFIG = LoRAConfig(r=4, alpha=10, targets=["q_proj", "up_proj"])
NEW = [258, 260, 7]  # two that the model lacks, one that it has
IDS = torch.tensor([[5, 258, 7, 260, 9, 259]])
KEY = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


def model_of(tied: bool) -> Any:
    model = tiny.llama()
    if not tied:
        config = model.config
        config.tie_word_embeddings = False
        torch.manual_seed(5)
        model = LlamaForCausalLM(config).eval()
    return model


def ours(tied: bool, directory: Path) -> Any:
    model = model_of(tied)
    make_room(model, NEW)
    adapted(model, CONFIG)
    attach_rows(model, NEW)
    for rows in token_rows(model).values():
        if rows.tied_to is None:
            rows.rows.data += torch.randn(rows.rows.shape, generator=torch.Generator().manual_seed(3))
    peft.save(model, directory, CONFIG, base="b", tokenizer=None)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_comes_back_with_the_same_logits(tied: bool, tmp_path: Path) -> None:
    model, again = ours(tied, tmp_path / "a"), model_of(tied)
    peft.load(again, tmp_path / "a")
    assert torch.equal(logits(model), logits(again))
    assert [rows.ids.tolist() for rows in token_rows(again).values()] == [NEW, NEW]


@pytest.mark.parametrize("tied", [True, False])
def test_peft_reads_it_with_the_same_logits(tied: bool, tmp_path: Path) -> None:
    model, base = ours(tied, tmp_path / "a"), model_of(tied)
    make_room(base, NEW)  # what `resize_token_embeddings` is to a user of PEFT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = real_peft.PeftModel.from_pretrained(base, tmp_path / "a").eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("modules", [["embed_tokens", "lm_head"], ["embed_tokens"]])
def test_we_read_pefts_with_the_same_logits(tied: bool, modules: list[str], tmp_path: Path) -> None:
    model_of(tied).save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    torch.manual_seed(8)
    base.resize_token_embeddings(262, mean_resizing=False)  # random rows, which PEFT then saves with all others
    config = real_peft.LoraConfig(
        r=4, lora_alpha=10, target_modules=["q_proj"], trainable_token_indices={name: NEW for name in modules}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = real_peft.get_peft_model(base, config).eval()
        for name, parameter in theirs.named_parameters():
            if "tokens_delta" in name or "lora_B" in name:
                parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
        theirs.save_pretrained(tmp_path / "a")
    model = model_of(tied)
    peft.load(model, tmp_path / "a")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)


def test_the_file_holds_a_shared_row_once(tmp_path: Path) -> None:
    ours(True, tmp_path / "a")
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert fields["trainable_token_indices"] == {"model.embed_tokens": NEW}
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert [key for key in tensors if "token_adapter" in key] == [KEY]
    assert tensors[KEY].shape == (3, 32)


def test_rows_that_are_missing_or_of_another_shape_or_infinite_are_refused(tmp_path: Path) -> None:
    ours(True, tmp_path / "a")
    rewrite_tensors(tmp_path / "a", lambda t: t.update({KEY: t[KEY] / 0}))
    refused(tmp_path / "a", f"{KEY} holds values that are not finite")
    rewrite_tensors(tmp_path / "a", lambda t: t.update({KEY: t[KEY][:2].clone()}))
    refused(tmp_path / "a", f"{KEY} has shape (2, 32)")
    rewrite_tensors(tmp_path / "a", lambda t: t.pop(KEY))
    refused(tmp_path / "a", f"{KEY} is missing")


@pytest.mark.parametrize(
    "value", [[1, 1], [-1], ["a"], {"embed_tokens": [1], "lm_head": [2]}, {"embed_tokens": 4}, "x"]
)
def test_indices_that_make_no_sense_are_refused(value: Any, tmp_path: Path) -> None:
    ours(True, tmp_path / "a")
    rewrite(tmp_path / "a", trainable_token_indices=value)
    refused(tmp_path / "a", "trainable_token_indices")


def test_a_module_that_is_no_embedding_is_refused(tmp_path: Path) -> None:
    ours(True, tmp_path / "a")
    rewrite(tmp_path / "a", trainable_token_indices={"q_proj": [1]})
    refused(tmp_path / "a", "neither the embedding nor the output head")
