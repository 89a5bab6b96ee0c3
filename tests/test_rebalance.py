"""Exact powers of two: float32 to the last bit, float16 finite; amplified and natural weights."""

import copy
import json
import math
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
    UNetControlNetXSModel,
    UNetMotionModel,
)
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from peft import LoraConfig
from planted import PLANTED
from planting import SELF_ATTENTION, find_module, scale_weights
from tiny_pipelines import build_tiny_pipe, build_tiny_sd3_pipe, build_tiny_xl_pipe, build_vae

from sdkit import ValidationError, amplify, load_pipeline, measure_headroom, rebalance
from sdkit.emulate import float16_arithmetic, mps
from sdkit.guarding import guard
from sdkit.loading.border_casts import map_floats
from sdkit.loading.rebalanced import remove_checks
from sdkit.loading.sidecar import SIDECAR_NAME
from sdkit.precision import Headroom, RebalanceReport, save_rebalanced
from sdkit.precision.exponents import SUBNORMAL_SHARE
from sdkit.precision.rebalancing import find_largest, measure_calls
from sdkit.precision.streams import find_streams
from sdkit.precision.synthetic import make_calls
from sdkit.validation import is_finite

pytestmark = pytest.mark.filterwarnings(
    "ignore::sdkit.emulate.EmulationWarning", "ignore:invalid value encountered in cast"
)
EXPONENT = 16
SUBNORMAL = 2.0**-14
CURABLE = (
    "UNet conv1, exact scaling", "UNet mid block conv1, exact scaling",
    "UNet up block conv1, at a later step", "VAE stream overflows in a residual sum",
    "VAE decoder conv1, exact scaling", "VAE encoder of image-to-image",
)  # fmt: skip


def build_sd2_unet():
    """SD 2.x: linear projections, one number of heads for each level, attention upcast."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=2, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), use_linear_projection=True,
        cross_attention_dim=48, attention_head_dim=[2, 4], upcast_attention=True,
    )  # fmt: skip


def build_sdxl_vae():
    """As SDXL's configuration: no scaling of the shape, `force_upcast` on."""
    torch.manual_seed(0)
    return build_vae(layers_per_block=2, force_upcast=True)


BUILDERS = {
    "SD 1.x UNet": lambda folder: build_tiny_pipe(folder).unet,
    "SD 2.x UNet": lambda folder: build_sd2_unet(),
    "SDXL UNet": lambda folder: build_tiny_xl_pipe(folder).unet,
    "SD 1.x VAE": lambda folder: build_tiny_pipe(folder).vae,
    "SDXL VAE": lambda folder: build_sdxl_vae(),
    "trained UNet": lambda folder: load_trained().unet,
    "trained VAE": lambda folder: load_trained().vae,
}


def load_trained():
    return load_pipeline("mini", dtype="float32", backend="cpu", progress=False)[0]


@pytest.fixture(params=BUILDERS)
def model(request, tokenizer_folder):
    return BUILDERS[request.param](tokenizer_folder)


@pytest.fixture
def unet(tokenizer_folder):
    return build_tiny_pipe(tokenizer_folder).unet


def run(model):
    """Its outputs, on other noise than it is measured on."""
    with torch.no_grad():
        return [call() for call in make_calls(model, seed=1)[:2]]


def run_in_float16(model):
    """As a cast copy would; a layer at a time is cast, so that there is memory for SDXL's UNet."""
    kept = {}

    def enter(module, args):
        for parameter in module._parameters.values():
            if parameter is not None:
                kept[parameter] = parameter.data
                parameter.data = parameter.data.half()
        return map_floats(args, torch.Tensor.half)

    def leave(module, args, output):
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.data = kept.pop(parameter)

    with ExitStack() as undo, float16_arithmetic():
        for module in model.modules():
            if module._parameters:
                undo.callback(module.register_forward_pre_hook(enter).remove)
                undo.callback(module.register_forward_hook(leave).remove)
        return run(model)


def measure_psnr(found, expected):
    """In dB, over all outputs, peak to peak of the expected."""
    found = torch.cat([t.flatten().double() for t in found])
    expected = torch.cat([t.flatten().double() for t in expected])
    error = (found - expected).square().mean()
    return float(20 * torch.log10(expected.max() - expected.min()) - 10 * torch.log10(error))


