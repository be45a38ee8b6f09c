"""Measure MediBot on one GPU: one command, under nine minutes, no network.

    python benchmarks/gpu.py --out FOLDER            # on a GPU
    python benchmarks/gpu.py --out FOLDER --tiny     # the same steps in small on a CPU, to find typos before

Each step is a process of its own with a time limit of its own, and leaves a line in FOLDER/gpu.jsonl. A step that fails
leaves its last lines there, and the next one runs. FOLDER/gpu.md is the table for recipes/README.md.

Weights are drawn at random in the shapes of TinyLlama 1.1B and of an 8B Llama, beside a small tokenizer that is trained
on the sample set: speed, memory and equality need no trained weights. Rates are those of a second epoch over the rows,
between two logged lines, with nothing evaluated, asked or saved on the way.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import speed

import medibot
from medibot.recipe import load_recipe
from medibot.run import open_run, read_lines

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "recipes" / "data" / "consumer_health.jsonl"
NF4 = "quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: true}"
BARE = ["training.eval_strategy=no", "training.eval_on_start=false", "training.load_best_model_at_end=false"]
BARE += ["training.save_strategy=no", "training.logging_steps=1", "evaluation.questions=[]", "tracking=null"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
SIZES += ("vocab_size",)
SHAPES = {"1.1b": (2048, 22, 32, 4, 5632, 32000), "8b": (4096, 32, 32, 8, 14336, 128256)}
SMALL = (64, 2, 4, 2, 128, 640)
WHOLE_SECONDS = 530
# Where the steps leave models and runs for one another
WORK = Path(os.environ.get("GPU_WORK", "."))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--tiny", action="store_true", help="small shapes on a CPU")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        step, file = given.inside
        Path(file).write_text(json.dumps(STEPS[step][0](given.tiny)))
        return
    given.out.mkdir(parents=True, exist_ok=True)
    longer = 3 if given.tiny else 1  # a CPU may be slow and busy
    record, end, lines = given.out / "gpu.jsonl", time.monotonic() + longer * WHOLE_SECONDS, {}
    record.write_text("")
    with tempfile.TemporaryDirectory() as folder:
        for step, (_, limit) in STEPS.items():
            lines[step] = run_step(step, given.tiny, Path(folder), min(longer * limit, end - time.monotonic()))
            with record.open("a") as file:
                file.write(json.dumps(lines[step]) + "\n")
            print(json.dumps(lines[step]), flush=True)
    table = make_table(lines)
    (given.out / "gpu.md").write_text(table)
    print(table)
    sys.exit(not all(line["ok"] for line in lines.values()))


def run_step(step: str, tiny: bool, work: Path, limit: float) -> dict[str, Any]:
    """Run one step in a process group of its own, which ends at the limit; return its line."""
    started, result, log = time.monotonic(), work / f"{step}.json", work / f"{step}.log"
    command = [sys.executable, __file__, "--inside", step, str(result), *(["--tiny"] if tiny else [])]
    own = {"MEDIBOT_OUTPUTS": str(work / "outputs"), "MEDIBOT_CACHE": str(work / "cache"), "GPU_WORK": str(work)}
    own |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "HF_HUB_OFFLINE": "1"}
    # One GPU of several, or none; memory as `medibot train` sets it
    own["CUDA_VISIBLE_DEVICES"] = "" if tiny else os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    own["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    said = f"no more than {WHOLE_SECONDS} s were left"
    if limit > 0:
        with log.open("w") as file:
            options: dict[str, Any] = {"stdout": file, "stderr": file, "env": os.environ | own}
            process = subprocess.Popen(command, start_new_session=True, **options)
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said = f"ended with {process.returncode} (limit {limit:.0f} s): {log.read_text()[-1500:]}"
    ok = result.is_file() and process.returncode == 0
    found = json.loads(result.read_text()) if ok else {"last_lines": said}
    return {"step": step, "ok": ok, "wall_seconds": round(time.monotonic() - started, 1), **found}


def make_table(lines: dict[str, Any]) -> str:
    """Return what was measured as Markdown: card, date and commit first; what failed has an empty cell."""
    found = {step: line for step, line in lines.items() if line["ok"]}
    about, peak = found.get("environment", {}), found.get("gemm", {}).get("tflops")
    text = {step: "" for step in STEPS if step not in {"environment", "weights"}}
    for step in [step for step in text if step in found]:
        own = {key: value for key, value in found[step].items() if key not in {"step", "ok", "wall_seconds"}}
        if peak and "needed_tflops" in own:
            own["of_gemm_peak"] = f"{own['needed_tflops'] / peak:.1%}"
        text[step] = ", ".join(f"{key} {value}" for key, value in own.items())
    if {"qlora", "trl"} <= found.keys():
        ratio = found["qlora"]["rows_per_second"] / found["trl"]["rows_per_second"]
        text["qlora against TRL's defaults"] = f"{ratio:.2f}x in rows/s"
    title = ", ".join(str(about.get(key, "")) for key in ("card", "date", "commit"))
    return "\n".join([title, "", "| step | measured |", "|---|---|", *(f"| {a} | {b} |" for a, b in text.items()), ""])


# --- what runs in a process of its own --------------------------------------------------------------------------------


def environment(tiny: bool) -> dict[str, Any]:
    import torch

    if not tiny and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here: --tiny runs on a CPU")
    asked_git = ["git", "rev-parse", "--short", "HEAD"] if shutil.which("git") else ["true"]
    commit = subprocess.run(asked_git, capture_output=True, text=True, cwd=ROOT).stdout
    found = {"card": "CPU", "date": datetime.now(UTC).date().isoformat(), "commit": commit.strip() or "unknown"}
    found |= {name: version(name) for name in ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")}
    if tiny:
        return found
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]
    card = {"card": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "driver": driver}
    return found | card | {"bytes": torch.cuda.mem_get_info()[1]}


def gemm(tiny: bool) -> dict[str, Any]:
    """TFLOPS of the fastest of several bfloat16 products, by wall time over many of them."""
    import torch

    device, rates, wait = "cpu" if tiny else "cuda", [], torch.cpu.synchronize if tiny else torch.cuda.synchronize
    for size in (64,) if tiny else (4096, 8192, 16384):
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        times = 10 if tiny else max(1, 2**44 // size**3)
        for _ in range(3):
            wait()
            started = time.perf_counter()
            for _ in range(times):
                a @ b
            wait()
            rates.append(2 * size**3 * times / (time.perf_counter() - started) / 1e12)
    return {"tflops": round(max(rates), 4)}


def weights(tiny: bool) -> dict[str, Any]:
    """Draw both models on the device, and write them beside one tokenizer."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    texts = [text for line in SAMPLE.read_text().splitlines() for text in json.loads(line).values() if text]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=600, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|endoftext|>"]})
    tokenizer.chat_template, end = TEMPLATE, tokenizer.eos_token_id
    found, dtype, device = {}, torch.float32 if tiny else torch.bfloat16, "cpu" if tiny else "cuda"
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        config = LlamaConfig(**dict(zip(SIZES, SMALL if tiny else shape, strict=True)), eos_token_id=end)
        with torch.device(device):
            # Drawn in this dtype: an 8B model in float32 would be 32 GB first
            model = LlamaForCausalLM._from_config(config, dtype=dtype)
        model.save_pretrained(WORK / "models" / name)
        tokenizer.save_pretrained(WORK / "models" / name)
        found[f"{name}_parameters"] = model.num_parameters()
    return found


