"""Sliced attention of our own: SDPA's answer under every fault, at or below diffusers' memory."""

# B batch, H heads, L queries, S keys, D width of a head, C channels

import copy

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from tiny_pipelines import build_tiny_sd3_pipe, build_tiny_xl_pipe

import sdkit
from sdkit.attention import find_unsafe_processors, refuse_unsafe_attention
from sdkit.emulate import FAULTS, mps
from sdkit.memory.live_bytes import LiveBytes
from sdkit.slicing import SafeSlicedAttnProcessor, attend_in_slices, use_sliced_attention
from sdkit.validation import ValidationError

pytestmark = pytest.mark.filterwarnings("ignore::sdkit.emulate.EmulationWarning")
INF = float("inf")
# Relative to the largest value: both sum in float32 in another order and round once to the dtype.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
ABOUT_ATTENTION = [
    name
    for name in FAULTS
    if name.startswith(("baddbmm", "addbmm", "addmm", "matmul", "score", "sdpa", "softmax", "norm"))
]


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attend_by_sdpa(query, key, value, mask=None):
    return torch.nn.functional.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=None if mask is None else mask[None]
    )[0]


def difference(result, expected):
    """The largest error, relative to the largest value."""
    assert result.dtype == expected.dtype and result.shape == expected.shape
    error, largest = (result.float() - expected.float()).abs().max(), expected.float().abs().max()
    return (error / largest.clamp(min=1e-30)).item()  # all zeros are equal where a mask hides all


def make_layer(dtype=torch.float32, **options):
    torch.manual_seed(0)
    defaults = {"query_dim": 32, "heads": 4, "dim_head": 8}
    return Attention(**defaults | options).to(dtype).eval()


def compare_with_sdpa(layer, *inputs, slice_size="auto", **options):
    """The same layer with both processors."""
    with torch.no_grad():
        layer.set_processor(AttnProcessor2_0())
        expected = layer(*inputs, **options)
        layer.set_processor(SafeSlicedAttnProcessor(slice_size))
        return difference(layer(*inputs, **options), expected)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 5),
    queries=st.integers(1, 70),
    keys=st.integers(1, 70),
    width=st.integers(1, 24),
    dtype=st.sampled_from(list(TOLERANCE)),
    slice_size=st.one_of(st.just("auto"), st.integers(1, 300)),
    mask=st.sampled_from(["none", "additive", "bool", "one row"]),
)
def test_any_shape_agrees_with_sdpa(batch, heads, queries, keys, width, dtype, slice_size, mask):
    query = normal(batch * heads, queries, width, dtype=dtype, seed=1)
    key = normal(batch * heads, keys, width, dtype=dtype, seed=2)
    value = normal(batch * heads, keys, width, dtype=dtype, seed=3)
    drawn = normal(batch * heads, 1 if mask == "one row" else queries, keys, dtype=dtype, seed=4)
    chosen = {"none": None, "bool": drawn > 0}.get(mask, drawn)
    result = attend_in_slices(
        query, key, value, scale=width**-0.5, mask=chosen, slice_size=slice_size
    )
    reference = attend_by_sdpa(
        query.float(), key.float(), value.float(), drawn.float() if chosen is drawn else chosen
    )
    # Against float32, so that the tolerance holds whatever the dtype of SDPA's accumulators.
    assert difference(result, reference.to(dtype)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("slice_size", ["auto", 1, 7])
def test_layers_agree_with_sdpa(dtype, slice_size):
    tokens, context = normal(2, 25, 32, dtype=dtype), normal(2, 9, 24, dtype=dtype, seed=1)
    image = normal(2, 32, 5, 4, dtype=dtype, seed=2)
    plain = {"slice_size": slice_size}
    assert compare_with_sdpa(make_layer(dtype), tokens, **plain) <= TOLERANCE[dtype]
    assert (
        compare_with_sdpa(make_layer(dtype, cross_attention_dim=24), tokens, context, **plain)
        <= TOLERANCE[dtype]
    )
    vae = {"norm_num_groups": 8, "residual_connection": True, "rescale_output_factor": 2.0}
    assert compare_with_sdpa(make_layer(dtype, **vae), image, **plain) <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm": "layer_norm"},
        {"upcast_attention": True, "upcast_softmax": True},
        {"cross_attention_dim": 24, "cross_attention_norm": "layer_norm"},
        {"norm_num_groups": 8, "spatial_norm_dim": 16},
    ],
    ids=str,
)
def test_what_else_a_layer_can_have_is_kept(options):
    layer = make_layer(**options)
    if "spatial_norm_dim" in options:
        inputs, more = (normal(2, 32, 4, 4),), {"temb": normal(2, 16, 4, 4)}
    else:
        context = normal(2, 9, 24) if "cross_attention_dim" in options else None
        inputs, more = (normal(2, 25, 32), context), {}
    assert compare_with_sdpa(layer, *inputs, **more) <= TOLERANCE[torch.float32]


