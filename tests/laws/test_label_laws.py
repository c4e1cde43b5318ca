"""The laws of a head of labels beside every method, on a Llama by its last token and by the mean, and on a BERT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaModel,
)

from lorafit.config import METHOD_VARIANTS, MethodConfig
from lorafit.data.pack import micro_batches
from lorafit.data.store import Encoded, led
from lorafit.engine.engine import plain
from lorafit.errors import AdapterError, ConfigError
from lorafit.export import saved
from lorafit.export.merge import tolerance
from lorafit.infer.labels import scores_of
from lorafit.methods import table
from lorafit.methods.labels import IN_FRONT, LabelHead, Labels, engine_of, label_head, pooling_of, put_head
from lorafit.methods.virtual import lead_of
from lorafit.model import spec
from lorafit.plan.counts import method_params
from lorafit.train.labelled import standardise
from tests import tiny

NAMES = ("a", "b", "c")
BODIES = {"llama last": (tiny.llama, "last"), "llama mean": (tiny.llama, "mean"), "bert": (tiny.bert, "mean")}
CASES = [
    (body, method, variant)
    for body in BODIES
    for method, variants in METHOD_VARIANTS.items()
    for variant in variants
    if body == "llama last" or method not in IN_FRONT
    if body != "bert" or variant != "parallel"  # BERT has no module that is its whole MLP
]


def settings(method: str, variant: str) -> MethodConfig:
    return MethodConfig(method=method, variant=variant, bottleneck=12, virtual_tokens=5, r=3, alpha=7.0, seed=2)


def headed(body: str) -> nn.Module:
    return put_head(BODIES[body][0](), labels_of(body), seed=4)


def labels_of(body: str) -> Labels:
    """In the place of an output head there is no bias, as there."""
    pooling = BODIES[body][1]
    return Labels(NAMES, pooling, bias=pooling != "last")


def moved(model: nn.Module) -> nn.Module:
    """Trained by chance."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in table.of(model).trainable(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def rows(lengths: tuple[int, ...] = (9, 23, 14, 5, 40), shared: int = 0) -> list[Encoded]:
    """Tokens, and a label in the last cell. shared: tokens that all begin with."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for number, length in enumerate(lengths):
        ids = torch.randint(2, 258, (length + 1,), generator=generator).int().numpy()
        ids[:shared] = np.arange(20, 20 + shared)
        ids[-1] = number % len(NAMES)
        found.append(Encoded(ids, np.arange(length + 1) == length, length, f"row {number}", row=number))
    return found


def scores(model: nn.Module, given: list[Encoded], fast: bool = False) -> Tensor:
    engine = engine_of(model, share_prefix=True) if fast else replace(plain(model), chunked=True)
    found = scores_of(engine, given, 1000, lambda count: None)[0]
    engine.close()
    return found


def off(expected: Tensor, got: Tensor) -> float:
    return float((expected - got).norm() / expected.norm())


@pytest.mark.parametrize(("body", "method", "variant"), CASES)
def test_gradients_reach_the_head_and_the_method_and_nothing_else(body: str, method: str, variant: str) -> None:
    model = headed(body)
    attached = table.attach(model, settings(method, variant))
    moved(model)  # at the start one factor of a product is 0
    given = rows()
    engine = replace(plain(model), chunked=True)
    for batch in micro_batches(led(given, lead_of(model)), range(len(given)), 1000, engine.packing):
        engine.loss(batch).backward()
    own = {id(p) for p in table.of(model).trainable(model).values()}
    head = label_head(model)
    assert head is not None
    assert {id(p) for p in head.parameters()} <= own
    for name, parameter in model.named_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        rows_unused = name.endswith(("position_embeddings.weight", "token_type_embeddings.weight"))
        assert has_gradient == (id(parameter) in own) or rows_unused, name
    assert attached.trainable_params == sum(p.numel() for p in table.of(model).trainable(model).values())


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, spec.ModelSpec]:
    found = {}
    for name, (make, _) in BODIES.items():
        directory = tmp_path_factory.mktemp("body")
        make().save_pretrained(directory)
        found[name] = spec.read(str(directory))
    return found


@pytest.mark.parametrize(("body", "method", "variant"), CASES)
def test_the_plan_counts_what_is_trained(
    body: str, method: str, variant: str, specs: dict[str, spec.ModelSpec]
) -> None:
    config = settings(method, variant)
    attached = table.attach(headed(body), config)
    assert attached.trainable_params == method_params(specs[body], config, len(NAMES), labels_of(body).bias)
    assert attached.total_params == specs[body].parameters


@pytest.mark.parametrize(("body", "method", "variant"), CASES)
def test_saved_and_loaded_it_gives_the_same_scores(body: str, method: str, variant: str, tmp_path: Path) -> None:
    model, config = headed(body), settings(method, variant)
    table.attach(model, config)
    moved(model)
    expected = scores(model, rows())
    config = table.of(model).finish(model, config)
    labels = labels_of(body)
    saved.save(model, tmp_path / "adapter", config, "somewhere", None, labels)
    assert saved.labels_of(tmp_path / "adapter") == labels
    other = put_head(BODIES[body][0](), labels, seed=0)
    saved.load(other, tmp_path / "adapter")
    assert torch.equal(expected, scores(other, rows()))


def test_what_is_saved_is_loaded_strictly(tmp_path: Path) -> None:
    model, config = headed("bert"), settings("head", "head")
    table.attach(model, config)
    saved.save(model, tmp_path / "adapter", config, "somewhere", None, Labels(NAMES, "mean"))
    with pytest.raises(AdapterError, match="holds a head of 3 labels"):
        saved.load(tiny.bert(), tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"label_head\.weight has shape \(3, 32\), the model wants \(2, 32\)"):
        saved.load(put_head(tiny.bert(), Labels(("x", "y"), "mean"), 0), tmp_path / "adapter")


def test_a_head_of_standardised_features_is_folded_into_one_of_features_as_they_are() -> None:
    generator = torch.Generator().manual_seed(1)
    features = 3 * torch.randn(50, 32, generator=generator) + 10 * torch.randn(32, generator=generator)
    features[:, 5] = 4.0  # says nothing
    head = LabelHead(32, 3, seed=0)
    standardise(head, torch.split(features, 7), torch.tensor([0] * 40 + [1] * 9 + [2]))
    shares = head(features.mean(0)).softmax(0)
    assert torch.allclose(shares, torch.tensor([40.5, 9.5, 1.5]) / 51.5, atol=1e-5)
    wide = features.double()
    expected = (wide - wide.mean(0)) / wide.std(0, correction=0).where(torch.arange(32) != 5, 1.0)
    before = head(features).detach()
    assert off((expected.float() @ head.weight.T + head.bias).detach(), before) < 1e-5
    head.fold()
    assert head.standard is None
    # Scores are sums of 32 products of what is up to 10 deviations from 0: eps * sqrt(32) * 10.
    assert off(before, head(features).detach()) < 7e-6
    assert torch.isfinite(head.weight).all()


@pytest.mark.parametrize("body", BODIES)
def test_rows_together_give_what_rows_alone_give(body: str) -> None:
    model = headed(body)
    table.attach(model, settings("lora", "lora"))
    moved(model)
    given = rows()
    together = scores(model, given)
    alone = torch.cat([scores(model, [replace(row, row=0)]) for row in given])
    # Padding changes the order of sums alone: 2 layers and a head, each a few products of at most 48 terms in fp32.
    assert off(alone, together) < 1e-5


@pytest.mark.parametrize(("body", "shared"), [("llama last", 0), ("llama last", 12), ("llama mean", 0), ("bert", 0)])
def test_the_engine_gives_the_gradients_of_plain_rows(body: str, shared: int) -> None:
    model = headed(body)
    table.attach(model, settings("lora", "lora"))
    moved(model)
    given = rows((39, 33, 61, 22), shared)
    found = []
    fast = engine_of(model, share_prefix=True)
    assert fast.packing.padded == (body != "llama last")
    assert fast.groups
    assert not fast.notes
    fast.close()
    for make in (lambda: replace(plain(model), chunked=False), lambda: engine_of(model, share_prefix=True)):
        engine = make()
        for batch in micro_batches(given, range(len(given)), 120, engine.packing):
            engine.loss(batch).backward()
        engine.close()
        own = table.of(model).trainable(model)
        found.append(torch.cat([p.grad.flatten() for p in own.values() if p.grad is not None]))
        for parameter in own.values():
            parameter.grad = None
    assert off(found[0], found[1]) <= 1e-5  # what design asks of any two orders of the same sums
    if shared:
        batch = micro_batches(given, range(len(given)), 10_000, fast.packing)[0]
        assert batch.computed_tokens < batch.real_tokens - len(given)


def test_the_mean_is_that_of_all_tokens_and_cls_the_first() -> None:
    model = tiny.bert()
    given = rows((9, 23))
    with torch.no_grad():
        hidden = [model(input_ids=torch.from_numpy(row.input_ids[:-1].astype(np.int64))[None])[0][0] for row in given]
    for pooling, expected in (("mean", [h.mean(0) for h in hidden]), ("cls", [h[0] for h in hidden])):
        pooled = put_head(tiny.bert(), Labels(NAMES, pooling), seed=4)
        head = label_head(pooled)
        assert head is not None
        assert off(head(torch.stack(expected)).detach(), scores(pooled, given)) < 1e-5


@pytest.mark.parametrize("family", ["roberta", "distilbert", "gpt2"])
def test_positions_are_those_of_the_family(family: str) -> None:
    torch.manual_seed(0)
    small = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4}  # fmt: skip
    made = {
        "roberta": lambda: RobertaModel(
            RobertaConfig(**small, max_position_embeddings=66, pad_token_id=1), add_pooling_layer=False
        ),
        "distilbert": lambda: DistilBertModel(
            DistilBertConfig(vocab_size=258, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64)
        ),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    }
    model, given = made[family]().eval(), rows()
    body = getattr(model, "transformer", model) if family == "gpt2" else model
    with torch.no_grad():
        ids = [torch.from_numpy(row.input_ids[:-1].astype(np.int64))[None] for row in given]
        expected = torch.stack([body(input_ids=one)[0][0].mean(0) for one in ids])
    pooled = put_head(model, Labels(NAMES, "mean"), seed=4)
    head = label_head(pooled)
    assert head is not None
    assert off(head(expected).detach(), scores(pooled, given, fast=True)) < 1e-5


@pytest.mark.parametrize("body", BODIES)
def test_a_body_merged_under_its_head_gives_the_scores_of_the_unmerged_one(body: str) -> None:
    model = headed(body)
    table.attach(model, settings("lora", "lora"))
    moved(model)
    expected = scores(model, rows())
    table.of(model).merge(model)
    assert off(expected, scores(model, rows())) <= tolerance(model)


def test_scale_0_is_the_base_under_the_head() -> None:
    model = headed("bert")
    expected = scores(model, rows())
    table.attach(model, settings("lora", "lora"))
    assert torch.equal(expected, scores(model, rows()))
    with torch.no_grad():
        for name, parameter in table.of(model).trainable(model).items():
            if "label_head" not in name:
                parameter.add_(0.3)
    assert off(expected, scores(model, rows())) > 0.01
    table.of(model).set_scale(model, 0.0)
    assert torch.equal(expected, scores(model, rows()))


@pytest.mark.parametrize(
    ("wanted", "is_encoder", "method", "expected"),
    [("auto", True, "lora", "mean"), ("auto", False, "lora", "last"), ("auto", False, "head", "mean"),
     ("cls", True, "lora", "cls"), ("last", False, "prompt", "last")],
)  # fmt: skip
def test_what_pooling_is_by_default(wanted: str, is_encoder: bool, method: str, expected: str) -> None:
    assert pooling_of(wanted, is_encoder, method) == expected


@pytest.mark.parametrize(
    ("wanted", "is_encoder", "method", "said"),
    [("cls", False, "lora", "has seen no other"), ("mean", False, "prompt", "in front of a row"),
     ("auto", True, "prefix", "in front of a row")],
)  # fmt: skip
def test_pooling_that_would_read_something_else_is_refused(
    wanted: str, is_encoder: bool, method: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        pooling_of(wanted, is_encoder, method)
