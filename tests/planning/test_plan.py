"""The plan against what is really loaded, traced, sharded and written; and that it loads nothing itself."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SAMPLE
from peft import get_peft_model
from typer.testing import CliRunner

from medibot import cli
from medibot.data.prepared import prepare
from medibot.errors import RecipeError
from medibot.model.loading import load_base
from medibot.model.precision import make_lora_config
from medibot.planning.hardware import Device, Hardware, find_device
from medibot.planning.memory import count_bytes, trace
from medibot.planning.plan import make_plan
from medibot.planning.schedule import READING, UTILIZATION
from medibot.recipe import load_recipe
from medibot.run import open_run, read_json, read_lines
from medibot.training.record import count_parameters
from medibot.training.session import train
from medibot.training.trainer import peak_memory

pytestmark = pytest.mark.slow
FLOAT = torch.float32
METHODS = {
    "lora": ["quantization=null"],
    "dora": ["quantization=null", "lora.use_dora=true"],
    "some": ["quantization=null", "lora.target_modules=[q_proj, v_proj]", "lora.rank_pattern={v_proj: 4}"],
    "whole-head": ["quantization=null", "lora.modules_to_save=[lm_head]"],
    "nf4": [],
    "nf4-single": ["quantization.bnb_4bit_use_double_quant=false"],
    "full": ["quantization=null", "lora=null"],
}


@pytest.fixture
def recipe(make_model, workplace):
    """recipe(*overrides): the quickstart on a tiny model."""

    def make(*overrides: str, family: str = "llama3"):
        place = [f"model.pretrained_model_name_or_path={make_model(family)}", f"data.path={SAMPLE}"]
        return load_recipe("quickstart", [*place, "tracking=null", *overrides], root=ROOT)

    return make


@pytest.fixture
def plan(recipe):
    """plan(*overrides): its plan on a GPU, or on another device."""

    def make(*overrides: str, device: Device | None = None, hardware: Hardware = Hardware()):  # noqa: B008
        prepared = prepare(recipe(*overrides))
        return make_plan(prepared, device or find_device("24GB", None), hardware)

    return make


def loaded(recipe):
    base = load_base(recipe, FLOAT)
    return base if recipe.lora is None else get_peft_model(base, make_lora_config(recipe))


def constants(weight) -> list[torch.Tensor]:
    state = weight.quant_state
    nested = [state.state2.absmax, state.offset] if state.nested else []
    return [state.absmax, state.code, *nested]


@pytest.mark.parametrize("method", METHODS)
def test_parameter_bytes_are_those_of_the_loaded_model(method, recipe):
    checked = recipe(*METHODS[method])
    planned, really = count_bytes(checked, FLOAT, FLOAT), loaded(checked)
    adapters = {n: p for n, p in really.named_parameters() if p.requires_grad and checked.lora is not None}
    packed = [p for p in really.parameters() if p.__class__.__name__ == "Params4bit"]
    sizes = sum(p.numel() * p.element_size() for n, p in really.named_parameters() if n not in adapters)
    sizes += sum(tensor.numel() * tensor.element_size() for weight in packed for tensor in constants(weight))
    assert sum(planned.base.values()) == sizes
    assert planned.base.get("4-bit blocks", 0) == sum(p.numel() for p in packed)
    assert planned.adapters == sum(p.numel() * 4 for p in adapters.values())
    assert (planned.trainable, planned.total) == count_parameters(really)
    assert bool(packed) == method.startswith("nf4")


def test_optimizer_state_is_what_adamw_makes(recipe):
    checked = recipe(*METHODS["lora"])
    really = loaded(checked)
    learned = [p for p in really.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned)
    for parameter in learned:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = [v for values in optimizer.state.values() for v in values.values() if v.numel() > 1]
    assert count_bytes(checked, FLOAT, FLOAT).optimizer == sum(v.numel() * 4 for v in state)
    small = count_bytes(recipe(*METHODS["full"], "training.optim=adamw_8bit"), FLOAT, FLOAT)
    assert small.optimizer < count_bytes(recipe(*METHODS["full"]), FLOAT, FLOAT).optimizer / 3


@pytest.mark.parametrize("method", ["lora", "dora", "nf4", "full"])
def test_activations_are_those_that_autograd_really_keeps(method, recipe):
    checked = recipe(*METHODS[method])
    really = loaded(checked).train()
    held = {p.untyped_storage().data_ptr() for p in [*really.parameters(), *really.buffers()]}
    keeps = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            keeps[storage.data_ptr()] = storage
        return tensor

    backbone = (really.get_base_model() if checked.lora else really).base_model
    mask = torch.ones(2, 48, dtype=torch.long)
    mask[0, :5] = 0
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        made = backbone(input_ids=torch.zeros_like(mask), attention_mask=mask, use_cache=False)
    found = trace(checked, FLOAT, FLOAT, False, 2, 48)
    assert made.last_hidden_state.nbytes == found.state and found.traced
    assert 2 * found.layer + found.outside == pytest.approx(sum(s.nbytes() for s in keeps.values()), rel=0.02)


def test_a_model_that_cannot_be_traced_is_estimated_and_says_so(recipe, monkeypatch):
    from torch._subclasses.fake_tensor import DataDependentOutputException

    def refuse(*_):
        raise DataDependentOutputException("aten.nonzero")

    traced = trace(recipe(), FLOAT, FLOAT, False, 2, 48)
    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", refuse)
    guessed = trace(recipe(), FLOAT, FLOAT, False, 2, 48)
    assert not guessed.traced and 0.5 < guessed.layer / traced.layer < 2


def test_largest_micro_batch_fits_and_one_more_does_not(plan):
    planned = plan()
    most = []
    for capacity in (0.65e9, 0.7e9, 0.8e9, 1e9):
        planned = replace(planned, device=replace(planned.device, capacity=capacity))
        most.append(planned.most_rows())
        assert planned.fits(most[-1]) and not planned.fits(most[-1] + 1)
    assert most == sorted(most) and most[0] < most[-1]
    most = [replace(planned, checkpointing=again).most_rows() for again in (True, False)]
    assert most[0] > most[1]
    planned = replace(planned, device=replace(planned.device, capacity=1e6))
    assert planned.most_rows() == 0 and "before the first row" in planned.advice()


def held(planned, hardware):
    """What one process holds on other hardware, whatever the batch."""
    return replace(planned, hardware=hardware).fixed()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_sharding_divides_what_the_strategy_shards(method, plan):
    planned = plan(*METHODS[method])
    one = held(planned, Hardware())
    weights = [name for name in one if name.startswith("weights")]
    for strategy in ("ZeRO-3", "FSDP2"):
        four = held(planned, Hardware(strategy, 4))
        weighing = sum(size for name, size in four.items() if name.startswith("weights"))
        halved = 2 if strategy == "ZeRO-3" and method == "full" else 1
        assert weighing == pytest.approx(sum(one[name] for name in weights) / 4 / halved, abs=4)
        assert four["adapters"] == pytest.approx(one["adapters"] / 4, abs=1)
        assert four["optimizer"] < one["optimizer"]
    ddp, two = held(planned, Hardware("DDP", 4)), held(planned, Hardware("ZeRO-2", 4))
    assert [ddp[name] for name in weights] == [one[name] for name in weights]
    assert ddp["optimizer"] == one["optimizer"] and ddp["gradients"] == 2 * one["gradients"]
    assert two["gradients"] == pytest.approx(one["gradients"] / 4 / (2 if method == "full" else 1), abs=1)


def test_bytes_of_4_bit_weights_are_not_sharded_unless_stored_as_floats(plan):
    whole, ours = held(plan(), Hardware("FSDP2", 4)), plan().parameters
    assert whole["weights, 4-bit blocks"] == ours.base["4-bit blocks"]
    floats = held(plan("quantization.bnb_4bit_quant_storage=bfloat16"), Hardware("FSDP2", 4))
    assert floats["weights, 4-bit blocks"] == pytest.approx(ours.base["4-bit blocks"] / 4, abs=1)


def test_every_gpu_loads_4_bit_weights_whole_before_it_keeps_a_share(plan):
    planned = plan("quantization.bnb_4bit_quant_storage=bfloat16")
    large = replace(planned.parameters, base={"4-bit blocks": 20 * 10**9})
    many = replace(planned, hardware=Hardware("FSDP2", 64), device=find_device("24GB", None), overhead=0)
    many, whole = replace(many, parameters=large), 20 * 10**9 + large.adapters
    assert many.memory()["whole, while loading"] == many.certain() == whole
    assert many.memory()["peak"] == whole > 2 * sum(many.fixed().values())
    assert not replace(many, device=replace(many.device, capacity=whole - 1)).fits()
    assert replace(many, hardware=Hardware("DDP", 64)).memory()["whole, while loading"] == 0


def test_a_gpu_refuses_what_is_certain_and_warns_of_the_rest(plan):
    planned = replace(plan("training.per_device_train_batch_size=64"), device=find_device("24GB", None), overhead=0)
    assert planned.require_fit() is None
    certain, sizes = planned.certain(), replace(planned.device, capacity=0)
    tight = replace(planned, device=replace(sizes, capacity=certain))
    assert "by the plan, 64 rows" in str(tight.require_fit())
    with pytest.raises(RecipeError, match="64 rows"):
        replace(planned, device=replace(sizes, capacity=certain - 1)).require_fit()
    # What a CPU's plan says was measured
    with pytest.raises(RecipeError, match="64 rows"):
        replace(tight, device=replace(tight.device, gpu=False)).require_fit()


def test_the_warning_is_said_and_the_training_begins(plan, capsys):
    from medibot.training.session import refuse_machine

    planned = replace(plan(), device=replace(find_device("24GB", None), capacity=plan().certain()))
    refuse_machine(planned, keeps=True, anyway=False)
    assert capsys.readouterr().err.startswith("warning: by the plan, ")
    refuse_machine(planned, keeps=True, anyway=True)
    assert not capsys.readouterr().err


def test_nothing_is_read_but_config_and_headers(plan, make_model, tmp_path):
    folder = tmp_path / "headers"
    shutil.copytree(make_model("llama3"), folder)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: 8 + int.from_bytes(whole[:8], "little")])
    place = f"model.pretrained_model_name_or_path={folder}"
    truncated, full = plan(place).as_dict(), plan().as_dict()
    assert truncated["memory_bytes"] == full["memory_bytes"]
    file.unlink()
    assert plan(place).as_dict()["memory_bytes"] == full["memory_bytes"]


@pytest.fixture
def giant(make_model, tmp_path) -> Path:
    """A model of 8 billion parameters, of which there are only the config and the tokenizer."""
    folder = tmp_path / "giant"
    shutil.copytree(make_model("llama3"), folder)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 8, "num_attention_heads": 64}
    (folder / "config.json").write_text(json.dumps(config | sizes | {"num_key_value_heads": 8, "head_dim": 128}))
    return folder


def test_what_cannot_fit_is_refused_before_its_weights_are_missed(giant, recipe):
    checked = recipe(f"model.pretrained_model_name_or_path={giant}", *METHODS["full"])
    with pytest.raises(
        RecipeError, match=r"4 rows of \d+ tokens need \d\d\d\.\d GB of \d+\.\d GB.*\d\d\.\d GB are needed before"
    ):
        train(checked, "giant")
    assert not open_run("giant").folder.exists()
    with pytest.raises(RecipeError, match="no safetensors weights"):
        train(checked, "giant", anyway=True)
    assert not open_run("giant").folder.exists()


def test_a_refusal_is_exit_code_2(giant, workplace, monkeypatch, capsys):
    place = [f"data.path={SAMPLE}", f"model.pretrained_model_name_or_path={giant}", *METHODS["full"]]
    monkeypatch.setattr("sys.argv", ["medibot", "train", "quickstart", *place, "--run", "giant"])
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "ANYWAY=1" in said


def test_a_refusal_names_the_batch_that_fits(plan):
    planned = plan("training.per_device_train_batch_size=64")
    parts = planned.memory(16)
    planned = replace(planned, device=replace(planned.device, capacity=parts["peak"]))
    said = r"64 rows of \d+ tokens.*per_device_train_batch_size=16 would fit"
    assert re.search(said, str(planned.require_fit()))
    measured = replace(planned, device=replace(planned.device, capacity=0, gpu=False))
    measured = replace(measured, device=replace(measured.device, capacity=measured.memory(16)["peak"]))
    with pytest.raises(RecipeError, match=said):
        measured.require_fit()


def test_a_gpu_is_a_size_or_a_name():
    assert find_device("24GB", None).capacity == find_device("24 gb", None).capacity == 24e9
    assert find_device("24GB", None).tflops is None
    assert find_device("a100-80gb", None).name == "A100 80GB" and find_device("L4", None).tflops == 121
    assert find_device("T4", None).compute == torch.float16 and find_device("L4", "float32").compute == FLOAT
    with pytest.raises(RecipeError, match="GPU: 'Voodoo' is not known"):
        find_device("Voodoo", None)


def test_a_gpus_memory_is_measured_as_reserved(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 3)
    monkeypatch.setattr("torch.cuda.max_memory_reserved", lambda: 4)
    assert peak_memory() == 4


def test_after_a_run_planned_stands_beside_measured(recipe):
    small = [
        "data.limit={train: 8, validation: 4}",
        "evaluation.questions=[]",
        "training.gradient_accumulation_steps=2",
    ]
    # A process's peak is of its whole life: where an earlier test went higher, this training shows no peak of its own
    before = peak_memory()
    train(recipe(*small, "training.max_steps=-1", "training.num_train_epochs=2", "training.save_steps=1"), "mini")
    run = open_run("mini")
    record, planned = run.record()["summary"], read_json(run.folder / "plan.json")
    assert planned["measured"] == record["memory"]
    assert record["memory"]["measured_bytes"] == record["cost"]["peak_memory_bytes"]
    assert record["memory"]["planned_over_measured"] < 2
    assert record["memory"]["planned_over_measured"] > 0.5 or record["memory"]["measured_bytes"] == before
    assert planned["steps"] == record["steps"] == 2
    assert planned["tokens"] == pytest.approx(read_lines(run.metrics)[-1]["num_input_tokens_seen"], rel=0.1)


@pytest.mark.parametrize(
    ("overrides", "times", "scored"),
    [
        (["training.eval_strategy=steps", "training.eval_steps=2"], 4, 3),
        (["training.eval_strategy=steps", "training.eval_steps=2", "training.eval_on_start=true"], 4, 4),
        (["training.eval_strategy=steps", "training.eval_steps=0.5"], 3, 2),
        (["training.eval_strategy=no"], 2, 0),
    ],
)
def test_hours_count_the_questions_as_often_as_a_training_asks_them(overrides, times, scored, plan, recipe):
    more = ["training.max_steps=5", "training.eval_on_start=false"]
    more += ["training.load_best_model_at_end=false", "training.save_strategy=no", "quantization=null", *overrides]
    more += ["evaluation.questions=['What is gout?','What is anemia?','Hi?']"]
    more += ["training.per_device_eval_batch_size=2", "evaluation.max_new_tokens=4", "data.validation=0.2"]
    run = train(recipe(*more), "asked")
    answers, losses = (read_lines(file) for file in (run.answers, run.metrics))
    assert len({line["global_step"] for line in answers}) == times
    assert len([line for line in losses if "eval_loss" in line]) == scored
    device = find_device("L4", None)
    whole, asked_nothing = plan(*more, device=device), plan(*more, "evaluation.questions=[]", device=device)
    hours = [made.as_dict()["hours_estimated"] for made in (whole, asked_nothing)]
    # Two batches of four tokens each time
    reading = times * 2 * 4 * READING * whole.parameters.total
    assert hours[0] - hours[1] == pytest.approx(reading / (121e12 * UTILIZATION * 3600))
    beside = asked_nothing.as_dict()["hours_evaluating_and_answering"]
    assert (beside > 0) == bool(scored) and whole.validated == sum(prepare(whole.recipe).load("validation")["tokens"])


def test_the_verb_prints_tables_and_writes_json(recipe, make_model, workplace):
    words = ["plan", "quickstart", f"model.pretrained_model_name_or_path={make_model('llama3')}", f"data.path={SAMPLE}"]
    (workplace / "accelerate_configs").symlink_to(ROOT / "accelerate_configs")
    for config, kind in (("zero3", "ZeRO-3"), ("fsdp2", "FSDP2")):
        more = ["--gpu", "L4", "--accelerate", config, "--launch", "--num_processes 4"]
        done = CliRunner().invoke(cli.app, [*words, *more])
        assert done.exit_code == 0, done.output
        for said in (kind, "4-bit blocks", "at most", "estimate", "data-sheet"):
            assert said in done.output, said
    written = read_json(workplace / "outputs" / "plans" / "quickstart.json")
    assert written["strategy"] == "FSDP2" and written["processes"] == 4 and written["hours_estimated"] > 0
    assert not written["activation_checkpointing"] and written["fits"] and written["largest_micro_batch"] > 4
