"""Training end to end on tiny models: every recipe, every method, resumes, and what must stop a run."""

import importlib
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import torch
import wandb
from conftest import FOUR_STEPS, MINIATURE, ROOT, adapter, assert_same, losses, wandb_records
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from medibot import tracking
from medibot.errors import RecipeError
from medibot.model.tokenizer import load_tokenizer, make_prompt
from medibot.recipe import load_recipe
from medibot.run import Run, locked, open_run, read_json, read_lines
from medibot.training import session
from medibot.training.record import Record
from medibot.training.session import train

pytestmark = pytest.mark.slow

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def quickstarts(make_model, prepared_once, tmp_path_factory) -> Path:
    """Outputs with the quickstart in miniature, trained once with W&B ("mini") and once without ("untracked")."""
    folder = tmp_path_factory.mktemp("quickstarts")
    shutil.copytree(prepared_once, folder / "cache")
    model = f"model.pretrained_model_name_or_path={make_model('smollm2')}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDIBOT_OUTPUTS", str(folder / "outputs"))
        patch.setenv("MEDIBOT_CACHE", str(folder / "cache"))
        for name, more in (("mini", []), ("untracked", ["tracking=null"])):
            train(load_recipe("quickstart", [model, *MINIATURE, *more], root=ROOT), name)
    return folder / "outputs"


@pytest.fixture
def finished(quickstarts, workplace):
    """finished(name): a copy of a finished quickstart in miniature, "mini" or "untracked", in this test's outputs."""

    def copy(name: str) -> Run:
        shutil.copytree(quickstarts / name, workplace / "outputs" / name, symlinks=True)
        return open_run(name)

    return copy


def test_there_are_recipes():
    assert len(RECIPES) >= 9


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_trains_two_steps_and_its_base_never_moves(path, miniature, make_model):
    recipe, before = miniature(path), load_file(make_model() / "model.safetensors")
    train(recipe, "mini")
    assert_same(before, load_file(make_model() / "model.safetensors"))
    run = open_run("mini")
    record = run.record()
    assert record["status"] == "finished" and record["summary"]["steps"] == 2
    assert len(losses("mini")) == 2
    if recipe.lora:
        moved = {key: tensor for key, tensor in adapter("mini").items() if "lora_B" in key}
        assert moved and all(tensor.abs().sum() > 0 for tensor in moved.values())
    else:
        after = load_file(run.weights / "model.safetensors")
        assert all(not torch.equal(before[key], after[key]) for key in after if "proj" in key)
    answers = read_lines(run.folder / "answers.jsonl")
    assert {row["global_step"] for row in answers} >= {0, 2}
    assert {row["question"] for row in answers} == set(recipe.evaluation.questions)


