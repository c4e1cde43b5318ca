"""A run with a head of labels as a model that needs no adapter: in transformers' own class where that says the same.

A decoder that is read by its last token is what `AutoModelForSequenceClassification` builds, a head on every token what
`AutoModelForTokenClassification` builds. Other heads have no class there (encoders put a layer of their own, which was
never trained, before theirs): body and head are written as they are, with the code that reads them in the card.
"""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn

from lorafit import files
from lorafit.data.mask import Marks
from lorafit.errors import MergeError
from lorafit.export import merge as export_merge
from lorafit.methods import table
from lorafit.methods.labels import LabelHead, Labels, Pooled, body_of, label_head

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEAD, TOLD = "head.safetensors", "head.json"


@dataclass(frozen=True)
class Written:
    """form: the class of transformers that reads it, or None where the card has the code. why: of None, why.

    difference: how far its scores are from the run's, relative to their norm; tolerance: what rounding explains.
    """

    form: str | None
    why: str | None
    difference: float
    tolerance: float


def write(
    model: Any, tokenizer: PreTrainedTokenizerBase, labels: Labels, directory: Path, dtype: torch.dtype
) -> Written:
    """Merge the update into the body, and write body and head. model: in float32, with what the method attached.

    Raises MergeError where the method cannot be merged, or what was written tells something else.
    """
    export_merge.check_output(directory)
    tolerance = export_merge.tolerance(model)
    tokenizer = ends_rows(tokenizer)
    inputs = tokenizer(PROBES, return_tensors="pt", padding=True, padding_side="right")
    before = _scores(model, labels, inputs)
    head = label_head(model)
    assert head is not None
    _merge(model)
    built, why = _built(model, head, labels, tokenizer)
    body: Any = built if built is not None else body_of(model)
    after = _scores_of_class(built, inputs) if built is not None else _scores(model, labels, inputs)
    difference = float(((after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)).max())
    if not difference <= tolerance:
        raise MergeError(
            f"merged, scores differ by {difference:.1e} of their norm, and rounding explains {tolerance:.1e}",
            "Nothing was written. Use the run as it is, by `lorafit eval`",
        )
    form = type(built).__name__ if built is not None else None

    def fill(temporary: Path) -> None:
        body.to(dtype).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if built is None:
            state = {name: p.detach().contiguous() for name, p in head.named_parameters()}
            save_file(state, temporary / HEAD, metadata={"format": "pt"})
            files.write_json(temporary / TOLD, asdict(labels))
        unpooled = "add_pooling_layer" in inspect.signature(type(body).__init__).parameters
        (temporary / "README.md").write_text(_card(labels, form, why, unpooled), encoding="utf-8")
        for file in temporary.iterdir():
            file.chmod(0o644)  # the library leaves weights to their owner alone

    files.write_dir_atomic(directory, fill)
    return Written(form, why, difference, tolerance)


PROBES = ["The quick brown fox jumps over the lazy dog.", "Où est la bibliothèque?", "1, 1, 2, 3, 5, 8, 13, 21"]


