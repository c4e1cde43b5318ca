"""A model and its tokenizer in memory: safetensors directories by transformers, GGUF files by our own reader.

GGUF goes its own way for speed: SmolLM2-135M takes transformers about 14 s and its tokenizer 4 s.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from lorafit.errors import ModelError, listed
from lorafit.model import gguf_config, gguf_header, gguf_tensors, gguf_tokenizer
from lorafit.model.keep import Kept, linear_weights, placeholder, put_stored, quantized_tensors, slab_tensors
from lorafit.model.skeleton import Skeleton, build
from lorafit.model.spec import ModelSpec
from lorafit.quant.codecs import CODECS
from lorafit.quant.stored import Stored
from lorafit.slabs import SLABS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

GENERATING = ("ForCausalLM", "LMHeadModel")  # how the classes of causal language models end
UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, AttributeError, StrictDataclassError)
MAX_REASON = 300  # characters of a foreign error message
REPORTED = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # `_check_keys` raises, with the names
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# What encoders have behind their hidden states: for a sentence's first token, and for words left out.
BEHIND = re.compile(r"(?:^|\.)(?:pooler|cls|lm_head|classifier|score|vocab_\w+)\.")
UNSET_LENGTH = 10**20  # transformers' model_max_length is 1e30 where nobody set it


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, its tokenizer, and the spec both were read by. kept: what of it stays in fewer bits."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: ModelSpec
    kept: Kept | None = None


def load(
    spec: ModelSpec,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    storage: str = "auto",
    decoded: bool = False,
    features: bool = False,
) -> Loaded:
    """Read the weights into `dtype` and build the tokenizer. Nothing is downloaded.

    storage: of the matrices, which are computed with in `dtype`: `auto` in that type, `keep` in a GGUF file's blocks,
    `nf4` or `int8` for a Hugging Face model. decoded: they are stored so and decoded at once, which gives the same
    numbers, faster, in more memory. features: a model that writes no text will do, such as an encoder; what it gives
    are hidden states. Code that comes with a model runs only if `trust_remote_code`. Raises
    ModelError if the checkpoint and the architecture disagree about a parameter, if the model is no causal language
    model, if it needs its own code, or if it can't be stored so.
    """
    _refuse_own_code(spec, trust_remote_code)
    with _quiet():
        if features and is_encoder(spec):
            return _load_encoder(spec, dtype, trust_remote_code, storage)
        if spec.kind == "hf":
            return _load_hf(spec, dtype, trust_remote_code, storage, decoded)
        return _load_gguf(spec, dtype, "auto" if storage == "keep" and decoded else storage)


def is_encoder(spec: ModelSpec) -> bool:
    """Whether a model gives hidden states and writes no text. Raises ModelError for one that has a decoder as well."""
    if spec.kind == "gguf" or spec.config.get("model_type") not in transformers.CONFIG_MAPPING:
        return False
    config = _explained(spec, "config", lambda: transformers.AutoConfig.from_pretrained(spec.path))
    if config.is_encoder_decoder:
        raise ModelError(
            f"{spec.name} has an encoder and a decoder ({spec.architecture})", "Give one that has one of them"
        )
    return not _generates(config)


def _load_encoder(spec: ModelSpec, dtype: torch.dtype, trust_remote_code: bool, storage: str) -> Loaded:
    """An encoder as transformers builds it, without the layer behind it that some pool with (`pooling` does that)."""
    if storage != "auto":
        raise _not_so(spec, storage, "is an encoder, whose weights stay as they are", "Leave --base-storage out")

    def read() -> Any:
        config = transformers.AutoConfig.from_pretrained(spec.path, local_files_only=True)
        own: Any = transformers.MODEL_MAPPING[type(config)]
        unpooled = "add_pooling_layer" in inspect.signature(own.__init__).parameters
        options = {"add_pooling_layer": False} if unpooled else {}
        SLABS.reserve(spec.parameters * dtype.itemsize)
        tensors = slab_tensors([file for file in spec.files if file.suffix == ".safetensors"], dtype)
        return own.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, **REPORTED, **options)

    model, info = _explained(spec, "weights", read)
    info["unexpected_keys"] = [name for name in info["unexpected_keys"] if not BEHIND.search(name)]
    _check_keys(spec, info)
    return Loaded(model.eval(), _hf_tokenizer(spec, trust_remote_code), spec)


def load_tokenizer(spec: ModelSpec, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer alone, as `load` builds it. Raises ModelError."""
    _refuse_own_code(spec, trust_remote_code)
    with _quiet():
        if spec.kind == "hf":
            return _hf_tokenizer(spec, trust_remote_code)
        return _tokenizer(spec, gguf_header.read_header(spec.path))


