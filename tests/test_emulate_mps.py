"""The emulated MPS backend: its rules, its fresh memory, and each documented fault, on and off."""

import warnings
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from sdkit.emulate import FAULTS, EmulationWarning, Fault, active, float16_arithmetic, mps

pytestmark = pytest.mark.filterwarnings("ignore::sdkit.emulate.EmulationWarning")
HALF, SINGLE = torch.float16, torch.float32


def draw_latents(pipe):
    """Two steps of the real pipeline, and its latents."""
    generator = torch.Generator().manual_seed(0)
    return pipe(
        "a shoe", num_inference_steps=2, height=64, width=64, generator=generator,
        output_type="latent",
    ).images  # fmt: skip


TABLE = [  # dtype, attention slicing, memory -> survives; DESIGN.md fact 2
    (dtype, sliced, memory, not (sliced and (memory == "nan" or
     (memory == "stale_float32" and dtype is HALF))))
    for dtype in (HALF, SINGLE)
    for sliced in (True, False)
    for memory in ("zeros", "stale_float16", "stale_float32", "nan")
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "sliced", "memory", "survives"), TABLE)
def test_the_table_of_the_report(tiny_pipe, dtype, sliced, memory, survives):
    pipe = tiny_pipe.to(dtype)
    if sliced:
        pipe.enable_attention_slicing("max")
    with mps(memory):
        latents = draw_latents(pipe)
    assert latents.dtype is dtype
    assert latents.isfinite().all() == survives


@pytest.mark.parametrize("memory", ["stale_float32", "nan"])
def test_an_honest_kernel_survives_any_memory(tiny_pipe, memory):
    pipe = tiny_pipe.to(HALF)
    pipe.enable_attention_slicing("max")
    with mps(memory, faults=()):
        latents = draw_latents(pipe)
    assert latents.isfinite().all()


SCHEDULERS = [
    (PNDMScheduler, {}), (DDIMScheduler, {}), (EulerDiscreteScheduler, {}),
    (EulerAncestralDiscreteScheduler, {}), (DPMSolverMultistepScheduler, {}),
    (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}), (UniPCMultistepScheduler, {}),
    (HeunDiscreteScheduler, {}), (LMSDiscreteScheduler, {}),
]  # fmt: skip


@pytest.mark.parametrize(("scheduler", "options"), SCHEDULERS)
def test_schedulers_keep_their_float64_tables(tiny_pipe, scheduler, options):
    pipe = tiny_pipe.to(HALF)
    with mps():
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **options)
        latents = draw_latents(pipe)
    assert latents.dtype is HALF
    assert latents.isfinite().all()


def test_a_float_timestep_makes_float64_in_the_unet_and_is_caught(tiny_pipe):
    unet = tiny_pipe.unet.half()
    latents, prompt_embeds = torch.zeros(1, 4, 8, 8).half(), torch.zeros(1, 77, 32).half()
    with mps(), pytest.raises(TypeError, match="float64 does not exist on the emulated MPS device"):
        unet(latents, 3.5, prompt_embeds)
    with mps():
        assert unet(latents, torch.tensor(3.5), prompt_embeds).sample.isfinite().all()


REFUSED = [
    lambda x: x.double(), lambda x: x.half().to(torch.float64), lambda x: x.long().double(),
    lambda x: torch.zeros(2, dtype=torch.float64, device=x.device),
    lambda x: torch.zeros(2, dtype=torch.float64), lambda x: torch.randn(2, dtype=torch.float64),
    lambda x: torch.tensor([0.5], dtype=torch.float64),
    lambda x: torch.tensor([0.5], dtype=torch.float64, device=x.device),
    lambda x: torch.as_tensor(torch.ones(2).double().numpy(), device=x.device),
    lambda x: torch.zeros_like(x, dtype=torch.float64),
    lambda x: x.new_ones(2, dtype=torch.float64),
    lambda x: torch.mul(x, torch.from_numpy(np.ones(3))),
    lambda x: x.sum(dtype=torch.float64), lambda x: x.to(torch.complex128),
    lambda x: torch.nn.Linear(3, 3).to(torch.float64),
]  # fmt: skip


@pytest.mark.parametrize("function", REFUSED)
def test_float64_on_the_device_is_refused(function):
    x = torch.ones(3)
    function(x)
    with mps(), pytest.raises(TypeError, match="Use float32"):
        function(x)


