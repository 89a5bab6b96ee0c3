"""What was asked for is what is loaded, and what cannot be is refused with the reason."""

import copy
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from tiny_pipelines import build_tiny_xl_pipe

from sdkit.device import GIB
from sdkit.emulate import mps
from sdkit.finding import NonFiniteError
from sdkit.generation import generate
from sdkit.guarding import guard, remove_guard
from sdkit.loading import LoadReport, PrecisionWarning, load_pipeline
from sdkit.loading.border_casts import install_border_casts, remove_border_casts
from sdkit.loading.checkpoint import find_checkpoint
from sdkit.loading.dtype_policy import choose_dtypes, find_cautions, find_memory_caution
from sdkit.loading.memory_need import find_activations_gib
from sdkit.loading.recipe import RECIPE_VERSION, Recipe, take_fingerprint
from sdkit.loading.weights import check_components
from sdkit.precision import predict_memory
from sdkit.validation import ValidationError

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"
MIXES = [
    {"unet": "float16", "vae": "float32"},
    {"unet": "float32", "vae": "float16"},
    {"unet": "bfloat16", "text_encoder": "float16", "vae": "float32"},
    {"text_encoder": torch.bfloat16, "default": "float32"},
]


def load(folder, **options):
    pipe, report = load_pipeline(folder, backend="cpu", progress=False, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe, report


def draw(pipe, **options):
    # Noise drawn in float32: drawn in another dtype it is other noise (seen with torch 2.7).
    generator = torch.Generator("cpu").manual_seed(0)
    if "image" not in options:
        options["latents"] = torch.randn(1, 4, 8, 8, generator=generator)
    return pipe(
        "black shoe", num_inference_steps=2, generator=generator, output_type="np", **options
    ).images


def psnr_db(image, reference):
    return -10 * np.log10(np.mean((image - reference) ** 2) + 1e-12)


@pytest.fixture
def broken_folder(tiny_folder, tmp_path):
    """A copy of the tiny pipeline to break."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "broken"))


def edit_weights(path, edit):
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_loads_as_diffusers_loads_it_and_the_report_says_how(tiny_folder):
    pipe, report = load(tiny_folder)
    plain = type(pipe).from_pretrained(tiny_folder)
    plain.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(pipe), draw(plain))
    assert report.pipeline_class == "StableDiffusionPipeline"
    assert report.dtypes == dict.fromkeys(("text_encoder", "unet", "vae"), "float32")
    assert report.device == "cpu"
    assert "asked for" in report.device_reason
    assert report.border_casts == ()
    assert report.weight_bytes["unet"] == 4 * sum(p.numel() for p in pipe.unet.parameters())
    assert report.environment["torch"].startswith(torch.__version__.split("+")[0])


def test_the_report_round_trips_and_reads_as_aligned_lines(tiny_folder):
    _, report = load(tiny_folder, dtype={"unet": "float16", "vae": "float32"})
    assert LoadReport.from_json(report.to_json()) == report
    lines = str(report).splitlines()
    assert all(line[16] != " " and line[15] == " " for line in lines)
    assert any(line.split()[:2] == ["unet", "float16,"] for line in lines)


@pytest.mark.parametrize("mix", MIXES)
def test_mixed_dtypes_draw_text_to_image_and_image_to_image(tiny_folder, mix):
    pipe, report = load(tiny_folder, dtype=mix)
    reference, _ = load(tiny_folder)
    for name, dtype in report.dtypes.items():
        found = {str(p.dtype) for p in getattr(pipe, name).parameters()}
        assert found == {f"torch.{dtype}"}, name
        asked = str(mix.get(name, mix.get("default", "float32"))).removeprefix("torch.")
        assert dtype == asked
    assert psnr_db(draw(pipe), draw(reference)) > 35
    photo = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    images = []
    for one in (pipe, reference):
        again = StableDiffusionImg2ImgPipeline(**one.components, requires_safety_checker=False)
        again.set_progress_bar_config(disable=True)
        images.append(draw(again, image=photo, strength=0.9))
    # Noise drawn in another dtype is other noise: so not equal, but a picture of the same photo.
    assert all(np.isfinite(image).all() and image.std() > 0.01 for image in images)
    assert abs(images[0].mean() - images[1].mean()) < 0.05


def test_without_the_casts_mixed_dtypes_crash_and_with_them_removed_again(tiny_folder):
    pipe, _ = load(tiny_folder, dtype={"unet": "float16", "vae": "float32"})
    image = draw(pipe)
    assert set(install_border_casts(pipe)) == {"unet", "vae"}  # the second time
    assert np.array_equal(draw(pipe), image)
    remove_border_casts(pipe)
    assert not pipe.unet._forward_hooks
    assert not pipe.unet._forward_pre_hooks
    assert "to" not in vars(pipe.vae)
    with pytest.raises(RuntimeError, match="dtype|type"):
        draw(pipe)


def test_the_unet_hands_its_prediction_back_in_the_latents_dtype_and_keeps_timesteps(tiny_folder):
    pipe, _ = load(tiny_folder, dtype={"unet": "float16", "vae": "float32"})
    seen = []
    pipe.unet.time_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    latents, prompt_embeds = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 32)
    timestep = torch.tensor([801.37])
    for options in ({"return_dict": False}, {}):
        noise_pred = pipe.unet(latents, timestep, encoder_hidden_states=prompt_embeds, **options)[0]
        assert noise_pred.dtype == torch.float32
        assert seen[-1].dtype == torch.float32
        assert seen[-1].item() == timestep.item()


def test_border_casts_keep_the_dtype_of_a_vae(tiny_folder):
    # What diffusers' SDXL pipeline does on MPS with a VAE of another dtype than the latents.
    pipe, _ = load(tiny_folder, dtype={"unet": "float16", "vae": "float32"})
    twin = copy.deepcopy(pipe.vae)
    assert pipe.vae.to(torch.float16) is pipe.vae
    assert pipe.vae.to("cpu", torch.float16).dtype == torch.float32
    twin.to("meta")
    assert {p.device.type for p in twin.parameters()} == {"meta"}
    assert {p.device.type for p in pipe.vae.parameters()} == {"cpu"}
    remove_border_casts(pipe)
    assert pipe.vae.to(torch.float16).dtype == torch.float16


@pytest.fixture(scope="module")
def tiny_xl_folder(tokenizer_folder, tmp_path_factory):
    pipe = build_tiny_xl_pipe(tokenizer_folder)
    pipe.scheduler = EulerDiscreteScheduler()  # SDXL's own
    folder = tmp_path_factory.mktemp("models") / "tiny_xl"
    pipe.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "mix",
    [
        {"unet": "float16", "vae": "float32"},
        {"default": "bfloat16", "vae": "float32"},
        {"text_encoder": "float16", "text_encoder_2": "bfloat16", "default": "float32"},
    ],
)
def test_mixed_dtypes_work_for_sdxl(tiny_xl_folder, mix):
    pipe, report = load(tiny_xl_folder, dtype=mix)
    reference, _ = load(tiny_xl_folder)
    assert report.pipeline_class == "StableDiffusionXLPipeline"
    assert psnr_db(draw(pipe), draw(reference)) > 30
    again = StableDiffusionXLImg2ImgPipeline(**pipe.components)
    again.set_progress_bar_config(disable=True)
    image = draw(again, image=torch.rand(1, 3, 64, 64), strength=0.9)
    assert np.isfinite(image).all()
    assert {name: str(getattr(pipe, name).dtype) for name in report.dtypes} == {
        name: f"torch.{dtype}" for name, dtype in report.dtypes.items()
    }


def test_sdxls_own_upcast_of_a_float16_vae_stays_on(tiny_xl_folder):
    """SDXL's VAE overflows in float16: its pipelines lift it while force_upcast is true."""
    pipe, _ = load(tiny_xl_folder, dtype={"text_encoder": "float32", "default": "float16"})
    seen = []
    hook = pipe.vae.decoder.register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    for force_upcast in (True, False):
        pipe.vae.register_to_config(force_upcast=force_upcast)
        draw(pipe)
    hook.remove()
    assert seen == [torch.float32, torch.float16]
    assert pipe.vae.dtype is torch.float16


def test_sizes_that_sdxl_embeds_reach_a_float16_unet_unrounded(tiny_xl_folder):
    pipe, _ = load(tiny_xl_folder, dtype={"unet": "float16", "default": "float32"})
    seen = []
    pipe.unet.add_time_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    draw(pipe, original_size=(4099, 4099))  # float16 has 4096 and 4100
    assert 4099 in seen[0].tolist()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("tiny", {"dtype": "fp16"}, "'fp16': expected auto, float32, float16, bfloat16"),
        ("tiny", {"dtype": torch.int8}, "expected auto, float32"),
        ("tiny", {"dtype": None}, "expected auto, float32"),
        ("tiny", {"dtype": {"unet": "half"}}, "'half': expected"),
        ("tiny", {"dtype": {"tokenizer": "float16"}}, "text_encoder, unet, vae, default"),
        ("tiny", {"attention": "slice"}, 'expected "sdpa".*"sliced".*"diffusers-sliced"'),
        ("tiny", {"variant": "fp16"}, "variant='fp16' is not there, found no variant"),
        ("tiny", {"config": "somewhere"}, "for single files only"),
        ("tiny/unet", {}, "one component, not a pipeline"),
        ("tiny/scheduler", {}, "not a pipeline folder; expected"),
        ("tiny/nowhere", {}, "no such file or folder. Expected mini, a folder"),
        (f"tiny/{UNET}", {}, "weights alone.*give config= a pipeline folder"),
        (f"tiny/{UNET}", {"variant": "fp16"}, "no meaning for a single file"),
        ("tiny/model_index.json", {}, "expected a .safetensors file or a pipeline folder"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(tiny_folder, model, options, message):
    with pytest.raises(ValidationError, match=message):
        load(tiny_folder.parent / model, **options)


def test_a_hub_id_that_is_not_cached_is_one_line_offline():
    for name in ("nobody/nothing", "runwayml/stable-diffusion-v1-5"):
        with pytest.raises(ValidationError, match=f"{name}.*not in the local cache") as error:
            load_pipeline(name, backend="cpu", local_files_only=True)
        assert "\n" not in str(error.value)
    assert "now stable-diffusion-v1-5/stable-diffusion-v1-5" in str(error.value)


def test_the_renamed_hub_id_loads_from_the_cache_with_a_notice(tiny_folder, tmp_path, monkeypatch):
    # The Hub's own cache layout, as an earlier download leaves it.
    commit = "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"
    repository = tmp_path / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    shutil.copytree(tiny_folder, repository / "snapshots" / commit)
    edit_weights(
        repository / "snapshots" / commit / UNET,
        lambda weights: weights.update(spare=torch.ones(2)),
    )
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for module in ("diffusers.pipelines.pipeline_utils", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    _, report = load("runwayml/stable-diffusion-v1-5", local_files_only=True)
    assert report.model == "runwayml/stable-diffusion-v1-5"
    assert report.resolved == "stable-diffusion-v1-5/stable-diffusion-v1-5@451f4fe16113"
    assert "gone from the Hub" in report.notices[0]
    assert "spare" in report.warnings[0]
    assert str(tmp_path) not in report.to_json()


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.pt"])
def test_pickled_files_are_refused_with_the_way_to_convert(tmp_path, name):
    (tmp_path / name).write_bytes(b"pickle")
    with pytest.raises(ValidationError, match="pickled.*from_single_file.*safe_serialization=True"):
        load(tmp_path / name)


def test_a_folder_with_pickled_weights_is_refused(broken_folder):
    torch.save(load_file(broken_folder / UNET), (broken_folder / UNET).with_suffix(".bin"))
    (broken_folder / UNET).unlink()
    with pytest.raises(
        ValidationError, match="unet: pickled weights, no safetensors.*save_pretrained"
    ):
        load(broken_folder)


def test_variants_are_taken_where_they_are_and_named_where_they_are_all_there_is(
    tiny_pipe, tmp_path
):
    tiny_pipe.save_pretrained(tmp_path, variant="fp16")
    _, report = load(tmp_path, variant="fp16")
    assert report.total_weight_bytes > 0
    with pytest.raises(
        ValidationError, match="only variant fp16 is there. Load with variant='fp16'"
    ):
        load(tmp_path)
    with pytest.raises(ValidationError, match="text_encoder: only variant fp16 is there"):
        load(tmp_path, variant="ema")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BREAKAGES = {
    "unet/.*corrupt or cut off": lambda folder: cut(folder / UNET),
    "text_encoder/.*corrupt": lambda folder: (folder / TEXT_ENCODER).write_text("<html>404"),
    "unet: no weights": lambda folder: (folder / UNET).unlink(),
    "holds no weights": lambda folder: save_file({}, folder / UNET),
    "the folder vae/ is missing": lambda folder: shutil.rmtree(folder / "vae"),
    "the folder tokenizer/ is missing": lambda folder: shutil.rmtree(folder / "tokenizer"),
    "model_index.json is not": lambda folder: (folder / "model_index.json").write_text("{"),
    "no model_index.json|not a pipeline": lambda folder: (folder / "model_index.json").unlink(),
    "class NewPipeline is not in diffusers": lambda folder: edit_json(
        folder / "model_index.json", _class_name="NewPipeline"
    ),
    "cannot be loaded from it": lambda folder: edit_json(
        folder / "unet/config.json", cross_attention_dim=64
    ),
    "weights are missing.*conv_in": lambda folder: edit_weights(
        folder / UNET, lambda weights: weights.pop("conv_in.weight")
    ),
    "weights are missing.*layer_norm1": lambda folder: edit_weights(
        folder / TEXT_ENCODER,
        lambda weights: weights.pop(next(key for key in weights if "layer_norm1.weight" in key)),
    ),
}


@pytest.mark.parametrize("message", BREAKAGES)
def test_a_broken_folder_is_one_clear_error(broken_folder, message):
    BREAKAGES[message](broken_folder)
    with pytest.raises(ValidationError, match=message) as error:
        load(broken_folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_bad_weight_is_named_and_laid_to_the_file(broken_folder, dtype):
    edit_weights(broken_folder / UNET, lambda w: w["conv_in.weight"].view(-1)[:3].fill_(torch.nan))
    with pytest.raises(ValidationError, match=r"unet.conv_in.weight .*3 of 1152 .*so in the file"):
        load(broken_folder, dtype=dtype)


def test_a_weight_that_overflows_in_the_cast_is_told_as_that(broken_folder):
    edit_weights(
        broken_folder / VAE, lambda w: w["decoder.conv_in.weight"].view(-1)[:1].fill_(70000)
    )
    with pytest.raises(
        ValidationError, match=r"vae.decoder.conv_in.weight .*1 are Inf.*70000, over"
    ):
        load(broken_folder, dtype="float16")
    load(broken_folder, dtype={"default": "float16", "vae": "float32"})


def test_warnings_of_the_libraries_are_shown_and_reported_but_for_torchvision(broken_folder):
    # In a process of its own: transformers says that torchvision is missing once a process.
    edit_weights(broken_folder / UNET, lambda weights: weights.update(leftover=torch.ones(2)))
    program = (
        "import sys; from sdkit.loading import load_pipeline;"
        "print(load_pipeline(sys.argv[1], backend='cpu', progress=False)[1].warnings)"
    )
    command = [sys.executable, "-c", program, broken_folder]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "leftover" in run.stdout
    assert "leftover" in run.stderr
    assert "torchvision" not in run.stdout + run.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda unet: unet.conv_out.half(), "unet.conv_out.weight: is float16, expected float32"),
        (lambda unet: unet.conv_out.to("meta"), "unet.conv_out.weight: is on meta, expected cpu"),
    ],
)
def test_a_part_that_is_not_what_was_asked_is_named(tiny_pipe, change, message):
    dtypes = dict.fromkeys(("text_encoder", "unet", "vae"), torch.float32)
    assert check_components(tiny_pipe, dtypes, torch.device("cpu")) == []
    change(tiny_pipe.unet)
    with pytest.raises(ValidationError, match=message):
        check_components(tiny_pipe, dtypes, torch.device("cpu"))


@pytest.mark.parametrize(
    ("heads", "expected"), [(2, "half of the heads"), (1, "one head at a time")]
)
def test_slicing_when_asked_works_with_few_heads(tiny_pipe, tmp_path, heads, expected):
    config = dict(tiny_pipe.unet.config) | {"attention_head_dim": heads}
    tiny_pipe.unet = UNet2DConditionModel.from_config(config)
    tiny_pipe.save_pretrained(tmp_path)
    sliced, report = load(tmp_path, attention="diffusers-sliced")
    assert expected in report.attention_reason
    names = {type(p).__name__ for p in sliced.unet.attn_processors.values()}
    assert names == {"SlicedAttnProcessor"}
    plain, report = load(tmp_path)
    assert not {"SlicedAttnProcessor"} & {
        type(p).__name__ for p in plain.unet.attn_processors.values()
    }
    assert psnr_db(draw(sliced), draw(plain)) > 60


def policy(device_type, **options):
    defaults = {"float32_gib": 4.0, "available_gib": 10.0, "macos": "15.1"}
    return choose_dtypes(device_type, **defaults | options)


def test_the_policy_of_each_device_has_its_reason():
    assert policy("cpu")[0] == {"default": "float32"}
    assert policy("cuda", device_name="NVIDIA H200")[0] == {"default": "float16"}
    assert policy("cuda", device_name="NVIDIA GeForce GTX 1660")[0] == {"default": "float32"}
    dtypes, reason = policy("mps")
    assert dtypes == {"default": "float32"}
    assert "6.4 GiB needed as float32, 10.0 GiB available" in reason
    dtypes, reason = policy("mps", available_gib=6.3)
    assert dtypes == {"default": "bfloat16", "vae": "float32"}
    assert "does not fit" in reason
    dtypes, reason = policy("mps", available_gib=5.0, macos="13.6")
    assert dtypes == {"default": "float16", "vae": "float32"}
    assert "13.6 has no bfloat16" in reason


def test_where_nothing_fits_the_smallest_is_taken_under_a_warning_of_its_own():
    dtypes, reason = policy("mps", available_gib=1.0)
    assert dtypes == {"default": "bfloat16", "vae": "float32"}
    assert "does not fit" in reason
    # 2.2 GiB: half of float32's 4, and the VAE's other half.
    (caution,) = find_memory_caution("mps", weights_gib=2.2, available_gib=1.0)
    assert "does not suffice: about 3.5 GiB needed in these dtypes, 1.0 GiB available" in caution
    assert find_memory_caution("mps", weights_gib=2.2, available_gib=3.6) == []
    assert find_memory_caution("cpu", weights_gib=2.2, available_gib=1.0) == []


def test_the_policy_counts_activations_where_they_are_known():
    dtypes, reason = policy("mps", available_gib=5.6, activations_gib=1.0)
    assert dtypes == {"default": "float32"} and "5.5 GiB needed as float32" in reason
    assert policy("mps", available_gib=5.6, activations_gib=1.2)[0]["default"] == "bfloat16"
    known = {"weights_gib": 2.2, "available_gib": 3.0, "activations_gib": 0.5}
    assert find_memory_caution("mps", **known) == []
    (caution,) = find_memory_caution("mps", **known | {"activations_gib": 0.6})
    assert "about 3.1 GiB needed" in caution


def test_activations_are_traced_only_where_they_decide(tiny_folder):
    """The same stages as predict_memory's, scaled to the dtypes that were got."""
    checkpoint = find_checkpoint(tiny_folder)
    predicted = predict_memory(tiny_folder)
    weights_gib = predicted.total_weight_bytes / GIB
    known = {"itemsizes": dict.fromkeys(checkpoint.components, 4), "sliced": False}

    def find(device_type, free, **options):
        memory = {"weights_gib": weights_gib, "available_gib": free * weights_gib}
        return find_activations_gib(checkpoint, device_type, **memory, **known | options)

    assert find("mps", 1.5) == pytest.approx(predicted.activation_bytes / GIB)
    halves = dict.fromkeys(checkpoint.components, 2)
    assert find("mps", 1.5, itemsizes=halves) == pytest.approx(find("mps", 1.5) / 2)
    assert find("mps", 1.5, sliced=True) <= find("mps", 1.5)
    assert find("mps", 0.9) is find("mps", 2.1) is find("cpu", 1.5) is find("cuda", 1.5) is None


def test_the_report_warns_where_memory_does_not_suffice(tiny_folder, monkeypatch):
    monkeypatch.setattr("sdkit.loading.pipeline.measure_available_gib", lambda device: 0.0)
    with mps(), pytest.warns(PrecisionWarning, match="memory does not suffice"):
        _, report = load(tiny_folder)
    assert "does not suffice" in report.warnings[0]


def test_float16_on_mps_comes_with_a_caution_that_names_the_cure():
    half, full = [torch.float16], [torch.float32]
    assert find_cautions("cuda", half) == []
    assert find_cautions("mps", full) == []
    assert "keep the guard on" in find_cautions("mps", half)[0]


@pytest.mark.parametrize("name", ["cpu", "cuda", "mps"])
def test_auto_loads_by_policy_on_each_device_present(tiny_folder, name):
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(name, True):
        pytest.skip(f"no {name} here")
    pipe, report = load_pipeline(tiny_folder, backend=name, progress=False)
    expected = {"cuda": "float16"}.get(name, "float32")
    assert set(report.dtypes.values()) == {expected}
    assert {p.device.type for p in pipe.unet.parameters()} == {name}
    assert np.isfinite(draw(pipe)).all()


def test_float16_asked_for_on_mps_warns(tiny_folder):
    if not torch.backends.mps.is_available():
        pytest.skip("no mps here")
    with pytest.warns(UserWarning, match="keep the guard on"):
        load_pipeline(tiny_folder, backend="mps", dtype="float16", progress=False)


def test_float16_on_mps_is_guarded_until_that_is_taken_off(tiny_folder):
    """MPS is emulated here; a real one is told by the device."""
    with mps(), pytest.warns(PrecisionWarning, match="keep the guard on"):
        pipe, report = load(tiny_folder, dtype={"unet": "float16", "default": "float32"})
    assert report.guard.startswith("on") and "remove_guard(pipe)" in str(report)
    assert np.isfinite(draw(pipe)).all()
    pipe.unet.conv_out.bias.data[0] = np.nan
    with pytest.raises(NonFiniteError, match=r"unet \(float16, cpu\): .* at step 0"):
        draw(pipe)
    settings = {"num_inference_steps": 2, "progress": False}
    record = generate(pipe, ["a", "b"], on_nonfinite="skip", **settings)
    assert [image.problem for image in record.images] == ["nan", "nan"]
    with guard(pipe, on_nonfinite="record") as watched:
        assert np.isnan(draw(pipe)).any()
    assert watched.findings[0].stage == "unet"
    remove_guard(pipe)
    assert np.isnan(draw(pipe)).any()


def test_only_float16_on_mps_is_guarded_unasked(tiny_folder):
    with mps():
        whole, report_of_whole = load(tiny_folder, dtype="float32")
    half, report_of_half = load(tiny_folder, dtype={"unet": "float16", "default": "float32"})
    for pipe, report in ((whole, report_of_whole), (half, report_of_half)):
        assert report.guard.startswith("off") and report.warnings == ()
        pipe.unet.conv_out.bias.data[0] = np.nan
        assert np.isnan(draw(pipe)).any()


def test_a_report_of_before_the_guard_was_in_it_still_loads(tiny_folder):
    _, report = load(tiny_folder)
    content = json.loads(report.to_json())
    del content["guard"]
    assert LoadReport.from_json(json.dumps(content)).guard == "off"


def test_the_report_tells_the_dtypes_of_a_recipe_as_they_are(tiny_pipe, tiny_folder):
    recipe = Recipe(
        version=RECIPE_VERSION, model="tiny", fingerprint=take_fingerprint(tiny_pipe),
        dtype="float16", float32=("vae", "unet.conv_in"), psnr_db=60.0, healthy_db=60.0,
        tolerance_db=1.0, trials=1, bisect_trials=None, weight_bytes=1, float32_weight_bytes=2,
        prompts=("a shoe",), made_on={},
    )  # fmt: skip
    pipe, report = load_pipeline(tiny_folder, backend="cpu", recipe=recipe, progress=False)
    assert report.dtypes == {"text_encoder": "float16", "unet": "float16", "vae": "float32"}
    assert (pipe.vae.dtype, pipe.unet.conv_out.weight.dtype) == (torch.float32, torch.float16)


def test_loading_leaves_pythons_and_the_libraries_settings_as_they_were(tiny_folder):
    from transformers.utils import logging as transformers_logging

    filters = list(warnings.filters)
    handlers = [len(h.filters) for h in transformers_logging.get_logger().handlers]
    load(tiny_folder)
    assert list(warnings.filters) == filters
    assert [len(h.filters) for h in transformers_logging.get_logger().handlers] == handlers
    assert transformers_logging.is_progress_bar_enabled()


# Original names of the weights, as Stable Diffusion 1.x files have them.
def rename_unet(key):
    parts = key.split(".")
    top = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    top |= {"time_embedding": f"time_embed.{2 * (parts[1] == 'linear_2')}"}
    if parts[0] in top:
        return f"{top[parts[0]]}.{parts[-1]}"
    if parts[0] == "mid_block":
        place = {"resnets": 2 * int(parts[2]), "attentions": 1}[parts[1]]
        prefix, rest = f"middle_block.{place}", parts[3:]
    else:
        block, kind, layer, rest = int(parts[1]), parts[2], int(parts[3]), parts[4:]
        down = parts[0] == "down_blocks"
        place = 2 * block + layer + (1 if down else 0)
        prefix = f"{'input' if down else 'output'}_blocks.{place}.{0 if kind == 'resnets' else 1}"
        if kind == "downsamplers":
            prefix, rest = f"input_blocks.{2 * (block + 1)}.0.op", rest[1:]
        if kind == "upsamplers":
            prefix, rest = f"output_blocks.{2 * block + 1}.1.conv", rest[1:]
    inner = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
    inner |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    if rest[0] in inner:
        rest = [inner[rest[0]], *rest[1:]]
    return ".".join([prefix, *rest])


def rename_vae(key, blocks=4):
    for new, old in {
        "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2",
        "mid_block.attentions.0": "mid.attn_1", "group_norm": "norm", "to_q": "q", "to_k": "k",
        "to_v": "v", "to_out.0": "proj_out", "conv_norm_out": "norm_out",
        "conv_shortcut": "nin_shortcut", "downsamplers.0": "downsample",
        "upsamplers.0": "upsample", "resnets": "block",
    }.items():  # fmt: skip
        key = key.replace(new, old)
    key = key.replace("down_blocks", "down")
    for i in range(blocks):
        key = key.replace(f"up_blocks.{i}.", f"up.{blocks - 1 - i}.")
    return key


@pytest.fixture
def single_file(tiny_folder, tmp_path):
    weights = {}
    for key, tensor in load_file(tiny_folder / UNET).items():
        weights[f"model.diffusion_model.{rename_unet(key)}"] = tensor
    for key, tensor in load_file(tiny_folder / VAE).items():
        is_projection = "attentions" in key and tensor.ndim == 2
        weights[f"first_stage_model.{rename_vae(key)}"] = (
            tensor[:, :, None, None] if is_projection else tensor
        )
    for key, tensor in load_file(tiny_folder / TEXT_ENCODER).items():
        key = key.removeprefix("text_model.")
        weights[f"cond_stage_model.transformer.text_model.{key}"] = tensor
    save_file(
        {key: tensor.contiguous() for key, tensor in weights.items()}, tmp_path / "shoe.safetensors"
    )
    return tmp_path / "shoe.safetensors"


def test_a_single_file_loads_with_a_config_folder_and_draws_the_same(single_file, tiny_folder):
    pipe, report = load(single_file, config=tiny_folder)
    assert np.array_equal(draw(pipe), draw(load(tiny_folder)[0]))
    assert report.resolved == "shoe.safetensors"
    pipe, report = load(
        single_file, config=tiny_folder, dtype={"unet": "float16", "vae": "float32"}
    )
    assert report.dtypes == {"text_encoder": "float32", "unet": "float16", "vae": "float32"}
    assert np.isfinite(draw(pipe)).all()


def test_a_bad_weight_in_a_single_file_is_named(single_file, tiny_folder):
    key = "model.diffusion_model.input_blocks.0.0.weight"
    edit_weights(single_file, lambda weights: weights[key].view(-1)[:3].fill_(70000))
    with pytest.raises(ValidationError, match="unet.conv_in.weight .*3 are Inf.*70000, overflows"):
        load(single_file, config=tiny_folder, dtype="float16")
