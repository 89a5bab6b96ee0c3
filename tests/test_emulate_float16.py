"""float16 arithmetic: correct rounding, torch's own meaning of every kind of op, stated bounds."""

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sdkit.emulate import active, float16_arithmetic

UNIT = 2.0**-11
UNIT_FLOAT32 = 2.0**-24
HALF_SUBNORMAL = 2.0**-25  # half the spacing of the smallest float16 numbers
SPECIAL = [0.0, -0.0, 65504.0, -65504.0, 2**-24, -(2**-24), 2**-14, 1.0, float("inf"), float("nan")]

bits = st.integers(0, 2**16 - 1).map(lambda n: float(np.uint16(n).view(np.float16)))
numbers = st.lists(bits | st.sampled_from(SPECIAL), min_size=1, max_size=24)


def make_all_values():
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)


def round_exactly(wide):
    """One rounding by NumPy, which casts float64 to float16 directly; torch rounds twice."""
    with np.errstate(over="ignore"):
        return torch.from_numpy(wide.numpy().astype(np.float16))


def assert_same(result, expected):
    assert result.dtype is torch.float16
    differs = (result != expected) & ~(result.isnan() & expected.isnan())
    signs = (result == 0) & (result.signbit() != expected.signbit())
    assert not differs.any(), f"{int(differs.sum())} of {differs.numel()} differ"
    assert not signs.any()


def make_normal(*shape, seed=0, scale=1.0, dtype=torch.float16):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


UNARY = [
    torch.abs, torch.neg, torch.sqrt, torch.rsqrt, torch.reciprocal, torch.exp, torch.exp2,
    torch.expm1, torch.log, torch.log2, torch.log1p, torch.sin, torch.cos, torch.tanh, torch.asinh,
    torch.sigmoid, torch.erf, torch.floor, torch.round, torch.trunc, torch.square, torch.relu,
    F.silu, F.gelu, F.mish, F.softplus, F.leaky_relu,
    lambda x: F.gelu(x, approximate="tanh"), lambda x: x * 1e6, lambda x: x + 0.1,
    lambda x: x / 0.3, lambda x: x**3, lambda x: x**-0.5, lambda x: 1 - x,
    lambda x: x.clamp(0.1, 0.3), lambda x: torch.lerp(x, x.flip(0), 0.3),
    lambda x: x * torch.tensor(0.1), lambda x: torch.addcmul(x, x, x.flip(0), value=0.5),
]  # fmt: skip
BINARY = [torch.add, torch.sub, torch.mul, torch.div, torch.maximum, torch.minimum, torch.atan2,
          torch.hypot, torch.fmod]  # fmt: skip


@pytest.mark.parametrize("function", UNARY)
def test_elementwise_is_correctly_rounded_for_every_float16_value(function):
    values = make_all_values()
    with float16_arithmetic():
        result = function(values)
    assert_same(result, round_exactly(function(values.double())))


def test_in_place_and_out_forms_are_correctly_rounded_too():
    values = make_all_values()
    expected = round_exactly(values.double().exp())
    with float16_arithmetic():
        assert_same(values.clone().exp_(), expected)
        assert_same(torch.exp(values, out=torch.empty_like(values)), expected)


@pytest.mark.parametrize("function", BINARY)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(first=numbers, second=numbers)
def test_binary_ops_are_correctly_rounded(function, first, second):
    a = torch.tensor(first, dtype=torch.float16)[:, None]
    b = torch.tensor(second, dtype=torch.float16)
    with float16_arithmetic():
        result = function(a, b)
    assert_same(result, round_exactly(function(a.double(), b.double())))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(first=numbers, second=bits)
def test_in_place_out_and_functional_forms_agree(first, second):
    a = torch.tensor(first, dtype=torch.float16)
    b = torch.tensor(second, dtype=torch.float16)
    with float16_arithmetic():
        expected = torch.addcmul(a, a, b, value=0.1)
        in_place = a.clone()
        assert in_place.addcmul_(a, b, value=0.1) is in_place
        out = torch.zeros_like(a)
        assert torch.addcmul(a, a, b, value=0.1, out=out) is out
    assert_same(in_place, expected)
    assert_same(out, expected)


