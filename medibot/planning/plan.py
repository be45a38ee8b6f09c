"""Say whether a training fits before a weight is loaded: what one device holds, and the largest micro-batch."""

import dataclasses
import json
import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
from rich.console import Group
from rich.table import Column, Table
from transformers import PretrainedConfig

from medibot.data.prepared import Prepared, prepare
from medibot.model.loading import weights_dtype
from medibot.planning.conflicts import share_batch
from medibot.planning.hardware import CONTEXT, GB, NCCL, Device, Hardware, detect_device, find_device
from medibot.planning.memory import CPU_TILE, Kept, Parameters, count_bytes, load_config, trace
from medibot.planning.schedule import UTILIZATION, is_flat, make_schedule, setting
from medibot.recipe import Recipe
from medibot.run import outputs_folder

# Measured on CPUs, glibc 2.36 (benchmarks/plan.py): what a training's process grows by beside what is counted here
# HOLES: what the heap cannot use again, as a share of what layers keep. Measured as 0.22 of what a layer frees, which in
# SmolLM2 is 1.0 (full) and 2.35 times (adapters) what it keeps; not fitted again in this form
LATER, HOLES, HOLES_WITH_ADAPTERS = 25_000_000, 0.23, 0.52
# trl/kernels/chunked_logprob.py: a tile of logits is at most so many positions by so many tokens of the vocabulary
GPU_TILE = (4096, 32768)