def test_masks_in_diffusers_form_are_those_of_sdpa():
    layer, tokens = make_layer(cross_attention_dim=24), normal(2, 25, 32)
    mask = torch.zeros(2, 1, 9)
    mask[:, :, 5:] = -10_000.0  # what UNet2DConditionModel makes of encoder_attention_mask
    context = normal(2, 9, 24)
    assert compare_with_sdpa(layer, tokens, context, attention_mask=mask) <= 2e-6


@pytest.mark.parametrize("slice_size", ["auto", 1, 7, 60])
@pytest.mark.parametrize(
    "shape", [(2, 9), (8, 9), (2, 25, 9), (2, 1, 1, 9), (2, 1, 25, 9)], ids=str
)
def test_masks_of_all_dimensions_are_those_of_sdpa(shape, slice_size):
    layer, tokens, context = make_layer(cross_attention_dim=24), normal(2, 25, 32), normal(2, 9, 24)
    allowed = normal(*shape, seed=5) > 0
    allowed[..., 0] = True
    for mask in (allowed, normal(*shape, seed=6).masked_fill(~allowed, -10_000.0)):
        options = {"attention_mask": mask, "slice_size": slice_size}
        assert compare_with_sdpa(layer, tokens, context, **options) <= 2e-6


@pytest.mark.parametrize("shape", [(4, 12, 9), (4, 6, 8), (1, 6, 9), (6, 9)], ids=str)
def test_a_mask_of_another_shape_is_refused(shape):
    query, key = normal(4, 6, 8), normal(4, 9, 8)
    with pytest.raises(ValidationError, match="attention_mask: .*6 queries and 9 keys"):
        attend_in_slices(query, key, key, scale=1.0, mask=torch.zeros(shape), slice_size=2)


@pytest.mark.parametrize("kind", ["additive", "bool"])
def test_a_row_that_may_attend_nowhere_is_zero_and_nan_is_not_hidden(kind):
    query, key, value = (normal(2, 6, 8, seed=seed) for seed in range(3))
    mask = torch.ones(2, 6, 6, dtype=torch.bool)
    mask[:, 3] = False
    chosen = mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, -INF)
    result = attend_in_slices(query, key, value, scale=1.0, mask=chosen)
    assert torch.equal(result[:, 3], torch.zeros(2, 8))
    assert result[:, :3].abs().min() > 0
    query[0, 1] = float("nan")
    result = attend_in_slices(query, key, value, scale=1.0, mask=chosen)
    assert result[0, 1].isnan().all() and result.isnan().sum() == 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scores_beyond_float16_do_not_overflow(dtype):
    query = normal(2, 16, 64, dtype=dtype) * 180
    scores = query.float() @ query.float().mT
    assert scores.max() * 64**-0.5 > torch.finfo(torch.float16).max  # even after the scale
    result = attend_in_slices(query, query, normal(2, 16, 64, dtype=dtype), scale=64**-0.5)
    assert result.isfinite().all()
    layer = make_layer(dtype, query_dim=64, heads=1, dim_head=64)
    layer.set_processor(SlicedAttnProcessor(1))
    sliced = SafeSlicedAttnProcessor()
    for projection in (layer.to_q, layer.to_k):
        torch.nn.init.eye_(projection.weight)
    with torch.no_grad():
        assert layer(query).isnan().any() == (dtype is torch.float16)
        layer.set_processor(sliced)
        assert layer(query).isfinite().all()