def are_equal(found, expected):
    return all(map(torch.equal, found, expected))


def assert_moved_by_powers_of_two(model, before):
    """Mantissas and signs are the same, and something moved."""
    moved = 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(torch.frexp(tensor).mantissa, torch.frexp(before[name]).mantissa), name
        moved += not torch.equal(tensor, before[name])
    assert moved


def keep_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def find_eps(model):
    return {name: m.eps for name, m in model.named_modules() if hasattr(m, "eps")}


def pretend(headroom, bits):
    """The headroom of a model with as much larger activations and the same weights."""
    ops = [replace(op, largest=tuple(v * 2.0**bits for v in op.largest)) for op in headroom.ops]
    return replace(headroom, ops=tuple(ops), source="made up")


def amplify_most(model):
    """By as much as the weights allow, at most 2^EXPONENT; returns the exponent."""
    for exponent in range(EXPONENT, 8, -1):
        try:
            report = amplify(model, exponent)
        except ValidationError:
            continue
        assert set(report.exponents.values()) == {exponent}
        return exponent
    raise AssertionError("no exponent above 8 leaves the weights finite")


def measure(model):
    root = "vae" if isinstance(model, AutoencoderKL) else "unet"
    return measure_calls(model, root, make_calls(model), 0)


def test_an_amplified_model_overflows_and_is_cured_exactly(model):
    expected, before = run(model), keep_state(model)
    healthy_db = measure_psnr(run_in_float16(model), expected)

    exponent = amplify_most(model)
    assert are_equal(run(model), expected)
    assert all(tensor.half().isfinite().all() for tensor in model.state_dict().values())
    assert_moved_by_powers_of_two(model, before)
    assert not all(map(is_finite, run_in_float16(model)))

    report = rebalance(model)
    assert are_equal(run(model), expected)
    assert_moved_by_powers_of_two(model, before)
    cured = run_in_float16(model)
    assert all(map(is_finite, cured))
    cured_db = measure_psnr(cured, expected)
    print(f"float16 {healthy_db:.2f} dB, rebalanced {cured_db:.2f} dB")
    assert abs(cured_db - healthy_db) < 1.0
    assert report.exponents and not report.left and not report.wanted and not report.on_synthetic
    assert all(-exponent <= moved < 0 for moved in report.exponents.values())
    assert "synthetic latents 16x16, seed 0" in str(report)
    assert RebalanceReport.from_json(report.to_json()) == report

    state, eps = keep_state(model), find_eps(model)
    assert rebalance(model).is_unchanged
    assert find_eps(model) == eps
    assert are_equal(model.state_dict().values(), state.values())


def test_it_is_measured_and_moved_on_a_device_without_float64(unet):
    amplify(unet, EXPONENT)
    with mps(faults=()):  # which refuses float64, as MPS does
        report = rebalance(unet)
    assert report.exponents and report.error_without_sidecar > 0


def test_a_natural_model_that_fits_is_left_alone(model):
    state, eps, config = keep_state(model), find_eps(model), dict(model.config)
    report = rebalance(model)
    assert report.is_unchanged and report.error_without_sidecar == 0.0
    assert are_equal(model.state_dict().values(), state.values())
    assert (find_eps(model), dict(model.config)) == (eps, config)
    assert "nothing: it fits" in str(report)


@pytest.mark.parametrize("bits", [3, 24], ids=["a little", "more than the weights allow"])
def test_natural_weights_move_exactly_and_within_their_bounds(model, bits):
    """As if the activations were larger: the bound is on the weights, which are natural."""
    expected, before = run(model), keep_state(model)
    healthy_db = measure_psnr(run_in_float16(model), expected)
    headroom = measure(model)
    root = "vae" if isinstance(model, AutoencoderKL) else "unet"
    worst = math.log2(max(find_largest(headroom, find_streams(model), root).values()))
    report = rebalance(model, pretend(headroom, 14 - worst + bits))
    assert report.measured_on == "made up" and report.exponents
    assert are_equal(run(model), expected)
    assert_moved_by_powers_of_two(model, before)
    for name, tensor in model.state_dict().items():
        if name.endswith("weight"):
            became = (tensor.abs() < SUBNORMAL) & (before[name].abs() >= SUBNORMAL)
            assert became.float().mean() <= SUBNORMAL_SHARE, name
        assert tensor.half().isfinite().all()
    moved_db = measure_psnr(run_in_float16(model), expected)
    print(f"float16 {healthy_db:.2f} dB, moved {moved_db:.2f} dB, bounds hit {len(report.bounds)}")
    assert abs(moved_db - healthy_db) < 1.0
    if bits == 24:
        assert report.wanted.keys() == report.bounds.keys() and report.wanted
        stream, path = next(iter(report.bounds.items()))
        assert f"{stream}: 2^{report.wanted[stream]} needed, stopped by {path}" in str(report)
        assert model.get_submodule(path).weight is not None
        assert any("bound by" in why for _, _, _, why in report.left)


