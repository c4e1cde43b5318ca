from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lorafit.config import MethodConfig
from lorafit.data.mask import prompt_ids
from lorafit.errors import DataError, NumericsError
from lorafit.infer import generate
from lorafit.infer.generate import Ability, Answer, Pieces, answer, decode, end_tokens, stream
from lorafit.methods import table
from lorafit.methods.virtual import lead_of
from tests import tiny
from tests.infer.learned import LEARNED, Learned

END = 1
TOKENIZER = tiny.tokenizer()


def ask(model: PreTrainedModel, prompts: list[list[int]], count: int | list[int] = 24, **settings: Any) -> list[Answer]:
    defaults: dict[str, Any] = {"batch_size": 32, "temperature": 0.0, "seed": 0, "on_answer": lambda: None}
    return answer(model, tiny.tokenizer(), prompts, max_new_tokens=count, **{**defaults, **settings})


def some_prompts(count: int, shared: int = 0, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 to 30 random tokens that are no special ones, after `shared` common ones."""
    draws = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 31, (count,), generator=draws).tolist()
    start = torch.randint(2, 258, (shared,), generator=draws).tolist()
    return [start + torch.randint(2, 258, (length,), generator=draws).tolist() for length in lengths]


def oracle(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """The slow, obvious way: the whole text again for every token."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + count:
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token == END:
                break
            ids.append(token)
    return ids[len(prompt) :]


def small(seed: int, config: Any, model_class: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = model_class(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)  # wide enough that logits can tell tokens apart
    return model  # type: ignore[no-any-return]  # the class is a parameter


SIZES = {"vocab_size": 258, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "llama": lambda: tiny.llama(),
    "learned positions": lambda: small(0, GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4), GPT2LMHeadModel),
    "alibi, no position_ids": lambda: small(
        0, BloomConfig(**SIZES, hidden_size=32, n_layer=2, n_head=4), BloomForCausalLM
    ),
    "sliding window": lambda: small(
        0,
        Gemma2Config(
            **SIZES, **WIDTHS, intermediate_size=48, num_key_value_heads=2, head_dim=8, sliding_window=8,
            max_position_embeddings=512,
        ),
        Gemma2ForCausalLM,
    ),
    "convolutions with a state": lambda: small(
        0,
        Lfm2Config(
            **SIZES, **WIDTHS, intermediate_size=48, num_key_value_heads=2, layer_types=["conv", "full_attention"],
            max_position_embeddings=512,
        ),
        Lfm2ForCausalLM,
    ),
    "recurrent, no past_key_values": lambda: small(
        0, MambaConfig(**SIZES, hidden_size=32, num_hidden_layers=2, state_size=4), MambaForCausalLM
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shared", [0, 20])
def test_an_answer_beside_others_is_the_answer_alone_and_the_slow_one(family: str, shared: int) -> None:
    model, prompts = FAMILIES[family](), some_prompts(7, shared)
    expected = [oracle(model, prompt, 12) for prompt in prompts]
    together = ask(model, prompts, 12)
    assert [got.ids for got in together] == expected
    assert [ask(model, [prompt], 12)[0] for prompt in prompts] == together
    assert ask(model, prompts, 12, batch_size=3) == together


@pytest.mark.parametrize(
    ("method", "variant"),
    [("lora", "dora"), ("adapter", "houlsby"), ("prefix", "p-tuning-v2"), ("prompt", "prompt"), ("ia3", "ia3")],
)
def test_under_every_kind_of_method_an_answer_beside_others_is_the_answer_alone(method: str, variant: str) -> None:
    model, prompts = tiny.llama(), some_prompts(7, shared=20)
    before = ask(model, prompts, 12)
    table.attach(model, MethodConfig(method=method, variant=variant, r=3, alpha=7.0, bottleneck=12, virtual_tokens=5))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in table.of(model).trainable(model).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    together = ask(model, prompts, 12)
    assert together != before
    assert [ask(model, [prompt], 12)[0] for prompt in prompts] == together
    assert [oracle(model, [*lead_of(model), *prompt], 12) for prompt in prompts] == [got.ids for got in together]


def test_abilities_are_read_off_the_architecture() -> None:
    found = {name: Ability.of(build()) for name, build in FAMILIES.items()}
    assert {name: (a.caches, a.pads, a.shares) for name, a in found.items()} == {
        "llama": (True, True, True),
        "learned positions": (True, True, True),
        "alibi, no position_ids": (True, True, True),
        "sliding window": (True, True, False),
        "convolutions with a state": (True, False, False),
        "recurrent, no past_key_values": (False, False, False),
    }


def test_a_shared_beginning_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny.llama(), some_prompts(5, shared=40)
    computed: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: computed.append(args[0].numel()))
    ask(model, prompts, 1)
    longest = max(map(len, prompts)) - 40
    assert sum(computed) == 40 + 5 * longest
    computed.clear()
    monkeypatch.setattr(generate, "LEAST_SHARED_TOKENS", 41)
    ask(model, prompts, 1)
    assert sum(computed) == 5 * (40 + longest)


def test_equal_prompts_get_equal_answers() -> None:
    prompt = some_prompts(1, shared=30)[0]
    assert len({tuple(got.ids) for got in ask(tiny.llama(), [prompt] * 3)}) == 1


def test_answers_end_at_the_end_token_although_it_is_the_pad_token(learned: Learned) -> None:
    prompts = [prompt_ids(example, learned.tokenizer) for example in learned.examples]
    done: list[int] = []
    learned.model.eval()
    got = ask(learned.model, prompts, 64, on_answer=lambda: done.append(1))
    assert [(a.text, a.ended) for a in got] == [(reply, True) for _, reply in LEARNED]
    assert all(END not in a.ids for a in got)
    assert len(done) == len(prompts)


def test_a_limit_ends_an_answer_and_says_so(learned: Learned) -> None:
    learned.model.eval()
    prompts = [prompt_ids(example, learned.tokenizer) for example in learned.examples]
    done: list[int] = []
    got = ask(learned.model, prompts, 3, on_answer=lambda: done.append(1))
    assert [(a.text, a.ended) for a in got] == [(reply[:3], False) for _, reply in LEARNED]
    assert len(done) == len(prompts)
    reply = LEARNED[2][1]  # one token a byte, and the end token is one more
    at_limit, above = (ask(learned.model, prompts[2:3], len(reply) + more)[0] for more in (0, 1))
    assert (at_limit.text, at_limit.ended) == (reply, False)
    assert (above.text, above.ended) == (reply, True)


def test_every_prompt_can_have_a_limit_of_its_own(learned: Learned) -> None:
    learned.model.eval()
    prompts = [prompt_ids(example, learned.tokenizer) for example in learned.examples]
    limits = [1 + 2 * n for n in range(len(prompts))]
    got = ask(learned.model, prompts, limits)
    assert got == [ask(learned.model, [prompt], limit)[0] for prompt, limit in zip(prompts, limits, strict=True)]
    assert {len(answer.ids) for answer in got} >= {1, 3}


def test_every_end_token_counts() -> None:
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    model.generation_config.eos_token_id = [1, 7]
    assert end_tokens(model, tokenizer) == {1, 7}
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = "<|im_start|>"  # as where the base's end of sequence is another token than the template's
    assert end_tokens(model, tokenizer) == {0, 1}
    prompt = some_prompts(1)[0]
    first = ask(model, [prompt])[0].ids[0]
    model.generation_config.eos_token_id = first
    assert ask(model, [prompt]) == [Answer([], "", True)]


def test_the_stream_is_the_answer(learned: Learned) -> None:
    learned.model.eval()
    for example, (_, reply) in zip(learned.examples, LEARNED, strict=True):
        prompt, pieces = prompt_ids(example, learned.tokenizer), Pieces(learned.tokenizer)
        tokens = stream(learned.model, learned.tokenizer, prompt, max_new_tokens=64, temperature=0.0, seed=0)
        parts = [pieces.push(token) for token in tokens]
        assert "".join(parts) + pieces.rest() == reply
        assert all("\ufffd" not in part for part in parts)


@given(st.lists(st.integers(0, 257), max_size=24))
def test_pieces_together_are_the_text_whatever_the_bytes(ids: list[int]) -> None:
    pieces = Pieces(TOKENIZER)
    assert "".join(map(pieces.push, ids)) + pieces.rest() == decode(TOKENIZER, ids)


@given(st.text(max_size=12))
def test_no_piece_holds_a_part_of_a_character(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    pieces = Pieces(TOKENIZER)
    parts = [pieces.push(token) for token in ids]
    assert "".join(parts) + pieces.rest() == text
    assert "\ufffd" in text or all("\ufffd" not in part for part in parts)


def test_pieces_keep_the_spaces_of_a_tokenizer_that_drops_the_first() -> None:
    tokens = ["<s>", "\u2581Hello", "\u2581you", "<0xE9>", "<0x9B>", "<0xA8>", "!"]
    backend = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    for ids in ([1, 2, 6], [1, 0, 2, 3, 4, 5, 2], [0, 1, 3, 4, 2], [3, 4]):
        pieces = Pieces(tokenizer)
        assert "".join(map(pieces.push, ids)) + pieces.rest() == decode(tokenizer, ids)
    assert decode(tokenizer, [1, 0, 2, 3, 4, 5, 2]) == "Hello you雨 you"


def test_drawn_answers_depend_on_seed_and_prompt_alone() -> None:
    model, prompts = tiny.llama(), some_prompts(4)
    one = ask(model, prompts, 10, temperature=1.0, seed=5)
    assert ask(model, prompts, 10, temperature=1.0, seed=5, batch_size=1) == one
    assert ask(model, prompts, 10, temperature=1.0, seed=6) != one
    assert ask(model, prompts, 10, temperature=1e-300, seed=6) == ask(model, prompts, 10)


def test_drawn_tokens_follow_the_chances() -> None:
    """400 draws of one token: each of the three likeliest appears as often as its chance says, within 5 deviations."""
    model, prompt = tiny.llama(), some_prompts(1)[0]
    with torch.no_grad():
        chances = (model(input_ids=torch.tensor([prompt])).logits[0, -1].double() / 0.7).softmax(-1)
    drawn = torch.tensor([got.ids[0] if got.ids else END for got in ask(model, [prompt] * 400, 1, temperature=0.7)])
    for token in chances.topk(3).indices:
        p = float(chances[token])
        deviation = (p * (1 - p) / 400) ** 0.5
        assert abs(float((drawn == token).double().mean()) - p) < 5 * deviation


def test_the_context_ends_an_answer_and_a_prompt_that_fills_it_is_refused() -> None:
    model = tiny.llama()
    ids = torch.randint(2, 258, (512,), generator=torch.Generator().manual_seed(0)).tolist()
    got = ask(model, [ids[:508], ids[:5]], 10)
    assert len(got[0].ids) == 4
    assert not got[0].ended
    assert len(got[1].ids) == 10
    with pytest.raises(DataError, match="a prompt of 512 tokens fills the model's context of 512"):
        ask(model, [ids])
    with pytest.raises(DataError, match="holds no tokens"):
        ask(model, [[]])


def test_a_broken_model_is_a_sentence() -> None:
    model = tiny.llama()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(NumericsError, match="not a number"):
        ask(model, some_prompts(2))


def test_no_prompts_no_answers() -> None:
    assert ask(tiny.llama(), []) == []