def test_the_edge_of_the_range_rounds_as_ieee_says():
    largest = torch.tensor([65504.0], dtype=torch.float16)
    with float16_arithmetic():
        below = largest + 15.99
        tie = largest + 16
        added = largest + torch.tensor([16.0], dtype=torch.float16)
        tiny = torch.tensor([2**-24], dtype=torch.float16) * 0.5
        twice_rounded = torch.ones(1, dtype=torch.float16) + (2**-11 + 2**-40)
    assert below.item() == 65504.0
    assert tie.item() == added.item() == float("inf")
    assert tiny.item() == 0.0
    assert twice_rounded.item() == 1 + 2**-10


@pytest.mark.parametrize("function", [torch.add, torch.sub, torch.mul, torch.div])
def test_native_float16_agrees_bit_for_bit_where_it_is_correct(function):
    a, b = make_normal(5000, scale=30), make_normal(5000, seed=1)
    with float16_arithmetic():
        result = function(a, b)
    assert_same(result, function(a, b))


@pytest.mark.parametrize("function", [torch.add, torch.sub, torch.mul, torch.div])
def test_every_value_with_many_others_is_rounded_once(function):
    values = make_all_values()
    generator = torch.Generator().manual_seed(2)
    others = values[torch.randint(len(values), (8,), generator=generator)]
    for other in [*others, *torch.tensor(SPECIAL, dtype=torch.float16)]:
        other = other.reshape(1)
        with float16_arithmetic():
            result = function(values, other)
            number = function(values, other.item())
            written = values.clone()
            getattr(written, f"{function.__name__}_")(other)
        expected = round_exactly(function(values.double(), other.double()))
        for seen in (result, number, written):
            assert_same(seen, expected)


@pytest.mark.parametrize("function", [torch.add, torch.sub])
def test_a_factor_within_a_sum_is_not_rounded_on_its_own(function):
    values = make_all_values()
    with float16_arithmetic():
        result = function(values, values.flip(0), alpha=0.1)
        doubled = function(values, values.flip(0), alpha=3)
    for seen, alpha in ((result, 0.1), (doubled, 3)):
        wide = function(values.double(), values.flip(0).double(), alpha=alpha)
        assert_same(seen, round_exactly(wide))


def test_numbers_are_compared_in_float16_as_natively():
    x = torch.tensor([0.1, 65504.0, float("nan")], dtype=torch.float16)
    with float16_arithmetic():
        results = [x == 0.1, x < 65519.9, x >= x, x.isnan(), x.isfinite(), x.argmax()]
    natives = [x == 0.1, x < 65519.9, x >= x, x.isnan(), x.isfinite(), x.argmax()]
    assert all(torch.equal(a, b) for a, b in zip(results, natives, strict=True))
    assert results[0][0]


def test_a_value_float16_cannot_hold_is_refused_as_natively():
    x, mask = torch.zeros(2, dtype=torch.float16), torch.tensor([True, False])
    with float16_arithmetic(), pytest.raises(RuntimeError, match="without overflow"):
        x.masked_fill(mask, 1e6)


def test_views_share_storage_and_writes_reach_the_base():
    base = torch.zeros(4, 6, dtype=torch.float16)
    with float16_arithmetic():
        views = [base.view(6, 4), base.t(), base[1:, ::2], base.expand(2, 4, 6), base.detach(),
                 *base.split(2), *base.unbind(1), base.as_strided((3,), (2,)),
                 *base.tensor_split(2), *base.unsafe_split(2), base.reshape(24)]  # fmt: skip
        assert {v.untyped_storage().data_ptr() for v in views} == {base.data_ptr()}
        base.t()[2:4].add_(0.1)
        base[0, :2].copy_(torch.tensor([1.0, 1 + 2**-11]))
        base.unsqueeze_(0).squeeze_(0).t_()
    assert base.shape == (6, 4)
    assert base.stride() == (1, 6)
    assert base[2:4].eq(0.1).all()
    assert base[:2, 0].tolist() == [1.0, 1.0]


def test_out_resizes_and_keeps_its_strides():
    a = make_normal(3, 4)
    with float16_arithmetic():
        grown = torch.empty(0, dtype=torch.float16)
        assert torch.mm(a, a.t(), out=grown) is grown
        column_major = torch.empty(3, 3, dtype=torch.float16).t()
        torch.mm(a, a.t(), out=column_major)
        values, indices = torch.empty(0, dtype=torch.float16), torch.empty(0, dtype=torch.int64)
        torch.max(a, 1, out=(values, indices))
        expected = a @ a.t()
    assert torch.equal(grown, expected)
    assert torch.equal(column_major, expected)
    assert column_major.stride() == (1, 3)
    assert torch.equal(a.gather(1, indices[:, None])[:, 0], values)