def test_what_hit_a_bound_is_not_moved_further_the_second_time(unet):
    """The 1 % that may become subnormal counts from the natural weights."""
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter *= 8.0 if parameter.dim() > 1 else 1.0
    before = keep_state(unet)
    amplify(unet, 14)
    assert rebalance(unet).wanted
    state, eps = keep_state(unet), find_eps(unet)
    again = rebalance(unet)
    assert again.is_unchanged and again.left
    assert are_equal(unet.state_dict().values(), state.values()) and find_eps(unet) == eps
    for name, tensor in state.items():
        became = (tensor.abs() < SUBNORMAL) & (before[name].abs() >= SUBNORMAL)
        assert tensor.dim() < 2 or became.float().mean() <= SUBNORMAL_SHARE, name


def test_a_headroom_from_before_is_brought_up_to_date(unet, tokenizer_folder):
    """Twice is once with one and the same headroom too, and it holds for a model loaded later."""
    pipe = build_tiny_pipe(tokenizer_folder)
    natural = measure_headroom(pipe, "a shoe", num_inference_steps=1)
    amplify(pipe.unet, EXPONENT)
    amplified = measure_headroom(pipe, "a shoe", num_inference_steps=1)
    assert Headroom.from_json(amplified.to_json()) == amplified
    twin = copy.deepcopy(pipe.unet)
    first = rebalance(pipe.unet, amplified)
    state = keep_state(pipe.unet)
    assert rebalance(pipe.unet, amplified).is_unchanged
    assert are_equal(pipe.unet.state_dict().values(), state.values())
    assert rebalance(twin, natural).exponents == first.exponents


@pytest.mark.parametrize(
    "case", [case for case in PLANTED if case.name in CURABLE], ids=lambda case: case.name
)
def test_a_planted_overflow_is_cured_with_the_pipelines_headroom(case, tokenizer_folder):
    pipe = case.base(tokenizer_folder)
    pipe.set_progress_bar_config(disable=True)
    pipe_kwargs = {"num_inference_steps": 3, **(case.plant(pipe) or {})}
    headroom = measure_headroom(pipe, "a shoe", **pipe_kwargs)
    component = getattr(pipe, case.stage)
    report = rebalance(component, headroom)
    assert report.exponents and not report.left
    if case.stage == "vae" and case.base is build_tiny_pipe:  # text to image does not encode
        assert "residual encoder 0" in report.on_synthetic
        assert not any("decoder" in stream for stream in report.on_synthetic)
    pipe.to(torch.float16)
    with float16_arithmetic(), guard(pipe) as found:
        pipe("a shoe", generator=torch.Generator().manual_seed(0), **pipe_kwargs)
    assert not list(found)


def test_what_the_prompts_did_not_reach_is_measured_on_synthetic_latents(tokenizer_folder):
    """Text to image does not encode; image to image must not fail for it."""
    pipe = build_tiny_pipe(tokenizer_folder)
    amplify(pipe.vae, EXPONENT)
    report = rebalance(pipe.vae, measure_headroom(pipe, "a shoe", num_inference_steps=1))
    assert report.measured_on == "1 prompt" and "residual encoder 3" in report.on_synthetic
    assert "on synthetic" in str(report) and report.exponents["residual encoder 0"] < 0
    assert all(map(is_finite, run_in_float16(pipe.vae)))


