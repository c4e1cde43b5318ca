"""`lorafit export`: its formats, what each refuses before a model is loaded, and what the directories hold."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft as theirs
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from lorafit.config import ExportConfig, LoRAConfig
from lorafit.errors import AdapterError, ConfigError, ModelError
from lorafit.export import gguf as export_gguf
from lorafit.export import gguf_limits, k_quants, peft
from lorafit.export.exporters import EXPORTERS
from lorafit.lora.inject import lora_layers
from lorafit.model import licence, safetensors_header
from lorafit.model import load as model_load
from lorafit.model import spec as model_spec
from lorafit.ship import export
from tests import tiny
from tests.data.test_families import FAMILIES
from tests.export.adapters import adapted


@pytest.fixture
def adapter_of(tmp_path: Path) -> Callable[..., Path]:
    def write(**more: Any) -> Path:
        config = LoRAConfig(**{"r": 3, "alpha": 7.0, **more})
        spec = model_spec.read(str(tiny.write_model(tmp_path / "model")))
        model = adapted(model_load.load(spec, torch.float32).model, config)
        for layer in lora_layers(model).values():
            layer.get_parameter("lora_B").data.mul_(0.05)
        peft.save(model, tmp_path / "adapter", config, base=str(tmp_path / "model"), tokenizer=tiny.tokenizer())
        return tmp_path / "adapter"

    return write


def exported(run: Path, output: Path, **more: Any) -> tuple[dict[str, Any], str]:
    heard = io.StringIO()
    found = export(ExportConfig(run=str(run), output=str(output), **more), Console(file=heard, width=2000))
    return found, heard.getvalue()


def test_unknown_formats_and_names_that_are_taken_are_refused(adapter_of: Callable[..., Path], tmp_path: Path) -> None:
    run = adapter_of()
    with pytest.raises(ConfigError, match=r"--format 'guf' is unknown\. Did you mean 'gguf'\?"):
        exported(run, tmp_path / "out", format="guf")
    with pytest.raises(ConfigError, match="Known: gguf, gguf-lora, ollama, peft"):
        exported(run, tmp_path / "out", format="onnx")
    with pytest.raises(ConfigError, match="exists already"):
        exported(run, run)
    with pytest.raises(AdapterError, match="is a model without an adapter"):
        exported(tmp_path / "model", tmp_path / "out")


@pytest.mark.parametrize(
    ("format", "given"),
    [
        ("gguf-lora", {"type": "f16"}),
        ("gguf-lora", {"scale": 0.5}),
        ("peft", {"scale": 1.0}),
        ("peft", {"type": "q8_0"}),
        ("gguf", {"num_ctx": 100}),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(
    format: str, given: dict[str, Any], adapter_of: Callable[..., Path], tmp_path: Path
) -> None:
    flag = next(iter(given)).replace("_", "-")
    with pytest.raises(ConfigError, match=f"--{flag} is given with --format {format}"):
        exported(adapter_of(), tmp_path / "out", format=format, **given)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"variant": "dora"}, "is of variant dora"),
        ({"targets": ["embed_tokens"]}, "the embedding or what is one weight with it"),
        ({"targets": ["lm_head"]}, "changes lm_head, the embedding or what is one weight with it"),
    ],
)
def test_what_llama_cpp_takes_in_no_adapter_is_refused_before_the_model_is_loaded(
    more: dict[str, Any], sentence: str, adapter_of: Callable[..., Path], tmp_path: Path
) -> None:
    run = adapter_of(**more)
    spoil_weights(tmp_path / "model")
    with pytest.raises(AdapterError, match=f"{sentence}.*Export the merged model: --format gguf"):
        exported(run, tmp_path / "out.gguf", format="gguf-lora")


def spoil_weights(model: Path) -> None:
    """The headers stay whole, every number becomes NaN: a model that was loaded would show it."""
    path = model / "model.safetensors"
    first = min(entry.offset for entry in safetensors_header.read_header(path).values())
    content = bytearray(path.read_bytes())
    content[first:] = b"\xff" * (len(content) - first)
    path.write_bytes(content)


def test_a_family_that_is_not_written_is_refused_before_it_is_loaded(
    adapter_of: Callable[..., Path], tmp_path: Path
) -> None:
    run = adapter_of()
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"model_type": "phi"}))
    for format in ("gguf", "gguf-lora", "ollama"):
        with pytest.raises(ModelError, match="is a phi, which is not written as GGUF here"):
            exported(run, tmp_path / "out", format=format)


def test_pefts_directory_is_read_by_peft(adapter_of: Callable[..., Path], tmp_path: Path) -> None:
    run = adapter_of(variant="dora")
    found, heard = exported(run, tmp_path / "out", format="peft")
    assert "nothing to write a model card from" in heard and "lorafit chat" in heard
    assert set(found["files"]) == {path.name for path in (tmp_path / "out").iterdir()}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        loaded = theirs.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    ours = model_load.load(model_spec.read(str(tmp_path / "model")), torch.float32).model
    peft.load(ours, run)
    ids = torch.arange(2, 42).view(2, 20)
    torch.testing.assert_close(loaded(input_ids=ids).logits, ours(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_a_damaged_adapter_is_not_handed_on(adapter_of: Callable[..., Path], tmp_path: Path) -> None:
    run = adapter_of()
    (run / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(AdapterError, match="cannot be read"):
        exported(run, tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()


def test_ollamas_directory_holds_a_model_and_its_modelfile(adapter_of: Callable[..., Path], tmp_path: Path) -> None:
    found, heard = exported(adapter_of(), tmp_path / "tuned", format="ollama", type="f16", num_ctx=100)
    text = (tmp_path / "tuned" / "Modelfile").read_text()
    assert text.startswith("FROM ./model.gguf\nTEMPLATE") and "PARAMETER num_ctx 100\n" in text
    assert 'PARAMETER stop "<|im_end|>"' in text and found["stops"] == ["<|im_end|>"]
    assert f"ollama create tuned -f {tmp_path / 'tuned' / 'Modelfile'}" in heard
    assert model_spec.read(str(tmp_path / "tuned" / "model.gguf")).storage["F16"] > 0


@pytest.mark.parametrize(
    ("system", "template", "line"),
    [
        ("Be brief.", None, 'SYSTEM """Be brief."""'),
        ("Be\u200d brief.", None, "has U+200D, which a Modelfile drops: send it with each request"),
        ("Be brief.", FAMILIES["mistral"].template, "has no place in the chat template: send it with each request"),
    ],
)
def test_the_system_message_of_the_training_is_kept_or_its_loss_is_said(
    system: str, template: str | None, line: str, adapter_of: Callable[..., Path], tmp_path: Path
) -> None:
    adapter, run = adapter_of(), tmp_path / "run"
    if template:
        (adapter / "chat_template.jinja").write_text(template)
    run.mkdir()
    adapter.rename(run / "adapter")
    (run / "run.toml").write_text("")
    (run / "run.json").write_text(
        json.dumps({"model": str(tmp_path / "model"), "system": system, "base_license": "mit"})
    )
    found, heard = exported(run, tmp_path / "out", format="ollama")
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert line in text + heard and ("SYSTEM" in text) == (found["system"] is not None) == line.startswith("SYSTEM")
    assert 'LICENSE """mit"""' in text


def test_every_exporter_says_what_to_type_next(adapter_of: Callable[..., Path], tmp_path: Path) -> None:
    run = adapter_of()
    for format in EXPORTERS:
        found, heard = exported(run, tmp_path / format, format=format)
        assert found["format"] == format and "next" not in found
        assert heard.partition("Next:\n")[2].startswith("  ")


# --- K types --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_k_types_are_written_within_their_step(kind: str) -> None:
    """Of a sub-block of 16 or 32 numbers in q bits: at most a step of its range, with the scale's own 6 bits."""
    values = np.random.default_rng(0).standard_normal((3 * k_quants.CHUNK_ROWS + 5, 512), np.float32)
    number = gguf.GGMLQuantizationType[kind]
    read = gguf.quants.dequantize(k_quants.quantize(values, kind), number)
    bits, size = int(kind[1]), 16 if kind == "Q6_K" else 32
    blocks = values.reshape(-1, size)
    step = (blocks.max(1) - blocks.min(1)).max() / (2**bits - 1)
    assert np.abs(read - values).max() <= 2 * step
    assert np.sqrt(np.mean((read - values) ** 2)) <= step / 2