def test_autocast_does_not_bring_the_overflow_back():
    query = normal(2, 16, 64) * 500
    expected = attend_in_slices(query, query, query, scale=0.125)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attend_in_slices(query, query, query, scale=0.125), expected)


@pytest.mark.parametrize("memory", ["stale_float32", "nan"])
@pytest.mark.parametrize("fault", ABOUT_ATTENTION)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_every_fault_about_attention_leaves_the_answer(dtype, fault, memory):
    """The layer as a VAE has it, which meets norms and products too; SDPA on an honest backend."""
    layer = make_layer(dtype, norm_num_groups=8, residual_connection=True)
    image = normal(2, 32, 8, 8, dtype=dtype)
    with torch.no_grad():
        layer.set_processor(AttnProcessor2_0())
        with mps(faults=()):
            expected = layer(image)
        layer.set_processor(SafeSlicedAttnProcessor(5))
        with mps(memory, faults=(fault,)):
            result = layer(image)
    assert difference(result, expected) <= TOLERANCE[dtype]


def test_more_keys_than_a_tile_of_the_faulty_product_are_summed_in_parts():
    """pytorch#195163 strikes from 32767 keys on: a VAE has them at 1448x1448 pixels."""
    query, key, value = normal(1, 3, 4), normal(1, 33_000, 4), normal(1, 33_000, 4)
    expected = attend_by_sdpa(query, key, value)
    with mps(faults=("matmul-last-tile",)):
        result = attend_in_slices(query, key, value, scale=0.5)
    assert difference(result, expected) <= 2e-5  # 33,000 terms that nearly cancel


def test_diffusers_slicing_is_the_control_that_fails():
    layer, tokens = make_layer(torch.float16), normal(2, 25, 32, dtype=torch.float16)
    for processor, is_finite in (
        (SlicedAttnProcessor(1), False),
        (SafeSlicedAttnProcessor(), True),
    ):
        layer.set_processor(processor)
        with mps("nan"), torch.no_grad():
            assert layer(tokens).isfinite().all() == is_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "context", "heads"),
    [
        ((2, 4096, 320), None, 8),
        ((2, 1024, 640), None, 8),
        ((2, 1024, 640), (2, 77, 768), 8),
        ((2, 256, 1280), (2, 77, 768), 8),
        ((1, 512, 48, 48), None, 1),
    ],
    ids=str,
)
def test_peak_memory_is_at_or_below_diffusers_slicing(dtype, shape, context, heads):
    """Shapes alone, on the meta device: layers of SD 1.5 at 512x512, its VAE's at 384x384."""
    width = shape[1] if len(shape) == 4 else shape[2]
    norms = {"norm_num_groups": 32, "residual_connection": True} if len(shape) == 4 else {}
    with torch.device("meta"):
        layer = Attention(
            query_dim=width, cross_attention_dim=context and context[2], heads=heads,
            dim_head=width // heads, **norms,
        ).to(dtype)  # fmt: skip
        inputs = [torch.empty(size, dtype=dtype) for size in (shape, context) if size]
    peaks = {}
    for processor in (SlicedAttnProcessor(1), SafeSlicedAttnProcessor()):
        layer.set_processor(processor)
        with torch.no_grad(), LiveBytes(layer) as live:
            layer(*inputs)
        peaks[type(processor)] = live.peak_bytes
    assert 0 < peaks[SafeSlicedAttnProcessor] <= peaks[SlicedAttnProcessor]