def test_what_the_bounds_forbid_is_told(tokenizer_folder):
    """GEGLU's weights times 2000: the streams behind it need more than natural weights give."""
    case = next(case for case in PLANTED if case.name == "GEGLU's product")
    pipe = case.base(tokenizer_folder)
    case.plant(pipe)
    expected = run(pipe.unet)
    report = rebalance(pipe.unet, measure_headroom(pipe, "a shoe", num_inference_steps=3))
    assert are_equal(run(pipe.unet), expected)
    place = "up_blocks.1.attentions.0.transformer_blocks.0.ff"
    assert report.exponents[f"feed-forward {place}"] <= -8
    assert "residual 0" in report.wanted and report.left
    assert all(why.startswith("bound by") for _, _, _, why in report.left)


def test_what_cannot_be_moved_is_named(tokenizer_folder):
    pipe = build_tiny_pipe(tokenizer_folder)
    transformer = "unet.up_blocks.1.attentions.0.transformer_blocks.0"
    scale_weights(SELF_ATTENTION + ".to_q", by=1e5)(pipe)
    scale_weights("unet.time_embedding.linear_1", by=1e5)(pipe)
    scale_weights("unet.conv_out", by=3e5)(pipe)
    state = keep_state(pipe.unet)
    report = rebalance(pipe.unet)
    whys = {module: why for module, op, _, why in report.left if op != "weight"}
    assert whys[SELF_ATTENTION + ".to_q"] == "the softmax fixes Q.K^T"
    assert whys["unet.time_embedding.linear_1"] == "a bare SiLU reads it"
    assert whys["unet.conv_out"] == "it is read raw"
    assert whys[SELF_ATTENTION + ".to_q"] in str(report)
    for name in ("time_embedding.linear_1.weight", "conv_out.weight"):
        assert torch.equal(pipe.unet.state_dict()[name], state[name])
    half = find_module(pipe, transformer + ".ff.net.0.proj").weight
    with torch.no_grad():
        half[len(half) // 2 :] *= 2e5
    left = {(module, op): why for module, op, _, why in rebalance(pipe.unet).left}
    assert left[transformer + ".ff.net.0", "aten.split[1]"] == "GELU reads the gate"


# The sidecar


def make_amplified_folder(tokenizer_folder, folder):
    """A pipeline whose VAE and UNet are rebalanced, saved; the reports and the outputs."""
    pipe = build_tiny_pipe(tokenizer_folder)
    reports, outputs = {}, {}
    for name in ("vae", "unet"):
        component = getattr(pipe, name)
        amplify(component, EXPONENT)
        reports[name] = rebalance(component)
        outputs[name] = run(component)
    pipe.save_pretrained(folder)
    return reports, outputs


def test_load_pipeline_restores_the_eps_and_a_plain_load_is_as_wrong_as_told(
    tokenizer_folder, tmp_path
):
    reports, outputs = make_amplified_folder(tokenizer_folder, tmp_path)
    pipe, load_report = load_pipeline(tmp_path, dtype="float32", backend="cpu", progress=False)
    plain = DiffusionPipeline.from_pretrained(tmp_path)
    for name, report in reports.items():
        # A copy: weights as safetensors maps them may lie askew, and meet other kernels.
        assert are_equal(run(copy.deepcopy(getattr(pipe, name))), outputs[name])
        calls = make_calls(getattr(plain, name))
        with torch.no_grad():
            found, expected = [c() for c in calls], [c() for c in make_calls(getattr(pipe, name))]
        error = sum(float((f - e).square().sum()) for f, e in zip(found, expected, strict=True))
        size = sum(float(e.square().sum()) for e in expected)
        assert report.error_without_sidecar > 0
        assert math.sqrt(error / size) == pytest.approx(report.error_without_sidecar, rel=0.05)
        assert any(n.startswith(f"{name}: rebalanced by sdkit") for n in load_report.notices)
    assert rebalance(pipe.vae).is_unchanged
    half, _ = load_pipeline(tmp_path, dtype="float16", backend="cpu", progress=False)
    with float16_arithmetic():
        assert all(map(is_finite, run(half.vae) + run(half.unet)))


def test_a_sidecar_of_other_weights_or_a_damaged_one_is_refused(tokenizer_folder, tmp_path):
    make_amplified_folder(tokenizer_folder, tmp_path)
    build_tiny_pipe(tokenizer_folder, seed=1).vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValidationError, match="vae/sdkit_rebalance.json: belongs to other weights"):
        load_pipeline(tmp_path, dtype="float32", backend="cpu", progress=False)
    sidecar = tmp_path / "vae" / SIDECAR_NAME
    content = json.loads(sidecar.read_text())
    for text, said in (
        ("{", "not a sidecar of sdkit"),
        (json.dumps({"version": 1}), "not a sidecar of sdkit"),
        (json.dumps(content | {"version": 99}), "version 99"),
        (json.dumps(content | {"class": "VQModel"}), "for VQModel"),
        (json.dumps(content | {"largest": {"decoder.conv_on": 1.0}}), "has no decoder.conv_on"),
    ):
        sidecar.write_text(text)
        with pytest.raises(ValidationError, match=said):
            load_pipeline(tmp_path, dtype="float32", backend="cpu", progress=False)


