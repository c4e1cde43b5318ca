"""What a base that stays in its blocks costs and saves: `lorafit train --base-storage keep` against decoded weights.

    python benchmarks/quantized_base/run.py step
    python benchmarks/quantized_base/run.py loss --data DATA
    python benchmarks/quantized_base/run.py large --scratch DIR
    python benchmarks/quantized_base/run.py table        (puts the results into docs/quantized.md)

step: SmolLM2-135M in its Q4_1 file, 8 x 256 tokens a step, bf16 against keep, in turns.
loss: 320 rows of banking77/chat12_train.jsonl under DATA, one epoch; the loss afterwards on 160 rows of the test file.
large: a random Llama of 3.2 billion parameters in Q4_0 (1.8 GB, written into DIR), two steps of 512 tokens in 4 GiB.
Every run is a process of its own, started as a user would; peak memory is its VmHWM, mapped pages included.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train_speed"))
from engines import revision
from run import machine

MODEL = "smollm2-135m"
REPEATS = 3
WAYS: dict[str, list[str]] = {"bf16": [], "keep": ["--base-storage", "keep"]}
LARGE = {"layers": 28, "hidden": 3072, "intermediate": 8192, "heads": 24, "kv_heads": 8, "dim": 128, "vocab": 128_256}
Result = dict[str, Any]


def trained(model: str, data: Path, run: Path, *flags: str) -> Result:
    """run.json of `lorafit train`, with the seconds of each step. Raises CalledProcessError."""
    command = [
        sys.executable,
        "-m",
        "lorafit",
        "train",
        model,
        str(data),
        "-o",
        str(run),
        "--precision",
        "bf16",
        *flags,
    ]
    done = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, text=True, check=True)
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return json.loads(done.stdout) | {"step_s": [line["step_s"] for line in lines if "step_s" in line]}


# --- step and loss --------------------------------------------------------------------------------------------------


def step(given: argparse.Namespace, scratch: Path) -> list[Result]:
    """Steps of 2,048 tokens that share nothing, all with a loss."""
    data = scratch / "text.jsonl"
    words = random.Random(0)
    text = " ".join("".join(words.choices("etaoinshrdlu", k=words.randint(2, 9))) for _ in range(9000))
    data.write_text(json.dumps({"text": text}))
    flags = ["--seq-len", "256", "--batch-size", "8", "--max-steps", "8", "--no-shuffle"]
    runs = []
    for repeat in range(given.repeats):
        for way, own in WAYS.items():
            found = trained(MODEL, data, scratch / f"{way}{repeat}", *flags, *own)
            seconds = found["step_s"][1:]
            runs.append(figures(found, way, repeat) | {"step_s": statistics.median(seconds), "steps_s": seconds})
            print(
                f"{way} {repeat}: {runs[-1]['step_s']:.3f} s a step, {found['peak_rss_bytes'] / 1e9:.2f} GB", flush=True
            )
    return runs


def loss(given: argparse.Namespace, scratch: Path) -> list[Result]:
    """The same rows, settings and seed both ways."""
    rows = {name: given.data / "banking77" / f"chat12_{name}.jsonl" for name in ("train", "test")}
    data = scratch / "train.jsonl"
    data.write_text("".join(rows["train"].read_text().splitlines(keepends=True)[:320]))
    runs = []
    for repeat in range(given.repeats):
        for way, own in WAYS.items():
            run = scratch / f"{way}{repeat}"
            found = trained(MODEL, data, run, "--seed", str(repeat), *own)
            command = [sys.executable, "-m", "lorafit", "eval", str(run), str(rows["test"]), "--rows", "160"]
            command += ["--no-generate", "--precision", "fp32", "--json"]
            evaluated = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
            runs.append(figures(found, way, repeat) | {"eval_loss": evaluated["loss"]})
            print(f"{way} {repeat}: {found['train_s']:.2f} s, eval loss {evaluated['loss']:.4f}", flush=True)
    return runs


def figures(found: Result, way: str, repeat: int) -> Result:
    kept = ("train_s", "load_s", "train_loss", "peak_rss_bytes", "predicted_peak_bytes", "mfu", "tokens_seen")
    return {"way": way, "repeat": repeat} | {name: found[name] for name in kept}


# --- large ----------------------------------------------------------------------------------------------------------


def large(given: argparse.Namespace, scratch: Path) -> list[Result]:
    """A step of 512 tokens over 3.2 billion parameters."""
    model, data = scratch / "random-3b.Q4_0.gguf", scratch / "text.jsonl"
    write_llama(model)
    data.write_text(json.dumps({"text": "".join(random.Random(0).choices("etaoinshrdlu ", k=2000))}))
    flags = ["--seq-len", "512", "--batch-size", "1", "--max-steps", "2", "--memory", "4GiB", *WAYS["keep"]]
    runs = []
    for repeat in range(given.repeats):
        found = trained(str(model), data, scratch / f"large{repeat}", *flags)
        runs.append(figures(found, "keep", repeat) | {"step_s": found["step_s"], "parameters": found["total_params"]})
        print(f"{repeat}: {found['step_s']} s, {found['peak_rss_bytes'] / 2**30:.2f} GiB", flush=True)
    return runs


def write_llama(path: Path) -> None:
    """A Llama of random blocks, tensor by tensor, with a tokenizer of bytes."""
    import gguf

    at = LARGE
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=False)
    writer.add_block_count(at["layers"])
    writer.add_context_length(2048)
    writer.add_embedding_length(at["hidden"])
    writer.add_feed_forward_length(at["intermediate"])
    writer.add_head_count(at["heads"])
    writer.add_head_count_kv(at["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(at["vocab"])
    writer.add_rope_dimension_count(at["dim"])
    write_tokenizer(writer, at["vocab"])
    shapes = tensors(at)
    for name, shape in shapes.items():
        quantized = len(shape) == 2
        kind = gguf.GGMLQuantizationType.Q4_0 if quantized else gguf.GGMLQuantizationType.F32
        stored = (shape[0], shape[1] // 32 * 18) if quantized else shape
        nbytes = int(np.prod(stored)) * (1 if quantized else 4)
        writer.add_tensor_info(name, stored, np.dtype(np.uint8 if quantized else np.float32), nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    numbers = np.random.default_rng(0)
    for shape in shapes.values():
        writer.write_tensor_data(random_blocks(shape, numbers) if len(shape) == 2 else np.ones(shape, np.float32))
    writer.close()


def tensors(at: dict[str, int]) -> dict[str, tuple[int, ...]]:
    hidden, kv = at["hidden"], at["kv_heads"] * at["dim"]
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (at["vocab"], hidden), "output_norm.weight": (hidden,)}
    for layer in range(at["layers"]):
        found |= {
            f"blk.{layer}.attn_norm.weight": (hidden,),
            f"blk.{layer}.attn_q.weight": (hidden, hidden),
            f"blk.{layer}.attn_k.weight": (kv, hidden),
            f"blk.{layer}.attn_v.weight": (kv, hidden),
            f"blk.{layer}.attn_output.weight": (hidden, hidden),
            f"blk.{layer}.ffn_norm.weight": (hidden,),
            f"blk.{layer}.ffn_gate.weight": (at["intermediate"], hidden),
            f"blk.{layer}.ffn_up.weight": (at["intermediate"], hidden),
            f"blk.{layer}.ffn_down.weight": (hidden, at["intermediate"]),
        }
    return found


def random_blocks(shape: tuple[int, ...], numbers: np.random.Generator) -> np.ndarray[Any, Any]:
    """Q4_0: random nibbles; scales such that weights have a standard deviation of about 0.02."""
    count = shape[0] * shape[1] // 32
    blocks = numbers.integers(0, 256, (count, 18), dtype=np.uint8)
    blocks[:, :2] = np.full((count, 1), 0.02 / 4.6, np.float16).view(np.uint8)
    return blocks.reshape(shape[0], -1)


def write_tokenizer(writer: Any, vocab: int) -> None:
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *alphabet, "et"]
    tokens += [f"<unused{number}>" for number in range(vocab - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (vocab - 2)])
    writer.add_token_merges(["e t"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)


# --- the table ------------------------------------------------------------------------------------------------------

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "quantized.md"
RESULTS = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- generated by benchmarks/quantized_base/run.py table -->", "<!-- /generated -->"


def table() -> str:
    """All results as one table in Markdown. Median, and lowest to highest, of the repeats."""
    lines = ["| work | base | a step, s | training, s | eval loss per seed | peak, GB | predicted peak / measured |"]
    lines.append("|---|---|---|---|---|---|---|")
    for work, title in TITLES.items():
        runs = json.loads((RESULTS / f"{work}.json").read_text())["runs"]
        for way in WAYS:
            own = [run for run in runs if run["way"] == way]
            if own:
                lines.append(line(title, way, own))
    return "\n".join(lines)


TITLES = {
    "step": "SmolLM2-135M (Q4_1), 8 x 256 tokens a step",
    "loss": "SmolLM2-135M (Q4_1), 320 chat rows, an epoch",
    "large": "a Llama of 3.2 billion parameters (Q4_0), 1 x 512 tokens a step, --memory 4GiB",
}


def line(title: str, way: str, own: list[Result]) -> str:
    peak = statistics.median(run["peak_rss_bytes"] for run in own)
    losses = ", ".join(f"{run['eval_loss']:.4f}" for run in own if "eval_loss" in run) or "-"
    steps = [value for run in own for value in as_list(run.get("step_s"))]
    cells = [title, way, spread(steps), spread([run["train_s"] for run in own] if "eval_loss" in own[0] else [])]
    cells += [losses, f"{peak / 1e9:.2f}", f"{own[0]['predicted_peak_bytes'] / peak:.2f}"]
    return "| " + " | ".join(cells) + " |"


def as_list(value: Any) -> list[float]:
    return [] if value is None else value if isinstance(value, list) else [value]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "-"


# --- the command line -----------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=("step", "loss", "large", "table"))
    parser.add_argument("--data", type=Path, help="holds banking77/; for `loss`")
    parser.add_argument("--out", type=Path, help="the results file; by default the one that `table` reads")
    parser.add_argument("--scratch", type=Path, help="where runs are written, and removed again")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    given = parser.parse_args()
    if given.work == "table":
        before, _, rest = DOCUMENT.read_text().partition(BEGIN)
        DOCUMENT.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}")
        return
    with tempfile.TemporaryDirectory(dir=given.scratch, prefix="quantized_base.") as scratch:
        runs = {"step": step, "loss": loss, "large": large}[given.work](given, Path(scratch))
    found = {"work": given.work, **revision(), "machine": machine(), "model": MODEL, "runs": runs}
    (given.out or RESULTS / f"{given.work}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
