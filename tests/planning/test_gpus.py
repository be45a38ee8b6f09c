"""Which GPUs a training gets: fake drivers on the path and torch's answers stand in for machines that are not here."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from medibot.errors import RecipeError
from medibot.planning import gpus
from medibot.planning.hardware import measure_tflops, read_hardware
from medibot.training import launch as launching

CPU_BUILD = {"count": 0, "version": "2.13.0+cpu", "built": None, "reason": "", "old": []}
CUDA_13 = CPU_BUILD | {"version": "2.13.0+cu130", "built": "13.0"}
TOO_OLD = "CUDA initialization: The NVIDIA driver on your system is too old (found version 12020)"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(torch_says, *lines): torch says this here, and nvidia-smi, if lines are given, has these GPUs."""
    for name in gpus.NAMES:
        monkeypatch.delenv(name)
    compiler = tmp_path / "bin" / "gcc"
    compiler.parent.mkdir()
    compiler.touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{compiler.parent}:/usr/bin:/bin")
    monkeypatch.delenv("CC", raising=False)

    def make(torch_says: dict, *lines: str, known: str = "compute_cap") -> None:
        monkeypatch.setattr(launching, "find_gpus", lambda: torch_says)
        monkeypatch.setattr(gpus, "find_gpus", lambda: torch_says)
        driver = compiler.with_name("nvidia-smi")
        printed = "\n".join(lines)
        driver.write_text(f"#!/bin/sh\ncase $1 in *{known}*) echo '{printed}';; *) exit 2;; esac\n")
        driver.chmod(0o755)

    return make


@pytest.mark.parametrize(("count", "config"), [(0, "cpu"), (1, "single-gpu"), (2, "multi-gpu"), (8, "multi-gpu")])
def test_hardware_is_what_torch_can_use(count, config, machine, monkeypatch):
    monkeypatch.chdir(ROOT)
    machine(CUDA_13 | {"count": count}, "NVIDIA GeForce RTX 4090 Laptop GPU, 580.65.06, 8.9")
    assert launching.choose_hardware(None)[0].stem == config
    assert launching.parse_launch("", read_hardware(ROOT / "accelerate_configs" / "multi-gpu.yaml"))[1] == max(1, count)