def test_a_model_is_saved_alone_and_a_copy_saves_itself(tmp_path):
    vae = build_sdxl_vae()
    amplify(vae, EXPONENT)
    twin = copy.deepcopy(vae)
    rebalance(twin)
    save_rebalanced(vae, tmp_path / "vae")
    save_rebalanced(twin, tmp_path / "twin")
    kept = [json.loads((tmp_path / n / SIDECAR_NAME).read_text()) for n in ("vae", "twin")]
    assert set(kept[0]["exponents"].values()) == {EXPONENT}
    assert max(kept[1]["exponents"].values()) < EXPONENT


def test_force_upcast_is_switched_where_the_gain_would_not_be_real():
    vae = build_sdxl_vae()
    assert rebalance(vae).notices[0].startswith("force_upcast is on, though this VAE fits")
    assert vae.config.force_upcast
    amplify(vae, EXPONENT)
    assert rebalance(vae).notices[0].startswith("force_upcast switched off")
    assert vae.config.force_upcast is False
    with torch.no_grad():
        vae.register_to_config(force_upcast=True)
        vae.decoder.conv_out.weight *= 1e6
        vae.decoder.up_blocks[0].resnets[0].conv1.weight *= 2.0**8
    assert rebalance(vae).notices[0].startswith("force_upcast stays on")
    assert vae.config.force_upcast


# What is added later


def test_lora_on_a_moved_layer_is_refused_and_taken_off(unet):
    amplify(unet, EXPONENT)
    rebalance(unet)
    expected = run(unet)
    for target in ("to_v", "conv1", "proj"):
        with pytest.raises(ValidationError, match=r"has an adapter .*Load the original model"):
            unet.add_adapter(LoraConfig(r=2, target_modules=[target]))
        assert not hasattr(unet, "peft_config") or not unet.peft_config
        assert are_equal(run(unet), expected)


def test_lora_weights_from_a_file_are_refused(tokenizer_folder, tmp_path):
    pipe = build_tiny_pipe(tokenizer_folder)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    pipe.save_lora_weights(
        tmp_path,
        unet_lora_layers={n: p for n, p in pipe.unet.state_dict().items() if "lora" in n},
    )
    pipe = build_tiny_pipe(tokenizer_folder)
    amplify(pipe.unet, EXPONENT)
    with pytest.raises(ValidationError, match="has an adapter"):
        pipe.load_lora_weights(tmp_path)


def test_residuals_without_a_name_are_scaled_too(unet):
    latents, text = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 32)
    skips = [(32, 16), (32, 16), (32, 8), (64, 8)]
    down = tuple(torch.randn(1, width, size, size) for width, size in skips)
    arguments = (1, text, None, None, None, None, None, down, torch.randn(1, 64, 8, 8))
    with torch.no_grad():
        expected = unet(latents, *arguments).sample
        amplify(unet, EXPONENT)
        assert torch.equal(unet(latents, *arguments).sample, expected)


def test_lora_injected_behind_our_back_is_refused_at_the_call(unet):
    from peft import inject_adapter_in_model

    amplify(unet, EXPONENT)
    expected = run(unet)
    lora = LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False)
    inject_adapter_in_model(lora, unet)
    with pytest.raises(ValidationError, match=r"attn1\.to_v has an adapter"):
        run(unet)
    with pytest.raises(ValidationError, match=r"attn1\.to_v has an adapter"):
        unet.fuse_lora()  # which would hide it from the next call
    assert are_equal(run(unet), expected)


