"""Say whether a training fits before a weight is loaded: what one device holds, and the largest micro-batch."""

import dataclasses
import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Group
from rich.table import Column, Table
from transformers import PretrainedConfig

from medibot.data.prepared import Prepared, prepare
from medibot.model.loading import weights_dtype
from medibot.planning.activations import Kept, head_bytes, trace
from medibot.planning.conflicts import share_batch
from medibot.planning.hardware import CONTEXT, GB, NCCL, Device, Hardware, Layout, detect_device, find_device
from medibot.planning.memory import Parameters, count_bytes, load_config
from medibot.planning.schedule import UTILIZATION, Schedule, is_flat, make_schedule, setting
from medibot.recipe import Recipe
from medibot.run import outputs_folder

# Measured on CPUs, glibc 2.36 (benchmarks/plan.py): what a training's process grows by beside what is counted here, and
# by how much the heap is larger than the activations in it
LATER, HEAP = 25_000_000, 1.65


@dataclass(frozen=True)
class Plan:
    """One training on one device.

    Exact: parameters, adapters, gradients, optimizer state. Traced: activations. Estimated: the rest. `lengths` are the
    tokens of each row, `supervised_share` of the longest one is learned from, `overhead` are the bytes that the process
    holds whatever it trains.
    """

    recipe: Recipe
    weights: torch.dtype
    device: Device
    layout: Layout
    config: PretrainedConfig
    parameters: Parameters
    lengths: np.ndarray
    supervised_share: float
    overhead: int

    @property
    def rows(self) -> int:
        """Return the rows of the largest micro-batch."""
        return min(setting(self.recipe, "per_device_train_batch_size"), len(self.lengths))

    @property
    def longest(self) -> int:
        """Return the tokens of the longest row, to which its whole micro-batch is padded."""
        return int(self.lengths.max())

    @property
    def checkpointing(self) -> bool:
        """Tell whether activations are computed again in the backward pass."""
        return self.layout.checkpointing or self.recipe.training.get("activation_checkpointing", True)

    @cached_property
    def schedule(self) -> Schedule:
        """Return steps, tokens, time and disk."""
        return make_schedule(self)

    def memory(self, rows: int | None = None, checkpointing: bool | None = None) -> dict[str, int]:
        """Return bytes on one device, by what they are for; `peak` is what has to fit."""
        checkpointing = self.checkpointing if checkpointing is None else checkpointing
        parts = self.fixed(self.layout) | self.batch(rows or self.rows, checkpointing)
        passing, gradients = parts["activations"] + parts["logits"], parts["gradients"]
        always = sum(parts.values()) - passing - gradients
        # Without accumulation the gradients grow while the activations go; DDP's buckets are always there
        together = setting(self.recipe, "gradient_accumulation_steps") > 1 or self.layout.strategy == "ddp"
        return parts | {"peak": always + (passing + gradients if together else max(passing, gradients))}

    def fixed(self, layout: Layout) -> dict[str, int]:
        """Return the bytes that do not depend on the batch.

        ZeRO-2 shards gradients and optimizer, ZeRO-3 and FSDP2 the weights, too.
        """
        own, bits, compute = self.parameters, self.recipe.quantization or {}, self.device.compute
        shares = layout.processes if layout.strategy != "ddp" else 1
        weight_shares = layout.processes if layout.strategy in {"fsdp2", "zero3"} else 1
        # 4-bit weights stored as bytes are not sharded (accelerate/utils/fsdp_utils.py), and ZeRO-3 loads them whole
        whole = own.quantized and not (layout.strategy == "fsdp2" and "bnb_4bit_quant_storage" in bits)
        base_shares = 1 if whole else weight_shares
        base, optimizer, gradients = own.base, own.optimizer, own.trained
        if layout.strategy in {"zero2", "zero3"} and own.casts and self.recipe.lora is None:
            # DeepSpeed computes with half-precision weights, and keeps the float32 ones with the optimizer's state
            base = {str(compute).removeprefix("torch."): compute.itemsize * own.total}
            optimizer, gradients = own.optimizer + own.trained, compute.itemsize * own.trainable
        return {
            **{f"weights, {name}": math.ceil(size / base_shares) for name, size in base.items()},
            "adapters": math.ceil(own.adapters / weight_shares),
            "layers gathered": 2 * own.layer * compute.itemsize if base_shares > 1 else 0,
            "copies by autocast": own.casts if layout.strategy in {"one process", "ddp"} else 0,
            "optimizer": math.ceil(optimizer / shares),
            "gradients": 2 * gradients if layout.strategy == "ddp" else math.ceil(gradients / shares),
            "overhead": self.overhead,
        }

    @cached_property
    def traces(self) -> dict[int, Kept]:
        """Return what a forward pass over one and two of the longest rows keeps; a mask comes with the second."""
        compute = self.device.compute
        return {rows: trace(self.recipe, self.weights, compute, rows, self.longest) for rows in (1, 2)}

    def batch(self, rows: int, checkpointing: bool) -> dict[str, int]:
        """Return what is kept for the backward pass, and what comes on top: logits, or one layer's gradients."""
        flat, layers, compute = is_flat(self.recipe), self.config.num_hidden_layers, self.device.compute
        traced = 1 if rows == 1 or flat else 2
        kept, times = self.traces[traced], rows / traced
        stored = times * (layers * (kept.state if checkpointing else kept.layer) + kept.outside)
        # The rows of a flat batch are told apart by a mask over all its tokens
        stored += (rows * self.longest) ** 2 * compute.itemsize if flat else 0
        supervised = math.ceil(rows * self.longest * self.supervised_share)
        logits = head_bytes(self.device.gpu, supervised, self.config, compute, full=self.recipe.lora is None)
        layer = times * kept.layer * (2 if checkpointing else 1)
        return {"activations": int(stored * (1 if self.device.gpu else HEAP)), "logits": int(max(logits, layer))}

    def fits(self, rows: int | None = None, checkpointing: bool | None = None) -> bool:
        """Tell whether a micro-batch of `rows` of the longest rows fits."""
        return self.memory(rows, checkpointing)["peak"] <= self.device.capacity

    def most_rows(self, checkpointing: bool | None = None) -> int:
        """Return the largest micro-batch of the longest rows that fits; 0 if none does."""
        low, high = 0, 1
        while high <= 1 << 16 and self.fits(high, checkpointing):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(middle, checkpointing) else (low, middle)
        return low

    def advice(self) -> str:
        """Return what to lower, in the plan's own figures."""
        most, remedies = min(self.most_rows(), self.rows - 1), []
        if most:
            fit = f"per_device_train_batch_size={most} would fit"
            remedies.append(f"{fit}: raise gradient_accumulation_steps by as much")
        again = 0 if self.checkpointing else min(self.rows, self.most_rows(checkpointing=True))
        if again > most:
            remedies.append(f"with activation_checkpointing=true {again} rows would fit")
        if remedies:
            return ", or ".join(remedies)
        parts = self.memory(1)
        fixed = (parts["peak"] - parts["activations"] - parts["logits"]) / GB
        return f"{fixed:.1f} GB are needed before the first row: shorten max_length, quantize, or take a smaller model"

    def require_fit(self) -> None:
        """Raise RecipeError, before a weight is loaded, for what cannot fit."""
        if not self.fits():
            peak, capacity = self.memory()["peak"] / GB, self.device.capacity / GB
            rows, name = f"{self.rows} rows of {self.longest} tokens", self.device.name
            what = f"{rows} need {peak:.1f} GB, {name} has {capacity:.1f}"
            raise self.recipe.error("training.per_device_train_batch_size", what, f"{self.advice()}; or ANYWAY=1")

    def planned_peak(self) -> int:
        """Return what `training.record.peak_memory` measures: on a GPU what is allocated, without the context."""
        return self.memory()["peak"] - (self.overhead if self.device.gpu else 0)

    def as_dict(self) -> dict[str, Any]:
        """Return all figures: bytes, tokens, hours."""
        quantiles = np.percentile(self.lengths, (5, 50, 95)).tolist()
        schedule = self.schedule
        return {
            "device": self.device.name,
            "capacity_bytes": int(self.device.capacity),
            "computes_in": str(self.device.compute).removeprefix("torch."),
            "strategy": self.layout.strategy,
            "processes": self.layout.processes,
            "micro_batch": self.rows,
            "activation_checkpointing": self.checkpointing,
            "activations_traced": self.traces[1].traced,
            "memory_bytes": self.memory(),
            "fits": self.fits(),
            "largest_micro_batch": self.most_rows(),
            "lengths": dict(zip(("p5", "median", "p95"), quantiles, strict=True)) | {"longest": self.longest},
            "rows": len(self.lengths),
            "steps": schedule.steps,
            "tokens": schedule.tokens,
            "flops": schedule.flops,
            "hours_estimated": schedule.hours,
            "utilization_assumed": UTILIZATION if schedule.hours else None,
            "disk_bytes": schedule.disk,
        }

    def __rich__(self) -> Group:
        """Return the verdict, memory by part, and the figures below it."""
        fit = "fits" if self.fits() else f"does NOT fit: {self.advice()}"
        peak, capacity = self.memory()["peak"] / GB, self.device.capacity / GB
        verdict = f"{self.recipe.name} {fit} ({peak:.1f} of {capacity:.1f} GB, {self.device.name})"
        title = f"GB on one device of {self.layout.processes}, {self.rows} rows of {self.longest} tokens"
        table = Table("", Column(self.layout.strategy, justify="right"), title=title, title_justify="left")
        other = f"peak with{'out' if self.checkpointing else ''} checkpointing"
        parts = self.memory() | {other: self.memory(checkpointing=not self.checkpointing)["peak"]}
        for part, size in parts.items():
            if size:
                table.add_row(part, f"{size / GB:.3f}")
        return Group(verdict, table, *(f"{name:14}{value}" for name, value in self.figures()))

    def figures(self) -> list[tuple[str, str]]:
        """Return name and value of each line below the table."""
        own, schedule, compute = self.parameters, self.schedule, str(self.device.compute).removeprefix("torch.")
        time = "not estimated: no data sheet is known for this device"
        if schedule.hours is not None:
            long = f"{schedule.hours:.1f} h" if schedule.hours >= 1 else f"{60 * schedule.hours:.0f} min"
            time = f"{long} (estimate: {UTILIZATION:.0%} of {self.device.tflops} data-sheet TFLOPs a device)"
        traced = "traced" if self.traces[1].traced else "a rule of thumb: this architecture cannot be traced"
        other = self.most_rows(checkpointing=not self.checkpointing)
        lengths = self.as_dict()["lengths"].items()
        return [
            ("computes in", compute),
            ("parameters", f"{own.trainable:,} of {own.total:,} trained"),
            ("activations", f"{traced}; checkpointing {'on' if self.checkpointing else 'off'}"),
            ("micro-batch", f"at most {self.most_rows()} rows; checkpointing the other way {other}"),
            ("row lengths", ", ".join(f"{name} {value:.0f}" for name, value in lengths) + " tokens"),
            ("steps", f"{schedule.steps:,}; {schedule.tokens:,} tokens, padding included"),
            ("compute", f"{schedule.flops:.2e} FLOPs"),
            ("time", time),
            ("disk", f"{schedule.disk / GB:.2f} GB for checkpoints and model"),
        ]


