"""Memory that runs out, wherever a model is used, is one line that says what to do."""

import errno

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.integrations import bitsandbytes as quantizing

import medibot
from medibot.errors import RecipeError, explain_memory, is_out_of_memory
from medibot.export import gguf
from medibot.model import convert
from medibot.serving.assistant import Assistant, Decoding
from medibot.serving.chat import Chat

pytestmark = pytest.mark.slow
# As they came from GPUs and machines; the types are those of torch 2.13
SAID = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 15.77 GiB"),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    ),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    MemoryError(),
]
LINE = r"out of memory: .*allocate.*\(.*end what else uses this memory"


@pytest.mark.parametrize("error", SAID, ids=lambda error: str(error)[:40])
def test_every_way_to_say_it_is_known(error):
    with pytest.raises(RecipeError, match=r"eval: out of memory: .*\(do this\)"), explain_memory("eval", "do this"):
        raise error


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error: device-side assert triggered"), OSError(errno.ENOSPC, "No space left on device")],
)
def test_other_failures_stay_what_they_are(error):
    assert not is_out_of_memory(error)
    with pytest.raises(type(error), match=str(error).replace("[", r"\[")), explain_memory("eval", "do this"):
        raise error


def take_all(*_, **__):
    torch.empty(1 << 50)


def test_a_model_that_does_not_fit_is_said_by_whatever_loads_it(trained, miniature, monkeypatch):
    """Quantizing is the first that takes memory, and upstream hides its errors."""
    run, recipe = trained("run"), miniature("quickstart", "tracking=null")
    monkeypatch.setattr(quantizing.Bnb4bitQuantize, "convert", take_all)
    for use in (lambda: medibot.evaluate("run"), lambda: medibot.merge("run"), lambda: Assistant(run)):
        with pytest.raises(RecipeError, match=LINE):
            use()
    with pytest.raises(RecipeError, match=r"by the plan, 2 rows of \d+ tokens need .*add a section quantization"):
        medibot.train(recipe, "new")
    assert not run.merged.exists() and not list(run.folder.glob(".*partial"))


def test_a_model_that_runs_out_while_it_is_used_says_what_to_lower(trained, monkeypatch):
    trained("run", "quantization=null")
    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "forward", take_all)
        with pytest.raises(RecipeError, match=r"eval: out of memory: .*lower training.per_device_eval_batch_size"):
            medibot.evaluate("run", rows=2)
        with pytest.raises(RecipeError, match=r"merge: out of memory: .*hide the GPU"):
            medibot.merge("run")


def test_exports_say_it_too(trained, workplace, monkeypatch):
    trained("run", "lora=null", "quantization=null")
    (workplace / "converter").touch()
    monkeypatch.setattr(gguf, "CONVERTER", workplace / "converter")
    monkeypatch.setattr(gguf.AutoTokenizer, "from_pretrained", take_all)
    with pytest.raises(RecipeError, match=r"export-gguf: out of memory: .*hide the GPU"):
        gguf.export_gguf("run")
    (workplace / "base.gguf").touch()
    monkeypatch.setattr(convert.AutoModelForCausalLM, "from_pretrained", take_all)
    with pytest.raises(RecipeError, match=rf"model: {LINE}"):
        convert.convert_gguf(workplace / "base.gguf", workplace / "base")


def test_a_chat_goes_on_after_an_answer_for_which_memory_ran_out(speaker, monkeypatch, capsys):
    conversation = Chat(speaker, Decoding(4))
    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "forward", take_all)
        conversation.take("What is anemia?")
    said = capsys.readouterr().out
    assert "messages: out of memory: " in said and "ask for a shorter answer" in said
    conversation.take("What is anemia?")
    assert conversation.messages["tuned"]
