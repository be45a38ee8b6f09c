"""What happens to a run that is stopped, killed, or runs out of something: nothing is lost and one line says why."""

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import FOUR_STEPS, MINIATURE, ROOT, adapter, assert_same, losses

from medibot.errors import RecipeError, Stopped
from medibot.recipe import load_recipe
from medibot.run import open_run, read_json, read_lines
from medibot.training import session
from medibot.training.record import Record
from medibot.training.session import train

pytestmark = pytest.mark.slow


def own_environment() -> dict[str, str]:
    """This process's environment, without its W&B service: that would hold on to the run of a process that is killed."""
    return {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}


@pytest.fixture
def launch(make_model, workplace):
    """launch(name, hardware): `medibot train` of 40 short steps as its users start it, on that accelerate config.

    `launch.whole(name)` trains the same in this process, which has imported everything already.
    """
    overrides = [*MINIATURE, "training.max_steps=40", "training.eval_strategy=no", "training.eval_on_start=false"]
    overrides += ["training.save_strategy=no", "training.load_best_model_at_end=false", "evaluation.questions=[]"]
    overrides += [f"model.pretrained_model_name_or_path={make_model()}", "quantization=null", "lora.lora_dropout=0.1"]

    def start(name: str, hardware: str, *more: str) -> subprocess.Popen:
        config = str(ROOT / "accelerate_configs" / f"{hardware}.yaml")
        command = [
            sys.executable,
            "-m",
            "medibot",
            "train",
            str(ROOT / "recipes" / "quickstart.yaml"),
            *overrides,
            *more,
        ]
        command += ["--run", name, "--accelerate", config]
        environment = own_environment() | {"PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environment, **pipes)

    start.overrides = overrides
    start.whole = lambda name, *more: train(load_recipe("quickstart", [*overrides, *more], root=ROOT), name)
    return start


def wait_for_steps(name: str, count: int) -> None:
    end = time.monotonic() + 300
    while len(losses(name)) < count:
        assert time.monotonic() < end, "no step was taken"
        time.sleep(0.01)


def descendants(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_signal_stops_at_a_step_with_code_75_a_kill_is_said_in_a_line_and_the_run_goes_on_from_both(launch):
    launch.whole("whole")
    stopped = launch("stopped", "cpu")
    wait_for_steps("stopped", 3)
    below = descendants(stopped)
    stopped.send_signal(signal.SIGINT)
    said = stopped.communicate(timeout=60)
    assert stopped.returncode == 75, said
    this, record = open_run("stopped"), open_run("stopped").record()
    assert record["status"] == "stopped" and 3 <= record["step"] < 40
    assert this.last_checkpoint().name == f"checkpoint-{record['step']}" and not this.weights.exists()
    assert f"stopped at step {record['step']} of 40; the same command goes on" in said[1] and "Traceback" not in said[1]
    assert not [process for process in below if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    killed = launch("stopped", "cpu")
    wait_for_steps("stopped", record["step"] + 2)
    (process,) = psutil.Process(killed.pid).children()
    process.kill()
    said = killed.communicate(timeout=60)
    assert killed.returncode == 128 + signal.SIGKILL
    assert f"going on from {this.checkpoints}/checkpoint-{record['step']}" in said[0]
    assert (
        "training ended by signal 9 (9 is often the system's, out of memory); run the same command to resume" in said[1]
    )
    launch.whole("stopped")
    assert losses("stopped") == losses("whole") and len(losses("whole")) == 40
    assert_same(adapter("stopped"), adapter("whole"))
    assert [line["step"] for line in read_lines(this.metrics) if "loss" in line] == list(range(1, 41))
    assert len(list((this.folder / "wandb").glob("offline-run-*"))) == 3
    names = {path.name.rpartition("-")[2] for path in (this.folder / "wandb").glob("offline-run-*")}
    assert len(names) == 1


def test_signal_before_the_training_began_ends_it_and_leaves_nothing(launch):
    started = launch("early", "cpu")
    time.sleep(2)
    below = descendants(started)
    started.terminate()
    started.communicate(timeout=30)
    assert started.returncode == 128 + signal.SIGTERM
    assert not [process for process in below if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not open_run("early").folder.exists()


SRUN = """#!/usr/bin/env bash
# Two tasks, as on two nodes: signals go to both, and the larger exit code is the step's
shift
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
trap 'kill -TERM $first $second' TERM
a=0; b=0
wait $first || a=$?; wait $first || a=$?
wait $second || b=$?; wait $second || b=$?
exit $((a > b ? a : b))
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then printf '127.0.0.1\\nother\\n'; else echo "$@" >> requeued; fi
"""


def test_two_processes_one_of_which_dies_go_on_on_two_nodes_of_slurm_and_give_the_weights_of_one(
    launch, workplace, capsys
):
    same = ["training.optim=sgd", "training.learning_rate=0.1", "lora.lora_dropout=0.0", "training.max_steps=20"]
    same += ["training.train_sampling_strategy=random", "training.save_strategy=steps", "training.save_steps=1"]
    launch.whole("whole", *same)
    assert "2 per device x 1 accumulated x 1 processes = 2 rows a step" in capsys.readouterr().out
    torn = launch("nodes", "cpu-2", *same)
    wait_for_steps("nodes", 3)
    ranks = [
        p for p in descendants(torn) if "medibot" in p.cmdline() and "accelerate.commands.launch" not in p.cmdline()
    ]
    victim = next(process for process in ranks if process.environ().get("LOCAL_RANK") == "1")
    victim.kill()
    killed = time.monotonic()
    said = torn.communicate(timeout=60)
    assert torn.returncode != 0 and time.monotonic() - killed < 30
    assert "1 per device x 1 accumulated x 2 processes = 2 rows a step" in said[0]
    assert "Signal 9 (SIGKILL)" in said[1], said[1]
    # Either the other process noticed first, or torchrun ended it
    ended = ("another process of this run ended", "training ended with exit code 1 (see above)")
    assert any(line in said[1] for line in ended), said[1]
    assert open_run("nodes").record()["status"] == "running" and not open_run("nodes").weights.exists()
    tools = workplace / "tools"
    tools.mkdir()
    medibot = f'#!/usr/bin/env bash\nexec {sys.executable} -m medibot "$@"\n'
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("medibot", medibot)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = own_environment() | {
        "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "MEDIBOT": str(tools / "medibot"),
        "MEDIBOT_PORT": str(port), "RUN": "nodes", "ACCELERATE": str(ROOT / "accelerate_configs" / "cpu-2.yaml"),
        "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_ID": "7",
    }  # fmt: skip
    script = ROOT / "accelerate_configs" / "slurm" / "train.sbatch"
    command = ["bash", str(script), str(ROOT / "recipes" / "quickstart.yaml"), *launch.overrides, *same]
    job = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_steps("nodes", len(losses("nodes")) + 2)
    step = next(process for process in psutil.Process(job.pid).children() if "srun" in " ".join(process.cmdline()))
    step.terminate()
    said = job.communicate(timeout=90)[0]
    assert job.returncode == 75 and "going on from" in said, said
    assert (workplace / "requeued").read_text() == "requeue 7\n"
    # torchrun logs a traceback, and goes on, where the first machine leaves its last barrier before the second has heard
    ours = [line for line in said.splitlines() if "torch/distributed/elastic/agent/server/api.py" not in line]
    assert open_run("nodes").record()["status"] == "stopped" and not any("Traceback" in line for line in ours), said
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0 and "going on from" in again.stdout, again.stderr[-3000:]
    assert_same(adapter("nodes"), adapter("whole"), tolerance=1e-5)
    assert [line["step"] for line in read_lines(open_run("nodes").metrics) if "loss" in line] == list(range(1, 21))
    assert again.stdout.count("rows a step") == 1
    assert read_json(open_run("nodes").folder / "environment.json")["processes"] == 2
    runs = {path.name.rpartition("-")[2] for path in (open_run("nodes").folder / "wandb").glob("offline-run-*")}
    assert len(runs) == 1


def test_the_slurm_script_asks_slurm_for_what_it_needs():
    text = (ROOT / "accelerate_configs" / "slurm" / "train.sbatch").read_text()
    lines = text.splitlines()
    options = [line.split()[1] for line in lines if line.startswith("#SBATCH")]
    assert all(re.fullmatch(r"--[a-z-]+(=\S+)?", option) for option in options)
    assert {"--requeue", "--ntasks-per-node=1", "--open-mode=append"} <= set(options)
    # Slurm reads no option behind the first command
    assert max(n for n, line in enumerate(lines) if line.startswith("#SBATCH")) < lines.index("set -euo pipefail")
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_a_second_signal_ends_a_process_at_once():
    code = """
import time
from medibot.training.signals import Signals
with Signals() as signals:
    print("ready", flush=True)
    while True:
        time.sleep(0.1)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    assert "ready\n" in iter(process.stdout.readline, "")
    for _ in range(3):
        # At once, as a process group's signal and make's own reach it: they are one
        process.terminate()
    time.sleep(1.5)
    assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=5) == -signal.SIGTERM


def test_random_kills_lose_nothing():
    command = [sys.executable, str(ROOT / "tests" / "training" / "kills.py"), "--kills", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "weights equal: True; record equal: True" in done.stdout


class AtStep(Record):
    """Does `what` when a step begins."""

    step = 4

    def what(self) -> None:
        raise NotImplementedError

    def on_step_begin(self, args, state, *rest, **kwargs):
        super().on_step_begin(args, state, *rest, **kwargs)
        if state.global_step == self.step - 1:
            self.what()


@pytest.mark.parametrize("step", [3, 4], ids=["inside an epoch", "at its end"])
def test_a_stop_between_two_logged_lines_changes_neither(step, miniature, monkeypatch):
    class Signalled(AtStep):
        def what(self):
            os.kill(os.getpid(), signal.SIGTERM)

    Signalled.step = step
    settings = ["training.max_steps=8", "training.logging_steps=5", "training.save_strategy=no", "tracking=null"]
    settings += ["training.eval_strategy=no", "training.eval_on_start=false", "training.load_best_model_at_end=false"]
    recipe = miniature("quickstart", *settings, "quantization=null", "evaluation.questions=[]")
    train(recipe, "whole")
    with monkeypatch.context() as patch, pytest.raises(Stopped, match=f"stopped at step {step} of 8"):
        patch.setattr(session, "Record", Signalled)
        train(recipe, "stopped")
    train(recipe, "stopped")
    figures = ("step", "loss", "entropy", "mean_token_accuracy")
    logged = {
        name: [[line[key] for key in figures] for line in read_lines(open_run(name).metrics) if "loss" in line]
        for name in ("whole", "stopped")
    }
    assert logged["whole"] and logged["stopped"] == logged["whole"]
    assert_same(adapter("stopped"), adapter("whole"))


@pytest.mark.parametrize("method", [["quantization=null"], ["lora=null", "quantization=null"]], ids=["lora", "full"])
def test_a_disk_that_is_full_is_said_in_a_line_and_costs_nothing(method, miniature, monkeypatch):
    overrides = [*FOUR_STEPS, "training.load_best_model_at_end=false", "tracking=null", *method]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full(AtStep):
        def what(self):
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))

    try:
        with monkeypatch.context() as patch:
            patch.setattr(session, "Record", Full)
            with pytest.raises(RecipeError, match=r"cannot be written, .* GB free: .*checkpoint-2 is whole.*make room"):
                train(miniature("quickstart", *overrides), "mini")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert open_run("mini").last_checkpoint().name == "checkpoint-2" and not open_run("mini").weights.exists()
    train(miniature("quickstart", *overrides), "mini")
    train(miniature("quickstart", *overrides), "whole")
    assert losses("mini") == losses("whole")


def test_memory_that_runs_out_is_said_with_what_to_lower(miniature, monkeypatch):
    class Hungry(AtStep):
        def what(self):
            torch.empty(1 << 50)

    monkeypatch.setattr(session, "Record", Hungry)
    said = (
        r"out of memory \(checkpoint-2 is whole\); by the plan, 2 rows of \d+ tokens need [\d.]+ GB of [\d.]+ GB on .+ "
        r"\(per_device_train_batch_size=1 would fit"
    )
    with pytest.raises(RecipeError, match=said):
        train(miniature("quickstart", *FOUR_STEPS, "tracking=null"), "mini")


def test_an_outputs_folder_that_cannot_be_made_is_said_in_a_line(miniature, monkeypatch):
    monkeypatch.setenv("MEDIBOT_OUTPUTS", "/proc/outputs")
    with pytest.raises(RecipeError, match=r"/proc/outputs.*cannot be written.*MEDIBOT_OUTPUTS"):
        train(miniature("quickstart", "tracking=null"), "mini")


def test_a_clock_that_jumps_back_deletes_no_newer_checkpoint(miniature, monkeypatch):
    class Jump(AtStep):
        step = 3

        def what(self):
            for folder in self.run.all_checkpoints():
                for part in [folder, *folder.iterdir()]:
                    os.utime(part, (4e9, 4e9))

    monkeypatch.setattr(session, "Record", Jump)
    keep = ["training.save_steps=1", "training.save_total_limit=1", "training.load_best_model_at_end=false"]
    train(miniature("quickstart", *FOUR_STEPS, *keep, "tracking=null"), "mini")
    assert [folder.name for folder in open_run("mini").all_checkpoints()] == ["checkpoint-4"]


def test_the_best_checkpoint_is_remembered_under_its_own_name(miniature):
    best_kept = ["training.load_best_model_at_end=true", "training.metric_for_best_model=eval_loss", "tracking=null"]
    train(miniature("quickstart", *FOUR_STEPS, *best_kept), "mini")
    best = Path(open_run("mini").record()["summary"]["best_checkpoint"])
    assert best.is_dir() and best.parent == open_run("mini").checkpoints
    state = read_json(open_run("mini").last_checkpoint() / "trainer_state.json")
    assert Path(state["best_model_checkpoint"]).is_dir() and ".writing" not in state["best_model_checkpoint"]