def test_factories_and_dtype_arguments_keep_their_meaning():
    x = make_normal(3, 5)
    integers = torch.arange(6)
    half, single = torch.float16, torch.float32
    with float16_arithmetic():
        halves = [torch.zeros(2, dtype=half), torch.linspace(0, 1, 3, dtype=half), x.new_ones(2),
                  torch.empty_like(x), torch.randn(4, dtype=half), integers.to(half),
                  integers.sum(dtype=half), torch.arange(3, dtype=half), x.softmax(-1)]  # fmt: skip
        singles = [x.softmax(-1, dtype=single), x.sum(dtype=single), x.float(), x + x.float(),
                   torch.zeros_like(x, dtype=single), x.type(torch.FloatTensor)]  # fmt: skip
        doubles = [x.double(), x * torch.ones(5, dtype=torch.float64)]
        others = [x.bool(), x.long(), x > 0, x.to(torch.bfloat16)]
        float32_softmax = x.softmax(-1, dtype=single)
    assert {t.dtype for t in halves} == {half}
    assert {t.dtype for t in singles} == {single}
    assert {t.dtype for t in doubles} == {torch.float64}
    assert [t.dtype for t in others] == [torch.bool, torch.int64, torch.bool, torch.bfloat16]
    assert torch.equal(float32_softmax, x.float().softmax(-1))
    with float16_arithmetic():  # dtype= casts before the sum: inf - inf
        assert torch.tensor([65520.0, -65520.0]).sum(dtype=half).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_product_of_halves_is_computed_in_float32(dtype):
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((func, args[0].dtype))
            return func(*args, **(kwargs or {}))

    x, seen = make_normal(4, 4, dtype=dtype), []
    with Watch(), float16_arithmetic():
        assert (x @ x).dtype is dtype
    assert (torch.ops.aten.mm.default, torch.float32) in seen
    assert (torch.ops.aten.mm.default, dtype) not in seen


def test_promotion_is_native():
    x, y = make_normal(3), torch.ones(3)
    number, half_number = torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float16)
    pairs = [(x, y), (x, number), (half_number, y), (half_number, number), (x, torch.arange(3)),
             (half_number, torch.arange(3)), (x, y.bfloat16()), (x, number.double())]  # fmt: skip
    assert pairs
    for a, b in pairs:
        with float16_arithmetic():
            assert (a * b).dtype is (torch.result_type(a, b)), (a.dtype, b.dtype)
            assert (b - a).dtype is (torch.result_type(a, b)), (a.dtype, b.dtype)


@pytest.mark.parametrize("function", [
    lambda x, y: x @ y, lambda x, y: F.conv2d(x[None, None], y[None, None]),
    lambda x, y: F.linear(x, y), lambda x, y: torch.add(x, x, out=y.int()),
    lambda x, y: F.scaled_dot_product_attention(x[None, None], y[None, None], y[None, None]),
    lambda x, y: torch.mm(x, x, out=y),
])  # fmt: skip
def test_mixed_dtypes_are_refused_as_natively(function):
    x, y = make_normal(4, 4), torch.ones(4, 4)
    with pytest.raises(RuntimeError) as native:
        function(x, y)
    with float16_arithmetic(), pytest.raises(RuntimeError) as emulated:
        function(x, y)
    assert str(emulated.value) == str(native.value)


def assert_within_sum_bound(result, exact, magnitudes, terms):
    """The bound in the docstring of `float16_arithmetic`, for sums of products."""
    unit = torch.finfo(result.dtype).eps / 2
    bound = unit * exact.abs() + HALF_SUBNORMAL + (terms + 2) * UNIT_FLOAT32 * magnitudes
    error = (result.double() - exact).abs()
    assert (error <= bound).all(), f"worst {float((error / bound).max()):.2f} of the bound"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 40.0])
