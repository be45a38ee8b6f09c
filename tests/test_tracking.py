"""The dashboard: the saved view's specification, and the terminal's where there is no key."""

import json
import os
import pty
import re
import select
import sys
import time

import pytest

from medibot import tracking
from medibot.errors import RecipeError
from medibot.run import open_run

pytestmark = pytest.mark.slow


def test_the_saved_view_shows_curves_cost_against_quality_differences_and_answers():
    written = json.loads(tracking.make_view("me", "medibot")._to_model().model_dump_json(by_alias=True))
    sections = {s["name"]: s["panels"] for s in written["spec"]["section"]["panelBankConfig"]["sections"]}
    assert list(sections) == ["Curves", "Cost against quality", "What differs", "Answers"]
    drawn = {(panel["config"]["xAxis"], panel["config"]["metrics"][0]) for panel in sections["Curves"]}
    axes, losses = ("train/num_supervised_tokens_seen", "train/seconds"), ("eval/loss", "train/loss")
    assert drawn == {(axis, loss) for axis in axes for loss in losses}
    against = {(panel["config"]["xAxis"], panel["config"]["yAxis"]) for panel in sections["Cost against quality"]}
    assert ("summary:cost.training_seconds", "summary:test/nll/value") in against and len(against) == 6
    assert json.dumps(sections["What differs"]).count("Run Comparer") == 1
    for table in ("test/metrics", "test/answers", "answers"):
        assert table in json.dumps(sections["Answers"])


def test_without_a_key_the_terminal_shows_every_run(trained, monkeypatch):
    for name, seed in (("one", 1), ("two", 2)):
        trained(name, "quantization=null", "tracking={project: mine}", f"training.seed={seed}")
    with pytest.raises(RecipeError, match="needs a terminal"):
        tracking.dashboard("mine")
    folder = open_run("one").folder.parent / ".leet"
    logs = sorted(open_run("one").folder.parent.glob("*/wandb/offline-run-*/run-*.wandb"))
    assert sorted(path.resolve() for path in folder.glob("*/*.wandb")) == sorted(path.resolve() for path in logs)
    assert len(logs) == 2
    shown = in_a_terminal(
        "from medibot.tracking import dashboard; dashboard('mine')", seconds=60, until=["offline-run"]
    )
    for log in logs:
        assert log.parent.name[:20] in shown


def in_a_terminal(code: str, seconds: float, until: list[str]) -> str:
    """What a program draws on a terminal of 50 lines of 200 characters before it is asked to quit."""
    import fcntl
    import struct
    import termios

    child, terminal = pty.fork()
    if child == 0:
        os.environ.update(TERM="xterm-256color", WANDB_MODE="offline")
        os.execv(sys.executable, [sys.executable, "-c", code])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    drawn, end = b"", time.monotonic() + seconds
    while time.monotonic() < end and not all(word.encode() in drawn for word in until):
        if select.select([terminal], [], [], 0.5)[0]:
            try:
                drawn += os.read(terminal, 65536)
            except OSError:
                break
            # The program asks its terminal where the cursor is and which colours it has
            if b"\x1b[6n" in drawn:
                os.write(terminal, b"\x1b[1;1R")
    time.sleep(1)
    if select.select([terminal], [], [], 0.5)[0]:
        drawn += os.read(terminal, 1 << 20)
    os.write(terminal, b"q")
    time.sleep(0.5)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode(errors="replace"))


def test_a_dashboard_of_nothing_or_without_a_terminal_is_said_in_a_line(trained, workplace):
    with pytest.raises(RecipeError, match=r"no W&B run in .*run: make train"):
        tracking.dashboard("medibot")
    trained("one", "quantization=null", "tracking={project: mine}")
    with pytest.raises(RecipeError, match=r"needs a terminal.*wandb leet"):
        tracking.dashboard("medibot")


def test_a_server_that_does_not_take_the_view_is_said_in_a_line(monkeypatch, workplace):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(RecipeError, match=r"W&B refused the view: .*WANDB_MODE=offline make dashboard"):
        tracking.dashboard("medibot")
