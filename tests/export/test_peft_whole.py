"""Modules that an adapter replaces whole (modules_to_save): PEFT is the oracle, in eval, in merging, and back."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import peft as real_peft
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaForSequenceClassification

from lorafit import ship
from lorafit.config import MergeConfig
from lorafit.data.formats import read_examples
from lorafit.data.load import locate
from lorafit.data.mask import encode_all
from lorafit.errors import TargetError
from lorafit.export import peft
from lorafit.export.merge import merge_into_base, save_merged
from lorafit.infer.evaluate import model_loss
from lorafit.lora.inject import adapter_parameters, detach, merge, set_scale, unmerge
from lorafit.lora.whole import whole_modules
from tests import tiny
from tests.export.adapters import refused, rewrite, rewrite_tensors

IDS = torch.tensor([[5, 200, 7, 250, 9, 259]])
CASES = [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"], ["model.norm", "lm_head"], ["mlp.up_proj"]]


def base(tied: bool, rows: int = 258) -> Any:
    torch.manual_seed(5)
    config = tiny.llama().config
    config.tie_word_embeddings = tied
    model = LlamaForCausalLM(config).eval()
    if rows > 258:
        torch.manual_seed(8)
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def of_peft(model: Any, directory: Path, modules: list[str], **settings: Any) -> Any:
    """An adapter that PEFT made and saved, every trained tensor moved."""
    config = real_peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"], modules_to_save=modules, **settings
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = real_peft.get_peft_model(model, config).eval()
        torch.manual_seed(3)
        for parameter in dict.fromkeys(theirs.parameters()):
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape)
        theirs.save_pretrained(directory)
    return theirs


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids.clamp(max=257)).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("modules", CASES)
def test_logits_are_pefts_and_those_of_its_merged_model(tied: bool, modules: list[str], tmp_path: Path) -> None:
    theirs = of_peft(base(tied), tmp_path / "a", modules)
    ours = base(tied)
    peft.load(ours, tmp_path / "a")
    expected = logits(theirs)
    assert not torch.allclose(expected, logits(base(tied)), atol=1e-2)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(logits(theirs.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)
    merge_into_base(ours, tiny.tokenizer())
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4)
    save_merged(ours, tiny.tokenizer(), tmp_path / "merged", torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again), logits(ours))
    torn = tied and any("embed" in name or "head" in name for name in modules)
    still = again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert still == (tied and not torn)


def test_ties_that_peft_was_told_to_keep_are_kept(tmp_path: Path) -> None:
    theirs = of_peft(base(True), tmp_path / "a", ["embed_tokens"], ensure_weight_tying=True)
    ours = base(True)
    peft.load(ours, tmp_path / "a")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    assert [module.tied_to for module in whole_modules(ours).values()] == [None, "model.embed_tokens"]
    peft.save(ours, tmp_path / "b", peft.load(base(True), tmp_path / "a"), base="b", tokenizer=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = real_peft.PeftModel.from_pretrained(base(True), tmp_path / "b").eval()
    torch.testing.assert_close(logits(back), logits(ours), rtol=1e-5, atol=1e-5)
    merge_into_base(ours, None)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight and ours.config.tie_word_embeddings
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_that_was_made_larger_comes_along(tied: bool, tmp_path: Path) -> None:
    theirs = of_peft(base(tied, 262), tmp_path / "a", ["embed_tokens", "lm_head"])
    ours = base(tied)
    peft.load(ours, tmp_path / "a")
    with torch.no_grad():
        expected = theirs(input_ids=IDS).logits
        torch.testing.assert_close(ours(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
        base(tied).save_pretrained(tmp_path / "model")
        tiny.tokenizer().save_pretrained(tmp_path / "model")
        rewrite(tmp_path / "a", base_model_name_or_path=str(tmp_path / "model"))
        for way in (False, True):
            output = tmp_path / f"merged {way}"
            config = MergeConfig(run=str(tmp_path / "a"), output=str(output), stream=way)
            ship.merge(config, Console(file=io.StringIO()))
            again = AutoModelForCausalLM.from_pretrained(output)
            torch.testing.assert_close(again(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
            assert again.config.vocab_size == 262


def test_a_classifiers_head_with_layers_of_its_own_comes_along(tmp_path: Path) -> None:
    config = base(False).config
    config.num_labels, config.pad_token_id = 3, 1

    def classifier() -> Any:
        torch.manual_seed(6)
        model = LlamaForSequenceClassification(config).eval()
        model.score = nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 3))  # as other families have one
        return model

    theirs = of_peft(classifier(), tmp_path / "a", ["score"], task_type="SEQ_CLS")  # PEFT adds "classifier"
    ours = classifier()
    peft.load(ours, tmp_path / "a")
    assert list(whole_modules(ours)) == ["score.0", "score.2"]
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5])
def test_the_scale_goes_from_the_base_to_the_trained_parameters(scale: float, tmp_path: Path) -> None:
    of_peft(base(False), tmp_path / "a", ["lm_head"])
    ours = base(False)
    peft.load(ours, tmp_path / "a")
    own = whole_modules(ours)["lm_head"].get_parameter("own_weight").detach()
    original = ours.lm_head.base.weight.detach().clone()
    set_scale(ours, scale)
    expected = logits(ours)
    if scale == 0:
        assert torch.equal(expected, logits(base(False)))
    merge(ours)
    torch.testing.assert_close(ours.lm_head.base.weight, original + scale * (own - original))
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4)
    set_scale(ours, 1.0)  # merged again, from the original
    assert torch.equal(ours.lm_head.base.weight, own)
    unmerge(ours)
    detach(ours)
    assert torch.equal(ours.lm_head.weight, original)


def test_what_is_saved_is_pefts_and_comes_back(tmp_path: Path) -> None:
    of_peft(base(True), tmp_path / "a", ["lm_head"])
    ours = base(True)
    config = peft.load(ours, tmp_path / "a")
    peft.save(ours, tmp_path / "b", config, base="b", tokenizer=None)
    back = base(True)
    peft.load(back, tmp_path / "b")
    assert torch.equal(logits(back), logits(ours))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = real_peft.PeftModel.from_pretrained(base(True), tmp_path / "b").eval()
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-5, atol=1e-5)


def test_the_loss_is_measured_with_the_head_that_was_saved(tmp_path: Path) -> None:
    of_peft(base(True), tmp_path / "a", ["lm_head", "up_proj", "model.norm"])
    ours, plain, untuned = (base(True).requires_grad_(False) for _ in range(3))
    peft.load(ours, tmp_path / "a")
    peft.load(plain, tmp_path / "a")
    merge_into_base(plain, None)
    rows = locate(str(tiny.write_chat(tmp_path / "rows.jsonl", 6))).unseen().rows()
    encoded = encode_all(read_examples(rows), tiny.tokenizer(), 512)
    expected = model_loss(plain, encoded.encoded, 200)
    assert model_loss(ours, encoded.encoded, 200) == pytest.approx(expected, rel=1e-5)
    set_scale(ours, 0)
    assert model_loss(ours, encoded.encoded, 200) == pytest.approx(model_loss(untuned, encoded.encoded, 200), rel=1e-6)
    assert abs(model_loss(ours, encoded.encoded, 200) - expected) > 1e-2


# --- refused --------------------------------------------------------------------------------------------------------


def test_what_is_damaged_is_refused_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    of_peft(base(False), tmp_path / "a", ["lm_head"])
    key = "base_model.model.lm_head.weight"

    def again(change: Any, sentence: str) -> None:
        of_peft(base(False), tmp_path / "a", ["lm_head"])
        rewrite_tensors(tmp_path / "a", change)
        refused(tmp_path / "a", sentence, base(False))

    again(lambda tensors: tensors.pop(key), f"{key} is missing")
    again(lambda tensors: tensors.update({key: tensors[key][:, :5].clone()}), f"{key} has shape (258, 5)")
    again(lambda tensors: tensors[key].fill_(float("inf")), f"{key} holds values that are not finite")
    of_peft(base(False), tmp_path / "a", ["lm_head"])
    rewrite(tmp_path / "a", modules_to_save=["score"])
    refused(tmp_path / "a", "modules_to_save names score, and the model has no such module", base(False))
    rewrite(tmp_path / "a", modules_to_save="lm_head")
    refused(tmp_path / "a", "adapter_config.json has modules_to_save = 'lm_head'", base(False))


def test_a_module_that_is_adapted_and_replaced_is_refused(tmp_path: Path) -> None:
    of_peft(base(False), tmp_path / "a", ["lm_head"])
    rewrite(tmp_path / "a", target_modules=["q_proj", "v_proj", "lm_head"])
    model = base(False)
    with pytest.raises(TargetError, match="lm_head is adapted, and is to be replaced as well"):
        peft.load(model, tmp_path / "a")
    assert not adapter_parameters(model)
