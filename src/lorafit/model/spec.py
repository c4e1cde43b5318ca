"""What a model is, from its headers alone: config.json and safetensors, or a GGUF file. No torch, no transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

from lorafit import files
from lorafit.errors import DataError, ModelError
from lorafit.model import gguf_config, gguf_header, gguf_names, safetensors_header
from lorafit.model.find import CONFIG, INDEX, INSTALLED, has_weights, read_json, resolve, weight_files
from lorafit.model.shapes import shapes_of

__all__ = ["INSTALLED", "ModelSpec", "describe", "read", "resolve", "sha256"]

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "spiece.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
ALIASES = {  # field -> the names it has in config.json, by family
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "intermediate": ("intermediate_size", "n_inner", "d_ff", "ffn_dim", "hidden_dim", "ffn_hidden_size"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "head_dim": ("head_dim", "d_kv"),
    "vocab": ("vocab_size",),
    "max_positions": ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx"),
}
GENERATING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # how classes that write text end
OUTPUT_WEIGHTS = ("lm_head.weight", "embed_out.weight", "output.weight")
# Modules that learn a vector for each position, and have none beyond the last.
OF_POSITIONS = ("wpe", "embed_positions", "position_embeddings")
BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".position_ids")  # stored by older versions


@dataclass(frozen=True)
class ModelSpec:
    """The facts of a model that planning and hashing need.

    name: as the user typed it. architecture: transformers' model_type, or llama.cpp's name where it has no other.
    Sizes are 0 where they do not apply. parameters: exact, tied ones once. weight_bytes: of the tensors as stored.
    storage: dtype or GGUF type -> parameters stored so. files: what defines the model, for hashing.
    tensors: parameter name (transformers' where known) -> shape. config: config.json, or the header as one.
    """

    name: str
    path: Path
    kind: Literal["hf", "gguf"]
    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    tied: bool
    parameters: int
    weight_bytes: int
    storage: Mapping[str, int]
    files: tuple[Path, ...]
    tensors: Mapping[str, tuple[int, ...]] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)

    @property
    def writes_text(self) -> bool:
        """Whether its config names a class that generates; an encoder gives hidden states alone."""
        stated = self.config.get("architectures") or []
        return self.kind == "gguf" or not stated or any(str(name).endswith(GENERATING) for name in stated)

    @property
    def most_tokens(self) -> int | None:
        """Of a row, where positions are learned; None where they are computed, and rows may be longer than stated."""
        learned = any(name.split(".")[-2:-1] == [one] for name in self.tensors for one in OF_POSITIONS)
        return self.max_positions or None if learned else None


def too_long(tokens: int, most: int, lead: int = 0, row: str = "the longest row") -> DataError:
    """What to say of a row of so many tokens, of which `lead` are virtual, where there are positions for `most`."""
    has = f"{tokens:,} tokens" + (f", {lead} virtual ones among them" if lead else "")
    return DataError(
        f"{row} has {has}, and the model has learned positions for {most:,}",
        f"Give --seq-len {most - lead}: longer rows are cut there, and those cut are counted",
    )


def read(model: str) -> ModelSpec:
    """Find `model` and read its headers. Raises ModelError if it is missing, damaged, pickled or quantized."""
    path = resolve(model)
    return _read_gguf(model, path) if path.is_file() else _read_hf(model, path)


def describe(model: str) -> ModelSpec:
    """As `read`; of a directory or a config.json without weights what its config says. Its storage is then empty.

    Raises ModelError as `read` does, and for a family whose shapes are not known from a config.
    """
    path = Path(model).expanduser()
    directory = path.parent if path.name == CONFIG else path
    if (directory / CONFIG).is_file() and not has_weights(directory):
        config = read_json(directory / CONFIG)
        text = _text_config(config)
        tensors = shapes_of(text, str(text.get("model_type") or config.get("model_type")))
        return _spec(model, directory, "hf", config, tensors, storage={}, weight_bytes=0, files=())
    return read(model)


def sha256(spec: ModelSpec) -> str:
    """One hash over the weights, the config and the tokenizer; of a GGUF that of the file."""
    return files.sha256_all(list(spec.files))


def _read_gguf(model: str, path: Path) -> ModelSpec:
    header = gguf_header.read_header(path)
    weights = {n: info for n, info in header.tensors.items() if n not in gguf_names.NOT_PARAMETERS}
    tensors = {gguf_names.hf_name(header.architecture, n) or n: info.shape for n, info in weights.items()}
    return _spec(
        model, path, "gguf", gguf_config.config_dict(header), tensors,
        storage=_tally((info.type, info.shape) for info in weights.values()),
        weight_bytes=sum(info.nbytes for info in header.tensors.values()), files=(path,),
    )  # fmt: skip


def _read_hf(model: str, path: Path) -> ModelSpec:
    config = read_json(path / CONFIG)
    _refuse_quantized(path, config)
    weights = weight_files(path)
    entries = {n: entry for file in weights for n, entry in safetensors_header.read_header(file).items()}
    parameters = {n: entry for n, entry in entries.items() if not n.endswith(BUFFERS)}
    index = (path / INDEX,) if (path / INDEX).is_file() else ()
    tokenizer = tuple(path / n for n in TOKENIZER_FILES if (path / n).is_file())
    return _spec(
        model, path, "hf", config, {n: entry.shape for n, entry in parameters.items()},
        storage=_tally((entry.dtype, entry.shape) for entry in parameters.values()),
        weight_bytes=sum(entry.nbytes for entry in entries.values()),
        files=(*weights, *index, path / CONFIG, *tokenizer),
    )  # fmt: skip


def _spec(
    model: str, path: Path, kind: Literal["hf", "gguf"], config: dict[str, Any], tensors: dict[str, tuple[int, ...]],
    storage: dict[str, int], weight_bytes: int, files: tuple[Path, ...],
) -> ModelSpec:  # fmt: skip
    text = _text_config(config)
    architecture = text.get("model_type") or config.get("model_type")
    if not isinstance(architecture, str):
        raise ModelError(f"{path / CONFIG} states no model_type", "Give the directory of a Transformers model")
    sizes = {name: _first_size(text, aliases) for name, aliases in ALIASES.items()}
    sizes = _derived(sizes, tensors)
    tied = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", _has_no_output(tensors))))
    return ModelSpec(
        name=model, path=path, kind=kind, architecture=architecture, **sizes, tied=tied,
        parameters=_count(tensors, tied), weight_bytes=weight_bytes, storage=storage, files=files,
        tensors=tensors, config=config,
    )  # fmt: skip


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _first_size(config: Mapping[str, Any], aliases: tuple[str, ...]) -> int:
    values = [config[alias] for alias in aliases if isinstance(config.get(alias), int)]
    return int(values[0]) if values else 0


def _derived(sizes: dict[str, int], tensors: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Fill in what config.json leaves to its class: by the shape of layer 0's projections, then by the usual ratios."""
    rows = {n.rsplit(".", 2)[-2]: shape[0] for n, shape in tensors.items() if ".0." in n and n.endswith(".weight")}
    head_dim = sizes["head_dim"] or rows.get("q_norm", 0)
    if not sizes["heads"] and head_dim:
        sizes["heads"] = rows.get("q_proj", 0) // head_dim
    head_dim = head_dim or (sizes["hidden"] // sizes["heads"] if sizes["heads"] else 0)
    from_rows = rows["k_proj"] // head_dim if "k_proj" in rows and head_dim else sizes["heads"]
    vocab = next((shape[0] for n, shape in tensors.items() if n.endswith(("embed_tokens.weight", "wte.weight"))), 0)
    return sizes | {
        "head_dim": head_dim,
        "kv_heads": sizes["kv_heads"] or from_rows,
        "intermediate": sizes["intermediate"] or rows.get("gate_proj", 0) or 4 * sizes["hidden"],
        "vocab": sizes["vocab"] or vocab,
    }


def _has_no_output(tensors: Iterable[str]) -> bool:
    return not any(name in OUTPUT_WEIGHTS for name in tensors)


def _count(tensors: Mapping[str, tuple[int, ...]], tied: bool) -> int:
    counted = {n: shape for n, shape in tensors.items() if not (tied and n in OUTPUT_WEIGHTS)}
    return sum(prod(shape) for shape in counted.values())


def _tally(stored: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for kind, shape in stored:
        counts[kind] += prod(shape)
    return dict(counts.most_common())


def _refuse_quantized(path: Path, config: Mapping[str, Any]) -> None:
    quantized = config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else quantized
        raise ModelError(
            f"{path} is quantized by {method}, which is not read here",
            "Use the unquantized model, or a .gguf of it; --base-storage quantizes while loading",
        )
