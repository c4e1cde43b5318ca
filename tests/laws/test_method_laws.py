"""The laws of every method that is no update of a weight, with each of its variants, on a Llama and a GPT-2.

A pass is held against another that computes the same in another order: each logit is the end of a chain of L layers, so
they are off by at most `tolerance` of their norm (export/merge.py derives it).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lorafit.config import METHOD_VARIANTS, MethodConfig, TrainConfig, usual_rate
from lorafit.data.pack import micro_batches
from lorafit.data.store import Encoded, led
from lorafit.engine.engine import plain, prepare
from lorafit.errors import AdapterError, ConfigError, MergeError, TargetError
from lorafit.export import saved
from lorafit.export.merge import merge_into_base, save_merged, tolerance
from lorafit.methods import table
from lorafit.methods.method import Beginning
from lorafit.methods.virtual import lead_of
from lorafit.model import spec
from lorafit.model.spec import ModelSpec
from lorafit.plan.counts import method_params
from tests import tiny

# A head alone has laws of its own, with labels beside every method: test_label_laws.py.
OWN_LAWS = ("lora", "head")
CASES = [(m, variant) for m, variants in METHOD_VARIANTS.items() for variant in variants if m not in OWN_LAWS]
VIRTUAL = ("prefix", "prompt")
WITHOUT_MERGING = ("adapter", "prefix", "prompt")
IDS = torch.randint(2, 258, (2, 9), generator=torch.Generator().manual_seed(3))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=258, n_positions=256, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
    return model


MODELS = {"llama": tiny.llama, "gpt2": gpt2}


def settings(method: str, variant: str) -> MethodConfig:
    return MethodConfig(method=method, variant=variant, bottleneck=12, virtual_tokens=5, r=3, alpha=7.0, seed=2)


def moved(model: nn.Module) -> nn.Module:
    """Trained by chance: every trained number is another one."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in table.of(model).trainable(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    lead = torch.tensor(lead_of(model), dtype=torch.int64).expand(len(IDS), -1)
    out: Tensor = model(input_ids=torch.cat([lead, IDS], dim=1), use_cache=False).logits
    return out[:, lead.shape[1] :]


def relative(expected: Tensor, got: Tensor) -> float:
    return float((expected - got).norm() / expected.norm())


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> nn.Module:
    return MODELS[request.param]()


@pytest.mark.parametrize(("method", "variant"), CASES)
def test_a_fresh_one_changes_nothing_and_scale_0_is_the_base_bitwise(
    model: nn.Module, method: str, variant: str
) -> None:
    before = logits(model)
    attached = table.attach(model, settings(method, variant))
    if method not in VIRTUAL:
        assert torch.equal(before, logits(model))
    if method == "full":
        return  # what the weights were is kept where a run is loaded, see below
    moved(model)
    assert relative(before, logits(model)) > 0.01
    table.of(model).set_scale(model, 0.0)
    assert torch.equal(before, logits(model))
    assert attached.trainable_params == sum(p.numel() for p in table.of(model).trainable(model).values())


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSpec]:
    found = {}
    for name, make in MODELS.items():
        directory = tmp_path_factory.mktemp(name)
        make().save_pretrained(directory)
        found[name] = spec.read(str(directory))
    return found


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize(("method", "variant"), CASES)
def test_the_plan_counts_what_is_trained(name: str, method: str, variant: str, specs: dict[str, ModelSpec]) -> None:
    config = settings(method, variant)
    attached = table.attach(MODELS[name](), config)
    assert attached.trainable_params == method_params(specs[name], config)


