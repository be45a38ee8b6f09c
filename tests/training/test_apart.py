"""Two machines that share no disk train as one: what one of them reads or finds, all of them do."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MINIATURE, ROOT, adapter, assert_same, losses

from medibot.recipe import load_recipe
from medibot.run import Run, open_run, read_lines
from medibot.training.session import train

pytestmark = pytest.mark.slow
SETTINGS = ["training.max_steps=6", "training.eval_steps=2", "training.save_steps=2", "training.optim=sgd"]
SETTINGS += ["training.learning_rate=0.1", "lora.lora_dropout=0.0", "training.train_sampling_strategy=random"]
SETTINGS += ["tracking=null", "quantization=null", "evaluation.questions=['What is anemia?','What is gout?','Hi?']"]


@pytest.fixture(scope="module")
def apart(make_model, tmp_path_factory):
    """What each of two machines made of the trainings in apart.py: (folder of outputs, results)."""
    folder = tmp_path_factory.mktemp("apart")
    overrides = [f"model.pretrained_model_name_or_path={make_model()}", *MINIATURE, *SETTINGS]
    outputs = [str(folder / name) for name in ("first", "second")]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = []
    for rank in range(2):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "True"}
        environment |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_MIXED_PRECISION": "no"}
        given = json.dumps({"outputs": outputs, "overrides": overrides})
        command = [sys.executable, str(ROOT / "tests" / "training" / "apart.py"), given]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, env=environment, **pipes))
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    results = [
        [json.loads(line.removeprefix("RESULT ")) for line in text.splitlines() if line.startswith("RESULT")]
        for text in said
    ]
    return list(zip(outputs, results, said, strict=True)), overrides


def test_two_machines_without_a_shared_disk_stop_and_go_on_as_one(apart, workplace, monkeypatch):
    (first, second), overrides = apart
    for _, results, _ in (first, second):
        assert [came_to for name, came_to, _ in results[:3]] == [
            "stopped at step 3 of 6; the same command goes on from there", "finished", "finished",
        ]  # fmt: skip
    # A checkpoint of each machine's own, the model and the record on the first
    runs = [Run(Path(outputs) / "stopped") for outputs, *_ in (first, second)]
    for this in runs:
        assert {folder.name for folder in this.whole_checkpoints()} >= {"checkpoint-6"}
        assert not list(this.folder.glob(".*")) and not list(this.writing.glob("checkpoint-*"))
    assert runs[0].record()["status"] == "finished" and runs[0].weights.is_dir()
    assert not runs[1].weights.exists() and not runs[1].answers.exists() and not runs[1].metrics.exists()
    assert "going on from" in first[2] and "is finished, made from exactly this" in first[2]
    train(load_recipe("quickstart", overrides, root=ROOT), "whole")
    monkeypatch.setenv("MEDIBOT_OUTPUTS", first[0])
    two = adapter("stopped"), losses("stopped"), read_lines(runs[0].answers)
    monkeypatch.setenv("MEDIBOT_OUTPUTS", str(workplace / "outputs"))
    assert_same(two[0], adapter("whole"), tolerance=1e-5)
    assert two[1] == pytest.approx(losses("whole"), abs=1e-5)
    answers = read_lines(open_run("whole").answers)
    assert [line["global_step"] for line in two[2]] == [line["global_step"] for line in answers]
    assert two[2][:3] == answers[:3]


def test_each_process_answers_its_share(apart):
    for _, results, _ in apart[0]:
        # At the start, and after steps 2, 4 and 6: two of three each, the second process one of them again
        assert results[0][2] == [2, 2] and results[1][2] == [2, 2] and results[2][2] == []


def test_what_is_wrong_on_one_machine_is_said_on_both(apart):
    for _, results, _ in apart[0]:
        said = {name: came_to for name, came_to, _ in results[3:]}
        assert "in the first process and" in said["other"] and said["other"].startswith("accelerate: data")
        assert "none.jsonl" in said["wrong"]
        assert "FSDP2 writes checkpoints on the first machine alone" in said["shards"]
        assert "no checkpoint is whole on every machine (copy it to each, or" in said["lost"]
