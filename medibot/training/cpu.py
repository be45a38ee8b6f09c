"""Train fast on a CPU with the same numbers: oneDNN's float32 products, and a plain loss head.

TRL's own head scores every position and folds the vocabulary in tiles by a dozen passes over memory, made for Triton,
where those are one kernel. This one scores the labelled positions alone, by two products and three passes. The gradient
of the hidden states is ready when the forward is over: d log p(label) / d hidden = W[label] - p W, for each position by
itself. It keeps no logits: two float32 tiles of TILE positions by vocabulary (50 MB for SmolLM2). Full fine-tuning
multiplies them out again, for the gradient of the head's own weight.
"""

from collections.abc import Iterator
from typing import Any

import torch
import trl.trainer.utils as upstream
from trl.kernels import ChunkedLogProbFunction

from medibot.planning.memory import CPU_TILE as TILE


def optimize_for_cpu() -> None:
    """Set this process up to train on a CPU."""
    prefer_onednn()
    # TRL's patched forward looks both up on each call; the second: the head gets labelled positions alone, as on a GPU
    upstream._ChunkedLogProbFunction = PlainHead
    upstream._use_triton = lambda _: True


def prefer_onednn() -> None:
    """Multiply float32 matrices by oneDNN where that is float32 indeed, else by MKL, which is torch's default.

    MKL takes AVX2 on processors that Intel did not make, oneDNN AVX-512 wherever it is. torch hands it float32 products
    only when told that bfloat16 is precise enough, which oneDNN makes use of where the CPU has AMX: one product tells.
    """
    # Not torch's global generator: the draws of the training stay what they were
    matrix = torch.randn(128, 1024, generator=torch.Generator().manual_seed(0))
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    # Rounding to bfloat16 leaves errors of 5e-2 here, float32 some 3e-5
    if (matrix @ matrix.t() - matrix.double() @ matrix.double().t()).abs().max() > 1e-3:
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"


class PlainHead(torch.autograd.Function):
    """TRL's `ChunkedLogProbFunction` with the same arguments, for what a CPU trains; see the module."""

    @classmethod
    def apply(cls, hidden: Any, weight: Any, bias: Any, targets: Any, temperature: float, *rest: Any) -> Any:
        """(log p, entropy, None, None, whether the label is the first most likely token), each [positions].

        `hidden` [positions, hidden size], `weight` [vocabulary, hidden size], `targets` [positions]. Heads with a bias
        or capped logits are upstream's: no model that is small enough for a CPU has been seen with one.
        """
        _, softcap, scale, _ = rest
        if bias is not None or softcap is not None:
            return ChunkedLogProbFunction.apply(hidden, weight, bias, targets, temperature, *rest)
        log_probs, entropy, first = super().apply(hidden * (scale / temperature), weight, targets)
        return log_probs, entropy, None, None, first

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Any:
        log_probs, entropy = torch.empty(2, len(hidden)).unbind()
        first = torch.empty(len(hidden), dtype=torch.bool)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for at, logits, probs in tiles(hidden, weight):
            labels, top = targets[at, None], logits.argmax(1, keepdim=True)
            first[at] = (top == labels).squeeze(1)
            log_z = logits.gather(1, top) - probs.gather(1, top).log()
            log_probs[at] = (logits.gather(1, labels) - log_z).squeeze(1)
            entropy[at] = log_z.squeeze(1) - logits.mul_(probs).sum(1)
            if gradient is not None:
                gradient[at] = weight[targets[at]] - probs.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient, hidden, weight, targets)
        ctx.mark_non_differentiable(entropy, first)
        return log_probs, entropy, first

    @staticmethod
    def backward(ctx: Any, of_log_probs: torch.Tensor, *_: Any) -> Any:
        of_hidden, hidden, weight, targets = ctx.saved_tensors
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = torch.zeros_like(weight, dtype=torch.float32)
            for at, _, probs in tiles(hidden, weight):
                probs.scatter_add_(1, targets[at, None], torch.full_like(probs[:, :1], -1.0))
                of_weight.addmm_(probs.mul_(-of_log_probs[at, None]).t(), hidden[at].float())
            of_weight = of_weight.to(weight.dtype)
        return None if of_hidden is None else of_hidden * of_log_probs[:, None], of_weight, None


def tiles(hidden: torch.Tensor, weight: torch.Tensor) -> Iterator[tuple[slice, Any, Any]]:
    """(positions, logits, probabilities) of TILE positions at a time, in float32, in two buffers used again."""
    buffers = torch.empty(2, min(TILE, len(hidden)), len(weight))
    for start in range(0, len(hidden), TILE):
        at = slice(start, min(start + TILE, len(hidden)))
        logits, probs = buffers[:, : at.stop - start]
        if hidden.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
            torch.mm(hidden[at], weight.t(), out=logits)
        else:
            logits.copy_(hidden[at] @ weight.t())
        yield at, logits, torch.softmax(logits, 1, out=probs)