@dataclass(frozen=True)
class Plan:
    """One training on one device.

    `traced` stands for two of the longest rows. `lengths` are the tokens of each row, `rows` a micro-batch, `longest` the
    tokens to which it is padded, `supervised_share` of them learned from, `overhead` what the process holds anyway,
    `validated` the tokens of the validation split.
    """

    recipe: Recipe
    device: Device
    hardware: Hardware
    config: PretrainedConfig
    parameters: Parameters
    traced: Kept
    lengths: np.ndarray
    rows: int
    longest: int
    checkpointing: bool
    supervised_share: float
    overhead: int
    validated: int

    def memory(self, rows: int | None = None) -> dict[str, int]:
        """Return bytes on one device, by what they are for; `peak` is what has to fit."""
        rows = rows or self.rows
        layers, layer = self.config.num_hidden_layers, self.traced.layer * rows // 2
        kept = self.traced.state if self.checkpointing else self.traced.layer
        stored = (layers * kept + self.traced.outside) * rows // 2
        if is_flat(self.recipe):
            # The rows of a flat batch are told apart by a mask over all its tokens
            stored += (rows * self.longest) ** 2 * self.device.compute.itemsize
        if not self.device.gpu:
            holes = HOLES if self.recipe.lora is None else HOLES_WITH_ADAPTERS
            stored += int(holes * layer * (1 if self.checkpointing else layers))
        # Head and loss need most on a GPU in TRL's fused head, one tile of logits at a time; on a CPU in that of
        # medibot/training/cpu.py, two tiles in float32. Both keep the supervised hidden states and their gradient
        supervised, size = math.ceil(rows * self.longest * self.supervised_share), self.device.compute.itemsize
        hidden, vocabulary = self.config.hidden_size, self.config.vocab_size
        positions, width = min(GPU_TILE[0], supervised), min(GPU_TILE[1], vocabulary)
        tile, copy = positions * width * size, width * hidden * size
        if not self.device.gpu:
            tile, copy = 2 * 4 * min(CPU_TILE, supervised) * vocabulary, 0
        # A head that is trained, too, has a gradient
        trained = 0 if self.recipe.lora is not None else 4 * vocabulary * hidden + copy
        head = tile + supervised * hidden * (4 + 2 * size) + trained
        # Or the gradients of one layer
        on_top = max(head, layer * (2 if self.checkpointing else 1))
        parts = self.fixed() | {"activations": stored, "logits": on_top}
        passing, gradients = stored + on_top, parts["gradients"]
        always = sum(parts.values()) - passing - gradients
        # Without accumulation the gradients grow while the activations go; DDP's buckets are always there
        together = setting(self.recipe, "gradient_accumulation_steps") > 1 or self.hardware.kind == "DDP"
        peak, loading = always + (passing + gradients if together else max(passing, gradients)), self.loading()
        return parts | {"whole, while loading": loading, "peak": max(peak, loading)}

    def loading(self) -> int:
        """Return the bytes of quantized weights that FSDP2 makes shards of only when each GPU has loaded them whole."""
        if self.hardware.kind != "FSDP2" or self.recipe.quantization is None:
            return 0
        return sum(self.parameters.base.values()) + self.parameters.adapters + self.overhead

    def fixed(self) -> dict[str, int]:
        """Return the bytes that do not depend on the batch; all but DDP share optimizer and gradients."""
        own, bits, compute = self.parameters, self.recipe.quantization, self.device.compute
        kind, processes = self.hardware.kind, self.hardware.processes
        shares = processes if self.hardware.sharded else 1
        weight_shares = processes if kind in {"FSDP2", "ZeRO-3"} else 1
        # 4-bit weights stored as bytes are not sharded (accelerate/utils/fsdp_utils.py), and ZeRO-3 loads them whole
        whole = bits is not None and not (kind == "FSDP2" and "bnb_4bit_quant_storage" in bits)
        base_shares = 1 if whole else weight_shares
        base, optimizer, gradients = own.base, own.optimizer, own.trained
        if kind in {"ZeRO-2", "ZeRO-3"} and own.casts and self.recipe.lora is None:
            # DeepSpeed computes with half-precision weights, and keeps the float32 ones with the optimizer's state
            base = {str(compute).removeprefix("torch."): compute.itemsize * own.total}
            optimizer, gradients = own.optimizer + own.trained, compute.itemsize * own.trainable
        layer = (own.total - self.config.vocab_size * self.config.hidden_size) // self.config.num_hidden_layers
        return {
            **{f"weights, {name}": math.ceil(size / base_shares) for name, size in base.items()},
            "adapters": math.ceil(own.adapters / weight_shares),
            "layers gathered": 2 * layer * compute.itemsize if base_shares > 1 else 0,
            "copies by autocast": 0 if self.hardware.sharded else own.casts,
            "optimizer": math.ceil(optimizer / shares),
            "gradients": 2 * gradients if kind == "DDP" else math.ceil(gradients / shares),
            "overhead": self.overhead,
        }

    def fits(self, rows: int | None = None) -> bool:
        """Tell whether a micro-batch of `rows` of the longest rows fits."""
        return self.memory(rows)["peak"] <= self.device.capacity

    def most_rows(self) -> int:
        """Return the largest micro-batch of the longest rows that fits; 0 if none does."""
        return bisect_left(range(1, 1 << 16), True, key=lambda rows: not self.fits(rows))

    def advice(self) -> str:
        """Return what to lower, in the plan's own figures."""
        most, remedies = min(self.most_rows(), self.rows - 1), []
        again = min(self.rows, dataclasses.replace(self, checkpointing=True).most_rows())
        if most:
            remedies.append(
                f"per_device_train_batch_size={most} would fit: raise gradient_accumulation_steps by as much"
            )
        if again > most and not self.checkpointing:
            remedies.append(f"with activation_checkpointing=true {again} rows would fit")
        least = f"{sum(self.fixed().values()) / GB:.1f} GB are needed before the first row"
        return ", or ".join(remedies) or f"{least}: shorten max_length, quantize, or take a smaller model"

    def __str__(self) -> str:
        needed, capacity = self.memory()["peak"] / GB, self.device.capacity / GB
        where = f"{needed:.1f} GB of {capacity:.1f} GB on {self.device.name}"
        return f"{self.rows} rows of {self.longest} tokens need {where}"

    def certain(self) -> int:
        """Return the bytes that no measurement is needed for: weights, adapters and the optimizer's state."""
        parts = self.fixed()
        counted = sum(size for part, size in parts.items() if part.startswith(("weights", "adapters", "optimizer")))
        return max(counted, self.loading() - self.overhead)

    def require_fit(self) -> str | None:
        """Raise RecipeError, before a weight is loaded, for what cannot fit; return a warning of what may not.

        Activations and the rest were measured on CPUs alone: on a GPU they are no reason to refuse.
        """
        if self.fits():
            return None
        if self.device.gpu and self.certain() <= self.device.capacity:
            return f"by the plan, {self}, which no measurement on a GPU backs yet; if it does not fit: {self.advice()}"
        remedy = f"{self.advice()}; or ANYWAY=1"
        raise self.recipe.error("training.per_device_train_batch_size", str(self), remedy)

    def as_dict(self) -> dict[str, Any]:
        """Return all figures: bytes, tokens, hours."""
        quantiles = np.percentile(self.lengths, (5, 50, 95)).tolist()
        return {
            "device": self.device.name,
            "capacity_bytes": int(self.device.capacity),
            "computes_in": str(self.device.compute).removeprefix("torch."),
            "strategy": self.hardware.kind,
            "processes": self.hardware.processes,
            "micro_batch": self.rows,
            "activation_checkpointing": self.checkpointing,
            "activations_traced": self.traced.traced,
            "memory_bytes": self.memory(),
            "fits": self.fits(),
            "largest_micro_batch": self.most_rows(),
            "lengths": dict(zip(("p5", "median", "p95"), quantiles, strict=True)) | {"longest": self.longest},
            "rows": len(self.lengths),
        } | make_schedule(self)

    def __rich__(self) -> Group:
        """Return the verdict, a table of memory by part, and the other figures."""
        found, other = self.as_dict(), dataclasses.replace(self, checkpointing=not self.checkpointing)
        title = f"GB on one device of {self.hardware.processes}, {self.rows} rows of {self.longest} tokens"
        table = Table("", Column(self.hardware.kind, justify="right"), title=title, title_justify="left")
        again = f"peak {'with' if other.checkpointing else 'without'} checkpointing"
        for part, size in (found["memory_bytes"] | {again: other.memory()["peak"]}).items():
            if size:
                table.add_row(part, f"{size / GB:.3f}")
        time = "no data sheet is known"
        if speed := self.device.tflops:
            known = f"{UTILIZATION:.0%} of {speed:.0f} data-sheet or measured TFLOPs a device"
            part = f"{found['hours_evaluating_and_answering']:.1f} h of it evaluating and answering the questions"
            time = f"{found['hours_estimated']:.1f} h, {part} (estimate: {known})"
        traced = "traced" if self.traced.traced else "a rule of thumb: this architecture cannot be traced"
        figures = {
            "computes in": found["computes_in"],
            "parameters": f"{self.parameters.trainable:,} of {self.parameters.total:,} trained",
            "activations": f"{traced}; checkpointing {'on' if self.checkpointing else 'off'}",
            "micro-batch": f"at most {found['largest_micro_batch']} rows; checkpointing the other way {other.most_rows()}",
            "row lengths": ", ".join(f"{name} {value:.0f}" for name, value in found["lengths"].items()) + " tokens",
            "steps": f"{found['steps']:,}; {found['tokens']:,} tokens, padding included",
            "time": time,
            "disk": f"{found['disk_bytes'] / GB:.2f} GB for checkpoints and model",
        }
        fit = "fits" if found["fits"] else f"does NOT fit ({self.advice()})"
        lines = [f"{name:14}{value}" for name, value in figures.items()]
        return Group(f"{self.recipe.name} {fit}: {self}", table, *lines)


