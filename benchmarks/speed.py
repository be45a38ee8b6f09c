"""MediBot's speed beside its yardsticks: the same rows, model and machine, each in a process of its own, in one run.

    .venv/bin/python benchmarks/speed.py                            # on the sample set, all cores
    .venv/bin/python benchmarks/speed.py --data medquad.parquet     # on MedQuAD
    .venv/bin/python benchmarks/speed.py --threads 1 --rows 8 --only medibot plain

    medibot, medibot-nf4   `medibot train`, as its users call it: float32, and NF4 with double quantization
    trl                    `trl sft` with TRL's defaults and the same adapter: batches of 8 in the order of the file,
                           activation checkpointing, dropout 0.05, its fused head
    plain                  a PEFT loop by hand with every setting that is known to help here: MediBot's batches and
                           rows grouped by length, dropout 0, no checkpointing, oneDNN's products, fused AdamW
    notebook               the original notebook's loop (benchmarks/notebook.py): every row padded to 1,000 tokens,
                           q and v alone, checkpointing; on some of the rows, since a padded row costs what any costs

Seconds are those of training steps: no start, evaluation, answers or saving. FLOP are those that the rows need, padding
and recomputation left out (`needed`), so that shares of the GEMM peak compare as rows/s do. The peak is the fastest
float32 product found, MKL's or oneDNN's, at the same number of threads. Peak memory is the largest resident size of any
process of the contestant. Preparation is a fresh process with an empty cache, on copies of the data whose topics are
renamed. Start-up is wall time from the command to the end of the first step, data prepared before.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
RECIPE = str(ROOT / "recipes" / "medquad-smollm2-135m.yaml")
NF4 = "quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: true}"
# Steps alone: nothing is evaluated, asked or saved on the way
BARE = [
    "training.eval_strategy=no",
    "training.eval_on_start=false",
    "training.load_best_model_at_end=false",
    "training.save_strategy=no",
    "training.logging_steps=1",
    "evaluation.questions=[]",
    "tracking=null",
]
GOALS = {"trl": 3.0, "plain": 0.9, "notebook": 5.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="recipes/data/consumer_health.jsonl", help="rows in MedQuAD's columns")
    parser.add_argument("--rows", type=int, default=32, help="rows that each contestant trains on, once")
    parser.add_argument("--notebook-rows", type=int, default=8, help="rows of the notebook's loop")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--copies", type=int, nargs="*", default=[1, 3, 10], help="preparation of so many copies")
    parser.add_argument("--only", nargs="*", default=list(CONTESTANTS), choices=list(CONTESTANTS))
    parser.add_argument("--output", type=Path, default=Path("outputs/speed.json"))
    parser.add_argument("--inside", nargs=2, metavar=("JOB", "FILE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.chdir(ROOT)
    if given.inside:
        job, file = given.inside
        Path(file).write_text(json.dumps(JOBS[job](given)))
        return
    result: dict[str, Any] = {
        "machine": {"threads": given.threads, "load_before": os.getloadavg()[0], "cpu": cpu_name()},
        "data": given.data,
    }
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        result |= inside("rows", given, work) | {"gemm_gflops": inside("peak", given, work)}
        print(f"{result['rows']} rows, {result['tokens']:,} tokens, {result['supervised']:,} of them supervised")
        result["contestants"] = {}
        for name in given.only:
            result["contestants"][name] = found = CONTESTANTS[name](given, work)
            print(f"{name}: {found['rows']} rows in {found['seconds']:.1f} s", flush=True)
        result["startup"] = {verb: seconds(given, work, BIN / "medibot", verb) for verb in ("--help", "list")}
        result["preparation"] = [prepared(given, work, copies) for copies in given.copies]
    report(result)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {given.output}")


def report(result: dict[str, Any]) -> None:
    """The figures of each contestant, and ratios to MediBot's own, against the goals."""
    peak = max(result["gemm_gflops"].values())
    print(f"\nGEMM peak, float32: {result['gemm_gflops']} GFLOP/s at {result['machine']['threads']} threads")
    print(f"{'':12} {'rows/s':>8} {'sup. tok/s':>10} {'of peak':>8} {'memory':>8} {'1st step':>9} {'medibot is':>11}")
    ours = result["contestants"].get("medibot")
    for name, found in result["contestants"].items():
        rate = found["rows"] / found["seconds"]
        found["rows_per_second"] = rate
        found["supervised_tokens_per_second"] = rate * result["supervised"] / result["rows"]
        found["share_of_gemm_peak"] = rate / result["rows"] * result["needed_flop"] / (peak * 1e9)
        line = f"{name:12} {rate:8.3f} {found['supervised_tokens_per_second']:10.1f} {found['share_of_gemm_peak']:8.1%}"
        first = f"{found['first_step']:7.1f} s" if "first_step" in found else ""
        line += f" {found['peak_bytes'] / 1e9:5.2f} GB {first:>9}"
        if ours and found is not ours:
            found["medibot_is"] = ours["rows_per_second"] / rate
            goal = f" (goal {GOALS[name]})" if name in GOALS else ""
            line += f" {found['medibot_is']:10.2f}x{goal}"
        print(line)
    for found in result["preparation"]:
        print(f"preparation: {found['rows']:,} rows in {found['seconds']:.1f} s, {found['peak_bytes'] / 1e9:.2f} GB")
    print("start-up: " + ", ".join(f"medibot {verb} {took:.2f} s" for verb, took in result["startup"].items()))
    if result["machine"]["load_before"] > 0.5:
        print(f"The machine was busy (load {result['machine']['load_before']:.1f}): ratios suffer, seconds more.")


