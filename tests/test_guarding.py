"""Plant a NaN, then demand its stage and step; plant none, and demand silence."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
)
from tiny_pipelines import build_tiny_pipe, build_tiny_xl_pipe

from sdkit.emulate import float16_arithmetic
from sdkit.finding import NonFiniteError
from sdkit.guarding import guard, install_guard, remove_guard, unguarded
from sdkit.validation import ValidationError

STEPS = 3
NAN = float("nan")


def run(pipe, prompt="a shoe", **pipe_kwargs):
    pipe_kwargs = {"num_inference_steps": STEPS, "output_type": "np", **pipe_kwargs}
    generator = torch.Generator("cpu").manual_seed(0)
    return pipe(prompt, generator=generator, **pipe_kwargs).images


def plant(module, *, call=0, row=None, value=NAN):
    """Puts one bad value into the output of one call of a module (of its first tensor)."""
    calls = iter(range(1_000_000))

    def spoil(module, args, output):
        if next(calls) == call:
            tensor = output if isinstance(output, torch.Tensor) else output[0]
            tensor[slice(None) if row is None else row].flatten()[0] = value

    return module.register_forward_hook(spoil)


def find(pipe, prompt="a shoe", **pipe_kwargs):
    """The finding of a run that must fail."""
    with pytest.raises(NonFiniteError) as caught, guard(pipe):
        run(pipe, prompt, **pipe_kwargs)
    return caught.value.finding


def hooks_and_methods(pipe):
    """All that a guard could leave behind, by module."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
    return {
        (component, path): (
            [dict(getattr(module, name)) for name in names],
            sorted(vars(module)),
            module._compiled_call_impl,
        )
        for component in ("text_encoder", "unet", "vae")
        for path, module in getattr(pipe, component).named_modules()
    }


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_unet_is_named_with_step_timestep_and_counts(tiny_pipe, value):
    plant(tiny_pipe.unet.conv_out, call=2, row=1, value=value)
    finding = find(tiny_pipe)
    assert (finding.stage, finding.step, finding.component) == ("unet", 2, "unet")
    assert finding.timestep == tiny_pipe.scheduler.timesteps[2]
    assert (finding.nan_count, finding.inf_count) == ((1, 0) if value != value else (0, 1))
    assert (finding.total, finding.rows, finding.row_count) == (2 * 4 * 8 * 8, (1,), 2)
    assert finding.message.startswith("unet (float32, cpu): 1 of 512 values are")
    assert "at step 2 (timestep 334)" in finding.message


def test_it_raises_before_the_scheduler_has_used_it(tiny_pipe):
    done = []
    plant(tiny_pipe.unet.conv_out, call=2)

    def note(pipe, step, timestep, kwargs):
        done.append(step)
        return kwargs

    find(tiny_pipe, callback_on_step_end=note)
    assert done == [0, 1]


def test_text_encoder_is_named(tiny_pipe):
    plant(tiny_pipe.text_encoder)
    finding = find(tiny_pipe)
    assert (finding.stage, finding.step, finding.tensor) == ("text_encoder", None, "output")


@pytest.mark.parametrize("module", ["decoder", "post_quant_conv"])
def test_vae_decode_is_named(tiny_pipe, module):
    plant(getattr(tiny_pipe.vae, module))
    finding = find(tiny_pipe)
    assert (finding.stage, finding.step, finding.component) == ("vae", None, "vae.decode")


@pytest.mark.parametrize("method", ["enable_tiling", "enable_slicing"])
def test_vae_is_judged_whole_under_tiling_and_slicing(tiny_pipe, method):
    getattr(tiny_pipe.vae, method)()
    tiny_pipe.vae.tile_latent_min_size, tiny_pipe.vae.tile_sample_min_size = 4, 32
    plant(tiny_pipe.vae.decoder, call=1)
    with guard(tiny_pipe, on_nonfinite="record") as report:
        run(tiny_pipe, ["a shoe"] * 2)
    assert [finding.stage for finding in report] == ["vae"]
    assert (report[0].row_count, report.calls["vae.decode"]) == (2, 1)
    assert report[0].rows == ((1,) if method == "enable_slicing" else (0,))