def nf4(tiny: bool) -> dict[str, Any]:
    """Quantize the same weights on both devices: the bytes must be equal, and near what they came from."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.manual_seed(0)
    drawn, device = torch.randn(64, 128) if tiny else torch.randn(4096, 4096), "cpu" if tiny else "cuda"
    here, state = quantize_4bit(drawn, quant_type="nf4")
    there, other = quantize_4bit(drawn.to(device), quant_type="nf4")
    equal, back = (here == there.cpu()).float().mean().item(), dequantize_4bit(there, other).cpu()
    apart = (back - dequantize_4bit(here, state)).abs().max().item()
    found = {"devices": f"cpu and {device}", "equal_bytes": equal, "largest_difference": apart}
    return found | {"mean_error": (back - drawn).abs().mean().item()}


def make_recipe(tiny: bool, model: str, *more: str) -> Any:
    rows = "{train: 8, validation: 4}" if tiny else "{train: 192, validation: 8}"
    dtype, batch = ("float32", 4) if tiny else ("bfloat16", 16)
    size = [f"training.per_device_train_batch_size={batch}", "training.gradient_accumulation_steps=1"]
    size += [f"model.dtype={dtype}", f"evaluation.max_new_tokens={8 if tiny else 128}"]
    place = f"model.pretrained_model_name_or_path={WORK / 'models' / model}"
    data = [f"data.path={SAMPLE}", f"data.limit={rows}", "training.num_train_epochs=2"]
    return load_recipe(str(ROOT / "recipes" / "medquad-lora.yaml"), [place, *data, *BARE, *size, *more])


def second_epoch(seconds: list[float], recipe: Any) -> dict[str, Any]:
    """The rate between the ends of the first and the second epoch, and the FLOP that these rows need in a second."""
    kept = speed.tokenized(prepared := medibot.prepare(recipe))[0]
    tokens = sum(len(row["input_ids"]) for row in kept)
    supervised = sum(label != -100 for row in kept for label in row["labels"])
    took = seconds[-1] - seconds[len(seconds) // 2 - 1]
    needed = speed.needed(prepared, tokens, supervised) / took / 1e12
    return {"rows_per_second": round(len(kept) / took, 4), "tokens": tokens, "needed_tflops": round(needed, 6)}


def trained(tiny: bool, name: str, model: str, *more: str) -> dict[str, Any]:
    """Train by MediBot's own path; return rate and memory, planned beside measured."""
    recipe = make_recipe(tiny, model, *more)
    run = medibot.train(recipe, name, anyway=True)
    seconds = [line["seconds"] for line in read_lines(run.metrics) if "loss" in line]
    return second_epoch(seconds, recipe) | run.record()["summary"]["memory"]


