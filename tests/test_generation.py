"""What must never happen: a bad image on the disk, a half-written file, a lost warning."""

import hashlib
import json
import resource
import warnings

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, EulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image, PngImagePlugin
from tiny_pipelines import build_tiny_flux_pipe, build_tiny_sd3_pipe
from transformers import CLIPConfig, CLIPImageProcessor

from sdkit.emulate import mps
from sdkit.finding import NonFiniteError
from sdkit.generation import generate
from sdkit.generation.provenance import read_provenance
from sdkit.generation.record import RunRecord
from sdkit.generation.request import RESERVED
from sdkit.validation import ValidationError, check_image_file

NAN = float("nan")
FAST = {"num_inference_steps": 2, "progress": False}
TAKEN = ("prompt", "negative_prompt", "image")  # generate's own arguments of these names
CALLS_AN_IMAGE = 3  # of the UNet in two steps of PNDM


def plant(module, *, call, row=None, value=NAN):
    """Puts a bad value into every row, or one row, of the output of one call of a module."""
    calls = iter(range(1_000_000))

    def spoil(module, args, output):
        if next(calls) == call:
            output[slice(None) if row is None else slice(row, row + 1), 0, 0, 0] = value

    return module.register_forward_hook(spoil)


def pixels(record):
    return [image.pixels_sha256 for image in record.images]


def assert_alike(record, other):
    for image, twin in zip(record.images, other.images, strict=True):
        difference = np.asarray(image.pil_image, int) - np.asarray(twin.pil_image, int)
        assert abs(difference).max() <= 2


def names(folder):
    """Of the files; incidents have folders."""
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def test_images_are_saved_with_their_origin_inside(tiny_pipe, tmp_path):
    prompts = ["A brown boot, grey ground", "sapatos pretos, maçã 黑"]
    record = generate(tiny_pipe, prompts, seed=5, output_folder=tmp_path / "new" / "run", **FAST)
    folder = tmp_path / "new" / "run"
    assert names(folder) == [
        "000_a-brown-boot-grey-ground_seed5.png",
        "001_sapatos-pretos-maca_seed6.png",
        "record.json",
    ]
    assert (record.complete, record.valid_count, record.error) == (True, 2, None)
    for image, prompt, seed in zip(record.images, prompts, (5, 6), strict=True):
        check_image_file(folder / image.path)
        assert np.array_equal(np.asarray(Image.open(folder / image.path)), image.pil_image)
        origin = read_provenance(folder / image.path)
        assert (origin["prompt"], origin["seed"]) == (prompt, seed)
        assert origin["settings"]["num_inference_steps"] == 2
        assert origin["dtypes"] == dict.fromkeys(("vae", "text_encoder", "unet"), "float32")
        assert origin["scheduler"] == "PNDMScheduler"
        assert torch.__version__.startswith(origin["environment"]["torch"])


def test_the_record_round_trips(tiny_pipe, tmp_path):
    record = generate(tiny_pipe, ["a", "b"], output_folder=tmp_path, **FAST)
    assert RunRecord.load(tmp_path / "record.json") == record
    assert RunRecord.from_json(record.to_json()) == record
    frame = record.to_frame()
    assert list(frame.seed) == [0, 1] and frame.valid.all()
    assert str(record).startswith("2 of 2 images valid")


def give_it_a_finding(**told):
    """Writes a finding of the guard into a record, with something else told of it."""
    finding = {
        "component": "unet", "step": 0, "nan_count": 1, "inf_count": 0, "total": 4, "message": "",
    } | told  # fmt: skip
    return lambda text: text.replace('"finding": null', f'"finding": {json.dumps(finding)}')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"version": 3', '"version": 99'), "version 99, expected 3"),
        (lambda text: text.replace('"first_seconds": ', '"first_seconds": NaN, "x": '), "NaN"),
        (lambda text: text.replace('"scheduler"', '"sheduler"'), r"missing \['scheduler'\]"),
        (lambda text: text.replace('"nan_count"', '"nans"'), r"image 0: missing \['nan_count'\]"),
        (lambda text: text[: len(text) // 2], "not valid JSON"),
        (lambda text: "[]", "no object"),
        (lambda text: text.replace('"valid": true', '"valid": "false"'), "valid is 'false', expec"),
        (lambda text: text.replace('"seed": 0', '"seed": true'), "seed is True, expected int"),
        (give_it_a_finding(step="third"), "image 0: its finding lacks some of component"),
        (give_it_a_finding(step=-1), "or they are of another kind"),
    ],
)
def test_a_damaged_record_is_refused(tiny_pipe, tmp_path, change, message):
    text = generate(tiny_pipe, "a", **FAST).to_json()
    path = tmp_path / "record.json"
    path.write_text(change(text))
    with pytest.raises(ValidationError, match=message):
        RunRecord.load(path)