def test_operators_raise_too_in_pythons_own_words():
    """torch turns any TypeError of an operator into Python's "unsupported operand type(s)"."""
    with mps(), pytest.raises(TypeError):
        torch.ones(3) * torch.from_numpy(np.ones(3))


def test_float64_tables_of_the_host_are_allowed():
    sigmas = torch.linspace(0, 1, 5, dtype=torch.float64).numpy()
    latents = torch.ones(2, 2, dtype=HALF)
    with mps():
        table = torch.from_numpy(sigmas).to("cpu").to(device="cpu")
        number = torch.tensor(3.0).double()
        scaled = (table[1:] - table[:-1]).flip(0) ** 2 * 0.5
        picked = table[torch.tensor([0, 2])]
        shifted = torch.from_numpy(np.linspace(0, 1, 3)).cumsum(0)
        result = latents * table[1] + scaled[0]
        narrow = table.to(torch.float32)
    assert {t.dtype for t in (scaled, picked, shifted, number)} == {torch.float64}
    assert result.dtype is HALF
    assert narrow.dtype is SINGLE


ALLOCATORS = [
    lambda dtype: torch.empty(1000, 100, dtype=dtype),
    lambda dtype: torch.empty_like(torch.zeros(1000, 100, dtype=dtype)),
    lambda dtype: torch.empty_strided((1000, 100), (1, 1000), dtype=dtype),
    lambda dtype: torch.empty_permuted((1000, 100), (1, 0), dtype=dtype),
    lambda dtype: torch.zeros(2).new_empty(1000, 100, dtype=dtype),
    lambda dtype: torch.zeros(2).new_empty_strided((1000, 100), (100, 1), dtype=dtype),
    lambda dtype: torch.zeros(0, dtype=dtype).resize_(1000, 100),
    lambda dtype: torch.zeros(0, dtype=dtype).resize_as_(torch.zeros(1000, 100, dtype=dtype)),
    lambda dtype: torch.empty(1000, 100, out=torch.zeros(0, dtype=dtype), dtype=dtype),
]


@pytest.mark.parametrize("allocate", ALLOCATORS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_every_allocation_holds_what_the_memory_says(allocate, context):
    def find_share(memory, dtype):
        with mps(memory), context():
            buffer = allocate(dtype)
            assert buffer.shape == (1000, 100)
            return (~buffer.isfinite()).float().mean().item(), buffer.abs().amax().item()

    # float32 bytes in float16: every second number is mantissa, and 1 in 32 of those is not finite.
    assert find_share("stale_float32", HALF)[0] == pytest.approx(1 / 64, abs=0.002)
    assert find_share("stale_float32", SINGLE)[0] == 0
    assert find_share("stale_float16", HALF)[0] == 0
    assert find_share("stale_float16", SINGLE)[0] == 0
    assert find_share("nan", HALF)[0] == find_share("nan", SINGLE)[0] == 1
    assert find_share("zeros", HALF) == find_share("zeros", SINGLE) == (0, 0)
    assert find_share("stale_float16", HALF)[1] > 3


def test_only_the_grown_part_of_a_resized_tensor_is_stale():
    kept = torch.ones(10, dtype=HALF)
    with mps("nan"):
        kept.resize_(4).resize_(30)
    assert kept[:10].eq(1).all()
    assert kept[10:].isnan().all()


def test_integer_and_bool_memory():
    with mps("stale_float32"):
        flags, tokens = torch.empty(5000, dtype=torch.bool), torch.empty(5000, dtype=torch.int64)
    assert set(flags.view(torch.uint8).tolist()) == {0, 1}
    assert tokens.unique().numel() > 4000
    with mps("nan"):
        assert torch.empty(3, dtype=torch.int32).eq(2**31 - 1).all()


def test_a_large_buffer_holds_all_the_stale_values_again_and_again():
    with mps("stale_float32"):
        buffer = torch.empty(3_000_000)
    assert buffer[:1_000_000].unique().numel() > 900_000
    assert buffer[-1_000_000:].unique().numel() > 900_000


def test_memory_is_deterministic_and_never_touches_the_global_generator():
    def allocate(seed):
        with mps("stale_float32", seed=seed):
            return torch.cat([torch.empty(999), torch.empty(77)])

    state = torch.get_rng_state()
    first, second, other = allocate(3), allocate(3), allocate(4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_what_torch_fills_itself_is_left_alone():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with mps("zeros"):
            assert torch.empty(5).isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_temporaries_of_the_emulator_are_not_filled():
    x = torch.full((64, 64), 0.5, dtype=HALF)
    with mps("nan"):
        results = [x @ x, F.linear(x, x), x.softmax(-1), F.layer_norm(x, (64,)), x.sort()[0],
                   F.conv2d(x[None, None], x[None, None, :3, :3]), F.dropout(x, 0.1), x.cumsum(0),
                   F.scaled_dot_product_attention(*[x[None, None]] * 3), torch.cat([x, x]),
                   ]  # fmt: skip
    assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16, SINGLE])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 3), (3,)])
