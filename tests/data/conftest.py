"""Small real tokenizers: byte-level BPE trained on a few sentences, under templates of the kinds that are in use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]
CORPUS = [
    "The capital of France is Paris. The capital of Peru is Lima.",
    "Where is my card? Your card is on the way.\n\n\nThank you, the card is here.\n\n\n",
    "User: What is the answer?\nAssistant: The answer is Paris.\n\n\nUser: Thank you.",
] * 4

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (  # trims, writes BOS before every question, refuses system messages, a space before the end token
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% elif m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PLAIN_ROLES = (  # the generation prompt ends in a space, which byte-level BPE merges with the word after it
    "{% for m in messages %}{% if m['role'] == 'user' %}User: {{ m['content'] }}\n"
    "{% else %}Assistant: {{ m['content'] }}{{ eos_token }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def build() -> Callable[..., PreTrainedTokenizerFast]:
    """A tokenizer: (template, bos, eos, adds_bos). pad == eos."""

    def make(
        template: str | None = None, bos: str | None = "<s>", eos: str | None = "</s>", adds_bos: bool = False
    ) -> PreTrainedTokenizerFast:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
            show_progress=False,
        )
        backend.train_from_iterator(CORPUS, trainer)
        if adds_bos:
            backend.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(str(bos), backend.token_to_id(str(bos)))]
            )
        fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos)
        fast.chat_template = template
        return fast

    return make


@pytest.fixture(scope="session")
def chatml(build: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """As SmolLM2: bos is <|im_start|>, pad == eos == <|im_end|>."""
    return build(CHATML, bos="<|im_start|>", eos="<|im_end|>")


@pytest.fixture(scope="session")
def llama2(build: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """Trims, writes BOS itself although the tokenizer adds one too, refuses system messages."""
    return build(LLAMA2, adds_bos=True)


@pytest.fixture(scope="session")
def plain_roles(build: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """A generation prompt that ends in a space."""
    return build(PLAIN_ROLES)


@pytest.fixture(scope="session")
def bare(build: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """A base model's: no chat template, adds BOS."""
    return build(None, adds_bos=True)