def test_outputs_folder_holds_what_comes_after_needs(finished):
    folder = finished("mini").folder
    for name in ("recipe.yaml", "ledger.json", "split.json", "audit.json", "environment.json", "metrics.jsonl"):
        assert (folder / name).stat().st_size > 0, name
    for name in ("adapter_model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (folder / "model" / name).stat().st_size > 0, name
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["trl"] and environment["dtype"] and environment["global_batch_size"] == 2
    assert json.loads((folder / "model" / "generation_config.json").read_text())["eos_token_id"]
    assert not list(folder.rglob("*.partial"))
    again = load_recipe(str(folder / "recipe.yaml"))
    question, asked = "What is anemia?", {"add_generation_prompt": True, "return_dict": False}
    tokenizer, message = AutoTokenizer.from_pretrained(folder / "model"), {"role": "user", "content": question}
    trained = load_tokenizer(again).apply_chat_template(make_prompt(question, again.data.system, ()), **asked)
    assert again.data.system and tokenizer.apply_chat_template([message], **asked) == trained
    assert again.training["max_steps"] == 2 and again.lora["r"] == 16


def test_the_end_of_a_training_says_how_other_programs_serve_it(finished, capsys):
    run = finished("mini")
    session.print_next_steps(run, load_recipe(str(run.recipe)))
    said = capsys.readouterr().out
    assert [program for program in ("vLLM", "TGI", "llama.cpp", "Ollama") if f"\n       {program} " in said] == [
        "vLLM", "TGI", "llama.cpp", "Ollama",
    ]  # fmt: skip
    # What is named is there
    for flag in ("--chat-template", "--generation-config", "--lora-modules mini="):
        named = re.search(rf"{flag}[ ]?(\S+)", said)
        assert named and Path(named[1]).exists(), flag


def test_supervised_tokens_are_counted_as_the_audit_counts_them(miniature):
    one_epoch = ["training.max_steps=-1", "training.num_train_epochs=1", "training.gradient_accumulation_steps=2"]
    train(miniature("quickstart", *one_epoch), "mini")
    folder = open_run("mini").folder
    last = read_lines(folder / "metrics.jsonl")[-1]
    audited = next(report for report in json.loads((folder / "audit.json").read_text()) if report["split"] == "train")
    assert last["num_supervised_tokens_seen"] == audited["supervised"] > 0
    assert last["num_examples_seen"] == 8
    cost = open_run("mini").record()["summary"]["cost"]
    assert cost["supervised_tokens"] == last["num_supervised_tokens_seen"]
    assert 0 < cost["training_seconds"] < cost["seconds"] and cost["peak_memory_bytes"] > 1e8
    assert cost["weights_bytes"] == (folder / "model" / "adapter_model.safetensors").stat().st_size


def test_same_seed_gives_the_same_losses_and_weights(miniature):
    for name in ("one", "two"):
        train(miniature("quickstart", "lora.lora_dropout=0.1"), name)
    assert losses("one") == losses("two")
    assert_same(adapter("one"), adapter("two"))


def test_finished_run_says_so_and_changes_nothing(miniature, finished, capsys):
    finished("mini")
    before = {file: file.stat().st_mtime_ns for file in open_run("mini").folder.rglob("*")}
    train(miniature("quickstart"), "mini")
    assert "is finished" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in open_run("mini").folder.rglob("*")}


def test_changed_recipe_is_refused_in_the_same_folder(miniature, finished):
    finished("mini")
    with pytest.raises(RecipeError, match=r"training.learning_rate: was 0.0004, is 0.001"):
        train(miniature("quickstart", "training.learning_rate=1e-3"), "mini")


@pytest.mark.parametrize(
    "method",
    [["lora.lora_dropout=0.1", "quantization=null"], ["lora.lora_dropout=0.1"], ["lora=null", "quantization=null"]],
    ids=["lora", "nf4-lora", "full"],
)
def test_resumed_equals_uninterrupted(method, miniature, monkeypatch):
    overrides = [*FOUR_STEPS, "training.save_total_limit=4", "training.gradient_accumulation_steps=2", *method]
    train(miniature("quickstart", *overrides), "whole")

    class Interrupted(Record):
        def on_log(self, args, state, *rest, **kwargs):
            super().on_log(args, state, *rest, **kwargs)
            if state.global_step == 3:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(session, "Record", Interrupted)
        train(miniature("quickstart", *overrides), "torn")
    assert open_run("torn").record()["status"] == "running" and not open_run("torn").weights.exists()
    train(miniature("quickstart", *overrides), "torn")

    file = "adapter_model.safetensors" if "lora=null" not in method else "model.safetensors"
    assert_same(load_file(open_run("whole").weights / file), load_file(open_run("torn").weights / file))
    for name in ("metrics.jsonl", "answers.jsonl"):
        whole, torn = (read_lines(open_run(run).folder / name) for run in ("whole", "torn"))
        timing = {
            "seconds",
            "training_seconds",
            "peak_memory_bytes",
            "train_runtime",
            "train_samples_per_second",
            "train_steps_per_second",
            "train_loss",
        }
        timing |= {
            "eval_runtime",
            "eval_samples_per_second",
            "eval_steps_per_second",
            "train_tokens_per_second",
        }
        strip = [[{k: v for k, v in line.items() if k not in timing} for line in lines] for lines in (whole, torn)]
        assert strip[0] == strip[1]
    # What a training costs is counted on from the checkpoint, not from zero
    lines = read_lines(open_run("torn").metrics)
    for figure in ("seconds", "training_seconds", "peak_memory_bytes"):
        counted = [line[figure] for line in lines]
        assert counted == sorted(counted) and counted[-1] > 0, figure


