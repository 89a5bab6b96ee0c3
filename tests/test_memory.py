"""Memory predicted from shapes against what real tensors take, and what is said of a machine."""

import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from peft import LoraConfig
from tiny_pipelines import build_tiny_sd3_pipe, build_tiny_xl_pipe

import sdkit
from sdkit.emulate import mps
from sdkit.finetuning.config import LoRAConfig
from sdkit.loading.recipe import Recipe, take_fingerprint
from sdkit.memory import LiveBytes, LoraTraining, build_architecture
from sdkit.memory.stages import add_lora
from sdkit.precision.machines import MACHINES, Machine
from sdkit.precision.memory import predict_memory
from sdkit.precision.memory_rungs import compare_with_report, list_memory_rungs
from sdkit.validation import ValidationError

pytestmark = pytest.mark.filterwarnings("ignore::sdkit.emulate.EmulationWarning")
MIB = 2**20
UNET_CONFIG = {
    "sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 2,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def mini():
    pipe, _ = sdkit.load_pipeline("mini", backend="cpu", dtype="float32", progress=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def get_models(pipe):
    return {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}


def count_bytes(modules):
    return sum(t.nbytes for m in modules for t in (*m.parameters(), *m.buffers()))


def test_live_bytes_are_those_that_are_alive():
    weight = torch.nn.Linear(256, 256, bias=False)
    with LiveBytes(weight) as live:
        first = torch.zeros(1024)  # 4 KiB
        view = first.view(32, 32).T
        assert live.live_bytes == 4096
        second = view + 1
        assert live.live_bytes == live.peak_bytes == 8192
        del first
        assert live.live_bytes == 8192  # the view holds it
        del view
        assert (live.live_bytes, live.peak_bytes) == (4096, 8192)
        second.mul_(2)
        assert live.live_bytes == 4096
        _ = weight.weight.T  # not counted
        assert live.live_bytes == 4096


def test_what_autograd_keeps_is_alive_until_backward():
    values = torch.ones(1024, requires_grad=True)
    with LiveBytes() as live:
        loss = values.exp().sin().sum()
        assert live.live_bytes == 4096 + 4  # what sin's derivative is made of, and the loss
        assert live.peak_bytes == 2 * 4096 + 4
        loss.backward()
        del loss
        assert live.live_bytes == 4096  # the gradient


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("sd15", {"text_encoder": 123_060_480, "unet": 859_520_964, "vae": 83_653_863}),
        (
            "sdxl",
            {
                "text_encoder": 123_060_480,
                "text_encoder_2": 694_659_840,
                "unet": 2_567_463_684,
                "vae": 83_653_863,
            },
        ),
    ],
)
def test_known_architectures_have_the_published_number_of_weights(name, sizes):
    built = build_architecture(name)
    assert {n: sum(p.numel() for p in m.parameters()) for n, m in built.items()} == sizes
    assert {p.device.type for m in built.values() for p in m.parameters()} == {"meta"}


@pytest.mark.parametrize(("batch_size", "attention"), [(1, "sdpa"), (2, "sliced")])
def test_a_generation_on_the_bundled_model_is_predicted(batch_size, attention):
    pipe, _ = sdkit.load_pipeline(
        "mini", backend="cpu", dtype="float32", attention=attention, progress=False
    )
    pipe.set_progress_bar_config(disable=True)
    models = get_models(pipe).values()
    with torch.no_grad(), LiveBytes(*models) as live:
        pipe(["black casual shoes"] * batch_size, num_inference_steps=1, output_type="pt")
    measured = count_bytes(models) + live.peak_bytes
    predicted = predict_memory(
        "mini", batch_size=batch_size, attention=attention, device_type="cpu"
    )
    assert predicted.total_bytes == pytest.approx(measured, rel=0.1)
    assert predicted.activation_bytes == pytest.approx(live.peak_bytes, rel=0.1)