def test_lora_on_layers_that_stay_acts_as_on_the_original(unet):
    """Queries and keys read a norm and write scores: no power of two touches them."""
    original = copy.deepcopy(unet)
    amplify(unet, EXPONENT)
    rebalance(unet)
    for one in (original, unet):
        torch.manual_seed(1)
        one.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"]))
        with torch.no_grad():
            for name, parameter in one.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    expected = run(original)
    assert are_equal(run(unet), expected)
    original.disable_adapters()
    assert not are_equal(run(original), expected)


def test_controlnet_residuals_act_as_on_the_original(tokenizer_folder):
    """Through the pipeline, with a ControlNet made from the original; a copy scales once, too."""
    pipe = build_tiny_pipe(tokenizer_folder)
    controlnet = ControlNetModel.from_unet(
        pipe.unet, conditioning_channels=3, load_weights_from_unet=False
    )
    with torch.no_grad():
        for block in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
            block.weight.normal_(std=0.5)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def draw(unet, scale=1.0):
        parts = {**pipe.components, "unet": unet}
        parts.pop("image_encoder", None)
        controlled = StableDiffusionControlNetPipeline(
            **parts, controlnet=controlnet, requires_safety_checker=False
        )
        controlled.set_progress_bar_config(disable=True)
        return controlled(
            "a shoe", image=image, num_inference_steps=2, output_type="latent",
            controlnet_conditioning_scale=scale, generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip

    moved = copy.deepcopy(pipe.unet)
    amplify(moved, EXPONENT)
    expected = draw(pipe.unet)
    assert not torch.equal(draw(pipe.unet, scale=0.0), expected)
    assert torch.equal(draw(moved), expected)
    again = copy.deepcopy(moved)
    rebalance(again)
    assert torch.equal(draw(again), expected)


def test_a_t2i_adapter_and_an_ip_adapter_are_refused(unet):
    amplify(unet, EXPONENT)
    inputs = {"encoder_hidden_states": torch.randn(1, 77, 32)}
    residuals = [torch.zeros(1, 32, 16, 16), torch.zeros(1, 64, 8, 8)]
    with torch.no_grad(), pytest.raises(ValidationError, match="a T2I-Adapter adds"):
        unet(torch.randn(1, 4, 16, 16), 1, down_intrablock_additional_residuals=residuals, **inputs)
    attention = unet.get_submodule(SELF_ATTENTION.removeprefix("unet."))
    attention.set_processor(IPAdapterAttnProcessor2_0(32, 32))
    with pytest.raises(ValidationError, match="has a IPAdapterAttnProcessor2_0 beside it"):
        run(unet)


@pytest.mark.parametrize(
    "rebuild",
    [
        UNetMotionModel.from_unet2d,
        ControlNetModel.from_unet,
        lambda unet: UNetControlNetXSModel.from_unet(unet, size_ratio=0.5, ctrl_optional_kwargs={}),
    ],
)
def test_a_model_rebuilt_from_the_parts_is_refused(rebuild):
    """Its norms would have the eps of the code: a picture that is a little wrong, in silence."""
    unet = build_sd2_unet()
    rebuild(copy.deepcopy(unet))
    amplify(unet, EXPONENT)
    for moved in (unet, copy.deepcopy(unet)):
        with pytest.raises(ValidationError, match="copied part by part .* from the original UNet"):
            rebuild(moved)
        assert moved.state_dict() and torch.nn.ModuleDict({"unet": moved}).state_dict()
    remove_checks(unet)
    rebuild(unet)


def test_textual_inversion_is_right_as_it_is(tokenizer_folder):
    """It adds tokens to the text encoder, which is never moved."""
    pipe = build_tiny_pipe(tokenizer_folder)
    embedding = torch.randn(32, generator=torch.Generator().manual_seed(0))

    def draw():
        generator = torch.Generator().manual_seed(0)
        return pipe(
            "a <x> shoe", num_inference_steps=2, output_type="np", generator=generator
        ).images

    plain = draw()
    pipe.load_textual_inversion(embedding, token="<x>")
    expected = draw()
    for component in (pipe.unet, pipe.vae):
        amplify(component, EXPONENT)
        rebalance(component)
    assert (draw() == expected).all() and not (plain == expected).all()
    pipe.unload_textual_inversion("<x>")
    pipe.load_textual_inversion(embedding, token="<x>")
    assert (draw() == expected).all()


# Bad input: an error that says what, and the model as it was


def test_other_models_are_refused(tokenizer_folder):
    pipe, other = build_tiny_pipe(tokenizer_folder), build_tiny_sd3_pipe(tokenizer_folder)
    for model, said in (
        (pipe.text_encoder, r"CLIPTextModel: cannot be rebalanced; text encoders hand on"),
        (other.transformer, r"SD3Transformer2DModel: cannot be rebalanced\. Expected an"),
        (torch.nn.Linear(2, 2), r"Linear: cannot be rebalanced"),
    ):
        with pytest.raises(ValidationError, match=said):
            rebalance(model)
        with pytest.raises(ValidationError, match=said):
            amplify(model, 1)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"attention_type": "gated"}, "attention_type='gated'"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift='scale_shift'"),
        ({"down_block_types": ("AttnDownBlock2D", "DownBlock2D")}, "a AttnDownBlock2D"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "a UNetMidBlock2DSimpleCrossAttn"),
        ({"cross_attention_dim": (32, 48)}, r"cross_attention_dim=\(32, 48\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configurations_that_were_not_proved_are_refused(config, said):
    plain = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 32,
    }  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=8,
        **plain | config,
    )  # fmt: skip
    state = keep_state(unet)
    with pytest.raises(ValidationError, match=said):
        rebalance(unet)
    assert are_equal(unet.state_dict().values(), state.values())