def draw(pipe):
    with torch.no_grad():
        return pipe(
            "black shoes", num_inference_steps=2, output_type="np",
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip


@pytest.mark.parametrize("build", ["sd", "xl"])
def test_pipelines_draw_what_sdpa_draws(tiny_pipe, tokenizer_folder, build):
    pipe = tiny_pipe if build == "sd" else build_tiny_xl_pipe(tokenizer_folder)
    expected = draw(pipe)
    counts = use_sliced_attention(pipe, slice_size=9)
    assert set(counts) == {"unet", "vae"} and counts["vae"] == 2
    assert find_unsafe_processors(pipe) == {}
    refuse_unsafe_attention(pipe, "cpu")
    np.testing.assert_allclose(draw(pipe), expected, atol=1e-5)
    assert use_sliced_attention(pipe) == counts  # again, with another size


def test_load_pipeline_slices_and_says_so(tiny_folder):
    pipe, report = sdkit.load_pipeline(
        tiny_folder, backend="cpu", attention="sliced", progress=False
    )
    names = {type(p).__name__ for p in pipe.unet.attn_processors.values()}
    assert names == {"SafeSlicedAttnProcessor"}
    assert report.attention == "sliced"
    assert "2 layers of vae" in report.attention_reason
    assert "no memory read that was not written" in str(report)


def test_generate_runs_through_it_where_diffusers_slicing_is_black(tiny_pipe):
    tiny_pipe.to(dtype=torch.float16)
    use_sliced_attention(tiny_pipe)
    with mps("nan", faults=("baddbmm-beta-zero", "score-rounding", "softmax-narrow-sum")):
        assert sdkit.generate(tiny_pipe, "a", num_inference_steps=1, progress=False).complete
        tiny_pipe.enable_attention_slicing("max")
        with pytest.raises(ValidationError, match="NaN"):
            sdkit.generate(tiny_pipe, "a", num_inference_steps=1, progress=False)


def test_lora_works_and_trains_through_it(tiny_pipe):
    unet = tiny_pipe.unet.requires_grad_(False)
    unet.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"],
                   init_lora_weights=False)
    )  # fmt: skip
    inputs = normal(1, 4, 8, 8), torch.tensor(10), normal(1, 7, 32)
    gradients = []
    for processor in (AttnProcessor2_0(), SafeSlicedAttnProcessor(5)):
        model = copy.deepcopy(unet)
        model.set_attn_processor(processor)
        model(*inputs).sample.square().mean().backward()
        trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert len(trained) > 10 and all(g.abs().max() > 0 for g in trained.values())
        gradients.append(trained)
    for name, gradient in gradients[0].items():
        assert difference(gradients[1][name], gradient) <= 1e-4


@pytest.mark.parametrize("slice_size", [0, -1, 2.0, True, "max"])
def test_a_slice_size_that_is_none_is_refused(tiny_pipe, slice_size):
    with pytest.raises(ValidationError, match="slice_size=.*number from 1 on"):
        use_sliced_attention(tiny_pipe, slice_size)


def test_processors_that_do_more_than_attend_are_refused_and_left(tiny_pipe, tokenizer_folder):
    layer = tiny_pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    layer.set_processor(IPAdapterAttnProcessor2_0(64, 32))
    before = [type(p) for p in tiny_pipe.unet.attn_processors.values()]
    with pytest.raises(ValidationError, match="attn2: IPAdapterAttnProcessor2_0 .*would lose"):
        use_sliced_attention(tiny_pipe)
    assert [type(p) for p in tiny_pipe.unet.attn_processors.values()] == before
    with pytest.raises(ValidationError, match="JointAttnProcessor2_0"):
        use_sliced_attention(build_tiny_sd3_pipe(tokenizer_folder))


def test_added_keys_are_refused(tiny_pipe):
    """The UNets of DeepFloyd and Kandinsky: their processors put keys beside those of the image."""
    config = dict(tiny_pipe.unet.config) | {
        "down_block_types": ("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "SimpleCrossAttnUpBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    }
    tiny_pipe.unet = UNet2DConditionModel.from_config(config)
    with pytest.raises(ValidationError, match="AttnAddedKVProcessor2_0"):
        use_sliced_attention(tiny_pipe)
