"""The op-level trace alone: views, in-place ops, masks, lists, memory; producers and carriers."""

import pytest
import torch
from torch import nn

from sdkit.diagnosis.cause import find_cause
from sdkit.diagnosis.trace import find_first_bad_op

NAN, INF = float("nan"), float("inf")


class Model(nn.Module):
    """One linear and a function."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.function = function

    def forward(self, values):
        return self.function(self.linear(values))


def trace(function, values=None, **options):
    model = Model(function)
    values = torch.ones(2, 4) if values is None else values
    with torch.no_grad():
        return find_first_bad_op(lambda: model(values), {"unet": model}, **options)


def test_finite_ops_are_not_accused():
    assert trace(lambda x: x.softmax(-1)) is None


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (lambda x: (x * 0) / (x * 0), "aten.div.Tensor"),
        (lambda x: (x * 0).log(), "aten.log.default"),
        (lambda x: x.mul_(0).div_(0).add_(1), "aten.div_.Scalar"),
        (lambda x: torch.cat([x, (x * 0).rsqrt()]), "aten.rsqrt.default"),
        (lambda x: {"sample": ((x.abs() + 100).exp(), 3)}, "aten.exp.default"),
        (lambda x: (x.abs() + 100).exp_().unsqueeze(0).chunk(2, -1)[1] * 0, "aten.exp_.default"),
    ],
)
def test_the_producer_is_named_not_the_carrier(function, op):
    found = trace(function)
    assert found.op == op or found.op.replace("Scalar", "Tensor") == op.replace("Scalar", "Tensor")
    assert found.module == "unet" and found.source.startswith("test_trace.py")


def test_an_inf_in_place_is_traced_to_its_origin():
    found = trace(lambda x: ((x.abs() + 100).exp().mul_(2).sub_(1)) * 0)
    assert found.op == "aten.exp.default"


def test_in_place_inputs_are_kept_from_before():
    found = trace(lambda x: (x * 0 + 2).div_(0))
    divided = next(summary for summary in found.inputs if summary.name == "self")
    assert (divided.minimum, divided.maximum, divided.inf_count) == (2, 2, 0)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.masked_fill(x < 10, -INF).index_fill(1, torch.tensor([0]), 1.0).softmax(-1),
        lambda x: (x + torch.full((2, 4), -INF).triu(1)).clamp(min=-5),
        lambda x: (x.abs() + 100).exp().sigmoid(),
        lambda x: torch.empty(2, 4).fill_(1) * x,
        lambda x: torch.empty_like(x).copy_(x),
    ],
)
def test_harmless_infinities_and_filled_memory_are_no_fault(function):
    assert trace(function, memory="nan") is None


def test_a_fully_masked_row_is_its_own_cause():
    found = trace(lambda x: torch.full_like(x, -INF).softmax(-1))
    assert (found.op, find_cause(found).name) == ("aten._softmax.default", "masked-softmax")


def test_memory_that_nobody_wrote_is_named():
    found = trace(lambda x: x + torch.empty(2, 4), memory="nan")
    assert find_cause(found).name == "uninitialised-memory"
    assert found.inputs[1].allocated_by == "aten.empty.memory_format"
    assert "uninitialised memory" in str(found.inputs[1])
    assert trace(lambda x: x + torch.empty(2, 4), memory="zeros") is None


def test_half_written_memory_is_named():
    def write_half(x):
        buffer = torch.empty(4, 4)
        buffer[:2] = x
        return buffer * 1

    assert find_cause(trace(write_half, memory="nan")).name == "uninitialised-memory"


def test_a_buffer_that_must_be_ignored_is_not_blamed_on_the_caller():
    def honest(x):
        return torch.baddbmm(torch.full((1, 2, 2), NAN), x[None], x.T[None], beta=0)

    assert trace(honest) is None


def test_what_was_swallowed_is_told_with_the_swallower():
    found = trace(lambda x: ((x * 0) / 0).nan_to_num(), look_for="swallowed")
    assert found.op == "aten.div.Tensor" and "nan_to_num" in found.swallowed_by
    assert trace(lambda x: x.nan_to_num(), look_for="swallowed") is None


def test_flushing_is_found_and_softmax_is_not_accused():
    assert trace(lambda x: (x.half() * 1e-2).square(), look_for="flushed") is None
    found = trace(lambda x: (x.half() * 1e-5).square(), look_for="flushed")
    assert found.op == "aten.pow.Tensor_Scalar" and found.outputs[0].largest == 0
    assert trace(lambda x: (x.half() * 1e4).softmax(-1), look_for="flushed") is None


def test_hooks_of_the_user_belong_to_their_module():
    model = Model(torch.tanh)
    model.linear.register_forward_hook(lambda module, args, output: output * NAN)
    found = find_first_bad_op(lambda: model(torch.ones(2, 4)), {"unet": model})
    assert found.module == "unet.linear"


def test_everything_is_undone_when_the_model_raises():
    def fail(x):
        raise RuntimeError("of its own")

    model = Model(fail)
    with pytest.raises(RuntimeError, match="of its own"):
        find_first_bad_op(lambda: model(torch.ones(2, 4)), {"unet": model})
    assert not model._forward_hooks and not model.linear._forward_hooks
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_memory_that_was_given_back_is_not_taken_for_another():
    def recycle(x):
        buffers = [torch.empty(4) for _ in range(50)]
        del buffers
        return x + torch.tensor([NAN] * 4)

    found = trace(recycle)
    assert not any(summary.allocated_by for summary in found.inputs)
    assert find_cause(found).name == "bad-input"


def test_a_float32_result_above_its_maximum_and_one_broken_on_the_way_are_told_apart():
    result = find_cause(trace(lambda x: (x.abs() + 1) * 1e38 * 1e3))
    assert result.name == "range-overflow" and "No wider dtype" in result.remedy
    assert "float32_on_the_cpu" not in result.evidence
    inner = find_cause(trace(lambda x: nn.functional.layer_norm(x * 1e30, (4,))))
    assert (
        inner.name == "range-overflow" and "within the op" in inner.evidence["float32_on_the_cpu"]
    )


def flatten(model, *, dtype=torch.float32):
    """Puts all parameters into one buffer, as FSDP does, and gives the buffer back."""
    parameters = list(model.parameters())
    flat = torch.cat([p.detach().flatten() for p in parameters]).to(dtype)
    for parameter, part in zip(
        parameters, flat.split([p.numel() for p in parameters]), strict=True
    ):
        parameter.data = part.view(parameter.shape)
    return flat


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.weight", "1.bias"])
def test_weights_of_one_flat_buffer_are_told_apart(name):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    flatten(model)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[1] = NAN
        found = find_first_bad_op(lambda: model(torch.ones(2, 4)), {"unet": model})
    assert found.bad_weights == (f"unet.{name}",)
    assert find_cause(found).module == f"unet.{name[0]}"


def test_of_a_flat_buffer_that_overflows_in_a_cast_the_parameter_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].bias[2] = 70000
        flat = flatten(model)
        found = find_first_bad_op(lambda: flat.half() * 0, {"unet": model})
    cause = find_cause(found)
    assert (cause.evidence["weights"], cause.module) == (["unet.0.bias"], "unet.0")
    assert cause.evidence["overflowed_in_the_cast"]


@pytest.mark.parametrize("make", [torch.zeros, torch.empty])
def test_an_inf_in_one_half_of_a_buffer_outlives_what_is_written_to_the_other(make):
    def fill(x):
        buffer = make(4, 4)
        buffer[:2] = (x.abs() + 100).exp()
        buffer[2:] = x
        return buffer * 0

    assert trace(fill).op == "aten.exp.default"


def write_past_torch(tensor):
    tensor.detach().numpy()[0, 0] = NAN


class Chain(nn.Module):
    """Two layers and what the caller wants between and after them."""

    def __init__(self, between=lambda x: None, after=lambda x: x):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.between, self.after = between, after

    def forward(self, values):
        values = self.first(values)
        self.between(values)
        return self.after(self.second(values))


@pytest.mark.parametrize(
    ("place", "module"),
    [
        ("hook of first", "unet.first"),
        ("hook before second", "unet.second"),
        ("between", "unet"),
        ("hook of second", "unet.second"),
        ("hook of the whole", "unet"),
    ],
)
def test_memory_that_changed_without_an_op_is_put_down_to_the_module_it_changed_in(place, module):
    model = Chain(write_past_torch if place == "between" else lambda x: None)

    def spoil(module, args, output):
        write_past_torch(output)

    {
        "hook of first": lambda: model.first.register_forward_hook(spoil),
        "hook before second": lambda: model.second.register_forward_pre_hook(
            lambda module, args: write_past_torch(args[0])
        ),
        "between": lambda: None,
        "hook of second": lambda: model.second.register_forward_hook(spoil),
        "hook of the whole": lambda: model.register_forward_hook(spoil),
    }[place]()
    with torch.no_grad():
        found = find_first_bad_op(lambda: model(torch.ones(2, 4)), {"unet": model})
    cause = find_cause(found)
    assert (found.op, found.module, cause.name) == (None, module, "bad-input")
    assert "without an op" in cause.evidence["changed"] and cause.evidence["nan_count"] == 1
    assert cause.evidence["finite_after"] in (
        "unet.first: aten.addmm.default", "unet.second: aten.addmm.default",
    )  # fmt: skip
    assert any("test_trace.py" in hook for hook in cause.evidence["hooks"]) == ("hook" in place)
    assert "changed after" in str(found)


def test_what_was_written_past_torch_and_swallowed_is_told():
    model = Chain(write_past_torch, lambda x: x)
    model.second = nn.Identity()
    model.after = lambda x: x.nan_to_num()
    with torch.no_grad():
        found = find_first_bad_op(
            lambda: model(torch.ones(2, 4)), {"unet": model}, look_for="swallowed"
        )
    assert found.op is None and "nan_to_num" in found.swallowed_by


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.t().contiguous().mul_(2).view(-1)[:3].add_(1),
        lambda x: torch.empty(2, 4).copy_(x).clone(),
        lambda x: torch._foreach_mul([x, x], 2.0)[0],
    ],
)
def test_memory_that_ops_alone_change_is_not_suspected(function):
    assert trace(function) is None


def test_an_op_that_writes_and_returns_nothing_is_the_one_to_blame():
    def write(x):
        torch._foreach_div_([x], 0.0)
        return x * 1

    found = trace(write)
    assert found.op == "aten._foreach_div_.Scalar" and found.changed_after is None
