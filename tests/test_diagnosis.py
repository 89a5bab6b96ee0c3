"""Plant a fault, then demand the op, its cause, and a proof; plant none, and demand silence."""

import itertools
import json

import accelerate
import pytest
import torch
from broken_attention import MathProcessor, divide_zero_by_zero
from diffusers import KDPM2AncestralDiscreteScheduler
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from planting import find_module
from tiny_pipelines import build_tiny_pipe, build_tiny_xl_pipe

from sdkit import diagnose
from sdkit.diagnosis import CAUSES, Diagnosis
from sdkit.diagnosis.model import diagnose_model
from sdkit.emulate import Fault, float16_arithmetic, mps
from sdkit.validation import ValidationError

FAST = {"num_inference_steps": 3}
NAN = float("nan")
CONV = "unet.mid_block.resnets.0.conv1"
ATTENTION = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def hooks_modes_and_methods(pipe):
    """All that a diagnosis could leave behind."""
    modules = [
        m for c in pipe.components.values() if isinstance(c, torch.nn.Module) for m in c.modules()
    ]
    return [
        (
            dict(m._forward_hooks),
            dict(m._forward_pre_hooks),
            sorted(vars(m)),
            id(m.forward.__func__),
        )
        for m in modules
    ]


def weights(pipe):
    return {n: p.clone() for n, p in pipe.unet.named_parameters()}


def overflow(pipe):
    """A convolution whose result float16 cannot hold and float32 can."""
    with torch.no_grad():
        pipe.unet.get_submodule("mid_block.resnets.0.conv1").bias.fill_(6e4)
        pipe.unet.get_submodule("mid_block.resnets.0.time_emb_proj").bias.fill_(6e4)


def test_healthy(tiny_pipe):
    diagnosis = diagnose(tiny_pipe, "a shoe", **FAST)
    assert (diagnosis.cause, diagnosis.stage, diagnosis.module) == ("healthy", "none", None)
    assert diagnosis.is_healthy and diagnosis.cause in CAUSES


def test_the_op_the_module_and_the_source_line_are_named(tiny_pipe):
    overflow(tiny_pipe)
    with float16_arithmetic():
        diagnosis = diagnose(tiny_pipe.to(torch.float16), "a shoe", prove=True, **FAST)
    assert (diagnosis.stage, diagnosis.step, diagnosis.cause) == ("unet", 0, "range-overflow")
    assert (diagnosis.module, diagnosis.op) == ("unet.mid_block.resnets.0", "aten.add.Tensor")
    assert diagnosis.bad_op.source.startswith("resnet.py:")
    assert "temb" in diagnosis.bad_op.source_line
    assert diagnosis.evidence["float64_largest"] > diagnosis.evidence["dtype_maximum"] == 65504
    assert len(diagnosis.bad_op.before) > 3 and "conv1" in " ".join(diagnosis.bad_op.before)
    assert diagnosis.proven and "in float32" in diagnosis.remedy


def test_slicing_on_stale_memory_is_proven_and_reproduced(tiny_pipe):
    tiny_pipe.enable_attention_slicing("max")
    before = tiny_pipe.unet.attn_processors
    with mps(memory="nan"):
        diagnosis = diagnose(tiny_pipe.to(torch.float16), "a shoe", prove=True, **FAST)
    assert (diagnosis.cause, diagnosis.module) == ("uninitialised-memory", ATTENTION)
    assert diagnosis.op.startswith("aten.baddbmm")
    assert diagnosis.evidence["ignored_by_contract"] == ["self"]
    assert diagnosis.proven and "SDPA" in diagnosis.proof
    assert tiny_pipe.unet.attn_processors == before
    assert "emulated" in diagnosis.emulated
    assert len(diagnosis.reproduction.splitlines()) <= 30


def test_the_same_pipeline_with_zeroed_memory_is_healthy(tiny_pipe):
    tiny_pipe.enable_attention_slicing("max")
    with mps(memory="zeros"):
        assert diagnose(tiny_pipe.to(torch.float16), "a shoe", **FAST).cause == "healthy"


def test_the_reproduction_needs_only_torch(tiny_pipe, tmp_path, monkeypatch):
    tiny_pipe.enable_attention_slicing("max")
    with mps(memory="nan"):
        script = diagnose(tiny_pipe.to(torch.float16), "a shoe", **FAST).reproduction
    imports = [line for line in script.splitlines() if "import" in line]
    assert imports == ["import copy, sys", "import torch"]
    monkeypatch.setattr("sys.argv", ["reproduction.py", "cpu"])
    with pytest.raises(SystemExit) as honest:
        exec(compile(script, "reproduction.py", "exec"), {})
    assert honest.value.code is False  # an honest CPU ignores the NaN in the buffer