def test_sums_of_products_stay_within_the_stated_bound(scale, dtype):
    a, b, c = (
        make_normal(*shape, seed=seed, scale=(scale, 1.0, 1.0)[seed], dtype=dtype)
        for seed, shape in enumerate([(6, 96), (96, 5), (6, 5)])
    )
    image = make_normal(2, 8, 7, 7, scale=scale, dtype=dtype)
    kernel = make_normal(4, 8, 3, 3, seed=3, dtype=dtype)
    with float16_arithmetic():
        products = [a @ b, torch.addmm(c, a, b), torch.bmm(a[None], b[None])[0]]
        convolved = F.conv2d(image, kernel, padding=1)
        summed = a.sum(1)
    assert {t.dtype for t in (*products, convolved, summed)} == {dtype}
    exact = a.double() @ b.double()
    magnitudes = a.double().abs() @ b.double().abs()
    assert_within_sum_bound(products[0], exact, magnitudes, 96)
    assert_within_sum_bound(products[1], exact + c, magnitudes + c.abs(), 97)
    assert_within_sum_bound(products[2], exact, magnitudes, 96)
    exact_image = F.conv2d(image.double(), kernel.double(), padding=1)
    image_magnitudes = F.conv2d(image.double().abs(), kernel.double().abs(), padding=1)
    assert_within_sum_bound(convolved, exact_image, image_magnitudes, 72)
    assert_within_sum_bound(summed, a.double().sum(1), a.double().abs().sum(1), 96)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([2.0**-20, 2.0**-8, 1.0, 90.0]))
def test_matmul_stays_within_the_bound_for_subnormals_and_overflow(seed, scale):
    a, b = make_normal(3, 33, seed=seed, scale=scale), make_normal(33, 4, seed=seed + 1, scale=90)
    with float16_arithmetic():
        result = a @ b
    assert result.dtype is torch.float16
    exact = a.double() @ b.double()
    fits = exact.abs() < 65000
    magnitudes = a.double().abs() @ b.double().abs()
    assert_within_sum_bound(result[fits], exact[fits], magnitudes[fits], 33)
    assert result[exact.abs() > 66000].isinf().all()


def test_matmul_and_convolution_agree_with_native_float16_within_twice_the_bound():
    a, b = make_normal(4, 16), make_normal(16, 4, seed=1)
    image, kernel = make_normal(1, 4, 6, 6), make_normal(4, 4, 3, 3, seed=1)
    with float16_arithmetic():
        results = [a @ b, F.conv2d(image, kernel)]
    for result, native in zip(results, [a @ b, F.conv2d(image, kernel)], strict=True):
        exponents = torch.frexp(native.float().abs())[1]
        ulp = torch.ldexp(torch.ones(exponents.shape), exponents - 11).clamp(min=2.0**-24)
        slack = 2 * 40 * UNIT_FLOAT32 * 36  # c * sum|a||b| for at most 36 terms of magnitude one
        assert ((result.float() - native.float()).abs() <= ulp + slack).all()


def test_accumulation_is_float32():
    """4096 in steps of one: a float16 accumulator would stop at 2048, bfloat16's at 256."""
    with float16_arithmetic():
        for dtype in (torch.float16, torch.bfloat16):
            ones = torch.ones(1, 4096, dtype=dtype)
            assert ones.sum().item() == 4096
            assert (ones @ ones.t()).item() == 4096
        assert (torch.full((3,), 60000.0).half().mean() == 60000).all()


def test_softmax_and_attention_round_once():
    scores, value = make_normal(2, 2, 9, 64, scale=4), make_normal(2, 2, 64, 8, seed=1)
    query, key = make_normal(2, 2, 9, 8, seed=2), make_normal(2, 2, 64, 8, seed=3)
    masks = [None, make_normal(9, 64, seed=4)]
    with float16_arithmetic():
        softmax = scores.softmax(-1)
        attended = [F.scaled_dot_product_attention(query, key, value, attn_mask=m) for m in masks]
        causal = F.scaled_dot_product_attention(key, key, value, is_causal=True)
    exact = scores.double().softmax(-1)
    error = (softmax.double() - exact).abs()
    assert (error <= UNIT * exact + HALF_SUBNORMAL + 64 * UNIT_FLOAT32 * exact).all()
    wide = [t.double() for t in (query, key, value)]
    for result, mask in zip(attended, masks, strict=True):
        wide_mask = None if mask is None else mask.double()
        exact = F.scaled_dot_product_attention(*wide, attn_mask=wide_mask)
        assert_attention_bound(result, exact, value)
    exact = F.scaled_dot_product_attention(wide[1], wide[1], wide[2], is_causal=True)
    assert_attention_bound(causal, exact, value)