def test_autoencoder_tiny_is_named(tiny_pipe):
    tiny_pipe.vae = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4,
    )  # fmt: skip
    with guard(tiny_pipe) as report:
        run(tiny_pipe)
    assert report.calls["vae.decode"] == 1
    plant(tiny_pipe.vae.decoder)
    assert find(tiny_pipe).stage == "vae"


def spoil_latents_after(step):
    """A callback that does what a broken `scheduler.step` does."""

    def spoil(pipe, i, timestep, kwargs):
        if i == step:
            kwargs["latents"] = kwargs["latents"] * NAN
        return kwargs

    return spoil


@pytest.mark.parametrize("step", range(STEPS + 1))
def test_scheduler_is_named_not_who_was_fed(tiny_pipe, step):
    """After the last step (PNDM adds one) it is the VAE that was fed."""
    finding = find(tiny_pipe, callback_on_step_end=spoil_latents_after(step))
    assert (finding.stage, finding.step) == ("scheduler", step)
    assert finding.component == ("unet" if step < STEPS else "vae.decode")
    assert finding.timestep == tiny_pipe.scheduler.timesteps[step]


def test_bad_latents_from_the_caller(tiny_pipe):
    latents = torch.zeros(1, 4, 8, 8)
    latents[0, 0, 0, 0] = NAN
    finding = find(tiny_pipe, latents=latents)
    assert (finding.stage, finding.step, finding.tensor) == ("latents", None, "sample")
    assert "latents=" in finding.message


def test_bad_prompt_embeds_from_the_caller(tiny_pipe):
    prompt_embeds = torch.zeros(1, 77, 32)
    negative_prompt_embeds = torch.full((1, 77, 32), NAN)
    finding = find(
        tiny_pipe, None, prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds
    )
    assert (finding.stage, finding.step, finding.rows) == ("prompt_embeds", 0, (0,))


def test_of_two_bad_arguments_the_latents_are_told(tiny_pipe):
    bad = {"latents": torch.full((1, 4, 8, 8), NAN), "prompt_embeds": torch.full((1, 77, 32), NAN)}
    assert find(tiny_pipe, None, **bad, guidance_scale=1.0).stage == "latents"


def test_the_dtype_is_the_component_s_own_behind_a_cast(tiny_pipe):
    def cast(module, args, output):
        return (output[0].double() * NAN,)

    tiny_pipe.unet.register_forward_hook(cast)
    assert find(tiny_pipe).dtype == "float32"


def test_a_mask_may_say_no_with_minus_infinity(tiny_pipe):
    """Its words are then left out; an Inf anywhere else is a finding."""
    unmasked = run(tiny_pipe)
    given = {"encoder_attention_mask": torch.ones(2, 77)}
    given["encoder_attention_mask"][:, 5:] = -float("inf")

    def add(module, args, kwargs):
        return args, kwargs | given

    tiny_pipe.unet.register_forward_pre_hook(add, with_kwargs=True)
    with guard(tiny_pipe) as report:
        masked = run(tiny_pipe)
    assert len(report) == 0 and np.isfinite(masked).all()
    assert not np.array_equal(masked, unmasked)
    given["mid_block_additional_residual"] = torch.full((2, 64, 4, 4), -float("inf"))
    finding = find(tiny_pipe)
    assert (finding.stage, finding.tensor) == ("conditioning", "mid_block_additional_residual")


def test_bad_timestep_is_the_schedulers(tiny_pipe):
    def spoil(module, args, kwargs):
        return (args[0], torch.tensor(NAN)), kwargs

    tiny_pipe.unet.register_forward_pre_hook(spoil, with_kwargs=True)
    assert find(tiny_pipe).stage == "scheduler"