def load_skeleton(spec: ModelSpec, trust_remote_code: bool = False) -> Skeleton:
    """A Hugging Face model without its weights, to be read tensor by tensor. Raises ModelError where it can't be."""
    _refuse_own_code(spec, trust_remote_code)
    with _quiet():
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
        config = _explained(spec, "config", lambda: transformers.AutoConfig.from_pretrained(spec.path, **options))
        model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if model_class is None:
            raise ModelError(
                f"{spec.name} is built by its own code, so it cannot be read tensor by tensor", "Leave out --stream"
            )
        _refuse_other_tasks(spec, config)
        files = [file for file in spec.files if file.suffix == ".safetensors"]
        model, *others = _explained(spec, "weights", lambda: build(model_class, config, files))
        return Skeleton(model, _hf_tokenizer(spec, trust_remote_code), *others)


def _load_gguf(spec: ModelSpec, dtype: torch.dtype, storage: str) -> Loaded:
    if storage not in ("auto", "keep"):
        raise _not_so(
            spec, storage, "is a GGUF file, quantized already", "Give --base-storage keep, or leave the flag out"
        )
    keep = storage == "keep"
    header = gguf_header.read_header(spec.path)
    if reason := gguf_config.unsupported(header):
        if keep:
            raise _not_so(spec, storage, f"is read by transformers' own loader ({reason})", "Leave --base-storage out")
        log.warning("%s: %s is read by transformers' own GGUF loader, which is slower", spec.name, reason)
        return Loaded(_model_by_transformers(spec, dtype), _tokenizer(spec, header), spec)
    blocks = _explained(spec, "weights", lambda: gguf_tensors.kept_blocks(header)) if keep else {}
    if keep and not blocks:
        raise _not_so(spec, storage, f"holds no matrix in {listed(list(CODECS))}", "Leave --base-storage out")
    if not keep:
        SLABS.reserve(spec.parameters * dtype.itemsize)
    config = gguf_config.config_dict(header)
    model_class = getattr(transformers, config["architectures"][0])

    def read() -> Any:
        own = model_class.config_class(**config)
        return _from_tensors(model_class, own, blocks, gguf_tensors.state_dict(header, dtype, without=blocks), dtype)

    model, info = _explained(spec, "weights", read)
    _check_keys(spec, info)
    kept = Kept(left=[name for name in gguf_tensors.matrices(header) if name not in blocks])
    put_stored(model, blocks, dtype, kept)
    return Loaded(model, _tokenizer(spec, header), spec, kept if keep else None)


def _from_tensors(
    model_class: Any, config: Any, stored: Mapping[str, Stored], rest: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> Any:
    """(model, what transformers says of its keys). stored: what `put_stored` will put in, a placeholder until then."""
    tensors = {name: placeholder(one, dtype) for name, one in stored.items()} | dict(rest)
    return model_class.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, **REPORTED)


def _not_so(spec: ModelSpec, storage: str, why: str, do: str) -> ModelError:
    return ModelError(f"--base-storage {storage}: {spec.name} {why}", do)


def _load_hf(spec: ModelSpec, dtype: torch.dtype, trust_remote_code: bool, storage: str, decoded: bool) -> Loaded:
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    config = _explained(spec, "config", lambda: transformers.AutoConfig.from_pretrained(spec.path, **options))
    if not trust_remote_code:
        _refuse_other_tasks(spec, config)
    if storage != "auto":
        return _load_quantized(spec, config, dtype, trust_remote_code, storage, decoded)
    model, info = _explained(spec, "weights", lambda: _plain_hf(spec, config, dtype, options))
    _check_keys(spec, info)
    return Loaded(model, _hf_tokenizer(spec, trust_remote_code), spec)