def assert_attention_bound(result, exact, value):
    bound = UNIT * exact.abs() + HALF_SUBNORMAL + 64 * UNIT_FLOAT32 * value.abs().max()
    assert result.dtype is torch.float16
    assert ((result.double() - exact).abs() <= bound).all()


def make_network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.GroupNorm(2, 8), torch.nn.SiLU(),
        torch.nn.BatchNorm2d(8), torch.nn.Flatten(), torch.nn.Linear(8 * 25, 4),
        torch.nn.LayerNorm(4),
    )  # fmt: skip


def test_backward_gives_float16_gradients_close_to_float32():
    network, reference = make_network().half(), make_network()
    image = make_normal(2, 3, 5, 5)
    with float16_arithmetic():
        (network(image) * torch.arange(4)).sum().backward()
    (reference(image.float()) * torch.arange(4)).sum().backward()
    running_mean = reference[3].running_mean
    assert torch.allclose(network[3].running_mean.float(), running_mean, atol=1e-3)
    assert not running_mean.eq(0).all()
    for half, single in zip(network.parameters(), reference.parameters(), strict=True):
        assert half.grad.dtype is torch.float16
        tolerance = 0.02 * single.grad.abs().max() + 1e-3
        assert (half.grad.float() - single.grad).abs().max() <= tolerance


def test_attention_backward_is_close_to_float64():
    """Its saved logsumexp stays float32 beside float16, and does not make the call a mixed one."""
    tensors = [make_normal(1, 2, 64, 40, seed=seed).requires_grad_() for seed in range(3)]
    with float16_arithmetic():
        F.scaled_dot_product_attention(*tensors).sum().backward()
    wide = [t.detach().double().requires_grad_() for t in tensors]
    F.scaled_dot_product_attention(*wide).sum().backward()
    for half, double in zip(tensors, wide, strict=True):
        assert half.grad.dtype is torch.float16
        # Native float16 exceeds this: it rounds scores and probabilities on the way.
        bound = UNIT * double.grad.abs() + 2e-4
        assert ((half.grad.double() - double.grad).abs() <= bound).all()


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_an_optimizer_step_is_rounded_in_place(options):
    weight = torch.nn.Parameter(make_normal(16))
    before, address = weight.detach().clone(), weight.data_ptr()
    optimizer = torch.optim.AdamW([weight], lr=0.01, eps=1e-4, **options)
    with float16_arithmetic():
        (weight * weight).sum().backward()
        optimizer.step()
    assert weight.dtype is torch.float16
    assert weight.data_ptr() == address
    step = before.float() * (1 - 1e-4) - weight.detach().float()
    expected = 0.01 * before.sign()
    assert torch.allclose(step, expected.float(), atol=2e-3)
    assert {v.dtype for v in optimizer.state[weight].values() if v.dim()} == {torch.float16}


def test_index_and_scatter_ops():
    x, index = make_normal(4, 3), torch.tensor([0, 2, 0])
    table = make_normal(5, 3, seed=1).requires_grad_()
    with float16_arithmetic():
        added = torch.zeros(3, 3, dtype=torch.float16).index_add_(0, index, x[:3])
        scattered = torch.zeros(4, 3, dtype=torch.float16).scatter_add(0, index[None], x[:1])
        picked = x[index]
        x[index] = torch.ones(3, 3, dtype=torch.float16)
        F.embedding(index, table).sum().backward()
    assert torch.equal(added[0], (picked[0].double() + picked[1].double()).half())
    assert {t.dtype for t in (added, scattered, picked, table.grad)} == {torch.float16}
    assert x[[0, 2]].eq(1).all()
    assert not x[1].eq(1).any()
    assert table.grad[:, 0].tolist() == [2, 0, 1, 0, 0]