def test_image_to_image(tiny_pipe):
    pipe = StableDiffusionImg2ImgPipeline(**tiny_pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    image = np.full((1, 64, 64, 3), 0.5, np.float32)
    with guard(pipe) as report:
        run(pipe, image=image, strength=0.5, num_inference_steps=6)
    assert report.calls["vae.encode"] == 1
    planted = plant(pipe.unet.conv_out, call=1)
    finding = find(pipe, image=image, strength=0.5, num_inference_steps=6)
    assert (finding.stage, finding.step) == ("unet", 1)  # its own first step is 0
    planted.remove()
    # PNDM lists its second timestep twice, and image-to-image may start between the two.
    planted = plant(pipe.unet.conv_out, call=1)
    finding = find(pipe, image=image, strength=0.5, num_inference_steps=4)
    assert (finding.step, finding.timestep) == (1, pipe.scheduler.timesteps[3])
    planted.remove()
    plant(pipe.vae.quant_conv)
    assert find(pipe, image=image).component == "vae.encode"
    assert find(pipe, image=image * NAN).stage == "image"


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler],
)
def test_step_is_the_index_of_the_loop(tiny_pipe, scheduler):
    tiny_pipe.scheduler = scheduler.from_config(tiny_pipe.scheduler.config)
    steps = []

    def note(pipe, step, timestep, kwargs):
        steps.append(step)
        return kwargs

    with guard(tiny_pipe, on_nonfinite="record") as report:
        run(tiny_pipe, callback_on_step_end=note)
        assert len(report) == 0
        plant(tiny_pipe.unet.conv_out, call=steps[-1])
        run(tiny_pipe)
    assert (report[0].stage, report[0].step) == ("unet", steps[-1])
    assert report[0].timestep == tiny_pipe.scheduler.timesteps[-1]


@pytest.mark.parametrize(
    "pipe_kwargs",
    [
        {"prompt": ["a", "b"]},
        {"guidance_scale": 1.0},
        {"num_images_per_prompt": 2},
        {"num_inference_steps": 1},
        {"output_type": "latent"},
        {"guidance_rescale": 0.7},
    ],
    ids=str,
)
def test_healthy_runs_are_silent_and_unchanged(tiny_pipe, pipe_kwargs):
    before = run(tiny_pipe, **pipe_kwargs)
    with guard(tiny_pipe) as report:
        after = run(tiny_pipe, **pipe_kwargs)
        run(tiny_pipe, **pipe_kwargs)
    assert len(report) == 0 and report.calls["unet"] >= 2
    assert np.array_equal(before, after)


def test_steps_restart_with_each_pipeline_call(tiny_pipe):
    """Also where nothing but the UNet is called: embeddings in, latents out."""
    embeds = {"prompt": None, "prompt_embeds": torch.zeros(1, 77, 32), "guidance_scale": 1.0}
    plant(tiny_pipe.unet.conv_out, call=(STEPS + 1) + 2)
    with guard(tiny_pipe, on_nonfinite="record") as report:
        run(tiny_pipe, **embeds, output_type="latent")
        run(tiny_pipe, **embeds, output_type="latent")
        plant(tiny_pipe.unet.conv_out, call=1)
        run(tiny_pipe)
    assert [finding.step for finding in report] == [2, 1]


def test_a_run_that_died_does_not_shift_the_next(tiny_pipe):
    planted = plant(tiny_pipe.unet.conv_out, call=1)
    with guard(tiny_pipe):
        with pytest.raises(NonFiniteError):
            run(tiny_pipe)
        planted.remove()
        plant(tiny_pipe.unet.conv_out, call=2)
        with pytest.raises(NonFiniteError, match="at step 2"):
            run(tiny_pipe)