# --- contestants ------------------------------------------------------------------------------------------------------


def overrides(given: argparse.Namespace) -> list[str]:
    return [f"data.path={given.data}", f"data.limit={{train: {given.rows}, validation: 4}}", *BARE]


def medibot(given: argparse.Namespace, work: Path, *more: str) -> dict[str, Any]:
    name = f"speed{len(list(work.glob('outputs/speed*')))}"
    command = [str(BIN / "medibot"), "train", RECIPE, *overrides(given), *more, "--run", name]
    seen = watched(command, given, work, r"step 1/")
    cost = json.loads((work / "outputs" / name / "run.json").read_text())["summary"]["cost"]
    return seen | {"rows": given.rows, "seconds": cost["training_seconds"]}


def trl(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    command = [str(BIN / "trl"), "sft", "--model_name_or_path", str(ROOT / "models/SmolLM2-135M-Instruct")]
    command += ["--dataset_name", str(work / "rows"), "--use_peft", "--lora_r", "16", "--lora_alpha", "32"]
    command += ["--lora_target_modules", "all-linear", "--use_cpu", "--bf16", "false", "--learning_rate", "3e-4"]
    command += ["--num_train_epochs", "1", "--logging_steps", "1", "--save_strategy", "no", "--seed", "0"]
    command += ["--report_to", "none", "--output_dir", str(work / "trl")]
    seen = watched(command, given, work, r"\{'loss'")
    runtime = re.findall(r"'train_runtime': '?([\d.]+)", seen["text"])
    return seen | {"rows": given.rows, "seconds": float(runtime[-1])}


def looped(job: str) -> Any:
    def run(given: argparse.Namespace, work: Path) -> dict[str, Any]:
        file = work / f"{job}.json"
        seen = watched(within(job, given, file), given, work, None)
        return seen | json.loads(file.read_text())

    return run


CONTESTANTS = {
    "medibot": medibot,
    "medibot-nf4": lambda given, work: medibot(given, work, NF4),
    "plain": looped("plain"),
    "trl": trl,
    "notebook": looped("notebook"),
}


# --- processes --------------------------------------------------------------------------------------------------------


def environment(given: argparse.Namespace, work: Path) -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": str(given.threads),
        "PYTHONPATH": str(ROOT),
        "MEDIBOT_OUTPUTS": str(work / "outputs"),
        "MEDIBOT_CACHE": str(work / "cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_CACHE": str(work / "datasets"),
        "TQDM_DISABLE": "1",
        "SPEED_WORK": str(work),
    }


def watched(command: list[str], given: argparse.Namespace, work: Path, first: str | None) -> dict[str, Any]:
    """Run a command: what it said, its largest process, and seconds until it said `first`."""
    started = time.perf_counter()
    env = environment(given, work)
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        lines, seen = [], {}
        for line in process.stdout or []:
            lines.append(line)
            if first and "first_step" not in seen and re.search(first, line):
                seen["first_step"] = time.perf_counter() - started
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    text = "".join(lines)
    if process.returncode:
        sys.exit(f"{' '.join(command)}\nended with {process.returncode}:\n{text[-3000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return seen | {"text": text[-2000:], "peak_bytes": usage.ru_maxrss * unit}


def within(job: str, given: argparse.Namespace, file: Path) -> list[str]:
    told = ["--data", given.data, "--rows", str(given.rows), "--notebook-rows", str(given.notebook_rows)]
    return [sys.executable, __file__, *told, "--inside", job, str(file)]


def inside(job: str, given: argparse.Namespace, work: Path) -> Any:
    file = work / f"{job}.json"
    watched(within(job, given, file), given, work, None)
    return json.loads(file.read_text())


def seconds(given: argparse.Namespace, work: Path, *command: Any) -> float:
    started = time.perf_counter()
    watched([str(word) for word in command], given, work, None)
    return time.perf_counter() - started


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    return names[0] if names else "unknown"


# --- what runs in a process of its own --------------------------------------------------------------------------------


def gathered(given: argparse.Namespace, *more: str) -> Any:
    from medibot.data.prepared import prepare
    from medibot.recipe import load_recipe

    return prepare(load_recipe(RECIPE, [*overrides(given), *more]))


def tokenized(prepared: Any) -> Any:
    """(rows as TRL tokenizes them for MediBot, the trainer's collator)."""
    from medibot.run import Run
    from medibot.training.trainer import build_trainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(prepared, Run(Path(folder)), tiny=True)
        return list(trainer.train_dataset), trainer.data_collator


def rows(given: argparse.Namespace) -> dict[str, Any]:
    """Prepare the rows, leave them to `trl sft` as a file, and count what they need."""
    prepared = gathered(given)
    folder = Path(os.environ["SPEED_WORK"]) / "rows"
    folder.mkdir()
    found = prepared.load("train").select_columns(["prompt", "completion"])
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    tokens, supervised = (
        sum(sum(kept(row)) for row in tokenized(prepared)[0])
        for kept in (lambda row: [1] * len(row["input_ids"]), lambda row: [label != -100 for label in row["labels"]])
    )
    return {
        "rows": len(found),
        "tokens": tokens,
        "supervised": supervised,
        "needed_flop": needed(prepared, tokens, supervised),
    }


def needed(prepared: Any, tokens: int, supervised: int) -> float:
    """FLOP of the matrix products that one pass over the rows needs, attention's own left out.

    2 a weight and token forward and 2 backward for frozen weights (no gradient of their own), 6 for the adapter's; the
    head is needed at supervised tokens alone.
    """
    from medibot.planning.memory import load_config

    config = load_config(prepared.recipe)
    hidden, wide, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    narrow = hidden * config.num_key_value_heads // config.num_attention_heads
    shapes = [(hidden, hidden)] * 2 + [(hidden, narrow)] * 2 + [(hidden, wide)] * 3
    frozen = layers * sum(a * b for a, b in shapes)
    adapter = layers * sum(prepared.recipe.lora["r"] * (a + b) for a, b in shapes)
    return 4.0 * (frozen * tokens + config.vocab_size * hidden * supervised) + 6.0 * adapter * tokens


def peak(_: argparse.Namespace) -> dict[str, float]:
    """GFLOP/s of float32 products of the model's shapes and one large one, best of several, by MKL and by oneDNN."""
    import torch

    from medibot.training.cpu import prefer_onednn

    def best(m: int, k: int, n: int) -> float:
        a, b = torch.randn(m, k), torch.randn(n, k)
        rates = []
        for _ in range(8):
            started, products = time.perf_counter(), 0
            while time.perf_counter() - started < 0.2:
                torch.mm(a, b.t())
                products += 1
            rates.append(2 * m * k * n * products / (time.perf_counter() - started) / 1e9)
        return round(max(rates), 1)

    shapes = [(1024, 576, 1536), (1024, 1536, 576), (2048, 2048, 2048)]
    rates = {"as torch comes": max(best(*shape) for shape in shapes)}
    prefer_onednn()
    return rates | {"as MediBot sets it": max(best(*shape) for shape in shapes)}


def plain(given: argparse.Namespace) -> dict[str, Any]:
    import torch
    from peft import get_peft_model

    from medibot.model.loading import load_base, weights_dtype
    from medibot.model.precision import make_lora_config
    from medibot.training.cpu import prefer_onednn

    prepared = gathered(given)
    data, collate = tokenized(prepared)
    prefer_onednn()
    torch.manual_seed(0)
    recipe = prepared.recipe
    base = load_base(recipe, weights_dtype(recipe, prepared.precision.dtype))
    weights = get_peft_model(base, make_lora_config(recipe)).train()
    trained = [parameter for parameter in weights.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4, fused=True)
    size = prepared.recipe.training["per_device_train_batch_size"]
    data.sort(key=lambda row: len(row["input_ids"]), reverse=True)
    started = time.perf_counter()
    for place in range(0, len(data), size):
        weights(**collate(data[place : place + size])).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {"rows": len(data), "seconds": time.perf_counter() - started}


def notebook(given: argparse.Namespace) -> dict[str, Any]:
    from notebook import AS_NOTEBOOK, BATCH, fit, written_by_hand

    prepared = gathered(given, *AS_NOTEBOOK)
    found = prepared.load("train").select(range(given.notebook_rows))
    texts = ["".join(written_by_hand(row["prompt"][-1]["content"], row["completion"][0]["content"])) for row in found]
    _, clock = fit(prepared, texts, len(texts) // BATCH)
    return {"rows": len(texts), "seconds": sum(clock.seconds)}


def prepared(given: argparse.Namespace, work: Path, copies: int) -> dict[str, Any]:
    """Rows, seconds and peak memory of preparing `copies` copies of the data, in a fresh process with an empty cache."""
    source = work / f"x{copies}.parquet"
    multiply(given.data, copies, source)
    told = argparse.Namespace(**(vars(given) | {"data": str(source)}))
    file = work / f"prepared{copies}.json"
    seen = watched(within("prepare", told, file), told, work, None)
    return {"copies": copies, "peak_bytes": seen["peak_bytes"]} | json.loads(file.read_text())


def prepare(given: argparse.Namespace) -> dict[str, Any]:
    from medibot.data.prepared import prepare as prepare_rows
    from medibot.model.tokenizer import load_tokenizer
    from medibot.recipe import load_recipe

    recipe = load_recipe(RECIPE, overrides(given))
    tokenizer = load_tokenizer(recipe)
    started = time.perf_counter()
    done = prepare_rows(recipe, tokenizer)
    return {"rows": done.ledger[0]["rows_in"], "seconds": time.perf_counter() - started}


def multiply(path: str, copies: int, target: Path) -> None:
    """Write `copies` copies of the rows whose topics, and what else ties rows together, have other names in each."""
    import pyarrow
    import pyarrow.parquet

    from medibot.data.sources import open_sources
    from medibot.recipe import load_recipe

    source = [row for _, row in open_sources(load_recipe(RECIPE, [f"data.path={path}"]))[0].read()]
    tying = ("document_id", "document_url", "umls_cui")

    def renamed(row: dict[str, Any], copy: int) -> dict[str, Any]:
        topic = re.compile(re.escape(row["question_focus"] or "\0"), re.I)
        spelled = {key: topic.sub(lambda found: f"{found[0]} {copy}", value) for key, value in row.items() if value}
        ties = {key: "|".join(f"{one}-{copy}" for one in row[key].split("|")) for key in tying if row[key]}
        return row | spelled | ties

    many = [renamed(row, copy) if copy else row for copy in range(copies) for row in source]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(many), target)


JOBS = {"rows": rows, "peak": peak, "plain": plain, "notebook": notebook, "prepare": prepare}

if __name__ == "__main__":
    main()
