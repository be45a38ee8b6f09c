"""The verbs: fast where they must be, private from the first import, and their exit codes survive the launcher."""

import os
import pty
import re
import subprocess
import sys
import termios

import pytest
from conftest import ROOT, SAMPLE

from medibot import cli
from medibot.errors import RecipeError
from medibot.planning.hardware import Hardware, read_hardware
from medibot.serving.emergencies import NOTICE
from medibot.training.launch import LAUNCHED_ON_CPU, ONE_CPU_PROCESS, choose_hardware, parse_launch

HEAVY = "torch transformers trl peft datasets wandb bitsandbytes accelerate"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("words", [["--help"], ["list"], ["train", "--help"]])
def test_help_and_list_import_nothing_heavy(words):
    done = python(
        f"""
import sys
sys.argv = ["medibot", *{words}]
from medibot.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("HEAVY", [name for name in {HEAVY.split()} if name in sys.modules])
"""
    )
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stdout


def test_upstream_telemetry_is_off_before_upstream_is_imported():
    code = """
import sys
sys.argv = ["medibot", "list"]
from medibot.cli import main
try:
    main()
except SystemExit:
    pass
from huggingface_hub import constants
print("OFF", constants.HF_HUB_DISABLE_TELEMETRY)
"""
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_DISABLE_TELEMETRY"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "OFF True" in done.stdout, done.stderr


def test_accelerate_names_the_hardware(monkeypatch):
    monkeypatch.chdir(ROOT)
    read = {name: choose_hardware(name)[1] for name in ("cpu-2", "multi-gpu")}
    assert parse_launch("", read["cpu-2"]) == ([], 2, 1)
    assert parse_launch("--num_processes 4", read["multi-gpu"])[1] == 4
    with pytest.raises(RecipeError, match="there are: cpu, cpu-2"):
        choose_hardware("tpu")