def test_record_keeps_where_it_arises_not_where_it_is_passed_on(tiny_pipe):
    """Two images of one batch go bad at different steps: two findings, each with its row."""
    plant(tiny_pipe.unet.conv_out, call=1, row=3)  # the conditional half of the second image
    plant(tiny_pipe.unet.conv_out, call=2, row=0)
    with guard(tiny_pipe, on_nonfinite="record") as report:
        images = run(tiny_pipe, ["a", "b"], callback_on_step_end=lambda p, i, t, kwargs: kwargs)
    assert [(f.stage, f.step, f.rows) for f in report] == [
        ("unet", 1, (3,)),
        ("unet", 2, (0, 1, 3)),
    ]
    assert np.isnan(images).any(axis=(1, 2, 3)).all()


def test_record_tells_one_cause_once(tiny_pipe):
    """Bad embeddings spoil every later stage; they are reported where they arise."""
    plant(tiny_pipe.text_encoder, call=2, row=0)
    with guard(tiny_pipe, on_nonfinite="record") as report:
        run(tiny_pipe)
        assert len(report) == 0
        run(tiny_pipe)
    assert [finding.stage for finding in report] == ["text_encoder"]


def test_nothing_stays_behind(tiny_pipe):
    before = hooks_and_methods(tiny_pipe)
    with guard(tiny_pipe):
        assert hooks_and_methods(tiny_pipe) != before
        run(tiny_pipe)
    assert hooks_and_methods(tiny_pipe) == before
    with pytest.raises(KeyboardInterrupt), guard(tiny_pipe):
        raise KeyboardInterrupt
    assert hooks_and_methods(tiny_pipe) == before
    plant(tiny_pipe.vae.decoder)
    before = hooks_and_methods(tiny_pipe)
    find(tiny_pipe)
    assert hooks_and_methods(tiny_pipe) == before


def test_nested_guards(tiny_pipe):
    before = hooks_and_methods(tiny_pipe)
    with guard(tiny_pipe, on_nonfinite="record") as outer, guard(tiny_pipe) as inner:
        run(tiny_pipe)
    assert outer.calls == inner.calls == {"text_encoder": 2, "unet": STEPS + 1, "vae.decode": 1}
    assert hooks_and_methods(tiny_pipe) == before


def test_a_permanent_guard_stops_a_plain_call_and_can_be_taken_off(tiny_pipe):
    before = hooks_and_methods(tiny_pipe)
    healthy = run(tiny_pipe)
    install_guard(tiny_pipe)
    install_guard(tiny_pipe)  # changes nothing
    assert np.array_equal(run(tiny_pipe), healthy)
    planted = plant(tiny_pipe.unet.conv_out, call=2)
    with pytest.raises(NonFiniteError, match=r"unet .* at step 2 \(timestep 334\)"):
        run(tiny_pipe)
    planted.remove()
    norm = next(m for m in tiny_pipe.text_encoder.modules() if isinstance(m, torch.nn.LayerNorm))
    for module, stage in ((norm, "text_encoder"), (tiny_pipe.vae.decoder, "vae")):
        planted = plant(module)
        with pytest.raises(NonFiniteError) as caught:
            run(tiny_pipe)
        assert caught.value.finding.stage == stage
        planted.remove()
    remove_guard(tiny_pipe)
    remove_guard(tiny_pipe)
    assert hooks_and_methods(tiny_pipe) == before
    plant(tiny_pipe.vae.decoder)
    assert np.isnan(run(tiny_pipe)).any()


def test_a_permanent_guard_rests_inside_a_guard_and_comes_back(tiny_pipe):
    install_guard(tiny_pipe)
    before = hooks_and_methods(tiny_pipe)
    planted = plant(tiny_pipe.unet.conv_out, call=1)
    with guard(tiny_pipe, on_nonfinite="record") as report:
        assert np.isnan(run(tiny_pipe)).any()
    assert [(finding.stage, finding.step) for finding in report] == [("unet", 1)]
    planted.remove()
    assert hooks_and_methods(tiny_pipe) == before
    tiny_pipe.vae.decoder.conv_out.bias.data[0] = NAN
    with unguarded(tiny_pipe):
        assert np.isnan(run(tiny_pipe)).any()
    with pytest.raises(NonFiniteError, match="vae.decode"):
        run(tiny_pipe)


