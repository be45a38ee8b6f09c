"""What shall measure a GPU runs here in small, step by step."""

import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow
sys.path.insert(0, str(ROOT / "benchmarks"))
spec = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks" / "gpu.py")
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)


def test_every_step_runs_in_small_and_leaves_its_line(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    written = (tmp_path / "gpu.jsonl").read_text()
    assert done.returncode == 0 and written in done.stdout, done.stdout + done.stderr
    found = {line["step"]: line for line in map(json.loads, written.splitlines())}
    assert list(found) == list(gpu.STEPS) and all(line["ok"] for line in found.values())
    assert found["environment"]["card"] == "CPU" and found["gemm"]["tflops"] > 0
    assert found["weights"]["1.1b_parameters"] == found["weights"]["8b_parameters"] > 100_000
    assert found["nf4"]["equal_bytes"] == 1 and 0.05 < found["nf4"]["mean_error"] < 0.1
    rates = [found[name] for name in ("lora", "qlora", "trl", "8b")]
    assert all(line["rows_per_second"] > 0 and line["needed_tflops"] > 0 for line in rates)
    # The same rows for MediBot and for TRL
    assert found["lora"]["tokens"] == found["qlora"]["tokens"] == found["trl"]["tokens"] > 1000
    assert found["resumed"]["killed"] and found["resumed"]["bitwise_equal"]
    assert found["resumed"]["went_on_from"] in {"checkpoint-2", "checkpoint-4"}
    names = ("lora", "qlora", "8b")
    assert all(found["planned"][name] == found[name]["planned_over_measured"] > 0.3 for name in names)
    assert found["evaluated"]["rows"] == 2 and found["merged"]["greedy_agreement"] > 0.9
    table = (tmp_path / "gpu.md").read_text()
    assert table.startswith("CPU, 20") and table in done.stdout
    assert all(f"| {step} | " in table for step in gpu.STEPS.keys() - {"environment", "weights"})


def test_a_step_that_fails_says_why_and_one_that_takes_too_long_is_ended(tmp_path):
    failed = gpu.run_step("planned", True, tmp_path, 60)
    assert not failed["ok"] and "KeyError" in failed["last_lines"]
    late = gpu.run_step("weights", True, tmp_path, 0.2)
    assert not late["ok"] and "ended with -9 (limit 0 s)" in late["last_lines"] and late["wall_seconds"] < 30
    never = gpu.run_step("weights", True, tmp_path, -1)
    assert not never["ok"] and "530 s" in never["last_lines"]
    # What failed has an empty cell
    assert "| planned |  |" in gpu.make_table({"planned": failed})
