"""The tokenizer of a GGUF file, built from its vocabulary and merges without transformers' converter.

Ids follow llama.cpp, which for GGUF files is the reference (src/llama-vocab.cpp), and with it the model's own
tokenizer.json. transformers' converter knows fewer pre-tokenizers and splits "   12" of a `smollm` file otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lorafit.errors import ModelError
from lorafit.model.gguf_header import Header

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
SPACE = "\u2581"  # how SentencePiece spells a space

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_LLAMA3 = rf"{_CONTRACTION}|{_BEFORE}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_CONTRACTION}|{_BEFORE}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_TEKKEN = rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_GPT4O = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)

SPLITS = {  # tokenizer.ggml.pre -> how text is cut before merging; the names are llama.cpp's
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "modern-bert"), "gpt2"),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), "digits"),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
}
# A word that is in the vocabulary is taken whole, whatever the merges say; bos comes first where the file is silent.
WHOLE_TOKENS_FIRST = ADD_BOS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"}


def build(header: Header) -> PreTrainedTokenizerFast | None:
    """The tokenizer, with special tokens, chat template and maximal length; None for a kind that is not known here.

    Raises ModelError if the file's vocabulary contradicts itself.
    """
    built = backend_of(header)
    return None if built is None else _wrap(header, *built)


def backend_of(header: Header) -> tuple[Tokenizer, bool] | None:
    """(the tokenizer proper, whether a text begins with bos where the file does not say); None as for `build`."""
    kind, pre = header.metadata.get("tokenizer.ggml.model"), header.metadata.get("tokenizer.ggml.pre", "default")
    if kind == "gpt2" and pre in SPLITS:
        return _build_explained(header, _byte_level), pre in ADD_BOS
    if kind == "llama" and header.architecture in ("llama", "gemma3"):
        return _build_explained(header, _sentencepiece), True
    return None


def settings(header: Header) -> dict[str, Any]:
    """Chat template and maximal length, under transformers' names; what the file does not state is left out."""
    stated = {
        "chat_template": header.metadata.get("tokenizer.chat_template"),
        "model_max_length": header.get("context_length"),
    }
    return {name: value for name, value in stated.items() if value}


def special_tokens(header: Header) -> dict[str, str]:
    """The texts of special tokens under transformers' names; what the file does not state is left out."""
    tokens = header.array("tokenizer.ggml.tokens")
    ids = {name: header.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in NAMED.items()}
    return {name: tokens[i] for name, i in ids.items() if isinstance(i, int) and i < len(tokens)}


def _wrap(header: Header, backend: Tokenizer, add_bos: bool) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    named = special_tokens(header)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers is partly untyped
        tokenizer_object=backend,
        add_bos_token=header.metadata.get("tokenizer.ggml.add_bos_token", add_bos) and "bos_token" in named,
        add_eos_token=header.metadata.get("tokenizer.ggml.add_eos_token", False) and "eos_token" in named,
        clean_up_tokenization_spaces=False,
        **named,
        **settings(header),
    )


def _build_explained(header: Header, build_backend: Any) -> Tokenizer:
    try:
        backend: Tokenizer = build_backend(header, header.array("tokenizer.ggml.tokens"))
    except Exception as error:  # tokenizers raises plain Exception for a merge of unknown tokens
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"{header.path} holds a tokenizer that contradicts itself: {error}", "Convert it again"
        ) from error
    _add_tokens(header, backend)
    return backend


def _byte_level(header: Header, tokens: Sequence[str]) -> Tokenizer:
    pre = header.metadata.get("tokenizer.ggml.pre", "default")
    merges = [tuple(merge.split(" ")) for merge in header.array("tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE(_vocabulary(tokens), merges, ignore_merges=pre in WHOLE_TOKENS_FIRST))
    backend.pre_tokenizer = _pre_tokenizer(SPLITS[pre])
    backend.decoder = decoders.ByteLevel()
    return backend


def _pre_tokenizer(split: str) -> pre_tokenizers.PreTokenizer:
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if split == "gpt2":
        return gpt2
    if split == "digits":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    cut = pre_tokenizers.Split(Regex(split), behavior="isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentencepiece(header: Header, tokens: Sequence[str]) -> Tokenizer:
    """BPE with byte fallback. A file lists scores, not merges: the better the merged piece, the earlier its merge."""
    prefix = header.metadata.get("tokenizer.ggml.add_space_prefix", True)
    scores = header.array("tokenizer.ggml.scores")
    if header.architecture == "gemma3":  # its scores do not follow its merges, its ids do; runs of spaces are respelled
        tokens = [SPACE * len(token) if token.strip(" ") == "" else token for token in tokens]
        scores = [-float(index) for index in range(len(tokens))]
    backend = Tokenizer(models.BPE(_vocabulary(tokens), _merges(tokens, scores), fuse_unk=True, byte_fallback=True))
    respell = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), respell]) if prefix else respell
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if not tokens or len(vocabulary) < len(tokens):
        raise ValueError(f"{len(tokens)} tokens, of which {len(vocabulary)} differ")
    return vocabulary


def _merges(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score first; of one piece, the longest left half first."""
    known = set(tokens)
    found = [
        (score, len(token) - cut, token[:cut], token[cut:])
        for token, score in zip(tokens, scores, strict=True)
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]
    found.sort(key=lambda merge: (-merge[0], merge[1]))
    return [(left, right) for _, _, left, right in found]


def _add_tokens(header: Header, backend: Tokenizer) -> None:
    """Tokens that are matched whole in the text: control tokens, which decoding can skip, and user-defined ones."""
    tokens, kinds = header.array("tokenizer.ggml.tokens"), header.array("tokenizer.ggml.token_type")
    vocabulary = backend.get_vocab()
    for kind, add, special in (
        (CONTROL, backend.add_special_tokens, True),
        (USER_DEFINED, backend.add_tokens, False),
    ):
        chosen = [token for token, its in zip(tokens, kinds, strict=False) if its == kind and token in vocabulary]
        add([AddedToken(token, normalized=False, special=special) for token in chosen])