def test_an_inf_constant_is_no_overflow(tiny_pipe):
    conv = tiny_pipe.unet.get_submodule("mid_block.resnets.0.conv1")
    conv.register_forward_hook(lambda module, args, output: output.fill_(float("inf")))
    diagnosis = diagnose(tiny_pipe, "a shoe", **FAST)
    assert (diagnosis.cause, diagnosis.module) == ("invalid-arithmetic", CONV)


def test_a_fault_that_never_comes_back_still_has_its_module(tiny_pipe):
    struck = []

    def strike_once(func, args, kwargs, compute):
        result = compute(func, args, kwargs)
        if result.shape == (2, 64, 4, 4):
            struck.append(1)
            if len(struck) == 7:
                result[0, 0, 0, 0] = NAN
        return result

    fault = Fault("once", ("aten.convolution",), (), "", strike_once)
    with mps(faults=(fault,)):
        diagnosis = diagnose(tiny_pipe, "a shoe", **FAST)
    assert (diagnosis.stage, diagnosis.cause, diagnosis.op) == ("unet", "backend-fault", None)
    assert diagnosis.module.startswith("unet.") and "finite_replays" in diagnosis.evidence


@pytest.mark.parametrize("prove", [False, True])
def test_nothing_stays_on_the_pipeline(tiny_pipe, prove):
    tiny_pipe.unet.set_attn_processor(AttnProcessor())
    overflow(tiny_pipe)
    tiny_pipe.to(torch.float16)
    before, weights_before = hooks_modes_and_methods(tiny_pipe), weights(tiny_pipe)
    with float16_arithmetic():
        diagnose(tiny_pipe, "a shoe", prove=prove, **FAST)
    assert hooks_modes_and_methods(tiny_pipe) == before
    after = weights(tiny_pipe)
    assert all(torch.equal(after[n], weights_before[n]) for n in after)
    assert all(after[n].dtype is torch.float16 for n in after)


def test_a_nan_that_an_op_swallows_is_found(tiny_pipe):
    norm = tiny_pipe.vae.decoder.conv_norm_out
    norm.register_forward_hook(lambda module, args, output: (output / 0 * 0).nan_to_num(0.0))
    with torch.no_grad():
        tiny_pipe.vae.decoder.conv_out.weight.zero_()
        tiny_pipe.vae.decoder.conv_out.bias.fill_(-2)  # black, with nothing to warn of
    diagnosis = diagnose(tiny_pipe, "a shoe", **FAST)
    assert (diagnosis.cause, diagnosis.stage) == ("hidden-nan", "vae")
    assert diagnosis.module == "vae.decoder.conv_norm_out"
    assert "nan_to_num" in diagnosis.evidence["swallowed_by"]


def test_json_holds_everything_but_tensors(tiny_pipe):
    overflow(tiny_pipe)
    with float16_arithmetic():
        diagnosis = diagnose(tiny_pipe.to(torch.float16), ["a", "b"], seed=3, **FAST)
    content = json.loads(diagnosis.to_json())
    assert content["bad_op"]["module"] == diagnosis.module
    assert content["bad_op"]["outputs"][0]["inf_count"] > 0
    assert torch.__version__.startswith(content["environment"]["torch"])
    assert "call" not in content["bad_op"]
    assert diagnosis.cause in str(diagnosis) and diagnosis.message.startswith(
        "range-overflow: unet"
    )


@pytest.mark.parametrize(
    ("name", "value"), [("proven", "false"), ("remedy", 3), ("emulated", True), ("step", -1)]
)
def test_a_damaged_diagnosis_is_one_clear_error(name, value):
    told = json.loads(Diagnosis("none", None, None, None, "healthy").to_json())
    assert Diagnosis.from_json(json.dumps(told)).is_healthy
    with pytest.raises(ValidationError, match=rf"diagnosis: .*{name} is"):
        Diagnosis.from_json(json.dumps(told | {name: value}))