def train_one_step(pipe, training):
    """A step as training loops write it, twice, so that the optimiser's state is there."""
    unet, vae = pipe.unet, pipe.vae
    vae.requires_grad_(False)
    parameters = add_lora(unet, training)
    weights = count_bytes(get_models(pipe).values())
    with LiveBytes(*get_models(pipe).values()) as live:
        optimizer = torch.optim.AdamW(parameters)
        for _ in range(2):
            with torch.no_grad():
                latents = vae.encode(torch.zeros(1, 3, 128, 128)).latent_dist.sample()
                embeds = pipe.text_encoder(torch.ones(1, 77, dtype=torch.int64))[0]
            noise_pred = unet(latents, torch.tensor([10]), embeds).sample
            torch.nn.functional.mse_loss(noise_pred, torch.ones_like(latents)).backward()
            optimizer.step()
            optimizer.zero_grad()
    states = [state for kept in optimizer.state.values() for state in kept.values()]
    return weights + live.peak_bytes, sum(state.nbytes for state in states)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_checkpointing_is_predicted(gradient_checkpointing):
    pipe, _ = sdkit.load_pipeline("mini", backend="cpu", dtype="float32", progress=False)
    training = LoraTraining(rank=4, gradient_checkpointing=gradient_checkpointing)
    measured, state_bytes = train_one_step(pipe, training)
    predicted = predict_memory("mini", training=training, device_type="cpu")
    assert predicted.total_bytes == pytest.approx(measured, rel=0.1)
    assert predicted.optimizer_bytes == pytest.approx(state_bytes, rel=0.1)
    assert predicted.optimizer_bytes == 2 * predicted.gradient_bytes > 0
    assert ("checkpointing" in predicted.task) == gradient_checkpointing


def test_sd15_in_numbers():
    """The full-size numbers that the slow test measures, and what each choice saves."""
    sdpa = predict_memory("sd15", device_type="cpu")
    assert sdpa.total_weight_bytes == 4 * 1_066_235_307 + 616  # and position ids
    assert sdpa.peak_stage == "vae" and sdpa.activation_bytes == pytest.approx(768.1 * MIB, 1e-3)
    on_mps = predict_memory("sd15")
    scores = 2 * 8 * 4096**2 * 4  # rows of guidance, heads, tokens, float32
    assert on_mps.stage_bytes["unet"] > scores > 2 * sdpa.stage_bytes["unet"]
    sliced = predict_memory("sd15", attention="sliced")
    theirs = predict_memory("sd15", attention="diffusers-sliced")
    unets = [predicted.stage_bytes["unet"] for predicted in (sliced, theirs, on_mps)]
    assert unets == sorted(unets) and unets[0] < unets[1] / 2
    assert sliced.stage_bytes["unet"] == pytest.approx(sdpa.stage_bytes["unet"], rel=0.02)


def test_what_each_choice_saves():
    full, half = (predict_memory("mini", dtype=dtype) for dtype in ("float32", "float16"))
    assert half.total_bytes == pytest.approx(full.total_bytes / 2, rel=0.01)
    plain = predict_memory("mini", attention="plain", device_type="cpu").stage_bytes
    assert plain["unet"] > full.stage_bytes["unet"]
    whole, tiled = (predict_memory("mini", image_size=384, vae_tiling=on) for on in (False, True))
    assert tiled.stage_bytes["vae"] < whole.stage_bytes["vae"] / 2
    three = predict_memory("mini", batch_size=3)
    one_by_one = predict_memory("mini", batch_size=3, vae_slicing=True)
    assert one_by_one.stage_bytes["vae"] < three.stage_bytes["vae"] / 2


def test_the_whole_wide_vae_of_sdxl_in_float16_is_said_to_be_lifted(tokenizer_folder):
    pipe = build_tiny_xl_pipe(tokenizer_folder)
    predicted = predict_memory(pipe, dtype="float16")
    assert predicted.dtypes["vae"] == "float32" and predicted.dtypes["unet"] == "float16"
    assert "force_upcast" in str(predicted)
    full = predict_memory(pipe)
    assert full.notices == () and set(full.stage_bytes) == {
        "text_encoder", "text_encoder_2", "unet", "vae",
    }  # fmt: skip


