"""How a training is spread over processes: the batch stays, what cannot work is refused, and real shards train."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_extend_env_parallelism_config
from conftest import FOUR_STEPS, MINIATURE, ROOT, assert_same, losses
from safetensors.torch import load_file

from medibot import cli
from medibot.errors import RecipeError
from medibot.planning import conflicts
from medibot.planning.conflicts import refuse_conflicts, refuse_same_rows, share_batch
from medibot.planning.gpus import NAMES
from medibot.planning.hardware import read_hardware
from medibot.recipe import load_recipe
from medibot.run import has_whole_weights, open_run, read_lines
from medibot.training import launch as launching
from medibot.training.launch import launch
from medibot.training.session import train

CONFIGS = ROOT / "accelerate_configs"


def quickstart(*overrides):
    return load_recipe("quickstart", ["quantization=null", *overrides], root=ROOT)


@pytest.mark.parametrize(
    ("rows", "accumulated", "processes", "shared"),
    [
        (8, 2, 1, (8, 2)), (8, 2, 2, (8, 1)), (8, 2, 4, (4, 1)), (8, 2, 16, (1, 1)), (8, 3, 2, (6, 2)), (4, 3, 2, (3, 2)),
        (1, 4, 2, (1, 2)), (3, 4, 4, (3, 1)), (5, 7, 5, (1, 7)),
    ],
)  # fmt: skip
def test_the_batch_of_a_step_is_the_recipes_on_any_number_of_processes(rows, accumulated, processes, shared):
    batch = [f"training.per_device_train_batch_size={rows}", f"training.gradient_accumulation_steps={accumulated}"]
    assert tuple(share_batch(quickstart(*batch), processes).values()) == shared
    assert shared[0] * shared[1] * processes == rows * accumulated and shared[0] <= rows


def test_a_batch_that_cannot_be_shared_is_refused_with_the_numbers():
    batch = ["training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=1"]
    with pytest.raises(RecipeError, match=r"4 rows a step do not divide among 3 processes \(start one of 1, 2, 4, or"):
        share_batch(quickstart(*batch), 3)


class Started(Exception):
    """Holds the command of a launcher that a test does not start."""


@pytest.fixture
def eight_gpus(monkeypatch):
    """Torch finds eight GPUs, and what would start raises Started."""

    def start(command, **_):
        raise Started(command)

    found = {"count": 8, "version": "2.13.0+cu130", "built": "13.0", "reason": "", "old": []}
    monkeypatch.setattr(launching, "find_gpus", lambda: found)
    for name in NAMES:
        monkeypatch.delenv(name)
    monkeypatch.setattr(launching.psutil, "Popen", start)


@pytest.mark.parametrize(
    ("rows", "config", "text", "started"),
    [
        (4, None, "", 4),
        (12, None, "", 6),
        (12, "fsdp2", "", 6),
        (8, None, "", 8),
        (1, None, "", 1),
        (8, None, "--num_processes 2", 2),
    ],
)
def test_as_many_gpus_train_as_can_share_the_batch(
    rows, config, text, started, miniature, eight_gpus, monkeypatch, capsys
):
    weights = miniature("quickstart").model["pretrained_model_name_or_path"]
    batch = [f"training.per_device_train_batch_size={rows}", "training.gradient_accumulation_steps=1"]
    overrides = [f"model.pretrained_model_name_or_path={weights}", *MINIATURE, "quantization=null", *batch]
    recipe, config = str(ROOT / "recipes" / "quickstart.yaml"), config and str(CONFIGS / f"{config}.yaml")
    with pytest.raises(Started) as caught:
        launch(recipe, overrides, [], config, text)
    (command,) = caught.value.args
    numbers = [int(command[place + 1]) for place, word in enumerate(command) if word == "--num_processes"]
    assert numbers[-1] == started
    said = f"{started} of 8 GPUs train: the {rows} rows of a step do not divide among 8 processes"
    assert (said in capsys.readouterr().out) == (started < 8 and not text)
    # What is planned is what is started
    # For a GPU that is not here the plan asks which config
    asked = ["--gpu", "24GB", "--launch", text, "--accelerate", config or str(CONFIGS / "multi-gpu.yaml")]
    monkeypatch.setattr(sys, "argv", ["medibot", "plan", recipe, *overrides, *asked])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code and f"GB on one device of {started}," in capsys.readouterr().out


def test_a_number_of_processes_that_was_written_is_not_changed(eight_gpus):
    batch = ["training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=1"]
    with pytest.raises(RecipeError, match="4 rows a step do not divide among 8 processes"):
        launch("quickstart", batch, [], str(CONFIGS / "multi-gpu.yaml"), "--num_processes 8")


def hardware(name, **settings):
    read = read_hardware(CONFIGS / f"{name}.yaml")
    return dataclasses.replace(read, settings=read.settings | settings)


NF4 = ["quantization.load_in_4bit=true", "quantization.bnb_4bit_quant_type=nf4"]
KWARGS = "training.activation_checkpointing_kwargs"
CLASHES = [
    ("fsdp2", {}, NF4, "every GPU would hold all of them"),
    ("fsdp2", {}, [*NF4, "quantization.bnb_4bit_quant_storage=float32", "model.dtype=bfloat16"], "stored as float32 would be cast"),
    ("fsdp2", {}, ["quantization.load_in_8bit=true"], "cannot be made shards"),
    ("fsdp2", {}, ["lora.modules_to_save=[lm_head]"], "not summed over the processes"),
    ("fsdp2", {"fsdp_activation_checkpointing": True}, [], "save an empty adapter"),
    ("fsdp2", {"fsdp_activation_checkpointing": True}, ["lora=null", "training.activation_checkpointing=true"], "write one of them"),
    ("fsdp2", {"fsdp_state_dict_type": "SHARDED_STATE_DICT"}, [], "save no model"),
    ("zero3", {"zero3_save_16bit_model": False}, [], "save shards only"),
    ("zero3", {}, [f"{KWARGS}={{use_reentrant: false}}", "training.activation_checkpointing=true"], "use_reentrant: true"),
    ("multi-gpu", {}, [f"{KWARGS}={{use_reentrant: true}}", "training.activation_checkpointing=true"], "use_reentrant: false"),
    ("fsdp2", {}, ["training.save_only_model=true", "training.load_best_model_at_end=true"], "no best model"),
    ("fsdp2", {"parallelism_config": {"parallelism_config_cp_size": 2}}, [], "several processes the same rows"),
    ("fsdp2", {"parallelism_config": {"parallelism_config_tp_size": 4}}, [], "several processes the same rows"),
    ("zero3", {"parallelism_config": {"parallelism_config_sp_size": 2}}, [], "several processes the same rows"),
    ("zero2", {"deepspeed_config_file": "tp.json"}, [], "holds settings that nothing here reads"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "overrides", "said"), CLASHES)
def test_what_upstream_would_spoil_is_refused_before_the_launch(name, settings, overrides, said):
    with pytest.raises(RecipeError) as caught:
        refuse_conflicts(quickstart(*overrides), hardware(name, **settings), gpus=8)
    found = [str(problem) for problem in caught.value.problems if "not installed" not in str(problem)]
    assert len(found) == 1 and said in found[0] and name in found[0], found


@pytest.mark.parametrize("name", ["cpu", "cpu-2", "single-gpu", "multi-gpu", "multi-node", "fsdp2"])
@pytest.mark.parametrize("overrides", [[], ["lora=null"], ["lora.use_dora=true"]], ids=["lora", "full", "dora"])
def test_what_works_is_let_through(name, overrides):
    refuse_conflicts(quickstart(*overrides), hardware(name), gpus=8)


def test_shards_and_replicas_of_them_take_rows_of_their_own():
    sizes = {
        "parallelism_config_dp_replicate_size": 2,
        "parallelism_config_dp_shard_size": 4,
        "parallelism_config_tp_size": 1,
    }
    refuse_conflicts(quickstart(), hardware("fsdp2", parallelism_config=sizes), gpus=8)


@pytest.mark.parametrize("way", ["cp", "tp", "sp"])
def test_processes_that_the_launcher_gives_the_same_rows_are_refused(way, miniature, monkeypatch):
    """Whoever starts `accelerate launch` by hand, or writes it in LAUNCH, has passed no check of the config."""
    recipe = miniature("quickstart", "tracking=null")
    args = SimpleNamespace(**vars(launch_command_parser().parse_args(["--use_parallelism_config", "--use_fsdp", "x"])))
    setattr(args, f"parallelism_config_{way}_size", 2)
    for name, value in prepare_extend_env_parallelism_config(args, {}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match="several processes the same rows"):
        train(recipe, "parallel")
    assert not open_run("parallel").folder.exists()
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{way.upper()}_SIZE", "1")
    refuse_same_rows()


def test_a_batch_size_that_changes_behind_the_record_is_refused():
    with pytest.raises(RecipeError, match=r"auto_find_batch_size: .*behind the record: lower per_device"):
        quickstart("training.auto_find_batch_size=true")


def test_a_machine_that_cannot_shard_is_refused(monkeypatch):
    with pytest.raises(RecipeError, match="FSDP2 needs GPUs: without them accelerate trains plain data parallel"):
        refuse_conflicts(quickstart(), hardware("fsdp2"), gpus=0)
    monkeypatch.setattr(conflicts.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RecipeError, match=r"DeepSpeed is not installed .*pip install deepspeed"):
        refuse_conflicts(quickstart(), hardware("zero2"), gpus=2)
    with pytest.raises(RecipeError, match="start the other machines itself"):
        refuse_conflicts(quickstart(), hardware("zero3", deepspeed_multinode_launcher="pdsh"), gpus=2, machines=2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("distributed_type: MULTI_CPU\nnum_processes: 2", "starts one process under MULTI_CPU"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}", "FSDP1 is deprecated"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 1}", "only ZeRO-2 and ZeRO-3"),
        ("distributed_type: MEGATRON_LM", "take one of accelerate_configs/"),
        ("- a", "is not an accelerate config"),
        ("a: [", "is not YAML"),
    ],
)
def test_an_accelerate_config_that_trains_something_else_is_refused(text, said, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(RecipeError, match=said):
        read_hardware(tmp_path / "mine.yaml")


def test_the_refusal_comes_before_anything_is_prepared(workplace, monkeypatch):
    gpus = {"count": 2, "version": "2.13.0+cu130", "built": "13.0", "reason": "", "old": []}
    monkeypatch.setattr("medibot.training.launch.find_gpus", lambda: gpus)
    with pytest.raises(RecipeError, match="left out of the shards"):
        launch(str(ROOT / "recipes" / "quickstart.yaml"), [], None, str(CONFIGS / "fsdp2.yaml"), "")
    assert not list(workplace.iterdir())


SAME = [
    "training.optim=sgd",
    "training.learning_rate=0.1",
    "lora.lora_dropout=0.0",
    "training.load_best_model_at_end=false",
]
SAME += ["training.train_sampling_strategy=random", "training.activation_checkpointing=true", "tracking=null"]
# Three for two processes, whose answers are not of one length
SAME += ["evaluation.questions=['What is anemia?','What is gout?','Hi?']", "evaluation.max_new_tokens=12"]
SAME += ["evaluation.generate={no_repeat_ngram_size: 1, stop_strings: [L, T]}"]
SHARDED = {
    "lora": ["quantization=null"],
    "nf4": ["quantization.bnb_4bit_quant_storage=float32"],
    "full": ["quantization=null", "lora=null"],
}


@pytest.mark.slow
def test_real_shards_train_what_one_process_trains(miniature, make_model, workplace):
    """FSDP2 over two CPU processes with the settings of fsdp2.yaml: weights, losses, checkpoints."""
    recipes = {name: miniature("quickstart", *FOUR_STEPS, *SAME, *method) for name, method in SHARDED.items()}
    for name, recipe in recipes.items():
        train(recipe, f"{name}-one")
    jobs = {name: sharded_overrides(make_model(), *method) for name, method in SHARDED.items()}
    said = launch_sharded(jobs, workplace)
    for name in SHARDED:
        one, two = open_run(f"{name}-one"), open_run(name)
        assert losses(name) == pytest.approx(losses(f"{name}-one"), abs=1e-5), said
        answers = read_lines(one.answers)[:3]
        assert read_lines(two.answers)[:3] == answers and len({line["tokens"] for line in answers}) > 1
        (file,) = (path.name for path in one.weights.glob("*.safetensors"))
        trained = load_file(one.weights / file)
        # Shards are saved with the tied head written out
        gathered = {key: tensor for key, tensor in load_file(two.weights / file).items() if key in trained}
        assert_same(gathered, trained, tolerance=1e-6)
        assert (
            two.last_checkpoint().name == "checkpoint-4"
            and (two.last_checkpoint() / "pytorch_model_fsdp.bin").is_file()
        )
    assert "1 per device x 1 accumulated x 2 processes = 2 rows a step" in said


def sharded_overrides(model, *method):
    return [f"model.pretrained_model_name_or_path={model}", *MINIATURE, *FOUR_STEPS, *SAME, *method]


def launch_sharded(jobs, folder):
    """Start tests/sharded.py on two processes with fsdp2.yaml; gives what it printed."""
    config = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text()) | {"use_cpu": True}
    (folder / "fsdp2.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", folder / "fsdp2.yaml"]
    command += ["--num_processes", "2", ROOT / "tests" / "training" / "sharded.py", json.dumps(jobs)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_a_folder_with_an_empty_adapter_holds_no_weights(tmp_path):
    from safetensors.torch import save_file

    assert not has_whole_weights(tmp_path)
    save_file({}, tmp_path / "adapter_model.safetensors")
    assert not has_whole_weights(tmp_path)


def test_the_table_of_methods_and_configs_is_current():
    spec = importlib.util.spec_from_file_location("strategies", ROOT / "benchmarks" / "strategies.py")
    strategies = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(strategies)
    text = (CONFIGS / "README.md").read_text()
    assert strategies.render(text) == text, "run: .venv/bin/python benchmarks/strategies.py"
    assert set(strategies.EVIDENCE) == {file.stem for file in CONFIGS.glob("*.yaml")}
    # Every refusal of the table has its reason below it, and every mark is one that the page explains
    for method, row in zip(strategies.METHODS, re.findall(r"^\| (?!\|)(.*) \|$", text, re.M), strict=True):
        marks = dict(zip(strategies.EVIDENCE, row.split(" | ")[1:], strict=True))
        refused = {hardware(name).kind for name, mark in marks.items() if mark == "-"}
        assert refused == set(re.findall(rf"^- {re.escape(method)} under ([^:]*):", text, re.M))
        assert set(marks.values()) <= {"tested", "on CPU", "tried", "upstream", "-"}
