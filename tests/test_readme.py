"""Every command that the README shows is run, as it stands there; what needs a GPU or the hub runs in miniature."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, SAMPLE

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
SHORT = (
    "training.max_steps=2 training.logging_steps=1 training.per_device_train_batch_size=2 evaluation.max_new_tokens=2"
    " data.limit.train=4 data.limit.validation=2"
)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


def make(command: str, outputs: Path, *more: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MEDIBOT_OUTPUTS": str(outputs), "MEDIBOT_CACHE": str(outputs / "cache")}
    words = [*shlex.split(command), *more]
    # What is typed to a chat
    return subprocess.run(
        words,
        cwd=ROOT,
        env=environment,
        input="/both\nWhat causes gout?\n",
        capture_output=True,
        text=True,
        timeout=400,
    )


def test_the_readme_shows_commands():
    assert {"make train", "make test", "make help"} <= set(COMMANDS) and len(COMMANDS) >= 10


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_command_runs(command, outputs, make_model):
    if command.startswith(UNFIT) or "multi-gpu" in command:
        # make must still know the way
        done = make(command, outputs, "--dry-run")
        assert done.returncode == 0, done.stderr
        return
    words = dict(word.split("=", 1) for word in shlex.split(command)[1:] if "=" in word)
    if not (ROOT / "models").exists() and "medquad" not in command:
        pytest.skip("no models/SmolLM2-135M-Instruct here: run make model")
    more = []
    if command.startswith(("make train", "make inspect", "make plan")):
        small = SHORT if command.startswith("make train") else ""
        # One run stays with the small real model; what only shows that a command works takes a tiny one
        if "medquad" in command or "RUN=two" in command:
            small += f" data.path={SAMPLE} data.too_long=drop model.pretrained_model_name_or_path={make_model()}"
        if "RUN=gentle" in command:
            small += " evaluation.questions=[] training.eval_on_start=false"
        more = [f"ARGS={words.get('ARGS', '')} {small}"]
    if command.startswith(("make ask", "make chat")):
        more = ["TOKENS=4"]
    if command.startswith("make eval"):
        more = ["ROWS=2"]
    if command.startswith("make benchmark"):
        more = ["LIMIT=2"]
    if "my.jsonl" in command:
        (outputs / "my.jsonl").write_text("".join(SAMPLE.open().readlines()[:3]))
        more = ["ROWS=2", f"DATA={outputs / 'my.jsonl'}"]
    done = make(command, outputs, *more)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    if command.startswith("make plan"):
        assert "micro-batch" in done.stdout and "written: " in done.stdout
    if command.startswith("make train"):
        run = words.get("RUN", words.get("RECIPE", "quickstart"))
        assert f"Next:  make ask RUN={run}" in done.stdout
        assert (outputs / run / "model" / "adapter_model.safetensors").is_file()
    if command.startswith("make eval"):
        assert "nats a token" in " ".join(done.stdout.split()) and "results.json, rows.jsonl" in done.stdout
    if command.startswith("make benchmark"):
        assert "2 questions" in done.stdout and "points" in done.stdout
    if command.startswith("make compare"):
        assert "Test metrics" in done.stdout and "comparison.json" in done.stdout
    if command.startswith(("make ask", "make chat")):
        assert "[base]" in done.stdout and "[tuned]" in done.stdout and "Not a medical device" in done.stdout
        assert "in the training data" in done.stdout


def test_every_target_that_documents_name_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for document in ("README.md", "CONTRIBUTING.md", "recipes/README.md"):
        named = set(re.findall(r"make ([a-z]+(?:-[a-z]+)*)", (ROOT / document).read_text()))
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
        assert written["mixed_precision"] == "no", file  # or it would overrule a recipe that says float32
    fsdp = yaml.safe_load((ROOT / "accelerate_configs" / "fsdp2.yaml").read_text())["fsdp_config"]
    assert fsdp["fsdp_version"] == 2 and fsdp["fsdp_state_dict_type"] == "FULL_STATE_DICT"