def test_a_compiled_unet_is_diagnosed_in_eager_and_says_so(tiny_pipe):
    overflow(tiny_pipe)
    tiny_pipe.unet.compile(backend="eager")
    with float16_arithmetic():
        diagnosis = diagnose(tiny_pipe.to(torch.float16), "a shoe", **FAST)
    assert diagnosis.module == "unet.mid_block.resnets.0"
    assert "eager" in diagnosis.evidence["compiled"]


@pytest.mark.parametrize(
    ("spoil", "prompts", "words"),
    [
        (lambda pipe: None, [], "prompts"),
        (lambda pipe: None, [3], r"prompts\[0\]"),
        (lambda pipe: setattr(pipe, "unet", None), "a", "unet or a transformer"),
        (lambda pipe: setattr(pipe, "scheduler", pipe.tokenizer), "a", "scheduler: CLIPTok"),
        (lambda pipe: setattr(pipe, "scheduler", type(pipe.scheduler)), "a", "got the class PNDM"),
        (lambda pipe: pipe.vae.to("meta"), "a", "vae on meta"),
    ],
)
def test_bad_input_is_one_clear_error(tiny_pipe, spoil, prompts, words):
    spoil(tiny_pipe)
    with pytest.raises(ValidationError, match=words):
        diagnose(tiny_pipe, prompts, **FAST)


def test_sdpa_is_left_alone_where_it_was(tokenizer_folder):
    pipe = build_tiny_pipe(tokenizer_folder)
    diagnose(pipe, "a shoe", prove=True, **FAST)
    assert all(type(p) is AttnProcessor2_0 for p in pipe.unet.attn_processors.values())