def test_a_permanent_guard_does_not_rest_for_another_pipeline(tiny_pipe, tokenizer_folder):
    install_guard(tiny_pipe)
    plant(tiny_pipe.unet.conv_out)
    with unguarded(build_tiny_pipe(tokenizer_folder)), pytest.raises(NonFiniteError, match="unet"):
        run(tiny_pipe)


def test_a_permanent_guard_belongs_to_the_components(tiny_pipe):
    """As `from_pipe` shares them."""
    install_guard(tiny_pipe)
    other = StableDiffusionImg2ImgPipeline(**tiny_pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    image = np.full((1, 64, 64, 3), 0.5, np.float32)
    plant(other.unet.conv_out, call=1)
    with guard(other, on_nonfinite="record") as report:
        run(other, image=image)
    assert len(report) == 1
    other.vae.quant_conv.bias.data[0] = NAN
    with pytest.raises(NonFiniteError, match="vae.encode"):
        run(other, image=image)
    remove_guard(other)
    assert np.isnan(run(other, image=image)).any()


def test_a_permanent_guard_keeps_no_unet_alive(tokenizer_folder):
    alive = []
    gc.collect()
    gc.disable()
    try:
        for is_guarded in (False, True):
            pipe = build_tiny_pipe(tokenizer_folder)
            if is_guarded:
                install_guard(pipe)
            run(pipe)
            unet = weakref.ref(pipe.unet)
            del pipe
            alive.append(unet() is not None)
    finally:
        gc.enable()
    assert alive == [False, False]


def test_a_copy_made_inside_uses_its_own_weights(tiny_pipe):
    """As an EMA copy would be; a closure over the original would decode with the wrong weights."""
    latents = torch.ones(1, 4, 8, 8)
    with guard(tiny_pipe), torch.no_grad():
        copied = copy.deepcopy(tiny_pipe.vae)
        copied.decoder.conv_out.bias += 7
        difference = copied.decode(latents).sample - tiny_pipe.vae.decode(latents).sample
    assert difference.min() > 6.9


def test_lora_layers(tiny_pipe):
    from peft import LoraConfig

    tiny_pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    with torch.no_grad():
        for name, parameter in tiny_pipe.unet.named_parameters():
            if "lora_B" in name:
                parameter.fill_(NAN)
    assert (find(tiny_pipe).stage, find(tiny_pipe).step) == ("unet", 0)


def test_compiled_as_a_wrapper(compilable_pipe):
    compilable_pipe.unet = torch.compile(compilable_pipe.unet, backend="eager")
    compilable_pipe.vae = torch.compile(compilable_pipe.vae, backend="eager")
    with guard(compilable_pipe) as report:
        run(compilable_pipe)
    assert report.calls == {"text_encoder": 2, "unet": STEPS + 1, "vae.decode": 1}
    compilable_pipe.unet.conv_out.bias.data[0] = NAN
    assert find(compilable_pipe).stage == "unet"


def test_compiled_in_place(compilable_pipe):
    """fullgraph refuses what a forward hook would break; the compiled code must be left alone."""
    compilable_pipe.unet.compile(backend="eager", fullgraph=True)
    compilable_pipe.vae.decode = torch.compile(compilable_pipe.vae.decode, backend="eager")
    before = (compilable_pipe.unet._compiled_call_impl, compilable_pipe.vae.decode)
    run(compilable_pipe)
    compilable_pipe.vae.decoder.conv_out.bias.data[0] = NAN
    assert find(compilable_pipe).stage == "vae"
    compilable_pipe.unet.conv_out.bias.data[0] = NAN
    assert find(compilable_pipe).stage == "unet"
    assert (compilable_pipe.unet._compiled_call_impl, compilable_pipe.vae.decode) == before


@pytest.fixture
def tiny_xl_pipe(tokenizer_folder):
    return build_tiny_xl_pipe(tokenizer_folder)


def test_xl_hidden_states_and_pooled_embeddings(tiny_xl_pipe):
    with guard(tiny_xl_pipe) as report:
        run(tiny_xl_pipe)
    assert report.calls["text_encoder_2"] == 1 and len(report) == 0
    planted = plant(tiny_xl_pipe.text_encoder_2.text_projection)
    assert find(tiny_xl_pipe).component == "text_encoder_2"
    planted.remove()
    embeds = dict(zip(
        ("prompt_embeds", "negative_prompt_embeds"), torch.zeros(2, 1, 77, 64), strict=True
    ))  # fmt: skip
    pooled = {"pooled_prompt_embeds": torch.full((1, 32), NAN)}
    finding = find(
        tiny_xl_pipe, None, **embeds, **pooled, negative_pooled_prompt_embeds=torch.zeros(1, 32)
    )
    assert (finding.stage, finding.tensor) == ("conditioning", "added_cond_kwargs")


def test_what_cannot_be_watched_is_refused(tiny_pipe):
    for not_a_pipe in (tiny_pipe.unet, tiny_pipe.config, None, "mini"):
        with pytest.raises(ValidationError, match="expected a diffusers pipeline"):
            with guard(not_a_pipe):
                pass
    tiny_pipe.unet = None
    with pytest.raises(ValidationError, match="StableDiffusionPipeline: found .*vae.* to watch"):
        with guard(tiny_pipe):
            pass
    with pytest.raises(ValidationError, match='expected "raise" or "record"'):
        with guard(tiny_pipe, on_nonfinite="ignore"):
            pass


def test_an_idle_guard_says_that_it_saw_nothing(tiny_pipe):
    with guard(tiny_pipe) as report:
        pass
    assert str(report) == "no NaN, no Inf (calls judged: none)"


def test_the_error_survives_pickling(tiny_pipe):
    """As it does on its way back from a worker process."""
    plant(tiny_pipe.unet.conv_out)
    with pytest.raises(NonFiniteError) as caught, guard(tiny_pipe):
        run(tiny_pipe)
    copied = pickle.loads(pickle.dumps(caught.value))
    assert copied.finding == caught.value.finding and str(copied) == str(caught.value)


def test_an_error_leaves_no_lifted_vae(tokenizer_folder):
    pipe = build_tiny_xl_pipe(tokenizer_folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.register_to_config(force_upcast=True)
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight[0] = NAN
    pipe.to(torch.float16)
    with float16_arithmetic(), pytest.raises(NonFiniteError), guard(pipe):
        run(pipe)
    assert {parameter.dtype for parameter in pipe.vae.parameters()} == {torch.float16}


@pytest.mark.parametrize("again", [False, True], ids=["at the end", "before the next call"])
def test_latents_that_no_component_is_given_are_judged_too(tiny_pipe, again):
    """The last step's, where a caller takes the latents themselves: for a refiner, say."""
    step, calls = tiny_pipe.scheduler.step, iter(range(100))
    last = run_and_count(tiny_pipe) - 1

    def spoil(*args, **kwargs):
        output = step(*args, **kwargs)
        if next(calls) == last:
            output[0][0, 1, 2, 3] = NAN
        return output

    tiny_pipe.scheduler.step = spoil
    done = []

    def call():
        with guard(tiny_pipe):
            for _ in range(1 + again):
                run(tiny_pipe, output_type="latent")
                done.append(1)

    with pytest.raises(NonFiniteError, match=r"scheduler\.step .*1 of 256 values are NaN after"):
        call()
    assert len(done) == 1
    assert tiny_pipe.scheduler.step is spoil


def run_and_count(pipe):
    """How many steps a run has."""
    counted = []
    run(pipe, output_type="latent", callback_on_step_end=lambda *given: counted.append(1) or {})
    return len(counted)


def test_latents_of_a_healthy_run_are_no_finding(tiny_pipe):
    with guard(tiny_pipe) as report:
        run(tiny_pipe, output_type="latent")
        run(tiny_pipe)
    assert not list(report)
