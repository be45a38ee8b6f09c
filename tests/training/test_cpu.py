"""What is made faster on a CPU gives the numbers that upstream gives."""

import pytest
import torch
import trl.trainer.utils as upstream
from safetensors.torch import load_file
from trl.kernels import ChunkedLogProbFunction

from medibot.run import open_run, read_lines
from medibot.training import cpu, trainer
from medibot.training.cpu import prefer_onednn, score_labels
from medibot.training.session import train

pytestmark = pytest.mark.slow

FIELDS = ("log_probs", "entropy", "is_top1")


@pytest.fixture
def head(monkeypatch):
    """Positions in more than one tile, labels of which some are the likeliest, and one tie with a token before it."""
    monkeypatch.setattr(cpu, "TILE", 16)
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 24, generator=draw), torch.randn(300, 24, generator=draw)
    weight[200] = weight[100]
    hidden[3] = 5 * weight[100]
    labels = torch.randint(0, 300, (40,), generator=draw)
    labels[::3] = (hidden @ weight.t()).argmax(1)[::3]
    labels[3] = 200
    return hidden, weight, labels


def scored(function, head, trains_weight: bool, scale: float = 1.0, softcap: float | None = None, bias=None):
    """(log p, entropy, whether first, gradients of hidden states and weight) under a different weight for each label."""
    hidden, weight, labels = head
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trains_weight)
    found = function(hidden, weight, bias, labels, 1.0, 32768, softcap, scale, FIELDS)
    (found[0] * torch.linspace(0.1, 1, len(labels))).sum().backward()
    return found[0], found[1], found[4], hidden.grad, weight.grad


@pytest.mark.parametrize(
    "case",
    [(False,), (False, 0.25), (True,), (False, 1.0, 5.0), (False, 1.0, None, torch.arange(300) % 2.0)],
    ids=["frozen head", "scaled logits", "trained head", "capped logits", "bias"],
)
def test_the_head_gives_upstreams_numbers_and_gradients(case, head):
    ours, theirs = scored(score_labels, head, *case), scored(ChunkedLogProbFunction.apply, head, *case)
    assert torch.equal(ours[2], theirs[2]) and 0 < ours[2].sum() < 40 and not ours[2][3]
    for one, other in zip(ours, theirs, strict=True):
        if one is not None:
            assert torch.allclose(one.float(), other.float(), rtol=1e-5, atol=1e-5)
    assert (ours[4] is None) == (theirs[4] is None) == (not case[0])


def test_the_head_gives_upstreams_numbers_in_bfloat16(head):
    hidden, weight, labels = head
    halved = hidden.bfloat16(), weight.bfloat16(), labels
    ours, theirs = scored(score_labels, halved, False), scored(ChunkedLogProbFunction.apply, halved, False)
    for one, other in zip(ours[:4], theirs[:4], strict=True):
        assert one.dtype == other.dtype
        assert torch.allclose(one.float(), other.float(), rtol=0.02, atol=0.02)


def test_the_head_without_a_label_is_a_zero_that_can_be_trained_through(head):
    hidden, weight, labels = head
    hidden = hidden[:0].requires_grad_()
    found = score_labels(hidden, weight, None, labels[:0], 1.0, 32768, None, 1.0, FIELDS)
    found[0].sum().backward()
    assert found[0].shape == (0,) and hidden.grad.shape == (0, 24)


@pytest.mark.parametrize(
    "method",
    [
        ["training.activation_checkpointing=true", "quantization=null"],
        ["training.gradient_accumulation_steps=2"],
        ["lora=null", "quantization=null"],
    ],
    ids=["lora", "nf4-lora", "full"],
)
def test_a_training_logs_what_it_logs_under_upstreams_head(method, miniature, monkeypatch):
    recipe = miniature("quickstart", "evaluation.questions=[]", "tracking=null", *method)
    with monkeypatch.context() as patch:
        patch.setattr(upstream, "_ChunkedLogProbFunction", ChunkedLogProbFunction)
        patch.setattr(upstream, "_use_triton", lambda _: False)
        patch.setattr(trainer, "optimize_for_cpu", lambda: None)
        train(recipe, "upstream")
    train(recipe, "ours")
    assert upstream._ChunkedLogProbFunction.apply is score_labels
    theirs, ours = (read_lines(open_run(name).metrics) for name in ("upstream", "ours"))
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for key in ("loss", "eval_loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm", "eval_entropy"):
        values = [[line[key] for line in lines if key in line] for lines in (ours, theirs)]
        assert values[0] and values[0] == pytest.approx(values[1], rel=1e-5, abs=1e-5), key
    weights = [next(open_run(name).weights.glob("*.safetensors")) for name in ("upstream", "ours")]
    theirs, ours = map(load_file, weights)
    for key in theirs:
        # Adam makes a step of full size of any gradient, however small, and rounding decides the sign of the smallest
        assert (ours[key] - theirs[key]).abs().mean() < 1e-5, key


def test_products_stay_float32():
    prefer_onednn()
    draw = torch.Generator().manual_seed(1)
    for m, k, n in ((1024, 576, 1536), (7, 576, 16), (300, 1536, 64), (1, 64, 4096)):
        a, b = torch.randn(m, k, generator=draw), torch.randn(n, k, generator=draw)
        error = (a @ b.t() - a.double() @ b.double().t()).abs().max()
        assert error < 1e-5 * k**0.5, (m, k, n)
