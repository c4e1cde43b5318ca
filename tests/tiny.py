"""Tiny real models and tokenizers on disk, and data files, for tests that run whole commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: one token a byte, and two special tokens. pad == eos, as in SmolLM2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<|im_start|>", "<|im_end|>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        model_max_length=512,
    )
    fast.chat_template = template
    return fast


def llama(seed: int = 0, layers: int = 2) -> LlamaForCausalLM:
    """A random Llama of 2 layers, width 32, tied embeddings: 258 tokens, as the tokenizer above."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,  # wide enough that logits can tell tokens apart
    )
    return LlamaForCausalLM(config).eval()


def write_model(directory: Path, seed: int = 0) -> Path:
    """The model and its tokenizer as a Hugging Face directory."""
    llama(seed).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def chat_row(question: str, answer: str) -> dict[str, Any]:
    """One `messages` row."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Rows as JSONL."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


LABELS = ("odd", "even")


def write_labelled(path: Path, count: int, names: tuple[str, ...] = LABELS) -> Path:
    """`count` texts whose label is told by a word in them, of differing lengths."""
    rows = [
        {"text": f"{n} is said to be {names[n % len(names)]}{'!' * (n % 5)}", "label": names[n % len(names)]}
        for n in range(count)
    ]
    return write_rows(path, rows)


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that writes [CLS] before a text and [SEP] behind it, as BERT's."""
    fast = tokenizer(None)
    backend = fast.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 0), ("<|im_end|>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="<|im_start|>", sep_token="<|im_end|>", pad_token="<|im_end|>",
        model_max_length=64,
    )  # fmt: skip


def bert(seed: int = 0) -> BertModel:
    """A random BERT of 2 layers, width 32, without a pooler: 258 tokens, 64 positions."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


def write_bert(directory: Path, seed: int = 0) -> Path:
    """The encoder and its tokenizer as a Hugging Face directory."""
    bert(seed).save_pretrained(directory)
    bert_tokenizer().save_pretrained(directory)
    return directory


def write_gpt2(directory: Path, positions: int = 64) -> Path:
    """A model with learned positions, as a Hugging Face directory."""
    config = GPT2Config(
        vocab_size=258, n_positions=positions, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1
    )
    GPT2LMHeadModel(config).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def write_chat(path: Path, count: int = 10) -> Path:
    """`count` short question and answer rows, of differing lengths."""
    return write_rows(
        path, [chat_row(f"What is {n} and {n * 7}?", f"{n + n * 7}{'!' * (n % 4)}") for n in range(count)]
    )