def test_one_cpu_process_is_started_as_accelerate_would_start_it(monkeypatch):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    config = ROOT / "accelerate_configs" / "cpu.yaml"
    assert read_hardware(config).settings == ONE_CPU_PROCESS
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    words = ["--config_file", str(config), "--num_cpu_threads_per_process", "1", "-m", "medibot", "train"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    _, environment = prepare_simple_launcher_cmd_env(args)
    added = {name: value for name, value in environment.items() if name.startswith("ACCELERATE_")}
    # What is left says in other words that nothing is compiled
    compiled = {name for name in added if "DYNAMO" in name}
    assert {name: added[name] for name in added.keys() - compiled} == LAUNCHED_ON_CPU
    assert {added[name] for name in compiled} <= {"NO", "default", "False"}


def test_diff_shows_only_what_differs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    cli.diff("medquad-lora", "medquad-dora")
    said = capsys.readouterr().out
    assert "lora.use_dora" in said and "tracking.tags" in said
    assert "learning_rate" not in said


def test_exit_code_and_line_survive_the_launcher(workplace):
    (workplace / "mine.yaml").write_text(
        (ROOT / "recipes" / "quickstart.yaml").read_text().replace("consumer_health.jsonl", "none.jsonl")
    )
    config = ROOT / "accelerate_configs" / "cpu.yaml"
    command = [
        sys.executable,
        "-m",
        "medibot",
        "train",
        "mine.yaml",
        "training.learning_rat=1",
        "--accelerate",
        str(config),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "training.learning_rat=1: training.learning_rat: no such setting (did you mean learning_rate?)"
    ]
    assert not (workplace / "outputs").exists()


def test_the_first_process_to_fail_says_why_whichever_it_is(workplace, monkeypatch, capsys):
    monkeypatch.setenv("MEDIBOT_EXIT", str(workplace / "code"))
    for rank, name in (("1", "first"), ("0", "second")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setattr(sys, "argv", ["medibot", "validate", name])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 2
    said = capsys.readouterr().err
    assert "first" in said and "second" not in said and (workplace / "code").read_text() == "2"


def test_every_makefile_target_of_ours_is_a_verb():
    makefile = (ROOT / "Makefile").read_text()
    used = set(re.findall(r"\$\((?:MEDIBOT|WITH_ARGS)\) ([a-z-]+)", makefile))
    verbs = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    assert {"train", "inspect", "ask", "list", "validate", "diff", "schema"} <= used <= verbs


SMALL = """\
model: {pretrained_model_name_or_path: MODEL}
lora: {r: 2, target_modules: all-linear}
data: {path: SAMPLE, prompt: question, completion: answer, system: "Be [careful].", test: 0, validation: 0, limit: 2}
training: {max_steps: 1, max_length: 2048, save_strategy: "no"}
"""


@pytest.fixture
def medibot(workplace, make_model, monkeypatch):
    """medibot(*words): the verb run here, with a small recipe in mine.yaml; gives its exit code."""
    (workplace / "mine.yaml").write_text(SMALL.replace("MODEL", str(make_model())).replace("SAMPLE", str(SAMPLE)))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")

    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["medibot", *words])
        try:
            cli.main()
        except SystemExit as end:
            return end.code
        return 0

    return run


def test_ask_gives_the_notice_and_both_answers(medibot, capsys):
    assert medibot("train", "mine.yaml") == 0
    capsys.readouterr()
    assert medibot("ask", "--run", "mine", "-q", "What is anemia?", "--max-new-tokens", "3") == 0
    said = capsys.readouterr().out
    assert said.startswith(NOTICE)
    assert said.index("What is anemia?") < said.index("[base]") < said.index("[tuned]")


def test_diff_shows_brackets_as_they_are_written(medibot, workplace, capsys):
    text = (workplace / "mine.yaml").read_text()
    (workplace / "other.yaml").write_text(text.replace("Be [careful].", "Be [/careful]. [red]"))
    assert medibot("diff", "mine.yaml", "other.yaml") == 0
    said = capsys.readouterr().out
    assert "Be [careful]." in said and "Be [/careful]. [red]" in said and "max_steps" not in said
    assert medibot("diff", "mine.yaml", "mine.yaml") == 0
    assert "mine.yaml and mine.yaml say the same" in capsys.readouterr().out


def test_nothing_is_sent_about_its_use(medibot, monkeypatch):
    names = ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "WANDB_ERROR_REPORTING")
    for name in names:
        # Set and taken away, so that the value is put back afterwards
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    assert medibot("validate", "mine.yaml") == 0
    assert [os.environ[name] for name in names] == ["1", "1", "false"]


@pytest.mark.parametrize(
    ("launch", "parsed"),
    [
        ("", ([], 3, 1)),
        ("--num_processes=2 --debug", (["--num_processes=2", "--debug"], 2, 1)),
        (
            "--num_machines 2 --main_process_ip 'a b' -x=1",
            (["--num_machines", "2", "--main_process_ip", "a b", "-x=1"], 3, 2),
        ),
    ],
)
def test_launch_arguments_are_split_as_a_shell_does(launch, parsed):
    assert parse_launch(launch, Hardware(settings={"num_processes": 3})) == parsed


def test_training_shows_a_progress_bar_on_a_terminal(workplace, make_model):
    """The real verb behind a pseudo-terminal; where there is none, bars stay away (see the launcher's test)."""
    (workplace / "mine.yaml").write_text(SMALL.replace("MODEL", str(make_model())).replace("SAMPLE", str(SAMPLE)))
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 100))  # a new one has no columns, and nothing fits into none
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_MIXED_PRECISION": "no"}
    environment.pop("TQDM_DISABLE", None)  # a verb that ran without a terminal in this process has set it
    process = subprocess.Popen(
        [sys.executable, "-m", "medibot", "train", "mine.yaml"], env=environment, stdout=follower, stderr=follower
    )
    os.close(follower)
    said = b""
    try:
        while chunk := os.read(leader, 65536):
            said += chunk
    except OSError:  # Linux ends a terminal that nobody holds this way
        pass
    os.close(leader)
    assert process.wait(timeout=60) == 0, said.decode()
    assert b"1/1 [" in said and b"100%" in said