def test_a_pipeline_its_folder_and_its_parts_agree_and_are_left_alone(mini):
    before = {name: parameter.data_ptr() for name, parameter in mini.unet.named_parameters()}
    loaded, folder = predict_memory(mini), predict_memory("mini")
    assert loaded.stage_bytes == folder.stage_bytes
    assert loaded.weight_bytes == folder.weight_bytes
    unet, vae = predict_memory(mini.unet, image_size=128), predict_memory(mini.vae)
    assert unet.stage_bytes | vae.stage_bytes == {
        name: size for name, size in folder.stage_bytes.items() if name != "text_encoder"
    }
    assert before == {name: p.data_ptr() for name, p in mini.unet.named_parameters()}
    assert not any(p.requires_grad and "lora" in n for n, p in mini.unet.named_parameters())


def test_a_guarded_pipeline_of_mixed_dtypes_is_predicted_as_it_is(tiny_folder):
    with mps():
        with pytest.warns(UserWarning, match="float16 on MPS"):
            pipe, _ = sdkit.load_pipeline(
                tiny_folder, backend="cpu", progress=False,
                dtype={"unet": "float16", "default": "float32"},
            )  # fmt: skip
        inside = predict_memory(pipe)
    assert inside.dtypes == {"text_encoder": "float32", "unet": "float16", "vae": "float32"}
    assert inside.stage_bytes == predict_memory(pipe).stage_bytes  # emulated or not
    assert pipe.unet._forward_hooks  # the guard's


def test_a_recipe_is_counted(mini):
    recipe = SimpleNamespace(dtype="float16", float32=("vae",))
    predicted = predict_memory(mini, recipe=recipe)
    half, full = (predict_memory(mini, dtype=name).weight_bytes for name in ("float16", "float32"))
    assert predicted.weight_bytes == half | {"vae": full["vae"]}


@dataclass(frozen=True)
class Settings:
    """As another training loop may have them."""

    rank: int = 8
    gradient_checkpointing: bool = True
    target_modules: tuple = ("to_q", "to_v")
    optimizer: str = "sgd"


def test_settings_of_another_loop_will_do():
    predicted = predict_memory("mini", training=Settings())
    assert predicted.optimizer_bytes == 0 < predicted.gradient_bytes
    assert predicted.gradient_bytes < predict_memory("mini", training=LoraTraining()).gradient_bytes


def test_verdicts():
    report = MACHINES["M2 Max, 32 GB"]
    assert (report.least_gib, report.most_gib) == (10, 12)
    full = predict_memory("sd15")
    assert full.verdict("M2 Max, 32 GB").answer == "fits"
    assert full.verdict("Mac, 8 GB").answer == "does not fit" and not full.verdict("Mac, 8 GB")
    assert full.verdict(Machine("any", 8, 4, 6, "")).answer == "tight"
    assert "GiB needed" in str(full.verdict()) and full.verdict().least_gib > 0
    assert str(full).splitlines()[0].startswith("sd15: inference, 512x512, batch 1")
    with pytest.raises(ValidationError, match="machine='M9': expected here"):
        full.verdict("M9")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "dtype='float8': expected auto, float32"),
        ({"image_size": 100}, "image_size=100: expected a multiple of 8"),
        ({"image_size": (64, 64, 3)}, "image_size=.*two"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 1.5}, "batch_size=1.5"),
        ({"batch_size": True}, "batch_size=True"),
        ({"batch_size": "2"}, "batch_size='2'"),
        ({"image_size": True}, "image_size=True"),
        ({"image_size": 10_000_000}, "image_size=10000000: .* at most 65536"),
        ({"image_size": "64"}, "image_size='64': expected a multiple of 8"),
        ({"image_size": (64, float("nan"))}, "image_size=.*multiple of 8"),
        ({"recipe": "no.json"}, "no.json: no recipe can be read"),
        ({"recipe": {}}, "recipe={}: expected a Recipe"),
        ({"training": "lora"}, "training='lora': expected a LoRAConfig"),
        ({"training": {"ranks": 4}}, "training={'ranks': 4}: expected a LoRAConfig"),
        ({"training": {"rank": 0}}, "training.rank=0: expected a whole number from 1 on"),
        ({"training": {"target_modules": ()}}, r"training.target_modules=\(\): expected names"),
        ({"training": {"target_modules": ("nope",)}}, "training.target_modules=.*nope.*not found"),
        ({"model": UNET_CONFIG, "vae_tiling": True}, "vae_tiling: there is no VAE"),
        ({"attention": "flash"}, "attention='flash': expected one of sdpa"),
        ({"device_type": "tpu"}, "device_type='tpu'"),
        ({"model": "sd9"}, "sd9: no such file or folder"),
        ({"training": Settings(optimizer="muon")}, "training.optimizer='muon'"),
    ],
    ids=str,
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValidationError, match=message):
        predict_memory(**options)