@pytest.mark.parametrize("overflows", [True, False])
def test_what_sdxls_own_upcast_hides_is_told(tokenizer_folder, overflows):
    pipe = build_tiny_xl_pipe(tokenizer_folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.register_to_config(force_upcast=True)
    if overflows:
        with torch.no_grad():
            pipe.vae.decoder.up_blocks[0].resnets[0].conv1.weight *= 2.0**17
    with float16_arithmetic():
        diagnosis = diagnose(pipe.to(torch.float16), "a shoe", **FAST)
    assert diagnosis.cause == "healthy"
    assert ("hides" in diagnosis.evidence["force_upcast"]) == overflows
    if overflows:
        assert diagnosis.evidence["hidden_cause"] == "range-overflow"
        assert diagnosis.evidence["hidden_module"] == "vae.decoder.up_blocks.0.resnets.0.conv1"


def test_several_images_a_prompt_and_embeddings_without_a_prompt(tiny_pipe):
    assert diagnose(tiny_pipe, "a shoe", num_images_per_prompt=2, **FAST).evidence["images"] == 2
    prompt_embeds = torch.full((1, 77, 32), NAN)
    inputs = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": prompt_embeds}
    assert diagnose(tiny_pipe, None, **inputs, **FAST).cause == "bad-input"


@pytest.mark.parametrize("bias", [0.0, 2.0, -2.0])
def test_a_flat_image_is_never_called_healthy(tiny_pipe, bias):
    with torch.no_grad():
        tiny_pipe.vae.decoder.conv_out.weight.zero_()
        tiny_pipe.vae.decoder.conv_out.bias.fill_(bias)
    diagnosis = diagnose(tiny_pipe, "a shoe", **FAST)
    assert diagnosis.cause == "undecided" and not diagnosis.is_healthy


def test_nan_after_the_vae_is_found(tiny_pipe):
    postprocess = tiny_pipe.image_processor.postprocess
    tiny_pipe.image_processor.postprocess = lambda image, *args, **kwargs: postprocess(
        image / 0 * 0, *args, **kwargs
    )
    diagnosis = diagnose(tiny_pipe, "a shoe", **FAST)
    assert (diagnosis.stage, diagnosis.cause) == ("vae", "invalid-arithmetic")
    assert diagnosis.bad_op.source.startswith("test_diagnosis.py")


def test_an_inf_from_outside_is_followed_to_its_writer(tiny_pipe):
    bad = torch.full((1,), float("inf"))
    conv = tiny_pipe.unet.get_submodule("mid_block.resnets.0.conv1")
    conv.register_forward_hook(lambda module, args, output: output + bad)
    assert diagnose(tiny_pipe, "a shoe", **FAST).module == CONV


def test_a_hook_that_counts_calls_is_not_called_a_kernel(tiny_pipe):
    calls = iter(range(100))

    def spoil(module, args, output):
        if next(calls) == 2:
            output[:, 0] = NAN

    tiny_pipe.unet.get_submodule("mid_block.resnets.0.conv1").register_forward_hook(spoil)
    diagnosis = diagnose(tiny_pipe, "a shoe", prove=True, **FAST)
    assert diagnosis.cause == "undecided" and diagnosis.proven is None
    assert "hooks" in diagnosis.evidence and "unchanged run" in diagnosis.proof


def test_float32s_own_range_is_no_fault_of_the_backend(tiny_pipe):
    latents = 1e25 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert diagnose(tiny_pipe, "a", latents=latents, **FAST).cause == "range-overflow"


def test_a_table_that_is_bad_by_nature_is_not_blamed(tiny_pipe):
    scheduler = KDPM2AncestralDiscreteScheduler.from_config(tiny_pipe.scheduler.config)
    tiny_pipe.scheduler = scheduler
    with float16_arithmetic():
        found = diagnose(tiny_pipe.to(torch.float16), "a", guidance_scale=1e7, **FAST)
    assert found.cause == "range-overflow" and found.module is None


def test_a_fullgraph_compiled_unet_is_diagnosed(compilable_pipe):
    with torch.no_grad():
        compilable_pipe.unet.get_submodule("mid_block.resnets.0.conv1").weight[0] = NAN
    compilable_pipe.unet = torch.compile(compilable_pipe.unet, backend="eager", fullgraph=True)
    diagnosis = diagnose(compilable_pipe, "a shoe", prove=True, **FAST)
    assert (diagnosis.module, diagnosis.cause, diagnosis.proven) == (CONV, "bad-weights", True)


def test_a_trial_that_cannot_run_does_not_lose_the_diagnosis(tiny_pipe):
    def strike(func, args, kwargs, compute):
        result = compute(func, args, kwargs)
        return result * NAN if result.shape == (1, 4, 8, 8) else result

    with mps(faults=(Fault("sub", ("aten.sub",), (), "", strike),)):
        diagnosis = diagnose(tiny_pipe, "a", prove=True, **FAST)
    assert (diagnosis.cause, diagnosis.module) == ("backend-fault", None)


def test_a_users_generator_and_output_type_are_heeded(tiny_pipe):
    generator = torch.Generator().manual_seed(7)
    state = generator.get_state()
    options = {"generator": generator, "output_type": "pil", "return_dict": False}
    assert diagnose(tiny_pipe, "a", **options, **FAST).is_healthy
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize(
    "wrong", [{"num_inference_steps": 0}, {"num_images_per_prompt": "2"}, {"seed": -1}]
)
def test_numbers_that_cannot_be_are_one_clear_error(tiny_pipe, wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        diagnose(tiny_pipe, "a", **{**FAST, **wrong})


def test_a_masked_row_is_proved_under_inference_mode_too(tiny_pipe):
    def hide_all(scores):
        return (scores.softmax(-1) * 0 + 1).masked_fill(scores == scores, -float("inf")).softmax(-1)

    conv = tiny_pipe.unet.get_submodule("mid_block.resnets.0.conv1")
    conv.register_forward_hook(lambda module, args, output: output + hide_all(output))
    with torch.inference_mode():
        diagnosis = diagnose(tiny_pipe, "a", prove=True, **FAST)
    assert (diagnosis.cause, diagnosis.proven) == ("masked-softmax", True)


def test_an_in_place_fault_has_its_reproduction(tiny_pipe):
    def strike(func, args, kwargs, compute):
        result = compute(func, args, kwargs)
        return result.fill_(NAN) if result.shape[1:] == (64, 4, 4) else result

    conv = tiny_pipe.unet.get_submodule("mid_block.resnets.0.conv1")
    conv.register_forward_hook(lambda module, args, output: output.mul_(1.5))
    with mps(faults=(Fault("mul_", ("aten.mul_",), (), "", strike),)):
        diagnosis = diagnose(tiny_pipe, "a", **FAST)
    assert (diagnosis.cause, diagnosis.module) == ("backend-fault", CONV)
    assert "deepcopy" in diagnosis.reproduction


def test_one_prompt_for_a_model_is_no_list_of_letters(tiny_folder):
    found = diagnose_model(tiny_folder, "a shoe", backend="cpu", **FAST)
    assert found.evidence["images"] == 1


def test_a_negative_prompt_may_be_words(tiny_pipe):
    assert diagnose(tiny_pipe, ["a", "b"], negative_prompt="blurred", **FAST).is_healthy


@pytest.mark.parametrize("name", ["num_infrence_steps", "prompt"])
def test_an_argument_that_the_pipeline_does_not_know_is_refused(tiny_pipe, name):
    with pytest.raises(ValidationError, match=name):
        diagnose(tiny_pipe, "a", **{name: 3})


def test_a_bad_weight_that_attention_takes_in_silence_is_named(tiny_pipe):
    """The fused attention of the CPU makes numbers of a NaN where there are few keys."""
    path = ATTENTION.replace("attn1", "attn2.to_q")
    with torch.no_grad():
        tiny_pipe.unet.get_submodule(path.removeprefix("unet.")).weight[0, 0] = NAN
    embeds = torch.randn(2, 1, 4, 32, generator=torch.Generator().manual_seed(0))
    call = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1], **FAST}
    diagnosis = diagnose(tiny_pipe, None, **call)
    assert (diagnosis.cause, diagnosis.module) == ("bad-weights", path)
    assert "scaled_dot_product" in diagnosis.evidence["swallowed_by"]