def test_a_renamed_function_leaves_prepared_rows_and_unfinished_runs_alone(miniature, monkeypatch, tmp_path, capsys):
    class Interrupted(Record):
        def on_log(self, args, state, *rest, **kwargs):
            super().on_log(args, state, *rest, **kwargs)
            if state.global_step == 3:
                raise KeyboardInterrupt

    recipe = miniature("quickstart", *FOUR_STEPS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(session, "Record", Interrupted)
        train(recipe, "torn")
    renamed = tmp_path / "renamed"
    shutil.copytree(ROOT / "medibot", renamed / "medibot", ignore=shutil.ignore_patterns("__pycache__"))
    for file in renamed.rglob("*.py"):
        file.write_text(re.sub(r"\b(drop_leaks|first_copies|fit_length)\b", r"new_\1", file.read_text()))
    overrides = [f"model.pretrained_model_name_or_path={recipe.model['pretrained_model_name_or_path']}"]
    overrides += [*MINIATURE, *FOUR_STEPS]
    monkeypatch.syspath_prepend(renamed)
    capsys.readouterr()
    # Only MediBot is imported anew: another process would spend its seconds on torch and trl
    ours = {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] == "medibot"}
    try:
        other, reader = (importlib.import_module(f"medibot.{name}") for name in ("training.session", "recipe"))
        assert Path(other.__file__).is_relative_to(renamed) and Path(reader.__file__).is_relative_to(renamed)
        other.train(reader.load_recipe("quickstart", overrides, root=ROOT), "torn")
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "medibot"]:
            del sys.modules[name]
        sys.modules.update(ours)
    said = capsys.readouterr().out
    assert "going on from" in said and "preparing" not in said
    assert open_run("torn").record()["status"] == "finished"


def test_run_killed_before_its_first_checkpoint_starts_over_without_repeats(miniature, monkeypatch):
    class Interrupted(Record):
        def on_log(self, args, state, *rest, **kwargs):
            super().on_log(args, state, *rest, **kwargs)
            if state.global_step == 1:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(session, "Record", Interrupted)
        train(miniature("quickstart", *FOUR_STEPS), "mini")
    train(miniature("quickstart", *FOUR_STEPS), "mini")
    lines = read_lines(open_run("mini").metrics)
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2, 4]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]