def test_what_is_not_stable_diffusion_is_refused(tokenizer_folder, tiny_pipe):
    with pytest.raises(ValidationError, match="SD3Transformer2DModel.*others are not predicted"):
        predict_memory(build_tiny_sd3_pipe(tokenizer_folder))
    unet = UNet2DConditionModel.from_config(tiny_pipe.unet.config, class_embed_type="timestep")
    with pytest.raises(ValidationError, match="others are not predicted"):
        predict_memory(unet)
    with pytest.raises(ValidationError, match="has no UNet to train"):
        predict_memory(tiny_pipe.vae, training=LoraTraining())


def test_each_rung_is_predicted_as_it_is_measured(tiny_folder):
    rungs = list_memory_rungs(tiny_folder, task="inference", measure=True).set_index("rung")
    assert rungs.index[0] == "float32, batch of 2" and len(rungs) == 9
    measured = rungs.dropna(subset="cpu_measured_gib")
    assert len(measured) == 7
    for row in measured.itertuples():
        assert row.cpu_predicted_gib == pytest.approx(row.cpu_measured_gib, rel=0.1)
    assert (rungs.saved_gib.iloc[1:-1] >= 0).all()
    assert rungs.saved_gib["VAE slicing"] > 0 and rungs.saved_gib["bfloat16, VAE float32"] > 0
    offload = rungs.loc[["CPU offload", "sequential CPU offload"]]
    assert (offload.saved_gib == 0).all() and offload.on_mps.str.contains("share").all()
    assert (
        rungs.gpu_gib["bfloat16, VAE float32"] > offload.gpu_gib.iloc[0] > offload.gpu_gib.iloc[1]
    )


def test_rungs_that_do_not_exist_are_listed_and_say_so(tiny_folder):
    rungs = list_memory_rungs(tiny_folder, task="LoRA training").set_index("rung")
    missing = rungs[rungs.needed_gib.isna()]
    assert list(missing.index) == ["8-bit optimiser", "CPU offload"]
    assert missing.on_mps.str.startswith("does not exist").all()
    assert rungs.saved_gib["batch of 1"] > 0 and rungs.saved_gib["gradient checkpointing"] > 0


def test_the_report_stands_beside_the_prediction():
    """Its weights are right; its working memory has in it what is not tensors."""
    table = compare_with_report().set_index(["dtype", "part"])
    assert 4 <= table.predicted_gb_sdpa["float32", "weights"] <= 5
    assert 2 <= table.predicted_gb_sdpa["float16", "weights"] <= 3
    for dtype, most in (("float16", 5), ("float32", 8)):
        sliced, sdpa = table.loc[dtype, "total"][["predicted_gb_sliced", "predicted_gb_sdpa"]]
        assert sliced < sdpa < most


@pytest.mark.slow
@pytest.mark.parametrize("case", ["one image", "LoRA step", "LoRA step, checkpointing"])
def test_sd15_at_full_size_is_predicted_within_a_tenth(case, monkeypatch):
    """Random weights, 512x512: live tensors, and resident memory of a process of its own."""
    folder = Path(__file__).parent / "benchmarks"
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    bench = runpy.run_path(str(folder / "bench_memory.py"))
    model, size, training = bench["CASES"][f"SD 1.5, {case}"]
    measured = bench["measure_in_a_process"](model, size, training)
    predicted = predict_memory(model, image_size=size, training=training, device_type="cpu")
    assert predicted.total_bytes == pytest.approx(measured["live"], rel=0.1)
    assert predicted.total_bytes == pytest.approx(measured["process"], rel=0.1)


def test_a_configuration_is_predicted_as_its_model_is(tiny_pipe, tmp_path):
    unet, vae = tiny_pipe.unet, tiny_pipe.vae
    expected = predict_memory(unet).stage_bytes
    unet.save_config(tmp_path)
    for named in (unet.config, UNET_CONFIG, tmp_path, str(tmp_path / "config.json")):
        assert predict_memory(named).stage_bytes == expected
    parts = {"unet": dict(unet.config), "vae": vae.config, "text_encoder": tiny_pipe.text_encoder}
    assert predict_memory(parts).total_bytes == predict_memory(tiny_pipe).total_bytes