def test_a_bad_weight_that_this_prompt_does_not_read_is_told(tiny_pipe):
    embedding = tiny_pipe.text_encoder.get_input_embeddings()
    with torch.no_grad():
        embedding.weight[tiny_pipe.tokenizer.convert_tokens_to_ids("z</w>")] = NAN
    healthy = diagnose(tiny_pipe, "a shoe", **FAST)
    assert healthy.is_healthy
    assert healthy.evidence["bad_weights_not_read"][0].endswith("token_embedding.weight")
    assert diagnose(tiny_pipe, "fuzz", **FAST).cause == "bad-weights"


def test_an_overflow_that_a_hook_cuts_off_is_told_though_the_picture_is_valid(tiny_pipe):
    conv = tiny_pipe.vae.decoder.mid_block.resnets[0].conv1
    with torch.no_grad():
        conv.weight *= 2.0**20
    conv.register_forward_hook(lambda module, args, output: output.clamp(-6e4, 6e4))
    with float16_arithmetic():
        diagnosis = diagnose(tiny_pipe.to(torch.float16), "a shoe", **FAST)
    assert (diagnosis.cause, diagnosis.stage) == ("hidden-nan", "vae")
    assert diagnosis.module == "vae.decoder.mid_block.resnets.0.conv1"
    assert diagnosis.evidence["made_by"] == "range-overflow"


def test_squares_that_overflow_in_a_norm_make_zeros_and_are_found(tiny_pipe):
    decoder = tiny_pipe.vae.decoder
    decoder.conv_norm_out.register_forward_hook(
        lambda module, args, output: output * (output * 1e3).pow(2).mean().rsqrt()
    )
    with torch.no_grad():
        decoder.conv_out.bias.zero_()
    with float16_arithmetic():
        diagnosis = diagnose(tiny_pipe.to(torch.float16), "a shoe", **FAST)
    assert (diagnosis.cause, diagnosis.op) == ("hidden-nan", "aten.pow.Tensor_Scalar")
    assert diagnosis.module == "vae.decoder.conv_norm_out"
    assert "rsqrt" in diagnosis.evidence["swallowed_by"]


@pytest.mark.parametrize(
    "repair",
    [
        lambda bad: bad.nan_to_num(0.0),
        lambda bad: torch.where(bad.isnan(), 0.0, bad),
        lambda bad: bad.masked_fill_(bad.isnan(), 0.0),
        lambda bad: torch.clamp(bad.fill_(float("inf")), -1.0, 1.0),
        lambda bad: bad.index_put_((bad.isnan(),), torch.zeros(())),
    ],
)
def test_a_nan_made_and_repaired_within_one_module_is_told(tiny_pipe, repair):
    def spoil(query, key, scores):
        return scores + repair(scores / 0 * 0)

    find_module(tiny_pipe, ATTENTION).set_processor(MathProcessor(spoil))
    found = diagnose(tiny_pipe, "a shoe", prove=True, **FAST)
    assert (found.cause, found.module) == ("hidden-nan", ATTENTION)
    assert found.proven and found.proof.startswith("MathProcessor replaced by SDPA")


def test_a_hidden_nan_that_does_not_come_back_is_at_least_told(tiny_pipe):
    calls = itertools.count()

    def strike_once(func, args, kwargs, compute):
        result = compute(func, args, kwargs)
        return result * NAN if result.shape == (2, 64, 4, 4) and next(calls) == 6 else result

    mid_block = tiny_pipe.unet.mid_block
    mid_block.register_forward_hook(lambda module, args, output: output.nan_to_num(0.0))
    with mps(faults=(Fault("once", ("aten.convolution",), (), "", strike_once),)):
        found = diagnose(tiny_pipe, "a shoe", **FAST)
    assert found.is_healthy and "second run" in found.evidence["within_a_component"]