def test_a_mix_gives_more_bits_to_what_suffers_and_falls_back_where_rows_are_no_blocks() -> None:
    def kinds(kind: str, width: int) -> list[str]:
        names = ["token_embd.weight", *(f"blk.{n}.ffn_down.weight" for n in range(8)), "blk.4.attn_q.weight"]
        return [k_quants.type_of(name, width, kind, 8, name == "token_embd.weight") for name in names]

    # Of 8 layers: the first, every third from there on, and the last. By hand from llama.cpp's rule.
    assert kinds("q4_k_m", 512) == [
        "Q6_K", "Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q6_K", "Q4_K",
    ]  # fmt: skip
    assert kinds("q5_k_m", 576)[:3] == ["Q8_0", "Q8_0", "Q5_1"]
    assert set(kinds("q6_k", 256)) == {"Q6_K"}


def test_k_types_without_their_library_are_refused_with_the_way_out(
    adapter_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = adapter_of()
    k_quants._library.cache_clear()
    monkeypatch.setitem(sys.modules, "xllamacpp.xllamacpp", None)  # as Python does for a module that is not there
    with pytest.raises(
        ConfigError, match=r"pip install 'lorafit\[llamacpp\]'.*llama-quantize F16.gguf OUT.gguf Q4_K_M"
    ):
        exported(run, tmp_path / "out.gguf", type="q4_k_m")


# --- what llama.cpp cannot be told ----------------------------------------------------------------------------------


OTHER_LOCAL_BASE = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
}


