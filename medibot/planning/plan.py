"""Whether a training fits, before a weight is loaded: what one device holds, and the largest micro-batch.

make plan RECIPE=medquad-qlora GPU="24GB"
"""

import math
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from medibot.data.prepared import Prepared
from medibot.model.loading import weights_dtype
from medibot.planning.activations import Kept, head, kept
from medibot.planning.conflicts import share_batch
from medibot.planning.hardware import CONTEXT, GB, NCCL, Device, Layout
from medibot.planning.memory import parameters, stored, text_config
from medibot.planning.schedule import UTILISATION, Schedule, flat, schedule, setting
from medibot.recipe import Recipe

# Measured on CPUs, glibc 2.36 (benchmarks/plan.py): what a training's process grows by beside what is counted here, and
# the share of what a layer allocates and frees that the heap cannot use again
LATER, HOLES = 25_000_000, 0.22


class Plan:
    """One training on one device; config, tokenizer and prepared conversations are all that is read.

    Exact: parameters, adapters, gradients, optimizer state. Traced: activations. Estimated: the rest.
    """

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        prepared: Prepared,
        weights: torch.dtype,
        device: Device,
        layout: Layout,
    ) -> None:
        self.recipe, self.weights, self.device, self.layout = recipe, weights, device, layout
        self.config = text_config(recipe).get_text_config()
        self.parameters = parameters(recipe, weights, device.compute)
        rows: Any = prepared.load("train")
        held_out: Any = prepared.load("validation")
        self.lengths = np.array(rows["tokens"])
        longest = rows[int(self.lengths.argmax())]["completion"][0]["content"]
        answer = len(tokenizer(longest, add_special_tokens=False)["input_ids"])
        self.supervised_share = min(1.0, answer / int(self.lengths.max()))
        evaluated = setting(recipe, "per_device_eval_batch_size")
        self.evaluated = min(evaluated, len(held_out)) * max(held_out["tokens"]) if held_out is not None else 0
        if setting(recipe, "packing"):
            whole = setting(recipe, "max_length")
            self.lengths = np.full(math.ceil(self.lengths.sum() / whole), whole)
        now = psutil.Process().memory_info().rss
        self.overhead = CONTEXT + NCCL * (layout.processes > 1) if device.gpu else now + LATER
        self.traces: dict[int, Kept] = {}

    @property
    def rows(self) -> int:
        """Rows of the largest micro-batch."""
        return min(setting(self.recipe, "per_device_train_batch_size"), len(self.lengths))

    @property
    def longest(self) -> int:
        """Tokens of the longest row; its whole micro-batch is padded to it."""
        return int(self.lengths.max())

    @property
    def checkpointing(self) -> bool:
        return self.layout.checkpointing or self.recipe.training.get("activation_checkpointing", True)

    @cached_property
    def schedule(self) -> Schedule:
        of = (self.recipe, self.lengths, self.parameters, self.config, self.device, self.layout, self.checkpointing)
        return schedule(*of)

    # --- memory -------------------------------------------------------------------------------------------------------

    def memory(
        self, rows: int | None = None, checkpointing: bool | None = None, layout: Layout | None = None
    ) -> dict[str, int]:
        """Bytes on one device, by what they are for; `peak` is what has to fit."""
        layout = self.layout if layout is None else layout
        parts = self.held(layout) | self.batch(
            self.rows if rows is None else rows, self.checkpointing if checkpointing is None else checkpointing
        )
        passing = parts["activations"] + parts["logits"]
        always = sum(parts.values()) - passing - parts["gradients"]
        # Without accumulation the gradients grow while the activations go; DDP's buckets are always there
        together = setting(self.recipe, "gradient_accumulation_steps") > 1 or layout.strategy == "ddp"
        gradients = parts["gradients"]
        return parts | {"peak": always + (passing + gradients if together else max(passing, gradients))}

    def held(self, layout: Layout) -> dict[str, int]:
        """What does not depend on the batch. ZeRO-2 shards gradients and optimizer, ZeRO-3 and FSDP2 weights, too."""
        own, bits = self.parameters, self.recipe.quantization or {}
        divided = layout.processes if layout.strategy != "ddp" else 1
        ways = layout.processes if layout.strategy in {"fsdp2", "zero3"} else 1
        # 4-bit weights stored as bytes are not sharded (accelerate/utils/fsdp_utils.py), and ZeRO-3 loads them whole
        whole = own.quantized and not (layout.strategy == "fsdp2" and "bnb_4bit_quant_storage" in bits)
        base = 1 if whole else ways
        weights = {f"weights, {name}": math.ceil(size / base) for name, size in own.base.items()}
        optimizer, gradients, copies = own.optimizer, own.trained, own.casts
        if layout.strategy in {"zero2", "zero3"} and own.casts and self.recipe.lora is None:
            # DeepSpeed computes with half-precision weights, and keeps the float32 ones with the optimizer's state
            name, half = str(self.device.compute).removeprefix("torch."), self.device.compute.itemsize
            weights = {f"weights, {name}": math.ceil(half * own.total / base)}
            optimizer, gradients = own.optimizer + own.trained, half * own.trainable
        if layout.strategy not in {"one process", "ddp"}:
            copies = 0
        return {
            **weights,
            "adapters": math.ceil(own.adapters / ways),
            "layers gathered": 2 * own.layer * self.device.compute.itemsize if base > 1 else 0,
            "copies by autocast": copies,
            "optimizer": math.ceil(optimizer / divided),
            "gradients": 2 * gradients if layout.strategy == "ddp" else math.ceil(gradients / divided),
            "overhead": self.overhead,
        }

    def batch(self, rows: int, checkpointing: bool) -> dict[str, int]:
        """What is kept for the backward pass, and what is on top of it at the peak: logits, or one layer's gradients."""
        kept, layers = self.kept(rows), self.config.num_hidden_layers
        stored = layers * (kept.state if checkpointing else kept.layer) + kept.outside
        layer = kept.layer * (2 if checkpointing else 1)
        logits = self.head(rows * self.longest, training=True)
        if not self.device.gpu:
            stored += int(HOLES * (kept.freed if checkpointing else layers * kept.freed))
            if setting(self.recipe, "eval_strategy") != "no" or setting(self.recipe, "eval_on_start"):
                # The heap gives little back: an evaluation comes on top of it
                logits = max(logits, self.head(self.evaluated, training=False))
        return {"activations": stored, "logits": max(logits, layer)}

    def kept(self, rows: int) -> Kept:
        """What a forward pass over `rows` of the longest rows keeps: traced for one and for two, then in proportion."""
        together = flat(self.recipe)
        traced = 1 if rows == 1 or together else 2
        if traced not in self.traces:
            of = (self.recipe, self.weights, self.device.compute, self.device.gpu, traced, self.longest)
            self.traces[traced] = kept(*of)
        one, times = self.traces[traced], rows / traced
        layer, outside, state, freed = (int(n * times) for n in (one.layer, one.outside, one.state, one.freed))
        # The rows of a flat batch are told apart by a mask over all its tokens
        mask = (rows * self.longest) ** 2 * self.device.compute.itemsize if together else 0
        return Kept(layer, outside + mask, state, freed, one.traced)

    def head(self, positions: int, training: bool) -> int:
        supervised = math.ceil(positions * self.supervised_share)
        full = training and self.recipe.lora is None
        return head(self.device.gpu, training, supervised, self.config, self.device.compute, full)

    def fits(self, rows: int | None = None, checkpointing: bool | None = None) -> bool:
        return self.memory(rows, checkpointing)["peak"] <= self.device.capacity

    def most_rows(self, checkpointing: bool | None = None) -> int:
        """The largest micro-batch of the longest rows that fits; 0 if none does."""
        low, high = 0, 1
        while high <= 1 << 16 and self.fits(high, checkpointing):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(middle, checkpointing) else (low, middle)
        return low

    # --- said ---------------------------------------------------------------------------------------------------------

    def advice(self) -> str:
        """What to lower, in the plan's own figures."""
        most, remedies = min(self.most_rows(), self.rows - 1), []
        if most:
            remedies.append(
                f"per_device_train_batch_size={most} would fit: raise gradient_accumulation_steps by as much"
            )
        again = 0 if self.checkpointing else min(self.rows, self.most_rows(checkpointing=True))
        if again > most:
            remedies.append(f"with activation_checkpointing=true {again} rows would fit")
        if remedies:
            return ", or ".join(remedies)
        parts = self.memory(1)
        fixed = (parts["peak"] - parts["activations"] - parts["logits"]) / GB
        return f"{fixed:.1f} GB are needed before the first row: shorten max_length, quantize, or take a smaller model"

    def require_fit(self) -> None:
        """Refuse, before a weight is loaded, what cannot fit."""
        peak, there = self.memory()["peak"] / GB, self.device.capacity / GB
        if not self.fits():
            what = f"{self.rows} rows of {self.longest} tokens need {peak:.1f} GB, {self.device.name} has {there:.1f}"
            raise self.recipe.error("training.per_device_train_batch_size", what, f"{self.advice()}; or ANYWAY=1")

    def as_dict(self) -> dict[str, Any]:
        """All figures: bytes, tokens, hours."""
        quantiles = np.percentile(self.lengths, (5, 50, 95)).tolist()
        done = self.schedule
        return {
            "device": self.device.name,
            "capacity_bytes": int(self.device.capacity),
            "computes_in": str(self.device.compute).removeprefix("torch."),
            "strategy": self.layout.strategy,
            "processes": self.layout.processes,
            "micro_batch": self.rows,
            "activation_checkpointing": self.checkpointing,
            "activations_traced": self.kept(self.rows).traced,
            "stored_bytes": stored(self.recipe),
            "memory_bytes": self.memory(),
            "fits": self.fits(),
            "largest_micro_batch": self.most_rows(),
            "lengths": dict(zip(("p5", "median", "p95"), quantiles, strict=True)) | {"longest": self.longest},
            "rows": len(self.lengths),
            "steps": done.steps,
            "tokens": done.tokens,
            "flops": done.flops,
            "hours_estimated": done.hours,
            "utilisation_assumed": UTILISATION if done.hours else None,
            "disk_bytes": done.disk,
        }

    def planned_peak(self) -> int:
        """What `train.peak_memory` measures: on a GPU what is allocated, without the context."""
        return self.memory()["peak"] - (self.overhead if self.device.gpu else 0)