def test_loss_that_is_not_a_number_stops_the_run(miniature, make_model, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(make_model(), broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    overrides = [f"model.pretrained_model_name_or_path={broken}", "training.eval_strategy=no", "quantization=null"]
    with pytest.raises(RecipeError, match=r"loss is nan at step 1 .*learning_rate"):
        train(miniature("quickstart", *overrides, "training.eval_on_start=false"), "wild")
    assert open_run("wild").record()["status"] == "running" and not open_run("wild").weights.exists()


def test_evaluation_leaves_4bit_training_unchanged(miniature):
    # Evaluations draw from the random stream that orders the batches, so the order is fixed here
    steps = ["training.max_steps=4", "training.train_sampling_strategy=sequential"]
    train(miniature("quickstart", *steps, "training.eval_steps=1"), "often")
    train(miniature("quickstart", *steps, "training.eval_strategy=no", "training.eval_on_start=false"), "never")
    assert losses("often") == losses("never")
    assert_same(adapter("often"), adapter("never"))


def test_a_world_that_is_not_the_one_launched_is_refused(miniature, monkeypatch):
    monkeypatch.setenv("MEDIBOT_PROCESSES", "2")
    with pytest.raises(RecipeError, match="2 processes were launched and 1 found each other"):
        train(miniature("quickstart"), "mini")


def test_two_trainings_into_one_folder_are_refused(miniature):
    with locked(open_run("mini")), pytest.raises(RecipeError, match="another training is writing it now"):
        train(miniature("quickstart"), "mini")
    assert not (open_run("mini").folder / "run.json").exists()


class Server(BaseHTTPRequestHandler):
    """As much of a W&B server as a run needs to start; it answers `answers` times and then breaks every connection."""

    answers = 0

    def do_POST(self):
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if "file_stream" in self.path or ("upsertBucket" not in asked and type(self).answers <= 0):
            type(self).answers = 0
            self.connection.close()
            return
        type(self).answers -= 1
        project = {"name": "medibot", "entity": {"name": "nobody"}}
        bucket = {"id": "1", "name": "mini", "displayName": "mini", "project": project, "historyLineCount": 0}
        reply = json.dumps({"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args):
        pass


@contextmanager
def endpoint(kind):
    """The address of a W&B server that refuses, hangs or dies after it accepted the run."""
    if kind == "refuses":
        yield "http://127.0.0.1:9"
    elif kind == "hangs":
        # Connections are accepted by the kernel, and nobody ever answers
        with socket.create_server(("127.0.0.1", 0)) as server:
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
    else:
        Server.answers = 3
        with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_address[1]}"
            server.shutdown()


@pytest.mark.parametrize("kind", ["refuses", "hangs", "dies"])
def test_a_wandb_server_that_fails_does_not_change_the_training(kind, miniature, finished, monkeypatch, capfd):
    key = "0123456789abcdef" * 2 + "01234567"
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(tracking, "INIT_TIMEOUT", 4)
    monkeypatch.setattr(tracking, "FINISH_TIMEOUT", 3)
    finished("untracked")
    with endpoint(kind) as address:
        monkeypatch.setenv("WANDB_API_KEY", key)
        monkeypatch.setenv("WANDB_BASE_URL", address)
        # wandb reads its environment once in a process
        wandb.teardown()
        train(miniature("quickstart"), "mini")
        wandb.teardown()
    said = capfd.readouterr().out
    assert losses("mini") == losses("untracked") and open_run("mini").record()["status"] == "finished"
    assert_same(adapter("mini"), adapter("untracked"))
    assert said.count("wandb sync") == 1
    assert ("tracking offline instead" in said) == (kind != "dies")
    for file in open_run("mini").folder.rglob("*"):
        assert not file.is_file() or key.encode() not in file.read_bytes(), file


def test_the_wandb_run_shows_config_metrics_tables_and_artifacts(finished):
    (folder,) = (finished("mini").folder / "wandb").glob("offline-run-*")
    command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", "--summary", folder]
    summary, records = json.loads(subprocess.check_output(command, text=True)), wandb_records(folder)
    assert {"recipe", "split", "ledger", "leaks", "environment"} <= set(summary["config"])
    assert "examples" not in json.dumps(summary["config"]["ledger"])
    shown = json.dumps(summary["summary"])
    for part in ("eval_loss_best", "eval_loss_last", "supervised_tokens_per_second", "answers"):
        assert part in shown, part
    data = read_json(open_run("mini").folder / "split.json")["data"][:12]
    for part in ("train/num_supervised_tokens_seen", "mini-adapter", f"data-{data}", "split_fingerprint"):
        assert part in records, part


def test_a_wandb_process_that_is_killed_does_not_stop_the_run(miniature, finished, capfd):
    # The service of the trainings before would be a second one
    wandb.teardown()
    with tracking.tracked(miniature("quickstart"), finished("mini"), {}, True) as mirror:
        mirror.log({"train/loss": 1.0})
        (core,) = (child for child in psutil.Process().children(recursive=True) if "wandb-core" in child.name())
        core.kill()
        core.wait()
        for value in (2.0, 3.0):
            mirror.log({"train/loss": value})
            mirror.summary({"value": value})
            mirror.table("rows", ["value"], [[value]])
    said = capfd.readouterr().out
    assert said.count("no more metrics") == said.count("no more tables") == 1 and said.count("wandb sync") == 1
    wandb.teardown()
