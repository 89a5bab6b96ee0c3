"""The finite gates on a small model: which sample is bad and why, and that nothing bad is kept."""

import pytest
import torch
from torch import nn

from sdkit.finetuning.batches import Batch
from sdkit.finetuning.gates import (
    DroppedStep,
    check_state,
    explain,
    find_bad_samples,
    find_guilty,
    measure_norm,
    name_images,
)
from sdkit.validation import ValidationError

NAN, INF = float("nan"), float("inf")


def make_batch(*rows, names="abcdefgh"):
    """One sample for each row of numbers; the positions begin at 4, as on a second process."""
    latents, count = torch.tensor(rows), len(rows)
    return Batch(
        names=tuple(f"{name}.png" for name in names[:count]),
        positions=tuple(range(4, 4 + count)),
        latents=latents,
        noise=torch.zeros_like(latents),
        timesteps=torch.zeros(count, dtype=torch.long),
        prompt_embeds=torch.zeros(count, 2, 2),
        input_ids=torch.zeros(count, 2, dtype=torch.long),
    )


class Model(nn.Module):
    """The root of a sum: where that is 0 the loss is finite, and its gradient is 0 * Inf."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, values):
        return (values * self.weight).square().sum(-1).sqrt()


@pytest.fixture
def model():
    return Model()


def measure_with(model):
    return lambda batch: model(batch.latents).mean()


def test_bad_numbers_are_counted_by_sample_and_tensor():
    batch = make_batch([1.0, 2.0], [NAN, INF], [3.0, NAN], [4.0, 5.0])
    batch.prompt_embeds[3, 1, 0] = -INF
    assert find_bad_samples(batch) == {
        5: "1 NaN and 1 Inf of 2 values in its latents",
        6: "1 NaN and 0 Inf of 2 values in its latents",
        7: "0 NaN and 1 Inf of 4 values in its prompt_embeds",
    }
    assert find_bad_samples(make_batch([1.0, 2.0])) == {}


def test_the_norm_is_that_of_all_gradients_and_shows_a_bad_one():
    assert measure_norm([torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]) == 5
    for bad in (NAN, INF):
        assert not measure_norm([torch.ones(2), torch.tensor([1.0, bad])]) < INF


def test_who_is_bad_alone_is_guilty_by_loss_or_by_gradient(model):
    batch = make_batch([1.0, 2.0], [1e30, 1.0], [3.0, 4.0], [0.0, 0.0])
    model.weight.grad = torch.full((2,), 7.0)
    measure = measure_with(model)
    assert find_guilty(batch, measure, list(model.parameters())) == (5, 7)
    assert torch.isfinite(measure(batch.split(1)[3]))
    assert model.weight.grad.tolist() == [7, 7] and model.unused.grad is None
    assert find_guilty(make_batch([1.0, 2.0]), measure, list(model.parameters())) == ()


def test_the_cause_is_traced_in_the_guilty_sample(model):
    batch = make_batch([1.0, 2.0], [1e30, 1.0], [0.0, 0.0], [1e30, 1.0])
    measure = measure_with(model)
    assert explain(batch, (5, 7), measure, {"unet": model}) == (
        "range-overflow",
        "b.png, d.png; first bad op aten.pow.Tensor_Scalar in unet, forward pass (range-overflow)",
    )
    assert explain(batch, (5, 6), measure, {"unet": model})[0] == "range-overflow"
    cause, message = explain(batch, (6, 7), measure, {"unet": model})
    assert cause == "invalid-arithmetic"
    assert message.startswith("c.png, d.png; first bad op aten.div") and "backward pass" in message


def test_what_spoils_every_sample_is_put_down_to_the_model_unless_it_is_the_only_one(model):
    model.weight.data[0] = NAN
    measure = measure_with(model)
    cause, message = explain(make_batch([1.0, 2.0], [3.0, 4.0]), (4, 5), measure, {"unet": model})
    assert cause == "bad-weights"
    assert message.startswith("each of 2 images alone is bad, so the fault is the model's; first")
    _, message = explain(make_batch([1.0, 2.0]), (4,), measure, {"unet": model})
    assert message.startswith("a.png; first bad op")


def test_a_fault_that_does_not_come_back_is_said_to_be_none_of_the_images(model):
    batch, measure = make_batch([1.0, 2.0], [3.0, 4.0]), measure_with(model)
    cause, message = explain(batch, (), measure, {"unet": model})
    assert cause == "not-repeatable" and "a.png, b.png were run one by one" in message
    cause, message = explain(batch, (5,), measure, {"unet": model})
    assert (cause, message) == ("not-repeatable", "b.png was bad alone, but not under the trace")


def test_an_image_that_is_in_a_batch_twice_is_named_once():
    batch = make_batch([1.0], [2.0], [3.0], names="xyx")
    assert name_images(batch, (6, 5, 4)) == ("x.png", "y.png")


def test_a_state_that_is_finite_is_returned_and_a_bad_tensor_is_named():
    state = {"step": 3, "layers": {"0": {"exp_avg": torch.ones(2), "lr": NAN}}}
    assert check_state(state, "optimiser") is state
    state["layers"]["0"]["exp_avg"][:] = torch.tensor([NAN, -INF])
    with pytest.raises(ValidationError) as caught:
        check_state(state, "optimiser")
    assert str(caught.value).startswith(
        "optimiser: layers: 0: exp_avg holds 1 NaN and 1 Inf. Expected finite"
    )


def test_a_dropped_step_is_counted_from_one_for_people():
    assert (
        str(DroppedStep(0, "loss", (), "diverged", "why")) == "step 1 dropped at the loss gate: why"
    )
