"""Measure MediBot on one GPU: what it does, how fast, and in how much memory, with models drawn at random.

python3 benchmarks/gpu.py --out results          # one GPU, under nine minutes
.venv/bin/python benchmarks/gpu.py --tiny        # the same steps in small on a CPU, to find what would fail there

Each step is a process of its own with a limit of its own, and leaves one JSON line in gpu.jsonl; one that fails shows its
last lines, and the next one runs. Nothing is asked of a network: weights are drawn, the tokenizer is trained on the rows.

    nf4       bitsandbytes' bytes on this device and on a CPU
    lora      LoRA in bfloat16, TinyLlama-1.1B's shape: rows/s, the share of the GEMM peak, memory planned and measured
    qlora     the same on NF4 weights
    trl       the same rows, model and method by TRL's defaults
    resume    a training that is killed and goes on, against one that nobody touched: the adapter's bytes
    eval      base against tuned
    merge     whole weights, proven against the trained model
    8b        QLoRA of an 8B Llama's shape

FLOP are those that the rows need (Kaplan et al., 2020): two a weight and token forward, and two for the gradient of the
inputs; padding and what checkpointing computes twice are left out. The first third of the steps warms up.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)
SHAPES = {
    "1b": (2048, 22, 32, 4, 5632, 32000),
    "8b": (4096, 32, 32, 8, 14336, 128256),
    "tiny": (64, 2, 4, 2, 128, 8192),
}
NF4 = "{load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: true}"
RECIPE = """
model: {{pretrained_model_name_or_path: {model}}}
lora: {{r: 16, lora_alpha: 32, target_modules: all-linear}}
data: {{path: {rows}, prompt: question, completion: answer, group_by: [topic], validation: 0.05, test: 0.05, clean: [drop_unanswered]}}
training:
  learning_rate: 5.0e-4
  max_length: 1024
  per_device_train_batch_size: {batch}
  max_steps: {steps}
  logging_steps: {logging}
  save_strategy: "no"
  activation_checkpointing: false
  train_sampling_strategy: group_by_length