@pytest.mark.parametrize("name", ["SD 1.x UNet", "SDXL VAE"])
def test_fused_projections_are_refused_until_they_are_apart(name, tokenizer_folder):
    """They hold the values in a copy, `to_qkv`, and leave `to_v` unread."""
    model = BUILDERS[name](tokenizer_folder)
    model.fuse_qkv_projections()
    expected, state = run(model), keep_state(model)
    for change in (rebalance, lambda model: amplify(model, EXPONENT)):
        with pytest.raises(ValidationError, match=r"Fused.*unfuse_qkv_projections\(\)"):
            change(model)
    assert are_equal(model.state_dict().values(), state.values())
    model.unfuse_qkv_projections()
    amplify(model, EXPONENT)
    model.fuse_qkv_projections()
    assert are_equal(run(model), expected)


def cast_one(unet):
    unet.mid_block.resnets[0].conv1.half()


def quantise_one(unet):
    weight = unet.mid_block.resnets[0].conv1.weight
    quantised = torch.nn.Parameter(weight.data.to(torch.int8), requires_grad=False)
    unet.mid_block.resnets[0].conv1.weight = quantised


def tie_two(unet):
    unet.mid_block.resnets[0].conv1.weight = unet.mid_block.resnets[1].conv1.weight


def spoil_one(unet):
    with torch.no_grad():
        unet.conv_in.weight.view(-1)[0] = float("nan")


def empty_one(unet):
    unet.conv_in.to("meta")


def adapt(unet):
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))