def test_random_numbers_equal_float32_ones_and_use_the_given_generator():
    def draw(dtype):
        generator = torch.Generator().manual_seed(7)
        return [torch.randn(40, generator=generator, dtype=dtype),
                torch.zeros(40, dtype=dtype).normal_(generator=generator),
                torch.full((40,), 0.5, dtype=dtype).bernoulli(generator=generator)]  # fmt: skip

    with float16_arithmetic():
        halves = draw(torch.float16)
        uniform = torch.rand(200_000, dtype=torch.float16)
        dropped = F.dropout(torch.ones(1000, dtype=torch.float16), 0.5)
    for half, single in zip(halves, draw(torch.float32), strict=True):
        assert torch.equal(half, single.half())
    assert uniform.max() < 1
    assert set(dropped.tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes_give_equal_numbers(context):
    network, image = make_network().half().eval(), make_normal(2, 3, 5, 5)
    with float16_arithmetic():
        expected = network(image)
        with context():
            result = network(image)
            flat = result.reshape(-1)
            assert flat.data_ptr() == result.data_ptr()
    assert torch.equal(result, expected)


def test_autocast_runs_matmul_in_float16():
    layer, x = torch.nn.Linear(4096, 1, bias=False), torch.ones(1, 4096)
    torch.nn.init.constant_(layer.weight, 1 + 2**-12)  # 1.0 in float16
    with float16_arithmetic(), torch.autocast("cpu", dtype=torch.float16):
        result = layer(x)
        norm = F.layer_norm(result, (1,))
    assert result.dtype is torch.float16
    assert norm.isfinite().all()
    assert result.item() == 4096


def test_a_tiny_unet_stays_close_to_float32(tiny_pipe):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    prompt_embeds = torch.randn(2, 77, 32, generator=generator)
    unet = tiny_pipe.unet
    with torch.no_grad():
        expected = unet(latents, 10, prompt_embeds).sample
        unet.half()
        with float16_arithmetic():
            result = unet(latents.half(), 10, prompt_embeds.half()).sample
    assert result.dtype is torch.float16
    error = (result.float() - expected).abs().max()
    assert 0 < error <= 0.01 * expected.abs().max()


def test_other_dtypes_are_left_alone():
    x, integers = torch.randn(50, generator=torch.Generator().manual_seed(0)), torch.arange(5)
    with float16_arithmetic():
        results = [x.exp(), x.bfloat16() * 0.1, integers // 2, x.double().sin()]
    natives = [x.exp(), x.bfloat16() * 0.1, integers // 2, x.double().sin()]
    for result, native in zip(results, natives, strict=True):
        assert result.dtype is native.dtype
        assert torch.equal(result, native)


def test_nothing_is_left_behind():
    x = torch.full((1,), 2048.0, dtype=torch.float16)
    seen = []
    assert active() is None
    with pytest.raises(KeyError), float16_arithmetic():  # noqa: PT012
        with float16_arithmetic():
            assert "float16" in active()
            thread = threading.Thread(target=lambda: seen.append(active()))
            thread.start()
            thread.join()
            assert (x + 1 + 1).item() == 2048
        assert "float16" in active()
        assert F.gelu(torch.full((1,), 0.5).half()).dtype is torch.float16
        raise KeyError
    assert active() is None
    assert seen == [None]
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_sparse_and_meta_tensors_pass_through():
    dense = make_normal(3, 3)
    sparse = torch.eye(3).half().to_sparse_csr().requires_grad_()
    with float16_arithmetic():
        assert (torch.ones(2, dtype=torch.float16, device="meta") * 2).dtype is torch.float16
        product = torch.sparse.mm(sparse, dense, "amax")  # widened, its backward crashes
        product.sum().backward()
    assert torch.equal(product, dense)
    assert sparse.grad.dtype is torch.float16


def test_nan_to_num_puts_float16s_own_limits():
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 1.5]).half()
    with float16_arithmetic():
        fresh, written = torch.nan_to_num(x), x.clone().nan_to_num_(nan=2.0)
    assert fresh.tolist() == [65504, -65504, 0, 1.5]
    assert written.tolist() == [65504, -65504, 2, 1.5]


def test_integer_tensors_are_promoted_through_float16():
    x = torch.tensor([0.0, 1.0, 2.0]).half()
    with float16_arithmetic():
        product = x * torch.tensor([70000, 70000, 3])
        total = x + torch.tensor([2049, 1, 1])
    assert product[0].isnan()
    assert product[1:].tolist() == [float("inf"), 6]
    assert total.tolist() == [2048, 2, 3]