def test_baddbmm_with_beta_zero_reads_its_input(dtype, poison, shape):
    matrices, ones = torch.full(shape, poison, dtype=dtype), torch.ones(2, 3, 3, dtype=dtype)
    with mps():
        out = torch.empty(0, dtype=dtype)
        leaky = [torch.baddbmm(matrices, ones, ones, beta=0),
                 torch.baddbmm(matrices, ones, ones, beta=0, out=out), out,
                 matrices.expand(2, 3, 3).clone().baddbmm_(ones, ones, beta=0)]  # fmt: skip
        finite_input = torch.baddbmm(torch.full_like(matrices, 7), ones, ones, beta=0, alpha=2)
        other_beta = torch.baddbmm(torch.ones_like(matrices), ones, ones, beta=2)
        infinite = torch.baddbmm(torch.full_like(matrices, float("inf")), ones, ones, beta=2)
    with mps(faults=()):
        honest = torch.baddbmm(matrices, ones, ones, beta=0)
    assert all(result.isnan().all() for result in leaky)
    assert finite_input.eq(6).all()
    assert other_beta.eq(5).all()
    assert infinite.eq(float("inf")).all()
    assert honest.eq(3).all()
    assert {t.dtype for t in (*leaky, finite_input, other_beta, honest)} == {dtype}


def test_one_poisoned_element_stays_where_it_is():
    matrices, ones = torch.zeros(1, 4, 4, dtype=HALF), torch.ones(1, 4, 4, dtype=HALF)
    matrices[0, 1, 2] = float("nan")
    with mps():
        result = torch.baddbmm(matrices, ones, ones, beta=0)
    assert torch.equal(result.isnan(), matrices.isnan())


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize("mode", ["baddbmm", "sdpa", "sdpa-causal", "sdpa-mask"])
def test_scores_rounded_before_the_scale_overflow(mode, dtype):
    """faults.md, probe P4: 40 * 64 * 64 = 163840 overflows float16, scaled by 40^-0.5 it fits."""
    query = torch.full((1, 2, 8, 40), 64.0, dtype=dtype)
    value = torch.arange(8.0).to(dtype)[None, None, :, None].expand(1, 2, 8, 40).contiguous()

    def attend():
        if mode == "baddbmm":
            batch, scores = query[0], torch.zeros(2, 8, 8, dtype=dtype)
            scores = torch.baddbmm(scores, batch, batch.mT, beta=0, alpha=40**-0.5)
            return scores.softmax(-1) @ value[0]
        mask = torch.zeros(8, 8, dtype=dtype) if mode == "sdpa-mask" else None
        return F.scaled_dot_product_attention(
            query, query, value, attn_mask=mask, is_causal=mode == "sdpa-causal"
        )

    with mps(faults=("score-rounding",)):
        early = attend()
    with mps():
        honest = attend()
    assert honest.isfinite().all()
    assert early.isfinite().all() == (dtype is SINGLE)
    assert early.dtype is honest.dtype is dtype


def test_scaled_scores_are_rounded_again_before_the_softmax():
    query = torch.full((1, 2, 8, 40), 31.6, dtype=HALF)  # 40 * 31.6^2 = 39942 fits, twice does not
    with mps(faults=("score-rounding",)):
        early = F.scaled_dot_product_attention(query, query, query, scale=2.0)
    with mps():
        honest = F.scaled_dot_product_attention(query, query, query, scale=2.0)
    assert early.isnan().all()
    assert honest.isfinite().all()


