"""Measure what a forward pass keeps for the backward pass, and what the logits need on top; nothing is computed.

Autograd itself is asked: the forward pass of the first one and two layers runs on fake tensors, and each further layer
is taken to keep what the second one does.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from transformers import PretrainedConfig

from medibot.planning.memory import build_skeleton, cast_bytes, load_config
from medibot.recipe import Recipe

# trl/kernels/chunked_logprob.py: a tile of logits is at most so many positions by so many tokens of the vocabulary
GPU_TILE = (4096, 32768)
# Positions that the head of medibot/training/cpu.py scores at a time
CPU_TILE = 128
# What a layer that cannot be traced keeps, in bytes a token for each hidden unit, at two bytes a value
# (Korthikanti et al., 2022, arXiv 2205.05198, without the attention matrix)
UNTRACED = 34


@dataclass(frozen=True)
class Kept:
    """Bytes that a forward pass keeps: a layer, what is outside of layers, one hidden state."""

    layer: int
    outside: int
    state: int
    traced: bool


def trace(recipe: Recipe, dtype: torch.dtype, compute: torch.dtype, rows: int, length: int) -> Kept:
    """Trace the first one and two layers over `rows` x `length` tokens; estimate a model that cannot be traced."""
    try:
        one, two = (trace_layers(recipe, dtype, compute, layers, rows, length) for layers in (1, 2))
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException):
        state = rows * length * load_config(recipe).get_text_config().hidden_size * compute.itemsize
        return Kept(state * UNTRACED // 2, state, state, traced=False)
    layer = two.layer - one.layer
    return Kept(layer, max(0, one.layer - layer), two.state, traced=True)


def trace_layers(recipe: Recipe, dtype: torch.dtype, compute: torch.dtype, layers: int, rows: int, length: int) -> Kept:
    """Run the backbone's first `layers` on fake tensors: `layer` is all that they keep."""
    model = build_skeleton(recipe, dtype, layers, quantized=False)
    backbone = (model.get_base_model() if recipe.lora is not None else model).base_model
    # Holding on to the storages keeps their identity
    saved: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved[storage._cdata] = storage
        return tensor

    # Half precision of either kind is as large, and bfloat16 is the one that every CPU can name
    autocast = nullcontext() if compute == torch.float32 else torch.autocast("cpu", dtype=torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        values = {
            name: torch.empty(value.shape, dtype=value.dtype, requires_grad=value.requires_grad)
            for name, value in [*backbone.named_parameters(), *backbone.named_buffers()]
        }
        parameters = {value.untyped_storage()._cdata for value in values.values()}
        ids = torch.zeros(rows, length, dtype=torch.long)
        # A single row is never padded, and upstream then drops the mask
        mask = torch.ones_like(ids) if rows > 1 else None
        batch = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        with autocast, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            made = torch.func.functional_call(backbone, values, kwargs=batch)
        kept = sum(storage.nbytes() for storage in saved.values()) - cast_bytes(backbone, compute)
        return Kept(kept, 0, made.last_hidden_state.nbytes, traced=True)


def head_bytes(gpu: bool, supervised: int, config: PretrainedConfig, compute: torch.dtype, full: bool) -> int:
    """Return the bytes that head and loss need on top, at their highest point, to learn from `supervised` positions.

    On a GPU it is TRL's fused head, one tile of logits at a time; on a CPU that of medibot/training/cpu.py, two tiles in
    float32. Both keep the hidden states of those positions and their gradient. `full`: the head is trained, too.
    """
    hidden, vocabulary = config.hidden_size, config.vocab_size
    logits, cast = 2 * 4 * min(CPU_TILE, supervised) * vocabulary, 0
    if gpu:
        width = min(GPU_TILE[1], vocabulary)
        logits, cast = min(GPU_TILE[0], supervised) * width * compute.itemsize, width * hidden * compute.itemsize
    return logits + supervised * hidden * (4 + 2 * compute.itemsize) + (4 * vocabulary * hidden + cast if full else 0)
