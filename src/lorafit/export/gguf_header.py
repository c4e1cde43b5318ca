"""What stands in a GGUF file before its tensors, of a transformers model: sizes, positions, tokenizer, chat template.

The other way round of `model/gguf_config.py` and `model/gguf_tokenizer.py`. Source: llama.cpp's conversion/*.py.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorafit.errors import ModelError
from lorafit.export import gguf_limits
from lorafit.export.gguf_chat import write_chat
from lorafit.model.gguf_config import ROPE_FREQS, llama3_divisors
from lorafit.model.gguf_tokenizer import CONTROL, NAMED, SPACE, SPLITS, USER_DEFINED

NORMAL, UNKNOWN, UNUSED, BYTE = 1, 2, 5, 6  # tokenizer.ggml.token_type


def write_header(writer: Any, config: Any, architecture: str, tokenizer: Any) -> dict[str, NDArray[np.float32]]:
    """Everything but tensors. config: of the text model. Returns tensors that belong to it, by name.

    Raises ModelError for positions or a tokenizer that cannot be stated in such a file.
    """
    gguf_limits.check(config, architecture)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(gguf_limits.context_length(config, architecture))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if architecture == "llama":
        writer.add_rope_dimension_count(head_dim)
    if architecture != "qwen2":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    _write_tokenizer(writer, tokenizer, config.vocab_size)
    return _write_positions(writer, config, head_dim)


def _write_positions(writer: Any, config: Any, head_dim: int) -> dict[str, NDArray[np.float32]]:
    import gguf

    rope = dict(config.rope_parameters)
    rope = rope.get("full_attention", rope)
    kind = rope.get("rope_type", "default")
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "llama3":
        return {ROPE_FREQS: llama3_divisors(rope["rope_theta"], head_dim, rope).astype(np.float32)}
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if kind not in ("default", "linear", "yarn"):
        raise ModelError(
            f"the model scales its rotary positions by {kind!r}, which is not written to a GGUF file here",
            "Merge it into a plain model, and convert that with llama.cpp",
        )
    return {}


# --- the tokenizer --------------------------------------------------------------------------------------------------


def _write_tokenizer(writer: Any, tokenizer: Any, rows: int) -> None:
    stated = json.loads(tokenizer.backend_tokenizer.to_str())
    model = stated["model"]
    if model.get("type") != "BPE":
        raise _unknown(f"a {model.get('type')} model")
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    tokens, kinds = _tokens(tokenizer, rows)
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_prepends(stated.get("normalizer")))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_name(stated.get("pre_tokenizer")))
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    write_chat(writer, tokenizer)
    for name, key in NAMED.items():
        number = getattr(tokenizer, f"{name}_id", None)
        if number is not None:
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", number)


def _tokens(tokenizer: Any, rows: int) -> tuple[list[str], list[int]]:
    """(texts, types) of all tokens that the model has a row for. Raises ModelError for one beyond."""
    vocabulary = tokenizer.get_vocab()
    if vocabulary and max(vocabulary.values()) >= rows:
        raise ModelError(f"the tokenizer has tokens beyond the model's {rows:,}", "Are they of one model?")
    texts = [f"[PAD{number}]" for number in range(rows)]
    kinds = [UNUSED] * rows
    added = tokenizer.added_tokens_decoder
    for text, number in vocabulary.items():
        texts[number] = text
        is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        kinds[number] = BYTE if is_byte else NORMAL
    for number, token in added.items():
        kinds[number] = CONTROL if token.special else USER_DEFINED
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in added:
        kinds[tokenizer.unk_token_id] = UNKNOWN
    return texts, kinds


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """The better the merged piece, the earlier its merge: what llama.cpp merges by where a file lists no merges."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _prepends(normalizer: Any) -> bool:
    """Whether a space is put in front of a text."""
    parts = (normalizer or {}).get("normalizers", [normalizer or {}])
    return any(part.get("type") == "Prepend" and part.get("prepend") == SPACE for part in parts)


def _split_name(pre_tokenizer: Any) -> str:
    """llama.cpp's name of how a text is cut. Raises ModelError for a way that it has no name for."""
    parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    kinds = [part.get("type") for part in parts]
    wanted: str | None = None
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        wanted = "gpt2"
    elif kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        wanted = "digits"
    elif kinds == ["Split", "ByteLevel"]:
        wanted = parts[0].get("pattern", {}).get("Regex")
    found = next((name for name, split in SPLITS.items() if split == wanted), None)
    if found is None or any(part.get("add_prefix_space") for part in parts):
        raise _unknown(f"a way to cut texts ({', '.join(map(str, kinds))})")
    return found


def _unknown(what: str) -> ModelError:
    return ModelError(
        f"the tokenizer has {what} that is not written to a GGUF file here",
        "Merge it into a plain model, and convert that with llama.cpp",
    )