def replace_norm(unet):
    unet.mid_block.attentions[0].transformer_blocks[0].norm1 = torch.nn.RMSNorm(64, eps=1e-5)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cast_one, r"resnets\.0\.conv1\.weight is float16, expected float32"),
        (quantise_one, r"resnets\.0\.conv1\.weight is int8, expected float32"),
        (tie_two, r"conv1\.weight and .*conv1\.weight are one tensor \(tied\)"),
        (spoil_one, r"conv_in\.weight holds NaN or Inf"),
        (empty_one, r"conv_in\.weight has no data"),
        (adapt, r"has adapter layers \(Linear\)\. Merge them first"),
        (lambda unet: unet.half(), r"is float16, expected float32"),
        (
            replace_norm,
            r"transformer_blocks\.0\.norm1 is a RMSNorm, expected GroupNorm or LayerNorm",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_weights_that_cannot_move_exactly_are_refused(unet, spoil, said):
    spoil(unet)
    pointers = [p.data_ptr() for p in unet.parameters()]
    norms = find_eps(unet)
    for change in (rebalance, lambda unet: amplify(unet, EXPONENT)):
        with pytest.raises(ValidationError, match=said):
            change(unet)
    assert [p.data_ptr() for p in unet.parameters()] == pointers and find_eps(unet) == norms


def test_a_headroom_of_another_model_is_refused(unet):
    with pytest.raises(ValidationError, match="headroom: has no op of this unet"):
        rebalance(unet, measure(build_sdxl_vae()))
    with pytest.raises(
        ValidationError, match="headroom: got a dict, expected what measure_headroo"
    ):
        rebalance(unet, {})


def test_a_headroom_of_another_model_of_the_same_architecture_is_refused(tokenizer_folder):
    pipe, other = (build_tiny_pipe(tokenizer_folder, seed=seed) for seed in (0, 1))
    headroom = measure_headroom(pipe, "a shoe", num_inference_steps=1)
    state = keep_state(other.unet)
    for found in (headroom, Headroom.from_json(headroom.to_json())):
        with pytest.raises(ValidationError, match=r"measured on another unet \(values\)"):
            rebalance(other.unet, found)
    assert are_equal(other.unet.state_dict().values(), state.values())
    assert rebalance(pipe.unet, headroom).is_unchanged


def test_a_model_of_zeros_is_left_alone(unet):
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.zero_()
    assert amplify(unet, np.int64(3)).error_without_sidecar == 0.0
    assert rebalance(unet).is_unchanged


@pytest.mark.parametrize("exponent", [0, -3, 1.5, "4", True])
def test_amplify_wants_a_positive_whole_number(unet, exponent):
    with pytest.raises(ValidationError, match="expected a whole number of at least 1"):
        amplify(unet, exponent)


def test_amplify_names_the_weight_that_would_overflow(unet):
    with torch.no_grad():
        unet.mid_block.resnets[0].conv1.weight.view(-1)[5] = 100.0
    state = keep_state(unet)
    with pytest.raises(
        ValidationError,
        match=r"mid_block\.resnets\.0\.conv1\.weight: \|x\| is up to 100.*exponent of at most 9",
    ):
        amplify(unet, 10)
    with pytest.raises(ValidationError, match="an exponent of at most"):
        amplify(unet, 10**6)
    assert are_equal(unet.state_dict().values(), state.values())
    amplify(unet, 9)


# Full size

SD15_UNET = {
    "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
}  # fmt: skip
SD_VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


SDXL_UNET = {
    "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip


def build_in_file(kind, config, path):
    """Random weights in one file that is mapped: 10 GB need not all be in memory at a time."""
    with torch.device("meta"):
        model = kind(**config)
    total, start = sum(p.numel() for p in model.parameters()), 0
    storage = torch.from_file(str(path), shared=True, size=total)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            data = storage[start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()
            if parameter.dim() == 1:
                data.fill_(float(name == "weight"))  # a norm's
            else:
                bound = data[0].numel() ** -0.5
                data.uniform_(-bound, bound)
            module._parameters[name] = torch.nn.Parameter(data, requires_grad=False)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "config"),
    [(AutoencoderKL, SD_VAE), (UNet2DConditionModel, SD15_UNET), (UNet2DConditionModel, SDXL_UNET)],
    ids=["VAE of SD 1.x and SDXL", "SD 1.5 UNet", "SDXL UNet"],
)
def test_a_full_size_model_is_cured_exactly(kind, config, tmp_path):
    torch.manual_seed(0)
    model = build_in_file(kind, config, tmp_path / "weights")
    (tmp_path / "weights").unlink()  # mapped it stays; it is gone with the model
    expected = run(model)
    healthy_db = measure_psnr(run_in_float16(model), expected)
    amplify_most(model)
    assert are_equal(run(model), expected)
    assert not all(map(is_finite, run_in_float16(model)))
    report = rebalance(model)
    assert are_equal(run(model), expected)
    cured = run_in_float16(model)
    assert all(map(is_finite, cured)) and not report.left
    cured_db = measure_psnr(cured, expected)
    print(f"float16 {healthy_db:.2f} dB, rebalanced {cured_db:.2f} dB\n{report}")
    assert abs(cured_db - healthy_db) < 1.0
    assert rebalance(model).is_unchanged