@pytest.mark.parametrize(
    ("torch_says", "line", "said"),
    [
        (
            CPU_BUILD,
            "NVIDIA L4, 580.65.06, 8.9",
            [
                "GPU NVIDIA L4",
                "torch 2.13.0 cannot use it under driver 580.65.06: built without CUDA",
                "whl/cu130 torch==2.13.0+cu130",
            ],
        ),
        (CPU_BUILD, "NVIDIA L4, 550.54, 8.9", ["driver 550.54", "whl/cu126 torch==2.13.0+cu126"]),
        (CPU_BUILD, "Tesla V100, 580.65, 7.0", ["whl/cu126 "]),
        (
            CUDA_13 | {"reason": TOO_OLD},
            "NVIDIA A10G, 535.104.05, 8.6",
            ["too old (found version 12020)", "535", "whl/cu126 "],
        ),
        (CUDA_13 | {"reason": TOO_OLD}, "NVIDIA B200, 570.1, 10.0", ["update the driver, to 580"]),
        (CUDA_13 | {"reason": TOO_OLD}, "Tesla T4, 470.57, 7.5", ["update the driver, to 580"]),
        (CUDA_13, "NVIDIA L4, 580.65.06, 8.9", ["built for CUDA 13.0", "look at what nvidia-smi"]),
        (
            CUDA_13 | {"count": 1, "old": [["Tesla V100-SXM2-16GB", 7, 0]]},
            "Tesla V100-SXM2-16GB, 580.65, 7.0",
            ["CUDA 13.0 without kernels for compute capability 7.0", "driver 580.65", "whl/cu126 "],
        ),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_refused_with_what_could(torch_says, line, said, machine):
    machine(torch_says, line)
    with pytest.raises(RecipeError) as refused:
        gpus.require_usable_gpus(torch_says)
    text = str(refused.value)
    assert "\n" not in text and [part for part in said if part not in text] == [], text


def test_an_old_drivers_nvidia_smi_knows_no_compute_capability(machine):
    machine(CPU_BUILD, "NVIDIA A100-SXM4-40GB, 450.80", known="name,driver_version")
    with pytest.raises(RecipeError, match=r"GPU NVIDIA A100-SXM4-40GB: .*driver 450\.80"):
        gpus.require_usable_gpus(CPU_BUILD)


def test_a_gpu_that_is_hidden_or_not_there_is_not_missed(machine, monkeypatch):
    machine(CPU_BUILD, known="nothing")
    assert gpus.require_usable_gpus(CPU_BUILD) == 0
    machine(CPU_BUILD, "NVIDIA L4, 580.65.06, 8.9")
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert gpus.require_usable_gpus(CPU_BUILD) == 0


def test_the_tests_themselves_use_no_gpu():
    assert {os.environ[name] for name in gpus.NAMES} == {""}
    assert gpus.find_gpus()["count"] == gpus.require_usable_gpus(CPU_BUILD) == 0


def test_a_gpu_needs_what_triton_compiles_with(machine, monkeypatch, tmp_path):
    one = CUDA_13 | {"count": 1}
    machine(one, "NVIDIA L4, 580.65.06, 8.9")
    monkeypatch.setattr(gpus.importlib.util, "find_spec", lambda name: name == "triton")
    monkeypatch.setattr(gpus.sysconfig, "get_path", lambda *_: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(RecipeError, match=r"no .*Python.h \(install gcc and python3-dev"):
        gpus.require_usable_gpus(one)
    (tmp_path / "bin" / "gcc").unlink()
    (tmp_path / "Python.h").touch()
    with pytest.raises(RecipeError, match=r"finds no C compiler \("):
        gpus.require_usable_gpus(one)
    monkeypatch.setenv("CC", "tcc")
    assert gpus.require_usable_gpus(one) == 1
    monkeypatch.delenv("CC")
    machine(CUDA_13, known="nothing")
    assert gpus.require_usable_gpus(CUDA_13) == 0


@pytest.fixture
def cards(monkeypatch):
    """cards(capability, …): torch sees these, and has the kernels of its CUDA 13 wheels."""

    def make(*capabilities: tuple[int, int], hip: str | None = None) -> None:
        monkeypatch.setattr(torch.version, "cuda", None if hip else "13.0")
        monkeypatch.setattr(torch.version, "hip", hip)
        wheels = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["gfx942"] if hip else wheels)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda place=0: f"card {place}")

    return make


def test_torch_tells_which_cards_it_has_kernels_for(cards, monkeypatch):
    cards((8, 9), (7, 0), (12, 1), (13, 0), (7, 5), (6, 1))
    found = gpus.ask_torch()
    assert (found["count"], found["built"]) == (6, "13.0")
    assert found["old"] == [["card 1", 7, 0], ["card 5", 6, 1]]
    # Without `compute_` a wheel ends with its last generation
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    assert [name for name, *_ in gpus.ask_torch()["old"]] == ["card 1", "card 2", "card 3", "card 4", "card 5"]
    cards((9, 4), hip="7.2")
    assert (gpus.ask_torch()["count"], gpus.ask_torch()["built"], gpus.ask_torch()["old"]) == (1, "7.2", [])
    cards()
    assert gpus.ask_torch()["count"] == 0


def test_torch_is_asked_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(gpus, "version", lambda _: "2.13.0")
    for name in gpus.NAMES:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "NoSuchDevice")
    assert gpus.find_gpus() == gpus.ask_torch()
    monkeypatch.setattr(gpus, "ASK", "raise SystemExit(1)")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus.find_gpus()["count"] == 0  # nothing to ask about