evaluation: {{max_new_tokens: 16}}
"""


def main() -> None:
    """Run the steps, and print a table that can stand in recipes/README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"), help="folder of gpu.jsonl")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on the CPU")
    parser.add_argument("--only", nargs="*", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--seconds", type=int, default=530, help="steps that do not fit into these are left out")
    parser.add_argument("--inside", nargs=2, metavar=("STEP", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        step, folder = given.inside
        print("\n" + json.dumps(STEPS[step][1](Bench(Path(folder), given.tiny))))
        return
    given.out.mkdir(parents=True, exist_ok=True)
    work, ends, lines = (given.out / "work").resolve(), time.monotonic() + given.seconds, []
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    for name in given.only:
        line = {"step": name} | run_step(name, work, given.tiny, ends - time.monotonic())
        lines.append(line)
        print(json.dumps(line), flush=True)
        with (given.out / "gpu.jsonl").open("w" if len(lines) == 1 else "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    shutil.rmtree(work)
    print(table(lines, given.tiny))
    sys.exit(any("failed" in line for line in lines))


def run_step(name: str, work: Path, tiny: bool, left: float) -> dict[str, Any]:
    """Return a step's figures and seconds, or what its last lines were."""
    limit, started = min(STEPS[name][0], left), time.monotonic()
    if left < 10:
        return {"failed": "no time was left"}
    command = [sys.executable, __file__, "--inside", name, str(work), *(["--tiny"] if tiny else [])]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""} if tiny else {}
    settings = {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings |= {"PYTHONPATH": paths, "MEDIBOT_OUTPUTS": str(work / "outputs"), "MEDIBOT_CACHE": str(work / "cache")}
    log = work / f"{name}.log"
    with log.open("wb") as file:
        # A session of its own, so that a limit ends what it started, too
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | settings | hidden, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    said, seconds = log.read_text(errors="replace").strip().splitlines(), round(time.monotonic() - started, 1)
    if code:
        print("\n".join(said[-25:]), file=sys.stderr, flush=True)
        return {"failed": f"over {limit:.0f} s" if code == -signal.SIGKILL else f"exit code {code}", "seconds": seconds}
    return json.loads(said[-1]) | {"seconds": seconds}


class Bench:
    """The folder that steps share, the device, and how large everything is."""

    def __init__(self, work: Path, tiny: bool) -> None:
        self.work, self.tiny, self.device = work, tiny, "cpu" if tiny else "cuda"
        self.dtype = "float32" if tiny else "bfloat16"
        self.rows, self.batch, self.steps = (240, 4, 4) if tiny else (6000, 32, 90)

    def figures(self, name: str) -> dict[str, Any]:
        """Return what an earlier step found, or nothing."""
        log = self.work / f"{name}.log"
        last = log.read_text(errors="replace").strip().rpartition("\n")[2] if log.is_file() else ""
        return json.loads(last) if last.startswith("{") else {}

    def draw(self, shape: str) -> tuple[Path, Path]:
        """Write made-up rows, and a Llama of that shape with random weights and a tokenizer; return both paths."""
        import torch
        from data import train_tokenizer, write_rows
        from transformers import LlamaConfig, LlamaForCausalLM

        rows, folder = self.work / "rows.jsonl", self.work / shape
        if not rows.exists():
            write_rows(rows, self.rows)
        if not folder.exists():
            sizes = dict(zip(SIZES, SHAPES["tiny" if self.tiny else shape], strict=True))
            config = LlamaConfig(
                **sizes, max_position_embeddings=2048, eos_token_id=1, bos_token_id=None, pad_token_id=0
            )
            torch.manual_seed(0)
            torch.set_default_dtype(vars(torch)[self.dtype])
            with torch.device(self.device):
                LlamaForCausalLM(config).save_pretrained(folder)
            train_tokenizer(folder, rows)
        return rows, folder

    def medibot(self, *words: str) -> None:
        """Run a verb, as a user would."""
        subprocess.run([sys.executable, "-m", "medibot", *words], check=True)

    def train(self, name: str, shape: str, *overrides: str) -> dict[str, Any]:
        """Train a recipe and return what its own record says."""
        rows, model = self.draw(shape)
        recipe = self.work / f"{name}.yaml"
        shown = max(1, self.steps // 6)
        recipe.write_text(RECIPE.format(model=model, rows=rows, batch=self.batch, steps=self.steps, logging=shown))
        self.medibot("train", str(recipe), f"model.dtype={self.dtype}", *overrides, "--run", name)
        folder = self.work / "outputs" / name
        record, audit = (json.loads((folder / file).read_text()) for file in ("run.json", "audit.json"))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if "loss" in line]
        first, last = lines[len(lines) // 3], lines[-1]
        batch = json.loads((folder / "plan.json").read_text())["micro_batch"]
        seconds = last["training_seconds"] - first["training_seconds"]
        speed = (last["step"] - first["step"]) * batch / seconds
        tokens = speed * audit[0]["tokens"] / audit[0]["rows_out"]
        found = {"rows_per_second": round(speed, 2), "tokens_per_second": round(tokens)} | record["summary"]["memory"]
        if peak := self.figures("gemm").get("tflops"):
            hidden, layers, heads, shared, inner, vocabulary = SHAPES["tiny" if self.tiny else shape]
            weights = layers * hidden * (2 * hidden + 2 * hidden * shared // heads + 3 * inner) + hidden * vocabulary
            found["share_of_gemm_peak"] = round(tokens * 4 * weights / (peak * 1e12), 4)
        return found


def environment(bench: Bench) -> dict[str, Any]:
    """Say what is measured on."""
    import torch

    packages = ("transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets")
    found = {"torch": torch.__version__} | {name: importlib.metadata.version(name) for name in packages}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    found |= {"date": time.strftime("%Y-%m-%d"), "commit": commit.stdout.strip() or "unknown", "card": "CPU"}
    if bench.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"card": properties.name, "memory_gb": round(properties.total_memory / 1e9, 1)}
        driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(driver, capture_output=True, text=True).stdout.strip()
    return found


def gemm(bench: Bench) -> dict[str, Any]:
    """Measure the fastest product of large matrices."""
    import torch

    from medibot.planning.hardware import measure_tflops

    sizes = (256, 512) if bench.tiny else (4096, 8192, 16384)
    speeds = [measure_tflops(vars(torch)[bench.dtype], bench.device, size) for size in sizes]
    return {"tflops": round(max(speeds), 3), "dtype": bench.dtype}


def nf4(bench: Bench) -> dict[str, Any]:
    """Compare the bytes that bitsandbytes makes here with those of a CPU, and what they stand for with what went in."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.manual_seed(0)
    weights = torch.randn(256 if bench.tiny else 4096, 256 if bench.tiny else 4096)
    found = {}
    for device in ("cpu", bench.device):
        packed, state = quantize_4bit(weights.to(device), quant_type="nf4")
        found[device] = packed.cpu(), dequantize_4bit(packed, state).cpu()
    (bytes_here, values_here), (bytes_cpu, values_cpu) = found[bench.device], found["cpu"]
    error = ((values_here - weights).norm() / weights.norm()).item()
    differing = (bytes_here != bytes_cpu).double().mean().item()
    apart = (values_here - values_cpu).abs().max().item()
    return {"bytes_that_differ": differing, "largest_difference": apart, "relative_error": round(error, 4)}


def trl(bench: Bench) -> dict[str, Any]:
    """Train the same rows by TRL's defaults on NF4 weights, with the same adapter."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows, model = bench.draw("1b")
    times: dict[int, float] = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if bench.device == "cuda":
                torch.cuda.synchronize()
            times[state.global_step] = time.perf_counter()

    def chat(row: dict[str, str]) -> dict[str, Any]:
        texts = {"prompt": ("user", row["question"]), "completion": ("assistant", row["answer"])}
        return {name: [{"role": role, "content": text}] for name, (role, text) in texts.items()}

    dataset = load_dataset("json", data_files=str(rows), split="train").filter(lambda row: row["answer"])
    bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=bench.dtype
    )
    loaded = AutoModelForCausalLM.from_pretrained(model, quantization_config=bits, dtype=bench.dtype)
    machine = {"use_cpu": True, "bf16": False} if bench.tiny else {}
    args = SFTConfig(str(bench.work / "trl"), max_steps=bench.steps, report_to="none", save_strategy="no", **machine)
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    dataset = dataset.map(chat, remove_columns=dataset.column_names)
    SFTTrainer(loaded, args, train_dataset=dataset, peft_config=adapter, callbacks=[Watch()]).train()
    first = max(1, bench.steps // 3)
    speed = (bench.steps - first) * args.per_device_train_batch_size / (times[bench.steps] - times[first])
    found = {"rows_per_second": round(speed, 2), "batch": args.per_device_train_batch_size}
    if ours := bench.figures("qlora").get("rows_per_second"):
        found["medibot_is"] = round(ours / speed, 2)
    return found


def resume(bench: Bench) -> dict[str, Any]:
    """Kill a training behind its first checkpoint, let it go on, and compare with one that nobody touched."""
    rows, model = bench.draw("1b")
    recipe = bench.work / "resume.yaml"
    recipe.write_text(RECIPE.format(model=model, rows=rows, batch=4, steps=8, logging=1))
    exact = [f"model.dtype={bench.dtype}", "training.full_determinism=true", "training.save_strategy=steps"]
    command = [sys.executable, "-m", "medibot", "train", str(recipe), f"quantization={NF4}", *exact]
    command.append("training.save_steps=4")
    killed = bench.work / "outputs" / "killed"
    training = subprocess.Popen([*command, "--run", "killed"], start_new_session=True)
    while training.poll() is None and not list(killed.glob("checkpoints/checkpoint-4")):
        time.sleep(0.05)
    # It may have come to its end, where steps are quick
    was_killed = training.poll() is None
    if was_killed:
        for line in subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout.splitlines():
            if "--run killed" in line:
                os.kill(int(line.split()[0]), signal.SIGKILL)
    training.wait()
    subprocess.run([*command, "--run", "killed"], check=True)
    subprocess.run([*command, "--run", "whole"], check=True)
    whole = bench.work / "outputs" / "whole"
    adapters = [(run / "model" / "adapter_model.safetensors").read_bytes() for run in (killed, whole)]
    return {"killed": was_killed, "same_bytes": adapters[0] == adapters[1]}


def evaluate(bench: Bench) -> dict[str, Any]:
    """Evaluate base and tuned model on a few held-out rows."""
    bench.medibot("eval", "--run", "qlora", "--rows", "4" if bench.tiny else "16")
    (results,) = (bench.work / "outputs" / "qlora").glob("eval/results.json")
    return {"verdict": json.loads(results.read_text())["verdict"]}


def merge(bench: Bench) -> dict[str, Any]:
    """Merge the adapter, and say how near the proof found the result."""
    bench.medibot("merge", "--run", "qlora")
    proof = json.loads((bench.work / "outputs" / "qlora" / "merged" / "merge.json").read_text())
    return {"kept": proof["kept"]} | proof["modes"][proof["kept"]]


# Name -> seconds that it may take, and what it does
STEPS: dict[str, tuple[int, Any]] = {
    "environment": (60, environment),
    "gemm": (60, gemm),
    "nf4": (60, nf4),
    "lora": (120, lambda bench: bench.train("lora", "1b")),
    "qlora": (120, lambda bench: bench.train("qlora", "1b", f"quantization={NF4}")),
    "trl": (120, trl),
    "resume": (180, resume),
    "eval": (90, evaluate),
    "merge": (120, merge),
    "8b": (
        180,
        lambda bench: bench.train(
            "8b", "8b", f"quantization={NF4}", "training.activation_checkpointing=true", "training.max_steps=12"
        ),
    ),
}


def table(lines: list[dict[str, Any]], tiny: bool) -> str:
    """Return the figures as a table in Markdown, with what they were measured on above it."""
    about = next((line for line in lines if line["step"] == "environment"), {})
    command = f"benchmarks/gpu.py{' --tiny' if tiny else ''}"
    rows = [f"{about.get('card')}, {about.get('date')}, commit {about.get('commit')}, `{command}`", ""]
    rows += ["| step | figures | s |", "|---|---|---|"]
    for line in lines:
        left = {key: value for key, value in line.items() if key not in ("step", "seconds")}
        shown = ", ".join(
            f"{key.replace('_', ' ')} {round(value, 3) if isinstance(value, float) else value}"
            for key, value in left.items()
        )
        rows.append(f"| {line['step']} | {shown} | {line.get('seconds', '')} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