def test_noise_depends_on_the_seed_alone(tiny_pipe):
    """Not on the batch; the images then differ by what a batched matmul rounds otherwise."""
    seen = []
    tiny_pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    prompts = ["a", "b", "c"]
    alone = generate(tiny_pipe, prompts, guidance_scale=1, **FAST)
    noise = torch.cat(seen[::CALLS_AN_IMAGE])
    seen.clear()
    together = generate(tiny_pipe, prompts, guidance_scale=1, batch_size=3, **FAST)
    assert torch.equal(seen[0], noise) and not torch.equal(noise[0], noise[1])
    assert_alike(alone, together)
    assert pixels(generate(tiny_pipe, "c", seed=2, guidance_scale=1, **FAST)) == pixels(alone)[2:]
    seen.clear()
    generate(tiny_pipe, ["c", "a"], seed=[2, 0], guidance_scale=1, batch_size=2, **FAST)
    assert torch.equal(seen[0], noise[[2, 0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_noise_is_the_same_in_every_dtype_and_scaled_by_the_scheduler(tiny_pipe, dtype):
    tiny_pipe.scheduler = EulerDiscreteScheduler.from_config(tiny_pipe.scheduler.config)
    seen = []
    tiny_pipe.to(dtype).unet.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    generate(tiny_pipe, "a", guidance_scale=1, **FAST)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator("cpu").manual_seed(0))
    sigma = tiny_pipe.scheduler.sigmas[0]
    expected = noise.to(dtype) * tiny_pipe.scheduler.init_noise_sigma / (sigma**2 + 1) ** 0.5
    assert seen[0].dtype == dtype
    assert torch.allclose(seen[0].float(), expected.float(), rtol=2e-3, atol=1e-4)


def test_it_draws_what_plain_diffusers_draws(tiny_pipe):
    record = generate(tiny_pipe, "a", seed=3, **FAST)
    generator = torch.Generator("cpu").manual_seed(3)
    plain = tiny_pipe("a", generator=generator, num_inference_steps=2).images[0]
    assert np.array_equal(plain, record.images[0].pil_image)


@pytest.fixture(
    params=[build_tiny_sd3_pipe, build_tiny_flux_pipe], ids=lambda build: build.__name__
)
def tiny_transformer_pipe(request, tokenizer_folder):
    """A pipeline with a transformer: Stable Diffusion 3, and Flux, which packs its latents."""
    return request.param(tokenizer_folder)


def test_transformers_draw_what_plain_diffusers_draws(tiny_transformer_pipe, tmp_path):
    pipe = tiny_transformer_pipe
    settings = {**FAST, "seed": 3, "guidance_scale": 3.5, "image_size": 64}
    record = generate(pipe, ["a", "b"], output_folder=tmp_path, **settings)
    generator = torch.Generator("cpu").manual_seed(3)
    size = {"height": 64, "width": 64, "guidance_scale": 3.5, "num_inference_steps": 2}
    plain = pipe("a", generator=generator, **size).images[0]
    assert np.array_equal(plain, record.images[0].pil_image)
    assert_alike(record, generate(pipe, ["a", "b"], batch_size=2, **settings))
    origin = read_provenance(tmp_path / record.images[1].path)
    assert origin["pipeline"] == type(pipe).__name__ and "transformer" in origin["dtypes"]
    assert record.attention


def test_transformers_are_guarded_and_start_from_images(tiny_transformer_pipe):
    pipe = tiny_transformer_pipe
    source = Image.effect_noise((100, 70), 90)
    settings = {"num_inference_steps": 4, "strength": 0.5, "progress": False, "guidance_scale": 2}
    record = generate(pipe, ["a", "b"], image=source, **settings)
    assert record.pipeline.endswith("Img2ImgPipeline")
    assert record.images[0].pil_image.size == (96, 64)
    other = generate(pipe, ["a", "b"], image=source.rotate(180), **settings)
    assert pixels(other) != pixels(record)
    with torch.no_grad():
        pipe.transformer.proj_out.bias[0] = NAN
    with pytest.raises(NonFiniteError, match=r"image 0 \('a'\): transformer .* at step 0"):
        generate(pipe, "a", image_size=64, **FAST)


def test_sizes_are_multiples_of_what_a_token_stands_for(tokenizer_folder):
    flux = build_tiny_flux_pipe(tokenizer_folder)
    with pytest.raises(ValidationError, match="image_size: got 72.*multiple of 16"):
        generate(flux, "a", image_size=72, **FAST)


def test_pipelines_of_another_kind_are_refused_before_anything_runs(tiny_pipe, tmp_path):
    pipe = DDPMPipeline(unet=tiny_pipe.unet, scheduler=DDPMScheduler())
    with pytest.raises(
        ValidationError, match="DDPMPipeline: takes no prompt, guidance_scale.*Flux"
    ):
        generate(pipe, "a", output_folder=tmp_path / "run", **FAST)
    assert names(tmp_path) == []


def test_nan_raises_and_nothing_of_it_is_saved(tiny_pipe, tmp_path):
    plant(tiny_pipe.unet.conv_out, call=CALLS_AN_IMAGE + 1)
    with pytest.raises(NonFiniteError, match=r"image 1 \('b'\): unet .* at step 1") as caught:
        generate(tiny_pipe, ["a", "b", "c"], output_folder=tmp_path, **FAST)
    record = caught.value.record
    assert names(tmp_path) == ["000_a_seed0.png", "record.json"]
    assert RunRecord.load(tmp_path / "record.json") == record
    assert (record.complete, record.valid_count, len(record.images)) == (False, 1, 2)
    assert record.error == str(caught.value)
    assert (record.images[1].problem, record.images[1].finding["step"]) == ("nan", 1)
    assert caught.value.finding["stage"] == "unet"


def test_skip_drops_only_the_bad_images_of_a_batch(tiny_pipe, tmp_path):
    plant(tiny_pipe.unet.conv_out, call=1, row=4)  # conditional half of the second of three
    settings = {**FAST, "on_nonfinite": "skip", "output_folder": tmp_path}
    record = generate(tiny_pipe, ["a", "b", "c", "d"], batch_size=3, **settings)
    assert [image.valid for image in record.images] == [True, False, True, True]
    assert names(tmp_path) == [
        "000_a_seed0.png",
        "002_c_seed2.png",
        "003_d_seed3.png",
        "record.json",
    ]
    bad = record.images[1]
    assert (bad.problem, bad.path, bad.pil_image) == ("nan", None, None)
    assert (bad.finding["stage"], bad.finding["step"]) == ("unet", 1)
    assert bad.nan_count == 64 * 64 * 3 and bad.minimum is None
    assert record.complete and RunRecord.load(tmp_path / "record.json") == record


def test_inf_is_caught_although_diffusers_clamps_it(tiny_pipe, tmp_path):
    """An Inf out of the VAE is a white pixel afterwards: the image alone looks valid."""
    plant(tiny_pipe.vae.decoder, call=0, row=1, value=float("inf"))
    settings = {**FAST, "on_nonfinite": "skip", "output_folder": tmp_path}
    record = generate(tiny_pipe, ["a", "b"], batch_size=2, **settings)
    assert [image.problem for image in record.images] == [None, "inf"]
    assert "vae.decode" in record.images[1].message


@pytest.mark.parametrize("colour", [-1.0, 0.3])
def test_black_and_flat_images_are_not_saved(tiny_pipe, tmp_path, colour):
    """The other image of the batch is, before the error is raised."""
    tiny_pipe.vae.decoder.register_forward_hook(
        lambda module, args, output: output.index_fill(0, torch.tensor([0]), colour)
    )
    problem = "black" if colour == -1 else "one colour"
    with pytest.raises(ValidationError, match=rf"image 0 \('a'\): .*{problem}") as caught:
        generate(tiny_pipe, ["a", "b"], batch_size=2, output_folder=tmp_path, **FAST)
    assert not isinstance(caught.value, NonFiniteError)
    assert names(tmp_path) == ["001_b_seed1.png", "record.json"]
    assert [image.valid for image in caught.value.record.images] == [False, True]


def test_the_safety_checker_is_named(tiny_pipe):
    """Diffusers' own, so small and so strict that every image is too much for it."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 32, "patch_size": 16}  # fmt: skip
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16))
    checker.concept_embeds_weights.data.fill_(-2)
    tiny_pipe.register_modules(
        safety_checker=checker,
        feature_extractor=CLIPImageProcessor(size=32, crop_size={"height": 32, "width": 32}),
    )
    record = generate(tiny_pipe, "a", on_nonfinite="skip", **FAST)
    assert record.images[0].problem == "safety-checker"
    assert "no numerical fault" in record.images[0].message


def warn_on_step(pipe, step, timestep, kwargs):
    np.array([NAN], np.float32).astype(np.uint8)  # what diffusers does to an image
    warnings.warn("odd", stacklevel=1)
    return kwargs


def test_warnings_are_recorded_counted_and_shown_once(tiny_pipe):
    with pytest.warns() as shown:
        record = generate(tiny_pipe, ["a", "b"], callback_on_step_end=warn_on_step, **FAST)
    counts = {(w["category"], w["message"]): w["count"] for w in record.warnings}
    cast = ("RuntimeWarning", "invalid value encountered in cast")
    assert counts[cast] == counts[("UserWarning", "odd")] == 2 * CALLS_AN_IMAGE
    assert record.cast_warning
    assert sorted(str(w.message) for w in shown) == [cast[1], "odd"]
    assert not generate(tiny_pipe, "a", **FAST).cast_warning


def test_a_truncated_prompt_is_a_recorded_warning(tiny_pipe, tmp_path):
    record = generate(tiny_pipe, "shoe " * 100, output_folder=tmp_path, **FAST)
    assert any("truncated" in warning["message"] for warning in record.warnings)
    assert len(record.images[0].path) < 100


def test_seconds_of_the_first_and_of_the_rest(tiny_pipe):
    record = generate(tiny_pipe, ["a", "b", "c"], **FAST)
    seconds = [image.seconds for image in record.images]
    assert record.first_seconds == seconds[0] > 0
    assert record.rest_mean_seconds == pytest.approx((seconds[1] + seconds[2]) / 2)
    assert generate(tiny_pipe, "a", **FAST).rest_mean_seconds is None
    assert record.memory["peak_process_gib"] > 0.1 and record.memory["peak_device_gib"] is None


def test_emulated_runs_have_no_seconds_and_no_memory(tiny_pipe, tmp_path):
    with mps():
        record = generate(tiny_pipe, ["a", "b"], output_folder=tmp_path, **FAST)
    assert "emulated MPS" in record.emulated and "emulated MPS" in str(record)
    assert record.first_seconds is record.rest_mean_seconds is record.memory is None
    assert [image.seconds for image in record.images] == [None, None]
    assert read_provenance(tmp_path / record.images[0].path)["emulated"] == record.emulated


def test_image_to_image(tiny_pipe, tmp_path):
    random_pixels = np.random.default_rng(0).integers(0, 255, (70, 90, 3), np.uint8)
    source = Image.fromarray(random_pixels)
    source.save(tmp_path / "source.png")
    settings = {"num_inference_steps": 4, "strength": 0.5, "progress": False}
    alone = generate(tiny_pipe, ["a", "b"], image=tmp_path / "source.png", **settings)
    assert (alone.pipeline, alone.settings["strength"]) == ("StableDiffusionImg2ImgPipeline", 0.5)
    assert alone.images[0].pil_image.size == (88, 64)
    together = generate(tiny_pipe, ["a", "b"], image=[source, source], batch_size=2, **settings)
    assert_alike(alone, together)
    other = generate(tiny_pipe, ["a", "b"], image=source.rotate(180), **settings)
    assert pixels(other) != pixels(alone)
    resized = generate(tiny_pipe, "a", image=source, image_size=(64, 72), **settings)
    assert resized.images[0].pil_image.size == (72, 64)
    plant(tiny_pipe.vae.encoder, call=1)
    settings["on_nonfinite"] = "skip"
    record = generate(tiny_pipe, ["a", "b"], image=source, batch_size=2, **settings)
    assert [image.problem for image in record.images] == [None, "nan"]
    assert record.images[1].finding["component"] == "vae.encode"


def test_input_images_are_named_by_file_and_pixels_never_by_path(tiny_pipe, tmp_path):
    source = Image.effect_noise((80, 72), 90).convert("RGB")
    source.save(tmp_path / "mine.png")
    source.save(tmp_path / "again.bmp")
    inputs = [tmp_path / "mine.png", Image.open(tmp_path / "again.bmp"), source.rotate(180)]
    settings = {"num_inference_steps": 4, "strength": 0.5, "progress": False}
    folder = tmp_path / "run"
    record = generate(tiny_pipe, ["a"] * 3, image=inputs, output_folder=folder, **settings)
    digest = hashlib.sha256(source.tobytes()).hexdigest()
    found = [image.input_image for image in record.images]
    assert found[0] == {"file_name": "mine.png", "pixels_sha256": digest}
    assert found[1] == {"file_name": "again.bmp", "pixels_sha256": digest}
    assert found[2]["file_name"] is None and found[2]["pixels_sha256"] != digest
    assert RunRecord.load(folder / "record.json") == record
    for image in record.images:
        assert read_provenance(folder / image.path)["input_image"] == image.input_image
    assert str(tmp_path) not in record.to_json()
    assert generate(tiny_pipe, "a", **FAST).images[0].input_image is None


def test_a_record_of_version_1_still_loads(tiny_pipe):
    record = generate(tiny_pipe, ["a", "b"], **FAST)
    content = json.loads(record.to_json())
    content["version"] = 1
    for image in content["images"]:
        del image["input_image"]  # what version 1 did not have
    assert RunRecord.from_json(json.dumps(content)) == record


def test_negative_prompts_and_pipeline_arguments_arrive(tiny_pipe):
    plain = generate(tiny_pipe, ["a", "b"], **FAST)
    other = generate(tiny_pipe, ["a", "b"], negative_prompt=[None, "c"], **FAST)
    assert pixels(other)[0] == pixels(plain)[0] and pixels(other)[1] != pixels(plain)[1]
    assert pixels(generate(tiny_pipe, "a", guidance_rescale=0.7, **FAST)) != pixels(plain)[:1]


def test_an_interrupt_leaves_what_was_made(tiny_pipe, tmp_path):
    def interrupt(pipe, step, timestep, kwargs):
        if (tmp_path / "000_a_seed0.png").exists():
            raise KeyboardInterrupt
        return kwargs

    with pytest.raises(KeyboardInterrupt) as caught:
        generate(
            tiny_pipe, ["a", "b"], output_folder=tmp_path, callback_on_step_end=interrupt, **FAST
        )
    assert names(tmp_path) == ["000_a_seed0.png", "record.json"]
    record = RunRecord.load(tmp_path / "record.json")
    assert (record.complete, record.error, record.valid_count) == (False, "KeyboardInterrupt", 1)
    assert caught.value.record == record


def test_a_full_disk_leaves_nothing_half_written(tiny_pipe, tmp_path):
    """A limit on the size of files stands in for a disk that fills during the run."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with (
            pytest.warns(UserWarning, match="odd"),  # the full disk takes none of it away
            pytest.raises(ValidationError, match="cannot be written.*Free some space") as caught,
        ):
            generate(
                tiny_pipe, "a", callback_on_step_end=warn_on_step, output_folder=tmp_path, **FAST
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == []
    assert not caught.value.record.complete


def test_what_an_earlier_run_left_cannot_look_done(tiny_pipe, tmp_path):
    generate(tiny_pipe, ["a", "b"], output_folder=tmp_path, **FAST)
    (tmp_path / "notes.txt").write_text("mine")
    plant(tiny_pipe.unet.conv_out, call=0)
    with pytest.raises(NonFiniteError):
        generate(tiny_pipe, ["a", "b"], output_folder=tmp_path, **FAST)
    assert names(tmp_path) == ["notes.txt", "record.json"]


def test_the_pipeline_is_left_as_it_was(tiny_pipe):
    tiny_pipe.set_progress_bar_config(desc="steps")
    generate(tiny_pipe, ["a", "b"], **FAST)
    assert tiny_pipe._progress_bar_config == {"desc": "steps"}
    assert not tiny_pipe.unet._forward_hooks and "decode" not in vars(tiny_pipe.vae)


def test_the_progress_bar_counts_images(tiny_pipe, capsys):
    generate(tiny_pipe, ["a", "b"], num_inference_steps=2)
    assert "2/2" in capsys.readouterr().err
    generate(tiny_pipe, ["a", "b"], **FAST)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "prompts: got"),
        ({"prompts": ["a", " "]}, r"prompts\[1\]: got ' '"),
        ({"prompts": "\ud800"}, "no valid Unicode"),
        ({"num_inference_steps": 0}, "num_inference_steps: got 0, expected at least 1"),
        ({"num_inference_steps": 2.5}, "num_inference_steps: got 2.5"),
        ({"guidance_scale": NAN}, "guidance_scale: got nan"),
        ({"image_size": 63}, "image_size: got 63.*multiple of 8"),
        ({"image_size": (64, 64, 3)}, "image_size"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"seed": [1, 2]}, "seed: got 2 for 1 prompts"),
        ({"seed": -1}, "seed: got -1"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: got 2 for 1"),
        ({"num_inference_step": 3}, "Did you mean num_inference_steps"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite: got 'ignore'"),
        ({"image": "nowhere.png"}, "image: nowhere.png cannot be opened"),
        ({"image": np.zeros((64, 64, 3))}, "image: got ndarray"),
        ({"image": Image.new("RGB", (64, 64)), "strength": 0.1}, "strength: 0.1 of 2 steps"),
        *(({name: None}, f"{name}: generate") for name in RESERVED if name not in TAKEN),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else None,
)  # fmt: skip
def test_bad_input_is_refused_before_anything_happens(tiny_pipe, tmp_path, arguments, message):
    def fail(*_):
        raise AssertionError("the pipeline ran")

    tiny_pipe.text_encoder.register_forward_pre_hook(fail)
    folder = tmp_path / "run"
    arguments = {"prompts": "a", "output_folder": folder, **FAST, **arguments}
    with pytest.raises(ValidationError, match=message):
        generate(tiny_pipe, arguments.pop("prompts"), **arguments)
    assert not folder.exists()


@pytest.mark.parametrize("name", ["file", "file/below", "x" * 300, "zero\0byte"])
def test_a_folder_that_cannot_be_is_refused(tiny_pipe, tmp_path, name):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValidationError, match="output_folder: .* cannot be written"):
        generate(tiny_pipe, "a", output_folder=tmp_path / name, **FAST)
    assert names(tmp_path) == ["file"]


