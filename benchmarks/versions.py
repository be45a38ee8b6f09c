"""Compare this clone with another one of MediBot, turn by turn in one run: start-up, preparation, training, answering.

    .venv/bin/python benchmarks/versions.py ../before --data medquad.parquet --rounds 3

Each figure is the median of its rounds; both clones run in this environment and take turns, so that a machine whose
speed drifts drifts for both. Nothing else should run meanwhile.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
PREPARE = """
import sys
from medibot.recipe import load_recipe
recipe = load_recipe("medquad-smollm2-135m", [f"data.path={sys.argv[1]}"])
try:
    from medibot.data.prepared import prepare
    prepare(recipe)
except ModuleNotFoundError:  # the flat package of version 0.1
    from medibot.data import prepare
    from medibot.model import load_tokenizer
    prepare(recipe, load_tokenizer(recipe))
"""
# Steps alone: no evaluation, no answers, no W&B
STEPS = [
    "training.max_steps=16", "training.eval_strategy=no", "training.eval_on_start=false", "tracking=null",
    "training.load_best_model_at_end=false", "training.save_strategy=no", "evaluation.questions=[]",
]  # fmt: skip


def run(clone: Path, work: Path, *command: str) -> float:
    """Run Python with `command` in a clone; return its seconds."""
    environment = os.environ | {
        "PYTHONPATH": str(clone),
        "MEDIBOT_OUTPUTS": str(work),
        "MEDIBOT_CACHE": str(work / "c"),
    }
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=clone, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{clone}: {' '.join(command)}: {done.stderr[-2000:]}")
    return time.perf_counter() - started


def measure(clone: Path, data: str | None) -> dict[str, float]:
    """Measure one clone once."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        found = {
            "--help, s": run(clone, work, "-m", "medibot", "--help"),
            "list, s": run(clone, work, "-m", "medibot", "list"),
        }
        if data:
            found["MedQuAD prepared, s"] = run(clone, work, "-c", PREPARE, data)
            shutil.rmtree(work / "c")
        run(clone, work, "-m", "medibot", "train", "quickstart", *STEPS, "--run", "steps")
        cost = json.loads((work / "steps" / "run.json").read_text())["summary"]["cost"]
        found["quickstart, supervised tokens/s"] = cost["supervised_tokens_per_second"]
        found["quickstart, peak GB"] = cost["peak_memory_bytes"] / 1e9
        answer = ["-m", "medibot", "ask", "--run", "steps", "-q", "What is anemia?", "--max-new-tokens", "1"]
        found["first answers (base and tuned), s"] = run(clone, work, *answer)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="the other clone")
    parser.add_argument("--data", help="MedQuAD as a parquet file; without it nothing is prepared")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    other = given.other.resolve()
    rounds: dict[Path, list[dict[str, float]]] = {other: [], HERE: []}
    for _ in range(given.rounds):
        for clone, found in rounds.items():
            found.append(measure(clone, given.data and str(Path(given.data).resolve())))
    print(f"{'median of ' + str(given.rounds):36}{'other':>10}{'here':>10}{'here/other':>12}")
    for name in rounds[HERE][0]:
        theirs, ours = (statistics.median(row[name] for row in rounds[clone]) for clone in (other, HERE))
        print(f"{name:36}{theirs:10.2f}{ours:10.2f}{ours / theirs:12.2f}")


if __name__ == "__main__":
    main()