def test_early_rounding_leaves_float32_alone():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 9, 8, generator=generator) for _ in range(2))
    matrices = torch.randn(2, 9, 9, generator=generator)
    results = []
    for faults in ((), ("score-rounding",)):
        with mps(faults=faults):
            product = torch.baddbmm(matrices, query, key.mT, beta=0.7, alpha=0.3)
            attended = F.scaled_dot_product_attention(query[None], key[None], key[None])
            results.append((product, attended))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_early_rounding_is_close_to_honest_where_nothing_overflows():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 2, 9, 8, generator=generator).half() for _ in range(3))
    query.requires_grad_()
    matrices = torch.ones(4, 9, 9, dtype=HALF)
    results = []
    for faults in ((), ("score-rounding",), ("baddbmm-beta-zero", "score-rounding")):
        with mps(faults=faults):
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            gradient = torch.autograd.grad(attended.sum(), query)[0]
            product = torch.baddbmm(matrices, key.flatten(0, 1), value.flatten(0, 1).mT, beta=0.5)
            results.append((attended.detach(), gradient, product))
    for other in results[1:]:
        for early, honest in zip(other, results[0], strict=True):
            assert early.shape == honest.shape
            assert early.dtype is HALF
            assert torch.allclose(early.float(), honest.float(), atol=0.02)
    assert not torch.equal(results[0][2], results[1][2])


@pytest.mark.parametrize("names", [["baddbmm-beta-zero", "score-rounding"],
                                   ["score-rounding", "baddbmm-beta-zero"]])  # fmt: skip
def test_faults_of_one_op_act_together_in_any_order(names):
    big = torch.full((1, 2, 40), 64.0, dtype=HALF)
    with mps(faults=names):
        poisoned = torch.baddbmm(torch.full((1,), float("nan")).half(), big, big.mT, beta=0)
        early = torch.baddbmm(torch.zeros(1).half(), big, big.mT, beta=0, alpha=40**-0.5)
    assert poisoned.isnan().all()
    assert early.isinf().all()


def test_a_fault_of_ones_own():
    def forget_negative_zero(func, args, kwargs, compute):
        return compute(func, args, kwargs).abs()

    fault = Fault("no-negatives", ("aten.neg.default",), (), "nowhere", forget_negative_zero)
    x = torch.ones(2, dtype=HALF)
    with mps(faults=(fault,)):
        assert (-x).eq(1).all()
        assert x.neg_().eq(-1).all()
        assert "no-negatives" in active()
    renamed = replace(fault, ops=("aten.neg",))
    with mps(faults=(renamed,)):
        assert torch.neg(x, out=torch.empty(2, dtype=HALF)).eq(1).all()


def test_faults_are_documented_data():
    assert set(FAULTS) >= {"baddbmm-beta-zero", "score-rounding"}
    for name, fault in FAULTS.items():
        assert fault.name == name
        assert fault.affects
        assert fault.ops
        assert all(thread.startswith("https://github.com/") for thread in fault.threads)
        for op in fault.ops:
            _, packet, *overload = op.split(".")
            assert hasattr(getattr(torch.ops.aten, packet), *(overload or ["overloads"]))
        with pytest.raises(FrozenInstanceError):
            fault.name = "other"


def test_it_says_loudly_that_it_is_an_emulation():
    with pytest.warns(EmulationWarning, match="emulated MPS") as caught, mps("nan"):
        assert active() == "emulated MPS (memory=nan, faults=baddbmm-beta-zero)"
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with mps(faults=()):
        assert active() == "emulated MPS (memory=zeros, faults=none)"
    assert active() is None


@pytest.mark.parametrize(("arguments", "message"), [
    ({"memory": "ones"}, "memory='ones' is not known; expected one of zeros"),
    ({"faults": ("bad",)}, "fault 'bad' is not known; expected one of baddbmm-beta-zero"),
])  # fmt: skip
def test_unknown_memory_and_faults_are_named(arguments, message):
    with pytest.raises(ValueError, match=message), mps(**arguments):
        pass
    assert active() is None


def test_nested_and_failed_emulations_leave_nothing_behind():
    nan, ones = torch.full((1, 1, 1), float("nan")).half(), torch.ones(1, 1, 1).half()

    def is_leaky():
        return torch.baddbmm(nan, ones, ones, beta=0).isnan().item()

    with pytest.raises(KeyError), mps("nan"):  # noqa: PT012
        assert is_leaky()
        with mps(faults=()):
            assert active() == "emulated MPS (memory=zeros, faults=none)"
            assert not is_leaky()
            assert torch.empty(3).eq(0).all()
        with float16_arithmetic():
            assert not is_leaky()
            assert torch.ones(2).double().dtype is torch.float64
            assert torch.ones(2, dtype=torch.float64, device="cpu").sum() == 2
        assert is_leaky()
        assert torch.empty(3).isnan().all()
        raise KeyError
    assert active() is None
    assert not is_leaky()
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    assert not torch.overrides._get_current_function_mode_stack()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.ones(2).double().dtype is torch.float64