def make_plan(prepared: Prepared, device: Device, layout: Layout) -> Plan:
    """Return the plan of a training on `device`, with the weights and rows that each process would hold."""
    training = prepared.recipe.training | share_batch(prepared.recipe, layout.processes)
    recipe = dataclasses.replace(prepared.recipe, training=training)
    weights = weights_dtype(recipe, device.compute)
    rows: Any = prepared.load("train")
    lengths = np.array(rows["tokens"])
    answer = rows[int(lengths.argmax())]["completion"][0]["content"]
    share = min(1.0, len(prepared.tokenizer(answer, add_special_tokens=False)["input_ids"]) / int(lengths.max()))
    if setting(recipe, "packing"):
        whole = setting(recipe, "max_length")
        lengths = np.full(math.ceil(lengths.sum() / whole), whole)
    overhead = CONTEXT + NCCL * (layout.processes > 1) if device.gpu else psutil.Process().memory_info().rss + LATER
    config, parameters = load_config(recipe).get_text_config(), count_bytes(recipe, weights, device.compute)
    return Plan(recipe, weights, device, layout, config, parameters, lengths, share, overhead)


def plan_recipe(recipe: Recipe, gpu: str | None, hardware: Hardware, processes: int) -> Plan:
    """Return what the training needs on `gpu` (this machine if None), and write it to outputs/plans/ as JSON."""
    device = find_device(gpu, recipe.model.get("dtype")) if gpu else None
    prepared = prepare(recipe)
    plan = make_plan(prepared, device or detect_device(prepared.precision.dtype), hardware.layout(processes))
    file = outputs_folder() / "plans" / f"{recipe.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(plan.as_dict(), indent=1) + "\n", encoding="utf-8")
    return plan