def show(plan: Plan) -> None:
    """The plan as tables: memory by what it is for and by strategy, then batch, steps, time and disk."""
    console, ways = Console(highlight=False), plan.layout.processes
    layouts = [plan.layout]
    if ways > 1:
        layouts = [Layout(name, ways) for name in ("ddp", "zero2", "zero3", "fsdp2")]
    other = not plan.checkpointing
    title = f"{plan.recipe.name}: GB on one device of {ways}, {plan.rows} rows of {plan.longest} tokens"
    table = Table("", *(layout.strategy for layout in layouts), title=title, title_justify="left")
    columns = [plan.memory(layout=layout) for layout in layouts]
    for part in dict.fromkeys(part for column in columns for part in column):
        if any(column.get(part) for column in columns):
            table.add_row(part, *(f"{column.get(part, 0) / GB:.3f}" for column in columns))
    again = [plan.memory(checkpointing=other, layout=layout)["peak"] for layout in layouts]
    table.add_row(f"peak {'with' if other else 'without'} checkpointing", *(f"{peak / GB:.3f}" for peak in again))
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    for name, value in figures(plan):
        console.print(f"{name:14}{value}", markup=False)


def figures(plan: Plan) -> list[tuple[str, str]]:
    """Name and value of each line below the table."""
    all_figures, own = plan.as_dict(), plan.parameters
    lengths, hours = all_figures["lengths"], all_figures["hours_estimated"]
    fit = "fits" if all_figures["fits"] else "does NOT fit: " + plan.advice()
    other = plan.most_rows(checkpointing=not plan.checkpointing)
    time = "not estimated: no data sheet is known for this device"
    if hours is not None:
        long = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"
        time = f"{long} (estimate: {UTILISATION:.0%} of {plan.device.tflops} data-sheet TFLOPs a device)"
    files = all_figures["stored_bytes"] or {}
    stored = ", ".join(f"{size / GB:.2f} GB {dtype}" for dtype, size in files.items())
    traced = "traced" if all_figures["activations_traced"] else "a rule of thumb: this architecture cannot be traced"
    return [
        ("device", f"{plan.device.name}, {plan.device.capacity / GB:.1f} GB, {all_figures['computes_in']}: {fit}"),
        ("parameters", f"{own.trainable:,} of {own.total:,} trained; files: {stored or 'not on this machine'}"),
        ("activations", f"{traced}; checkpointing {'on' if plan.checkpointing else 'off'}"),
        (
            "micro-batch",
            f"at most {all_figures['largest_micro_batch']} rows; "
            f"{'without' if plan.checkpointing else 'with'} checkpointing {other}",
        ),
        ("row lengths", ", ".join(f"{name} {value:.0f}" for name, value in lengths.items()) + " tokens"),
        ("steps", f"{plan.schedule.steps:,}; {plan.schedule.tokens:,} tokens, padding included"),
        ("compute", f"{plan.schedule.flops:.2e} FLOPs"),
        ("time", time),
        ("disk", f"{plan.schedule.disk / GB:.2f} GB for checkpoints and model"),
    ]


def per_process(recipe: Recipe, processes: int) -> dict[str, int]:
    """The settings with which each process takes its share of the recipe's batch."""
    rows, accumulated = share_batch(recipe, processes)
    return {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulated}


def make_plan(prepared: Prepared, device: Device, layout: Layout) -> Plan:
    """The plan of a training on `device`, with the weights and the rows that each process would hold."""
    held = weights_dtype(prepared.recipe, device.compute)
    training = prepared.recipe.training | per_process(prepared.recipe, layout.processes)
    return Plan(replace(prepared.recipe, training=training), prepared.tokenizer, prepared, held, device, layout)
