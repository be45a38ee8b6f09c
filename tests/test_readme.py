"""Every command that the README shows is run, as it stands there; what needs a GPU or the hub runs in miniature."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, SAMPLE

from medibot import cli
from medibot.recipe import load_recipe
from medibot.training.session import train

pytestmark = pytest.mark.slow
COMMANDS = [
    line.split(" #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    for line in block.splitlines()
    if line.startswith("make ")
]
COMMANDS += re.findall(r"`(make (?:list|validate|diff A=[\w-]+ B=[\w-]+))`", (ROOT / "README.md").read_text())
# What stands there twice is run once
COMMANDS = list(dict.fromkeys(COMMANDS))
# The tests cannot run themselves, nor start GPUs or ask a hub; a sweep, a dashboard, a server, a merge, a GGUF file and a
# push have tests that really make one
UNFIT = (
    "make test",
    "make test-fast",
    "make sweep",
    "make dashboard",
    "make speed",
    "make serve",
    "make benchmark RUN=medquad",
)
UNFIT += ("make merge", "make export-gguf", "make push")
# They import so little that each is a process
LIGHT = ("help", "list", "rules")
SHORT = (
    "training.max_steps=2 training.logging_steps=1 training.per_device_train_batch_size=2 evaluation.max_new_tokens=2"
    " data.limit.train=4 data.limit.validation=2"
)

# With the real model each step, question and evaluated row takes seconds
REAL = f"{SHORT} training.max_steps=1 training.per_device_train_batch_size=1 data.limit.validation=1"
REAL += " evaluation.questions=[Gout] training.eval_on_start=false"
# What make starts for the verb is written down here, in the place of the verb
RECORDER = """#!/bin/sh
printf '%s\\0' "$@" > "$RECORD"
"""


@pytest.fixture(scope="module")
def tiny(make_model) -> str:
    """Overrides that train a random model on the sample set."""
    length = "training.max_length=1024 data.too_long=drop"
    return f"{SHORT} {length} data.path={SAMPLE} model.pretrained_model_name_or_path={make_model()}"


@pytest.fixture(scope="module")
def outputs(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs with a quickstart of the random model: only training and asking need the real one."""
    folder = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDIBOT_OUTPUTS", str(folder))
        patch.setenv("MEDIBOT_CACHE", str(folder / "cache"))
        train(load_recipe("quickstart", tiny.split(), root=ROOT), "quickstart")
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs of the commands that run with the small real model."""
    return tmp_path_factory.mktemp("real")


def make(command: str, outputs: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MEDIBOT_OUTPUTS": str(outputs), "MEDIBOT_CACHE": str(outputs / "cache")} | environment
    words = [*shlex.split(command), *more]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)


@pytest.fixture
def make_here(tmp_path, monkeypatch, capfd):
    """make_here(command, outputs, *more): make runs, and the verb with the very words that it passes on runs here.

    A process would import for longer than the verb takes.
    """

    def run(command: str, outputs: Path, *more: str) -> tuple[str, str]:
        recorder, record = tmp_path / "recorder", tmp_path / "record"
        recorder.write_text(RECORDER)
        recorder.chmod(0o755)
        done = make(command, outputs, *more, f"MEDIBOT={recorder}", RECORD=str(record))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        words = record.read_text().split("\0")[:-1]
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        if "--accelerate" not in words:
            # What every accelerate launcher sets: the training starts no further process
            monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        monkeypatch.setenv("MEDIBOT_OUTPUTS", str(outputs))
        monkeypatch.setenv("MEDIBOT_CACHE", str(outputs / "cache"))
        monkeypatch.setenv("TQDM_DISABLE", "1")
        monkeypatch.setattr(sys, "argv", ["medibot", *words])
        monkeypatch.delenv("WANDB_SERVICE", raising=False)
        # What is typed to a chat
        monkeypatch.setattr(sys, "stdin", io.StringIO("/both\nWhat causes gout?\n"))
        monkeypatch.chdir(ROOT)
        interrupt = signal.getsignal(signal.SIGINT)
        capfd.readouterr()
        try:
            cli.main()
        except SystemExit as end:
            assert not end.code, capfd.readouterr()
        finally:
            signal.signal(signal.SIGINT, interrupt)
        return tuple(capfd.readouterr())

    return run


def test_the_readme_shows_commands():
    assert {"make train", "make test", "make help"} <= set(COMMANDS) and len(COMMANDS) >= 10


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_command_runs(command, outputs, real, tiny, make_here):
    if command.startswith(UNFIT) or "multi-gpu" in command:
        # make must still know the way
        done = make(command, outputs, "--dry-run")
        assert done.returncode == 0, done.stderr
        return
    words = dict(word.split("=", 1) for word in shlex.split(command)[1:] if "=" in word)
    verb, more = command.split()[1], []
    if not (ROOT / "models").exists() and verb in ("train", "ask", "inspect", "plan"):
        pytest.skip("no models/SmolLM2-135M-Instruct here: run make model")
    if verb == "train":
        more = [f"ARGS={words.get('ARGS', '')} {REAL if command == 'make train' else tiny}"]
    if verb in ("inspect", "plan") and "medquad" in command:
        more = [f"ARGS={tiny}"]
    if verb in ("ask", "chat"):
        more = ["TOKENS=4"]
    if verb == "benchmark":
        more = ["LIMIT=2"]
    if "RUN=gentle" in command and verb == "eval":
        # As many as the quickstart was asked last: only then can they be compared
        more = ["ROWS=10"]
    if "my.jsonl" in command:
        (outputs / "my.jsonl").write_text("".join(SAMPLE.open().readlines()[:3]))
        more = [f"DATA={outputs / 'my.jsonl'}"]
    if command == "make train" or verb == "ask" or verb in LIGHT:
        folder = real if command == "make train" or verb == "ask" else outputs
        done = make(command, folder, *more)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        said, complained = done.stdout, done.stderr
    else:
        folder = outputs
        said, complained = make_here(command, folder, *more)
    assert "Traceback" not in complained
    if verb == "plan":
        assert "micro-batch" in said and "written: " in said
    if verb == "train":
        run = words.get("RUN", words.get("RECIPE", "quickstart"))
        assert f"Next:  make ask RUN={run}" in said
        assert (folder / run / "model" / "adapter_model.safetensors").is_file()
        processes = 2 if "ACCELERATE=cpu-2" in command else 1
        assert json.loads((folder / run / "environment.json").read_text())["processes"] == processes
    if verb == "eval":
        assert "nats a token" in " ".join(said.split()) and "results.json, rows.jsonl" in said
    if verb == "benchmark":
        assert "2 questions" in said and "points" in said
    if verb == "compare":
        assert "Test metrics" in said and "comparison.json" in said
    if verb in ("ask", "chat"):
        assert "[base]" in said and "[tuned]" in said and "Not a medical device" in said
        assert "in the training data" in said


def test_the_question_about_a_file_of_the_documentation_is_answered(outputs, make_here, tmp_path):
    text = (ROOT / "docs" / "data.md").read_text()
    assert "make inspect FILE=rows.csv" in text
    rows = tmp_path / "rows.csv"
    rows.write_text(re.search(r"```csv questions.csv\n(.*?)```", text, re.S)[1])
    said, complained = make_here(f"make inspect FILE={rows}", outputs)
    assert "rows.csv: 2 rows" in said and "prompt: question" in said and "completion: answer" in said
    assert "Traceback" not in complained


def test_every_target_that_documents_name_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for document in ("README.md", "CONTRIBUTING.md", "recipes/README.md", "docs/data.md", "docs/serving.md"):
        named = set(re.findall(r"(?m)(?:^|`)make ([a-z]+(?:-[a-z]+)*)", (ROOT / document).read_text()))
        assert named - {"sure"} <= targets, document


def test_recipe_headers_say_purpose_launch_and_override():
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        header = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert header[0] == "# yaml-language-server: $schema=recipe.schema.json", path
        assert any(line.startswith("# Launch:") for line in header), path
        assert any(line.startswith("# Override:") for line in header), path
        assert f"`{path.stem}`" in (ROOT / "recipes" / "README.md").read_text(), path


def test_accelerate_configs_hold_what_accelerate_knows():
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    files = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
    assert {file.stem for file in files} >= {
        "cpu",
        "cpu-2",
        "single-gpu",
        "multi-gpu",
        "fsdp2",
        "zero2",
        "zero3",
        "multi-node",
    }
    known = vars(launch_command_parser().parse_args(["script"]))
    for file in files:
        loaded = load_config_from_file(str(file))
        written = yaml.safe_load(file.read_text())
        assert loaded.distributed_type == written["distributed_type"], file
        # Upstream passes over nested names that it does not know
        assert set(written.get("fsdp_config", {}) | written.get("deepspeed_config", {})) <= set(known), file
        if written["distributed_type"] != "NO" and written["num_machines"] == 1:
            assert written["main_process_port"] == 0, (
                file
            )  # or the second run of a machine finds upstream's 29500 in use
        assert written["mixed_precision"] == "no", file  # or it would overrule a recipe that says float32
    fsdp = yaml.safe_load((ROOT / "accelerate_configs" / "fsdp2.yaml").read_text())["fsdp_config"]
    assert fsdp["fsdp_version"] == 2 and fsdp["fsdp_state_dict_type"] == "FULL_STATE_DICT"