def ends_rows(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that by itself begins and ends a text as rows of training did, and pads with another token.

    A classifier of transformers looks for the last token that is no padding: a row that ends with the token that pads
    would be read one token too early.
    """
    marks = Marks.of(tokenizer)
    known = cast("list[str]", tokenizer.convert_ids_to_tokens([*marks.bos, *marks.closing]))
    begin, end = known[: len(marks.bos)], known[len(marks.bos) :]
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in dict.fromkeys(known)]
    backend: Any = tokenizer.backend_tokenizer
    own = tokenizer("a", add_special_tokens=False).input_ids
    if tokenizer("a").input_ids != [*marks.bos, *own, *marks.closing]:
        backend.post_processor = TemplateProcessing(single=[*begin, "$A", *end], special_tokens=special)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in marks.closing:
        others = sorted(marks.control - set(marks.closing)) or [next(n for n in range(9) if n not in marks.closing)]
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(others[0])
    return tokenizer


def _merge(model: Any) -> None:
    """The update becomes part of the body's weights; of a head alone there is none."""
    if getattr(model, "_lorafit_method", "") == "head":
        return
    method = table.of(model)
    method.merge(model)
    table.forget(model)


def _built(
    model: Any, head: LabelHead, labels: Labels, tokenizer: PreTrainedTokenizerBase
) -> tuple[Any | None, str | None]:
    """Transformers' own model around the body, or why there is none."""
    config = model.config
    if why := _why_apart(model, head, labels):
        return None, why
    tags, rows = (
        transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
        (transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    )
    found: Any = (tags if labels.task == "tag" else rows).get(type(config), None)
    if found is None:
        return None, f"transformers has none for {config.model_type}"
    config.num_labels = len(labels.names)
    config.id2label = dict(enumerate(labels.names))
    config.label2id = {name: number for number, name in enumerate(labels.names)}
    config.problem_type = "multi_label_classification" if labels.several else "single_label_classification"
    config.get_text_config().pad_token_id = tokenizer.pad_token_id
    with torch.device("meta"):  # all that is taken of it is its shape
        built: Any = found(config).eval()
    name = next((name for name in ("score", "classifier") if hasattr(built, name)), "")
    setattr(built, built.base_model_prefix, body_of(model))
    setattr(built, name, linear := nn.Linear(head.weight.shape[1], len(head.weight), bias=head.bias is not None))
    linear.load_state_dict(head.state_dict())
    if any(parameter.is_meta for parameter in built.parameters()):
        return None, f"{found.__name__} has more than a line behind the body"
    return built, None


def _why_apart(model: Any, head: LabelHead, labels: Labels) -> str | None:
    """Why no class of transformers could say the same; None where one may."""
    if labels.layer is not None:
        return f"it reads layer {labels.layer}, and a class of transformers reads the last"
    if labels.task == "tag":
        return None
    if labels.task == "regress":
        return "the mean of the numbers has no place in a class of transformers"
    if isinstance(model, Pooled):
        return WHY_POOLED[labels.pooling]
    return None if head.bias is None else "it has a bias, and a decoder's class has none"


WHY_POOLED = {
    "mean": "no class of transformers reads the mean of all tokens",
    "cls": "an encoder's class puts a layer of its own, which was never trained, before its head",
    "last": "an encoder's class does not read the last token",
}


@torch.no_grad()
def _scores(model: Any, labels: Labels, inputs: Any) -> Tensor:
    """The run's own scores of rows side by side: (rows, labels), or of every token."""
    logits: Tensor = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.float()
    return _at_last(logits, inputs["attention_mask"]) if labels.task != "tag" else _masked(logits, inputs)


@torch.no_grad()
def _scores_of_class(built: Any, inputs: Any) -> Tensor:
    logits = built(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return _masked(logits, inputs) if logits.dim() == 3 else cast(Tensor, logits)


def _at_last(logits: Tensor, mask: Tensor) -> Tensor:
    return logits[torch.arange(len(logits)), mask.sum(1) - 1]


def _masked(logits: Tensor, inputs: Any) -> Tensor:
    mask: Tensor = inputs["attention_mask"]
    return logits * mask[..., None]


# --- the card ---------------------------------------------------------------------------------------------------------

OWN = """\
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

told, head = json.loads(Path("head.json").read_text()), load_file("head.safetensors")
tokenizer, body = AutoTokenizer.from_pretrained("."), AutoModel.from_pretrained("."{unpooled}).float().eval()
inputs = tokenizer(["A text."], return_tensors="pt", padding=True, truncation=True, padding_side="right")
mask = inputs["attention_mask"]
with torch.no_grad():
    states = body(input_ids=inputs["input_ids"], attention_mask=mask, output_hidden_states=True)
hidden = {hidden}
scores = {features} @ head["weight"].T{bias}
print({told})
"""
FEATURES = {
    "mean": "((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))",
    "cls": "hidden[:, 0]",
    "last": "hidden[torch.arange(len(mask)), mask.sum(1) - 1]",
    "each": "hidden",
}
BY_CLASS = """\
import torch
from transformers import {auto}, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), {auto}.from_pretrained(".").eval()
inputs = tokenizer(["A text."], return_tensors="pt", padding=True, padding_side="right")
with torch.no_grad():
    scores = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
print({told})
"""


def _card(labels: Labels, form: str | None, why: str | None, unpooled: bool) -> str:
    """What it is and the code that uses it, run in the directory as it stands.

    unpooled: whether the body would be built with a layer that pools, which it has not, unless told.
    """
    auto = "AutoModelForTokenClassification" if labels.task == "tag" else "AutoModelForSequenceClassification"
    if form is not None:
        names, code = "model.config.id2label[{}]", BY_CLASS.replace("{auto}", auto)
        what = f"A `{form}` of transformers. It {labels.told}."
    else:
        hidden = "states.last_hidden_state" if labels.layer is None else f"states.hidden_states[{labels.layer}]"
        names, code = 'told["names"][{}]', OWN.replace("{hidden}", hidden)
        code = code.replace("{features}", FEATURES[labels.pooling])
        code = code.replace("{unpooled}", ", add_pooling_layer=False" if unpooled else "")
        code = code.replace("{bias}", ' + head["bias"]' if labels.bias else "")
        what = f"A body, and its head in `{HEAD}`, since {why}. It {labels.told}."
    if labels.task == "regress":
        told = '(told["mean"] + told["deviation"] * scores[:, 0]).tolist()'
    elif labels.several:
        told = f"[[{names.format('k')} for k, score in enumerate(row) if score > 0] for row in scores.tolist()]"
    elif labels.task == "tag":
        told = f"[[{names.format('k')} for k in row] for row in scores.argmax(-1).tolist()]"
    else:
        told = f"[{names.format('k')} for k in scores.argmax(-1).tolist()]"
    of_words = " A word's tag is that of its first token." if labels.task == "tag" else ""
    parts = ["# A merged run with a head", f"{what}{of_words}", f"```python\n{code.replace('{told}', told)}```"]
    return "\n\n".join(parts) + "\n"