@pytest.mark.parametrize("named", [{}, {"a": 1}, {"in_channels": "x", "latent_channels": 3}])
def test_what_is_no_configuration_is_said(named, tmp_path):
    with pytest.raises(ValidationError, match="tells no class|no model can be made"):
        predict_memory(named)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ValidationError, match=r"config.json: no configuration can be read"):
        predict_memory(tmp_path)


def test_sizes_and_widths_that_are_tuples_and_those_that_are_missing():
    wide = predict_memory(UNET_CONFIG | {"sample_size": (8, 16), "cross_attention_dim": (32, 32)})
    assert wide.image_size == (64, 128)
    assert wide.stage_bytes == predict_memory(UNET_CONFIG, image_size=(64, 128)).stage_bytes
    nameless = UNET_CONFIG | {"sample_size": None}
    assert predict_memory(nameless, image_size=64).image_size == (64, 64)
    with pytest.raises(ValidationError, match="image_size=None: .*no sample_size"):
        predict_memory(nameless)
    with pytest.raises(ValidationError, match="others are not predicted"):
        predict_memory(UNET_CONFIG | {"cross_attention_dim": (32, 48)})


def test_a_unet_is_trained_alone_whatever_it_reads(tiny_pipe):
    alone = predict_memory(tiny_pipe.unet, training=LoraTraining())
    assert set(alone.stage_bytes) == {"unet, forward and backward"}
    inpainting = predict_memory(UNET_CONFIG | {"in_channels": 9}, training=LoraTraining())
    assert inpainting.gradient_bytes == alone.gradient_bytes
    tiny_pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    with pytest.warns(UserWarning, match="multiple adapters"):
        beside = predict_memory(tiny_pipe.unet, training=LoraTraining())
    assert beside.gradient_bytes == alone.gradient_bytes
    assert beside.total_weight_bytes > alone.total_weight_bytes


def test_a_training_is_told_in_several_ways():
    expected = predict_memory(UNET_CONFIG, training=LoraTraining(gradient_checkpointing=True))
    for training in ({"gradient_checkpointing": True}, LoRAConfig(gradient_checkpointing=True)):
        assert predict_memory(UNET_CONFIG, training=training) == expected
    assert predict_memory(UNET_CONFIG, training=True) == predict_memory(UNET_CONFIG, training={})
    assert predict_memory(UNET_CONFIG, training=False).task == "inference"


def test_a_compiled_unet_is_predicted_as_it_is(tiny_pipe):
    expected = predict_memory(tiny_pipe)
    tiny_pipe.unet = torch.compile(tiny_pipe.unet)
    assert predict_memory(tiny_pipe).stage_bytes == expected.stage_bytes


def test_what_is_not_called_in_a_prediction_is_said(tiny_pipe):
    parts = {"unet": tiny_pipe.unet, "controlnet": ControlNetModel.from_unet(tiny_pipe.unet)}
    predicted = predict_memory(parts)
    assert "controlnet: its weights are counted, its calls are not" in str(predicted)
    assert predicted.weight_bytes["controlnet"] > 0


def test_a_recipe_of_another_model_is_refused(tiny_pipe, tmp_path):
    recipe = Recipe(
        version=1, model="tiny", fingerprint=take_fingerprint(tiny_pipe), dtype="float16",
        float32=("vae",), psnr_db=50.0, healthy_db=50.0, tolerance_db=1.0, trials=1,
        bisect_trials=None, weight_bytes=1, float32_weight_bytes=2, prompts=("a",), made_on={},
    )  # fmt: skip
    path = recipe.save(tmp_path / "recipe.json")
    assert predict_memory(tiny_pipe, recipe=path).dtypes["vae"] == "float32"
    with pytest.raises(ValidationError, match="recipe: made for tiny; this .* is another .shapes"):
        predict_memory("mini", recipe=recipe)
    with pytest.raises(ValidationError, match="the recipe decides"):
        predict_memory(tiny_pipe, recipe=recipe, dtype="float16")