def trl(tiny: bool) -> dict[str, Any]:
    """Train the same rows with NF4 and the same adapter by SFTTrainer as it comes."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from medibot.model.precision import make_lora_config, make_quantization_config

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
            seconds.extend([time.monotonic()] if "loss" in logs else [])

    recipe = make_recipe(tiny, "1.1b", NF4)
    rows = Dataset.from_list(list(medibot.prepare(recipe).load("train").select_columns(["prompt", "completion"])))
    folder, dtype = WORK / "models" / "1.1b", torch.float32 if tiny else torch.bfloat16
    quantized = {"dtype": dtype, "quantization_config": make_quantization_config(recipe, dtype)}
    model = AutoModelForCausalLM.from_pretrained(folder, **quantized)
    own = {"output_dir": str(WORK / "trl"), "num_train_epochs": 2, "logging_steps": 1, "save_strategy": "no"}
    args = SFTConfig(**own, report_to="none", bf16=not tiny, use_cpu=tiny)
    parts = {"train_dataset": rows, "peft_config": make_lora_config(recipe), "callbacks": [Clock()]}
    SFTTrainer(model, args, processing_class=AutoTokenizer.from_pretrained(folder), **parts).train()
    return second_epoch(seconds, recipe)


def resumed(tiny: bool) -> dict[str, Any]:
    """Kill a training after its first checkpoint, go on, and compare its weights with those nobody touched."""
    more = ["training.full_determinism=true", "training.save_strategy=steps", "training.save_steps=2"]
    recipe = make_recipe(tiny, "1.1b", NF4, *more, "training.max_steps=6")
    if "GPU_VICTIM" in os.environ:
        return {"finished": bool(medibot.train(recipe, "killed", anyway=True))}
    victim = subprocess.Popen([sys.executable, *sys.argv], env=os.environ | {"GPU_VICTIM": "1"})
    while open_run("killed").last_checkpoint() is None and victim.poll() is None:
        time.sleep(0.005)
    victim.kill()
    died = victim.wait() == -signal.SIGKILL
    at = str(open_run("killed").last_checkpoint()).rpartition("/")[2]
    runs = [medibot.train(recipe, name, anyway=True) for name in ("killed", "untouched")]
    files = [(run.weights / "adapter_model.safetensors").read_bytes() for run in runs]
    return {"killed": died, "went_on_from": at, "bitwise_equal": files[0] == files[1]}


def evaluated(tiny: bool) -> dict[str, Any]:
    medibot.evaluate("qlora", rows=(rows := 2 if tiny else 16))
    return {"rows": rows}


def merged(_: bool) -> dict[str, Any]:
    proof = medibot.merge("qlora").proof or {}
    return {"kept": proof["kept"], **proof["modes"][proof["kept"]]}


def planned(_: bool) -> dict[str, float]:
    runs = map(open_run, ("lora", "qlora", "8b"))
    return {run.name: run.record()["summary"]["memory"]["planned_over_measured"] for run in runs}


QUICK = "training.activation_checkpointing=false"
STEPS: dict[str, tuple[Any, float]] = {
    "environment": (environment, 40),
    "gemm": (gemm, 40),
    "weights": (weights, 90),
    "nf4": (nf4, 40),
    "lora": (lambda tiny: trained(tiny, "lora", "1.1b", QUICK), 70),
    "qlora": (lambda tiny: trained(tiny, "qlora", "1.1b", NF4, QUICK), 70),
    "trl": (trl, 70),
    "resumed": (resumed, 110),
    "8b": (lambda tiny: trained(tiny, "8b", "8b", NF4, f"data.limit={{train: {8 if tiny else 32}}}"), 110),
    "planned": (planned, 20),
    "evaluated": (evaluated, 60),
    "merged": (merged, 60),
}

if __name__ == "__main__":
    main()
