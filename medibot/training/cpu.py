"""Train fast on a CPU with the same numbers: oneDNN's float32 products, and a plain loss head.

TRL's own head scores every position and folds the vocabulary in tiles by a dozen passes over memory, made for Triton,
where those are one kernel. This one scores the labelled positions alone, by two products and three passes, and keeps no
logits: two float32 tiles of TILE positions by vocabulary (50 MB for SmolLM2).
"""

from types import SimpleNamespace
from typing import Any

import torch
import trl.trainer.utils as upstream
from trl.kernels import ChunkedLogProbFunction

from medibot.planning.memory import CPU_TILE as TILE


def optimize_for_cpu() -> None:
    """Set this process up to train on a CPU."""
    prefer_onednn()
    # TRL's patched forward looks both up on each call; the second: the head gets labelled positions alone, as on a GPU
    upstream._ChunkedLogProbFunction = SimpleNamespace(apply=score_labels)
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


def score_labels(hidden: Any, weight: Any, bias: Any, targets: Any, temperature: float, *rest: Any) -> Any:
    """Return (log p, entropy, None, None, whether the label is the first most likely token), each [positions].

    `hidden` [positions, hidden size], `weight` [vocabulary, hidden size], `targets` [positions]: as TRL calls its
    `ChunkedLogProbFunction`, which still scores trained heads, and heads with a bias or capped logits.
    """
    _, softcap, scale, _ = rest
    if weight.requires_grad or bias is not None or softcap is not None:
        return ChunkedLogProbFunction.apply(hidden, weight, bias, targets, temperature, *rest)
    hidden = hidden * (scale / temperature)
    log_probs, entropy = torch.empty(2, len(hidden)).unbind()
    first, gradient = torch.empty(len(hidden), dtype=torch.bool), torch.zeros_like(hidden)
    buffers = torch.empty(2, min(TILE, len(hidden)), len(weight))
    with torch.no_grad():
        for start in range(0, len(hidden), TILE):
            at = slice(start, min(start + TILE, len(hidden)))
            labels, (logits, probs) = targets[at, None], buffers[:, : at.stop - start]
            torch.softmax(logits.copy_(hidden[at] @ weight.t()), 1, out=probs)
            top = logits.argmax(1, keepdim=True)
            first[at] = (top == labels).squeeze(1)
            log_z = logits.gather(1, top) - probs.gather(1, top).log()
            log_probs[at] = (logits.gather(1, labels) - log_z).squeeze(1)
            entropy[at] = log_z.squeeze(1) - logits.mul_(probs).sum(1)
            if hidden.requires_grad:
                # d log p(label) / d hidden, for each position by itself
                gradient[at] = weight[targets[at]] - probs.to(weight.dtype) @ weight
    # Adds nothing to the value, and `gradient` to its derivative
    return log_probs + ((hidden - hidden.detach()) * gradient).sum(1), entropy, None, None, first