def test_a_valid_picture_alone_proves_no_cure_of_a_nan_that_was_lost(tiny_pipe):
    """It was valid before: another attention leaves the hook that writes NaN as it is."""
    tiny_pipe.unet.set_attn_processor(MathProcessor(lambda query, key, scores: scores))
    attention = find_module(tiny_pipe, ATTENTION)
    attention.register_forward_hook(lambda module, args, output: output / 0 * 0)
    block = find_module(tiny_pipe, ATTENTION.removesuffix(".attn1"))
    block.norm2.register_forward_pre_hook(lambda module, args: (args[0].nan_to_num(0.0),))
    block.register_forward_hook(lambda module, args, output: output.nan_to_num(0.0))
    found = diagnose(tiny_pipe, "a shoe", prove=True, **FAST)
    assert (found.cause, found.module) == ("hidden-nan", ATTENTION)
    assert found.proven and "without its hooks" in found.proof


def raise_one_weight(pipe):
    with torch.no_grad():
        pipe.unet.get_submodule(CONV.removeprefix("unet.")).weight[0, 0, 0, 0] = 8e4
    return pipe


def test_an_overflow_in_the_cast_of_autocast_is_proved_without_it(tiny_pipe):
    raise_one_weight(tiny_pipe)
    with torch.autocast("cpu", torch.float16), float16_arithmetic():
        diagnosis = diagnose(tiny_pipe, "a shoe", prove=True, **FAST)
    assert (diagnosis.cause, diagnosis.module) == ("bad-weights", CONV)
    assert diagnosis.proven and diagnosis.proof.startswith("without autocast")


def test_a_weight_that_overflowed_in_its_cast_is_proved_by_loading_it_anew(tiny_pipe, tmp_path):
    raise_one_weight(tiny_pipe).save_pretrained(tmp_path)
    pipe = type(tiny_pipe).from_pretrained(tmp_path).to(torch.float16)
    pipe.set_progress_bar_config(disable=True)
    with float16_arithmetic():
        diagnosis = diagnose(pipe, "a shoe", prove=True, **FAST)
    assert (diagnosis.cause, diagnosis.module, diagnosis.proven) == ("bad-weights", CONV, True)
    assert diagnosis.proof.startswith("unet loaded anew in float32")
    assert pipe.unet.dtype is torch.float16


def test_a_processor_without_an_answer_is_proved_by_diffusers_own(tiny_pipe):
    tiny_pipe.unet.set_attn_processor(MathProcessor(divide_zero_by_zero))
    before = dict(tiny_pipe.unet.attn_processors)
    diagnosis = diagnose(tiny_pipe, "a shoe", prove=True, **FAST)
    assert (diagnosis.cause, diagnosis.module) == ("invalid-arithmetic", ATTENTION)
    assert diagnosis.proven and diagnosis.proof.startswith("MathProcessor replaced by SDPA")
    assert tiny_pipe.unet.attn_processors == before


def test_a_weight_that_is_offloaded_has_its_name(tiny_pipe):
    raise_one_weight(tiny_pipe).unet.mid_block.resnets[0].conv1.weight.data[0, 0, 0, 0] = NAN
    accelerate.cpu_offload(tiny_pipe.unet, execution_device=torch.device("cpu"))
    diagnosis = diagnose(tiny_pipe, "a shoe", **FAST)
    assert (diagnosis.cause, diagnosis.module) == ("bad-weights", CONV)
    assert diagnosis.evidence["weights"] == [CONV + ".weight"]


def test_what_the_code_of_decode_itself_breaks_is_put_down_to_the_vae(tiny_pipe):
    tiny_pipe.vae.enable_tiling()
    tiny_pipe.vae.tile_latent_min_size, tiny_pipe.vae.tile_sample_min_size = 4, 32
    tiny_pipe.vae.blend_v = lambda a, b, extent: b / 0
    diagnosis = diagnose(tiny_pipe, "a shoe", **FAST)
    assert (diagnosis.stage, diagnosis.module) == ("vae", "vae")
    assert (diagnosis.cause, diagnosis.op) == ("invalid-arithmetic", "aten.div.Tensor")