def _plain_hf(spec: ModelSpec, config: Any, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """(model, what transformers says of its keys), its weights in slabs.

    As transformers reads them, weights in their own type stay mapped: what is made from them then stands beside all
    pages of the file, and nothing takes the place of a weight that is released. Only for what it would convert first
    (a mixture of experts), or build by code of the model's own, it reads the files itself.
    """
    own = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    text = config.get_text_config()
    if own is None or any(getattr(text, name, None) for name in EXPERTS):
        return transformers.AutoModelForCausalLM.from_pretrained(
            spec.path, config=config, dtype=dtype, use_safetensors=True, **REPORTED, **options
        )
    SLABS.reserve(spec.parameters * dtype.itemsize)
    files = [file for file in spec.files if file.suffix == ".safetensors"]
    return _from_tensors(own, config, {}, slab_tensors(files, dtype), dtype)


def _load_quantized(
    spec: ModelSpec, config: Any, dtype: torch.dtype, trust_remote_code: bool, storage: str, decoded: bool
) -> Loaded:
    """Linear layers in nf4 or int8, made from the files tensor by tensor; embeddings, head and norms in `dtype`."""
    if storage == "keep":
        raise _not_so(
            spec, storage, "is no GGUF file, so it has no blocks to keep", "Give nf4 or int8, or leave the flag out"
        )
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _not_so(spec, storage, "is built by its own code", "Leave --base-storage out")
    model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    weights = [file for file in spec.files if file.suffix == ".safetensors"]

    def read() -> Any:
        linear = linear_weights(model_class, config)
        stored, rest, errors = quantized_tensors(weights, linear, storage, dtype, decoded)
        kept = Kept(left=sorted(linear - stored.keys()), errors=errors)
        return stored, kept, *_from_tensors(model_class, config, stored, rest, dtype)

    stored, kept, model, info = _explained(spec, "weights", read)
    if not stored and not decoded:
        raise _not_so(spec, storage, "has no linear layer that can be stored so", "Leave --base-storage out")
    _check_keys(spec, info)
    put_stored(model, stored, dtype, kept)
    return Loaded(model, _hf_tokenizer(spec, trust_remote_code), spec, None if decoded else kept)


def _hf_tokenizer(spec: ModelSpec, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    tokenizer: PreTrainedTokenizerBase = _explained(
        spec, "tokenizer", lambda: transformers.AutoTokenizer.from_pretrained(spec.path, **options)
    )
    if tokenizer.model_max_length > UNSET_LENGTH and spec.max_positions:
        tokenizer.model_max_length = spec.max_positions
    return tokenizer


def _model_by_transformers(spec: ModelSpec, dtype: torch.dtype) -> PreTrainedModel:
    def read() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(
            spec.path.parent, gguf_file=spec.path.name, dtype=dtype, local_files_only=True, **REPORTED,
            quantization_config=transformers.GgufConfig(dequantize=True),
        )  # fmt: skip

    model, info = _explained(spec, "weights", read)
    _check_keys(spec, info)
    return model  # type: ignore[no-any-return]  # transformers' Auto classes are untyped


def _tokenizer(spec: ModelSpec, header: gguf_header.Header) -> PreTrainedTokenizerBase:
    if ours := gguf_tokenizer.build(header):
        return ours
    log.warning("%s: the tokenizer is read by transformers' own GGUF converter, which is slower", spec.name)
    settings = gguf_tokenizer.settings(header)

    def read() -> Any:
        return transformers.AutoTokenizer.from_pretrained(
            spec.path.parent, gguf_file=spec.path.name, local_files_only=True, **settings
        )

    return _explained(spec, "tokenizer", read)  # type: ignore[no-any-return]  # transformers' Auto classes are untyped


def _explained(spec: ModelSpec, what: str, read: Any) -> Any:
    """What `read` returns, or a ModelError in place of whatever transformers raises about the files."""
    try:
        return read()
    except UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        shown = reason if len(reason) <= MAX_REASON else reason[:MAX_REASON] + " ..."
        raise ModelError(
            f"the {what} of {spec.name} cannot be read: {shown}", "Check the files of the model"
        ) from error


def _refuse_own_code(spec: ModelSpec, trust_remote_code: bool) -> None:
    """Raise ModelError for a model that only its own code can build. What transformers knows too, it builds itself."""
    modules = spec.config.get("auto_map")
    if modules and not trust_remote_code and spec.config.get("model_type") not in transformers.CONFIG_MAPPING:
        files = sorted({str(name).split(".")[0] + ".py" for name in dict(modules).values()})
        raise ModelError(
            f"{spec.name} comes with code of its own ({listed(files, 3)}), which would run on your machine",
            "Read it, then pass --trust-remote-code",
        )


def _refuse_other_tasks(spec: ModelSpec, config: Any) -> None:
    """Raise ModelError for an encoder, a classifier or a translator: the config's class is not one that generates."""
    if not _generates(config):
        raise ModelError(
            f"{spec.name} is no causal language model but {listed(config.architectures or []) or spec.architecture}",
            "Give a model that generates text, as Llama, Qwen or Gemma; for an encoder, rows with text and label",
        )


def _generates(config: Any) -> bool:
    known = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    stated = config.architectures or []
    return type(config) in known and (
        not stated
        or any(name.endswith(GENERATING) or name == getattr(known[type(config)], "__name__", "") for name in stated)
    )


def _check_keys(spec: ModelSpec, info: Mapping[str, Any]) -> None:
    """Raise ModelError for parameters that the checkpoint lacks or has in another shape; log those it has too many."""
    missing, mismatched = sorted(info["missing_keys"]), sorted(key[0] for key in info["mismatched_keys"])
    for keys, what in ((missing, "lacks"), (mismatched, "has in another shape")):
        if keys:
            raise ModelError(
                f"the checkpoint of {spec.name} {what} {len(keys)} parameters: {listed(keys, 4)}",
                "Download it again; is it the model that its config describes?",
            )
    if info["error_msgs"]:
        raise ModelError(f"the checkpoint of {spec.name} cannot be read: {info['error_msgs'][0]}", "Download it again")
    if unexpected := sorted(info["unexpected_keys"]):
        log.warning("%s: %d tensors are not used: %s", spec.name, len(unexpected), listed(unexpected, 4))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar and without its table of keys, of which `_check_keys` makes one line."""
    from transformers.utils import logging as bars

    shown, reports = bars.is_progress_bar_enabled(), logging.getLogger("transformers.modeling_utils")
    bars.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers is partly untyped
    reports.addFilter(_is_no_report)
    try:
        yield
    finally:
        reports.removeFilter(_is_no_report)
        if shown:
            bars.enable_progress_bar()  # type: ignore[no-untyped-call]  # transformers is partly untyped


def _is_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()
