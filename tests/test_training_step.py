"""The first bad op of a training step: forward or backward, with the module of its forward."""

import pytest
import torch
from torch import nn

from sdkit.diagnosis.training_step import diagnose_training_step
from sdkit.emulate import float16_arithmetic


class Block(nn.Module):
    """A norm between two linears, and a function in between."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.function = function

    def forward(self, values):
        return self.last(self.function(self.norm(self.first(values))))


def diagnose_block(block, *, scale=1.0, dtype=torch.float32):
    values = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    return diagnose_training_step(
        lambda: (block.to(dtype)(values).float() * scale).square().mean(), {"unet": block}
    )


def test_a_healthy_step_is_healthy():
    assert diagnose_block(Block(torch.tanh)).cause == "healthy"


def test_a_nan_of_the_backward_is_put_down_to_its_forward():
    block = Block(lambda x: (x * 0).square().sum(-1, keepdim=True).sqrt() + x)  # sqrt'(0) * 0
    diagnosis = diagnose_block(block)
    assert diagnosis.evidence["pass"] == "backward"
    assert (diagnosis.cause, diagnosis.module) == ("invalid-arithmetic", "unet")
    assert diagnosis.op.startswith("aten.div")


def test_a_nan_of_the_forward():
    diagnosis = diagnose_block(Block(lambda x: x.relu() / x.relu()))
    assert (diagnosis.evidence["pass"], diagnosis.cause) == ("forward", "invalid-arithmetic")


def test_an_inf_of_the_forward_is_not_put_down_to_the_backward():
    diagnosis = diagnose_block(Block(torch.tanh), scale=1e30)
    assert (diagnosis.evidence["pass"], diagnosis.cause) == ("forward", "range-overflow")
    assert diagnosis.op.startswith("aten.pow")


def test_float16_gradients_that_overflow():
    with float16_arithmetic():
        block = Block(torch.tanh)
        block.last.weight.data *= 1e4
        diagnosis = diagnose_block(block, scale=1e3, dtype=torch.float16)
    assert (diagnosis.evidence["pass"], diagnosis.cause) == ("backward", "range-overflow")


def test_an_inf_gradient_that_is_masked_away_is_harmless():
    block = Block(lambda x: x.relu().sqrt())  # inf at 0, and relu's backward drops it
    assert diagnose_block(block).cause == "healthy"


def test_a_bad_weight_is_named():
    block = Block(torch.tanh)
    block.last.bias.data[3] = float("nan")
    diagnosis = diagnose_block(block)
    assert (diagnosis.cause, diagnosis.module) == ("bad-weights", "unet.last")
    assert diagnosis.evidence["weights"] == ["unet.last.bias"]


@pytest.mark.parametrize("is_bad", [False, True])
def test_gradients_are_left_as_they_were(is_bad):
    block = Block((lambda x: x / 0 * 0) if is_bad else torch.tanh)
    block.first.weight.grad = torch.ones(8, 8)
    diagnose_block(block)
    assert torch.equal(block.first.weight.grad, torch.ones(8, 8))
    assert block.last.weight.grad is None
    assert not block.last._forward_hooks and not block.last._forward_pre_hooks