def make_plan(prepared: Prepared, device: Device, hardware: Hardware) -> Plan:
    """Return the plan of a training on `device`, with the weights and rows that each process would hold."""
    training = prepared.recipe.training | share_batch(prepared.recipe, hardware.processes)
    recipe = dataclasses.replace(prepared.recipe, training=training)
    weights = weights_dtype(recipe, device.compute)
    rows: Any = prepared.load("train")
    lengths = np.array(rows["tokens"])
    answer = rows[int(lengths.argmax())]["completion"][0]["content"]
    share = min(1.0, len(prepared.tokenizer(answer, add_special_tokens=False)["input_ids"]) / int(lengths.max()))
    if setting(recipe, "packing"):
        whole = setting(recipe, "max_length")
        lengths = np.full(math.ceil(lengths.sum() / whole), whole)
    held: Any = prepared.load("validation")
    longest, several = int(lengths.max()), hardware.processes > 1
    # Before anything is traced
    overhead = CONTEXT + NCCL * several if device.gpu else psutil.Process().memory_info().rss + LATER
    own = hardware.settings.get("fsdp_activation_checkpointing")
    return Plan(
        recipe=recipe,
        device=device,
        hardware=hardware,
        config=load_config(recipe).get_text_config(),
        parameters=count_bytes(recipe, weights, device.compute),
        traced=trace(recipe, weights, device.compute, device.gpu, 2, longest),
        lengths=lengths,
        rows=min(setting(recipe, "per_device_train_batch_size"), len(lengths)),
        longest=longest,
        checkpointing=bool(own or training.get("activation_checkpointing", True)),
        supervised_share=share,
        overhead=overhead,
        validated=sum(held["tokens"]) if held else 0,
    )


def plan_recipe(recipe: Recipe, gpu: str | None, hardware: Hardware, processes: int) -> Plan:
    """Return what the training needs on `gpu` (this machine if None), and write it to outputs/plans/ as JSON."""
    if not hardware.sharded:
        hardware = dataclasses.replace(hardware, kind="DDP" if processes > 1 else "one process")
    device = find_device(gpu, recipe.model.get("dtype")) if gpu else None
    prepared = prepare(recipe)
    device = device or detect_device(prepared.precision.dtype)
    plan = make_plan(prepared, device, dataclasses.replace(hardware, processes=processes))
    file = outputs_folder() / "plans" / f"{recipe.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(plan.as_dict(), indent=1) + "\n", encoding="utf-8")
    return plan