@pytest.mark.parametrize(("method", "variant"), CASES)
def test_gradients_reach_all_of_it_and_nothing_else(model: nn.Module, method: str, variant: str) -> None:
    table.attach(model, settings(method, variant))
    moved(model)  # at the start one factor of a product is 0
    lead = lead_of(model)
    ids = torch.cat([torch.tensor(lead, dtype=torch.int64).expand(2, -1), IDS], dim=1)
    model(input_ids=ids, use_cache=False).logits[:, len(lead) :].logsumexp(-1).sum().backward()
    own = {id(p) for p in table.of(model).trainable(model).values()}
    for name, parameter in model.named_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert has_gradient == (id(parameter) in own), name


@pytest.mark.parametrize(("method", "variant"), CASES)
def test_saved_and_loaded_it_gives_the_same_logits(
    model: nn.Module, method: str, variant: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    name = "gpt2" if isinstance(model, GPT2LMHeadModel) else "llama"
    config = settings(method, variant)
    before = logits(model)
    table.attach(model, config)
    moved(model)
    expected = logits(model)
    config = table.of(model).finish(model, config)
    saved.save(model, tmp_path / "adapter", config, base="somewhere", tokenizer=None)
    other = MODELS[name]()
    saved.load(other, tmp_path / "adapter")
    assert torch.equal(expected, logits(other))
    assert saved.base_of(tmp_path / "adapter") == "somewhere"
    table.of(other).set_scale(other, 0.0)
    assert torch.equal(before, logits(other))
    table.of(other).set_scale(other, 1.0)
    assert torch.equal(expected, logits(other))


@pytest.mark.parametrize(("method", "variant"), CASES)
def test_a_damaged_file_is_refused(method: str, variant: str, tmp_path: Path) -> None:
    model = tiny.llama()
    config = settings(method, variant)
    table.attach(model, config)
    config = table.of(model).finish(model, config)
    saved.save(model, tmp_path / "adapter", config, base="", tokenizer=None)
    weights = tmp_path / "adapter" / saved.WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(AdapterError, match=r"method\.safetensors"):
        saved.load(tiny.llama(), tmp_path / "adapter")


@pytest.mark.parametrize(("method", "variant"), [case for case in CASES if case[0] not in (*WITHOUT_MERGING, "full")])
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_merged_equals_unmerged_and_unmerging_is_bitwise(
    model: nn.Module, method: str, variant: str, scale: float
) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    table.attach(model, settings(method, variant))
    moved(model)
    own = table.of(model)
    own.set_scale(model, scale)
    expected = logits(model)
    if method == "bitfit" and not isinstance(model, GPT2LMHeadModel):
        with pytest.raises(MergeError, match="no bias"):
            own.merge(model)
        return
    own.merge(model)
    assert relative(expected, logits(model)) <= tolerance(model)
    own.unmerge(model)
    trained = {id(p) for p in own.trainable(model).values()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in trained:
            assert torch.equal(before[name.replace(".base.", ".")], parameter), name


@pytest.mark.parametrize(("method", "variant"), [case for case in CASES if case[0] not in WITHOUT_MERGING])
def test_merged_it_is_a_plain_model_of_the_same_logits(
    model: nn.Module, method: str, variant: str, tmp_path: Path
) -> None:
    if method == "bitfit" and not isinstance(model, GPT2LMHeadModel):
        return
    plain_names = set(model.state_dict())
    table.attach(model, settings(method, variant))
    expected, changed = logits(moved(model)), table.changed_names(model)
    assert changed <= plain_names and changed
    found = merge_into_base(model, None)
    assert found.explained
    assert set(model.state_dict()) == plain_names
    assert relative(expected, logits(model)) <= tolerance(model)
    save_merged(model, None, tmp_path / "merged", torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(model), logits(again.eval()))


@pytest.mark.parametrize(("method", "variant"), [case for case in CASES if case[0] in WITHOUT_MERGING])
def test_what_cannot_be_merged_says_so_and_leaves_all_as_it_was(model: nn.Module, method: str, variant: str) -> None:
    table.attach(model, settings(method, variant))
    expected = logits(moved(model))
    with pytest.raises(MergeError):
        table.of(model).merge(model)
    assert torch.equal(expected, logits(model))


@pytest.mark.parametrize(("method", "variant"), [case for case in CASES if case[0] in VIRTUAL])
def test_virtual_tokens_are_there_or_not(method: str, variant: str) -> None:
    model = tiny.llama()
    table.attach(model, settings(method, variant))
    assert len(lead_of(model)) == 5
    with pytest.raises(ConfigError, match=r"--scale 0\.5"):
        table.of(model).set_scale(model, 0.5)


@pytest.mark.parametrize(("method", "variant"), CASES)
def test_a_second_one_is_refused(method: str, variant: str) -> None:
    model = tiny.llama()
    table.attach(model, settings("ia3", "ia3"))
    with pytest.raises(TargetError, match="adapter already"):
        table.attach(model, settings(method, variant))


@pytest.mark.parametrize(("method", "variant"), CASES)
def test_the_engine_gives_the_loss_and_gradients_of_plain_rows(model: nn.Module, method: str, variant: str) -> None:
    generator = torch.Generator().manual_seed(5)
    table.attach(model, settings(method, variant))
    moved(model)
    rows = []
    for length in (40, 33, 61, 12):  # they share 10 tokens
        ids = torch.randint(2, 258, (length,), generator=generator).int().numpy()
        ids[:10] = torch.arange(20, 30).numpy()
        supervised = torch.rand(length, generator=generator).numpy() > 0.4
        supervised[0], supervised[-1] = False, True
        rows.append(Encoded(ids, supervised, 0, "here"))
    given = led(rows, lead_of(model))
    found = []
    for engine in (plain(model), prepare(model, share_prefix=True)):
        total = 0.0
        for batch in micro_batches(given, range(len(rows)), 120, engine.packing):
            loss = engine.loss(batch)
            loss.backward()
            total += float(loss.detach())
        gradients = {}
        for name, parameter in table.of(model).trainable(model).items():
            assert parameter.grad is not None, name
            gradients[name] = parameter.grad.clone()
            parameter.grad = None
        found.append((total, gradients))
    (expected, by_plain), (got, by_engine) = found
    assert got == pytest.approx(expected, rel=1e-5)
    whole = torch.cat([g.flatten() for g in by_plain.values()])
    off = torch.cat([(by_engine[name] - by_plain[name]).flatten() for name in by_plain])
    assert float(off.norm() / whole.norm()) <= 1e-5  # what design asks of any two orders of the same sums


def test_keys_and_values_start_as_those_of_the_text() -> None:
    model = tiny.llama()
    config = settings("prefix", "p-tuning-v2")
    text = [7, 11, 13, 17, 19]
    with torch.no_grad():
        expected: Tensor = model(input_ids=torch.cat([torch.tensor([text]).expand(2, -1), IDS], 1)).logits[:, 5:]
    table.attach(model, config)
    beginning = Beginning(config, ModelSpec.__new__(ModelSpec), text, "a text")
    assert table.of(model).start(model, beginning) == ["keys and values start as those of a text"]
    # With the keys and values of real tokens in front, rows read what they would read behind those tokens.
    assert relative(expected, logits(model)) <= tolerance(model)


def test_every_default_rate_is_for_a_method_that_there_is() -> None:
    rates = {
        method: TrainConfig(model="m", data="d", output="o", method=method).peak_rate for method in METHOD_VARIANTS
    }
    assert rates["full"] < rates["lora"] < rates["prompt"]
    assert TrainConfig(model="m", data="d", output="o", method="full", lr=5e-3).peak_rate == 5e-3
    some_blocks = TrainConfig(model="m", data="d", output="o", method="full", layers="last:2")
    assert rates["full"] < some_blocks.peak_rate == usual_rate("full", in_part=True)
    assert usual_rate("lora", in_part=True) == rates["lora"]
    assert METHOD_VARIANTS.keys() == table.METHODS.keys()