def test_what_is_no_pipeline_is_refused(tiny_pipe):
    with pytest.raises(ValidationError, match="expected a diffusers pipeline"):
        generate(tiny_pipe.unet, "a")


def test_provenance_of_what_generate_did_not_write(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no image")
    damaged = PngImagePlugin.PngInfo()
    damaged.add_text("sdkit", "{")
    Image.new("RGB", (8, 8)).save(tmp_path / "damaged.png", pnginfo=damaged)
    for name, message in (
        ("damaged.png", "its provenance is damaged"),
        ("plain.png", "no provenance"),
        ("text.png", "cannot be read"),
        ("none.png", "No such file"),
    ):
        with pytest.raises(ValidationError, match=message):
            read_provenance(tmp_path / name)


def test_nothing_in_the_record_is_not_json(tiny_pipe):
    """A callback, a tuple and a NaN among the settings."""
    record = generate(
        tiny_pipe, "a", callback_on_step_end=lambda p, i, t, kwargs: kwargs,
        cross_attention_kwargs={"scale": NAN}, timesteps=None, **FAST,
    )  # fmt: skip
    settings = json.loads(record.to_json())["settings"]
    assert settings["callback_on_step_end"] == "function"
    assert settings["cross_attention_kwargs"] == {"scale": None}