@pytest.mark.parametrize(
    ("environment", "words", "config", "seen"),
    [
        ({}, "", "cpu", {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "", "cpu-2", {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}),
        ({}, "", "single-gpu", {"CUDA_VISIBLE_DEVICES": "0"}),
        ({"CUDA_VISIBLE_DEVICES": "3,2"}, "", "single-gpu", {"CUDA_VISIBLE_DEVICES": "3"}),
        ({"HIP_VISIBLE_DEVICES": "1,0"}, "", "single-gpu", {"HIP_VISIBLE_DEVICES": "1"}),
        ({"CUDA_VISIBLE_DEVICES": "3,2"}, "--num_processes 1", "multi-gpu", {"CUDA_VISIBLE_DEVICES": "3"}),
        ({"CUDA_VISIBLE_DEVICES": "3,2"}, "", "multi-gpu", {"CUDA_VISIBLE_DEVICES": "3,2"}),
    ],
)
def test_a_launched_process_sees_the_devices_of_its_config(
    environment, words, config, seen, machine, workplace, monkeypatch
):
    started = {}

    class Launched:
        def __init__(self, command, env, **options):
            started.update(env)

        def wait(self):
            return 0

    machine(CUDA_13 | {"count": 2}, "NVIDIA L4, 580.65.06, 8.9")
    monkeypatch.setattr(launching.psutil, "Popen", Launched)
    monkeypatch.setattr(launching, "refuse_conflicts", lambda *_: None)
    monkeypatch.setattr("medibot.data.prepared.prepare", lambda *_: None)
    for name in gpus.NAMES:
        monkeypatch.setenv(name, environment.get(name, "x"))
        if name not in environment:
            monkeypatch.delenv(name)
    file = str(ROOT / "accelerate_configs" / f"{config}.yaml")
    assert launching.launch(str(ROOT / "recipes" / "quickstart.yaml"), [], [], file, words) == 0
    assert {name: started[name] for name in gpus.NAMES if name in started} == seen


@pytest.mark.parametrize(
    ("count", "written", "seen"),
    [
        (1, {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        (1, {"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
        (1, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}),
        (0, {}, {}),
    ],
)
def test_a_gpus_memory_grows_in_segments_unless_its_user_says_how(count, written, seen, machine, monkeypatch):
    names, started = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"), {}

    class Launched:
        def __init__(self, command, env, **options):
            started.update({name: env[name] for name in names if name in env})

        def wait(self):
            return 0

    machine(CUDA_13 | {"count": count}, known="compute_cap" if count else "nothing")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(launching.psutil, "Popen", Launched)
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in written.items():
        monkeypatch.setenv(name, value)
    assert launching.launch("quickstart", [], [], None, "") == 0
    assert started == seen


def test_a_config_for_gpus_without_one_is_refused(machine):
    machine(CPU_BUILD, known="nothing")
    for name in ("single-gpu", "multi-gpu"):
        with pytest.raises(RecipeError, match=f"ACCELERATE={name}: no GPU was found"):
            launching.launch("quickstart", [], [], str(ROOT / "accelerate_configs" / f"{name}.yaml"), "")


def test_accelerates_own_launcher_with_a_cpu_config_hides_the_gpus(workplace):
    program = "import os, sys, medibot.cli as c; sys.argv = ['medibot', 'train', 'none']; "
    program += "c.load_recipe = lambda *_: sys.exit(repr(os.environ['CUDA_VISIBLE_DEVICES'])); c.main()"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "0,1",
        "ACCELERATE_MIXED_PRECISION": "no",
    }
    for cpu, seen in (("True", "''"), ("False", "'0,1'")):
        environment |= {"ACCELERATE_USE_CPU": cpu}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert done.stderr.strip() == seen


def test_a_training_from_python_asks_for_a_usable_gpu_first(machine, miniature, workplace):
    from medibot.training.session import train

    recipe = miniature("quickstart")
    machine(CPU_BUILD, "NVIDIA L4, 580.65.06, 8.9")
    with pytest.raises(RecipeError, match=r"GPU NVIDIA L4: torch .* cannot use it under driver"):
        train(recipe, "mine")
    assert not (workplace / "outputs").exists()


def test_the_device_of_a_gpu_has_a_speed(cards, monkeypatch):
    from medibot.planning import hardware

    cards((8, 9))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20_000_000_000, 24_000_000_000))
    monkeypatch.setattr(hardware, "measure_tflops", lambda *asked: {(torch.bfloat16, "cuda"): 12.5}[asked])
    found = hardware.detect_device(torch.bfloat16)
    assert (found.name, found.capacity, found.tflops) == ("card 0", 20.6e9, 12.5)


def test_speed_is_measured_by_products_that_are_waited_for():
    torch.set_num_threads(1)
    found = measure_tflops(torch.float32, "cpu", size=512, times=4)
    assert 1e-4 < found < 10


def test_windows_is_said_to_be_unsupported():
    program = "import sys, medibot.cli as c, medibot.training.launch; sys.platform = 'win32'; sys.argv = ['medibot', 'list']; c.main()"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "Windows: is not supported (run it in WSL 2 or a container)\n"