@pytest.mark.parametrize(
    ("architecture", "changes", "sentence"),
    [
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu"),
        ("gemma3", {"query_pre_attn_scalar": 100}, "its queries are scaled by 100, and there by 256"),
        ("gemma3", {"layer_types": ["full_attention"] * 26}, "not every 6th of its layers"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "its logits are capped"),
        ("gemma3", {"rope_parameters": OTHER_LOCAL_BASE}, "its sliding layers rotate positions by a base of 5000"),
    ],
)
def test_a_model_that_llama_cpp_would_take_for_another_is_refused(
    architecture: str, changes: dict[str, Any], sentence: str
) -> None:
    import transformers

    kind = {"llama": transformers.LlamaConfig, "gemma3": transformers.Gemma3TextConfig}[architecture]
    gguf_limits.check(kind(), architecture)
    with pytest.raises(ModelError, match=sentence):
        gguf_limits.check(kind(**changes), architecture)


def test_only_a_window_that_is_in_force_shortens_the_context() -> None:
    import transformers

    off = transformers.Qwen2Config(sliding_window=64, use_sliding_window=False, max_position_embeddings=512)
    some = transformers.Qwen2Config(
        sliding_window=64,
        use_sliding_window=True,
        max_window_layers=2,
        num_hidden_layers=4,
        max_position_embeddings=512,
    )
    assert gguf_limits.context_length(off, "qwen2") == 512 and gguf_limits.context_length(some, "qwen2") == 64
    mistral = transformers.MistralConfig(sliding_window=4096, max_position_embeddings=2048)
    assert gguf_limits.context_length(mistral, "llama") == 2048 and gguf_limits.context_remark(mistral, "llama") is None


def test_the_licence_is_the_one_that_the_models_files_state(tmp_path: Path) -> None:
    spec = model_spec.read(str(tiny.write_model(tmp_path / "model")))
    assert licence.licence_of(spec) is None
    for text, expected in (
        ("---\nlicense: apache-2.0\ntags:\n- a\n---\nlicense: mit\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: gemma\n---\n", "gemma"),
        ('---\nlicense: "llama3.2"  # theirs\n---\n', "llama3.2"),
        ("# No front matter\nlicense: mit\n", None),
    ):
        (tmp_path / "model" / "README.md").write_text(text)
        assert licence.licence_of(spec) == expected
    assert licence.licence_of(model_spec.read("smollm2-135m")) == "apache-2.0"
    loaded = model_load.load(spec, torch.float32)
    export_gguf.write_model(loaded.model, loaded.tokenizer, spec, tmp_path / "out.gguf", "f32", "apache-2.0")
    assert licence.licence_of(model_spec.read(str(tmp_path / "out.gguf"))) == "apache-2.0"
