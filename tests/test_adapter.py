"""The adapter and its file: frozen base, same start everywhere, loads with diffusers and kohya."""

import json

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from tiny_pipelines import build_tiny_pipe, build_tiny_sd3_pipe, build_tiny_xl_pipe
from tiny_training import make_config, make_encoded

from sdkit.finetuning.adapter import add_adapter, read_adapter, write_adapter
from sdkit.finetuning.adapter_file import (
    describe_training,
    load_adapter,
    pack_adapter,
    read_metadata,
    unpack_adapter,
)
from sdkit.finetuning.kohya import export_kohya
from sdkit.finetuning.merging import merge_adapter, unmerge_adapter
from sdkit.finetuning.training import train_lora
from sdkit.validation import ValidationError

ALL = ("attention", "feed_forward", "convolution", "text_encoder")


def run_model(pipe):
    """Text encoder and UNet on fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    input_ids = torch.randint(0, 40, (2, 77), generator=generator)
    with torch.no_grad():
        prompt_embeds = pipe.text_encoder(input_ids)[0]
        return prompt_embeds, pipe.unet(latents, 500, prompt_embeds)[0]


def measure_distance(one, other):
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def make_trained(pipe, folder, **changes):
    """Gives a pipeline an adapter that does something, and writes its file."""
    config = make_config(folder, **changes)
    metadata = describe_training(pipe, config, make_encoded(pipe))
    for parameter in add_adapter(pipe, config).values():
        parameter.data += 0.05 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(1)
        )
    path = folder / "pytorch_lora_weights.safetensors"
    path.write_bytes(pack_adapter(pipe, metadata))
    return path


def test_the_base_is_frozen_and_the_first_output_is_its_own(tiny_pipe, tmp_path):
    before = run_model(tiny_pipe)
    parameters = add_adapter(tiny_pipe, make_config(tmp_path, targets=ALL))
    assert measure_distance(before, run_model(tiny_pipe)) == 0
    trained = [
        name
        for component in (tiny_pipe.unet, tiny_pipe.text_encoder, tiny_pipe.vae)
        for name, parameter in component.named_parameters()
        if parameter.requires_grad
    ]
    assert len(trained) == len(parameters)
    assert all(".lora_" in name for name in trained)


def test_the_start_depends_on_the_seed_alone(tokenizer_folder, tmp_path):
    starts = []
    for seed, noise in ((1, 0), (1, 5), (2, 0)):
        pipe = build_tiny_pipe(tokenizer_folder)
        torch.manual_seed(noise)  # the global generator has no say
        starts.append(add_adapter(pipe, make_config(tmp_path, seed=seed)))
    name = next(name for name in starts[0] if ".lora_A." in name)
    assert torch.equal(starts[0][name], starts[1][name])
    assert not torch.equal(starts[0][name], starts[2][name])


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("attention", {"to_q", "to_k", "to_v", "0"}),
        ("feed_forward", {"proj", "2"}),
        ("text_encoder", {"q_proj", "k_proj", "v_proj", "out_proj"}),
    ],
)
def test_targets(tiny_pipe, tmp_path, targets, expected):
    parameters = add_adapter(tiny_pipe, make_config(tmp_path, targets=targets))
    assert {name.split(".lora_")[0].split(".")[-1] for name in parameters} == expected


def test_a_rank_that_no_layer_is_wide_enough_for(tiny_pipe, tmp_path):
    with pytest.raises(ValidationError, match="rank=65: the widest of the unet's layers has 64"):
        add_adapter(tiny_pipe, make_config(tmp_path, rank=65))


def test_other_pipelines_are_refused(tokenizer_folder, tmp_path):
    with pytest.raises(ValidationError, match="StableDiffusionXLPipeline: cannot be trained"):
        add_adapter(build_tiny_xl_pipe(tokenizer_folder), make_config(tmp_path))


@pytest.mark.parametrize("build", [build_tiny_xl_pipe, build_tiny_sd3_pipe])
def test_other_pipelines_are_refused_before_anything_is_read(tokenizer_folder, tmp_path, build):
    config = make_config(tmp_path / "run", dataset=str(tmp_path / "nowhere"))
    with pytest.raises(ValidationError, match="Pipeline: cannot be trained here"):
        train_lora(config, pipe=build(tokenizer_folder), progress=False)


@pytest.mark.parametrize("targets", [("attention",), ALL, ("convolution",), ("text_encoder",)])
def test_the_file_loads_with_plain_diffusers(tokenizer_folder, tmp_path, targets):
    pipe = build_tiny_pipe(tokenizer_folder)
    base = run_model(pipe)
    make_trained(pipe, tmp_path, targets=targets)
    expected = run_model(pipe)
    fresh = build_tiny_pipe(tokenizer_folder)
    fresh.load_lora_weights(tmp_path)
    assert measure_distance(run_model(fresh), expected) == 0
    assert measure_distance(base, expected) > 1e-3


@pytest.mark.parametrize("targets", [("attention",), ALL])
def test_kohya(tokenizer_folder, tmp_path, targets):
    pipe = build_tiny_pipe(tokenizer_folder)
    path = make_trained(pipe, tmp_path, targets=targets)
    exported = export_kohya(path, tmp_path / "kohya.safetensors")
    weights = safetensors.torch.load_file(exported)
    assert all(key.startswith(("lora_unet_", "lora_te_text_model_")) for key in weights)
    assert {float(v) for k, v in weights.items() if k.endswith(".alpha")} == {16.0}  # not the rank
    fresh = build_tiny_pipe(tokenizer_folder)
    fresh.load_lora_weights(tmp_path, weight_name="kohya.safetensors")
    assert measure_distance(run_model(fresh), run_model(pipe)) == 0


def test_kohya_wants_to_know_alpha(tmp_path):
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"unet.a.lora_A.weight": torch.ones(1)}, path)
    with pytest.raises(ValidationError, match="does not say its alpha"):
        export_kohya(path, tmp_path / "kohya.safetensors")


def test_metadata(tiny_pipe, tmp_path):
    path = make_trained(tiny_pipe, tmp_path, rank=4)
    metadata = read_metadata(path)
    assert metadata["config"]["rank"] == 4
    assert metadata["dataset"] == {"fingerprint": "tiny-24-0", "images": 24}
    assert metadata["versions"]["torch"] == torch.__version__
    assert "red boots" in metadata["caption_examples"]
    with safe_open(path, framework="pt") as file:
        assert str(tmp_path) not in json.dumps(file.metadata())  # no folder of anybody


def test_weights_go_out_and_come_back(tokenizer_folder, tmp_path):
    pipe, fresh = build_tiny_pipe(tokenizer_folder), build_tiny_pipe(tokenizer_folder)
    path = make_trained(pipe, tmp_path, targets=ALL)
    add_adapter(fresh, make_config(tmp_path, targets=ALL))
    write_adapter(fresh, unpack_adapter(path.read_bytes()))
    for component, state in read_adapter(pipe).items():
        for name, value in read_adapter(fresh)[component].items():
            assert torch.equal(value, state[name]), name


def test_a_nan_is_never_packed(tiny_pipe, tmp_path):
    parameters = add_adapter(tiny_pipe, make_config(tmp_path))
    list(parameters.values())[3].data[0, 0] = float("nan")
    with pytest.raises(ValidationError, match=r"adapter of the unet.*lora_B.*1 NaN"):
        pack_adapter(tiny_pipe, {})


def test_another_base_is_refused(tokenizer_folder, tmp_path):
    path = make_trained(build_tiny_pipe(tokenizer_folder), tmp_path)
    load_adapter(build_tiny_pipe(tokenizer_folder), tmp_path)  # its own is fine
    half = build_tiny_pipe(tokenizer_folder)
    half.unet.to(torch.bfloat16)
    load_adapter(half, path)  # in another dtype too
    other = build_tiny_pipe(tokenizer_folder, seed=1)
    with pytest.raises(ValidationError, match="whose weights are not those of this pipeline"):
        load_adapter(other, path)
    assert not getattr(other.unet, "peft_config", None)
    load_adapter(other, path, any_base=True)


def test_another_architecture_is_refused_by_layer(tokenizer_folder, tmp_path):
    path = make_trained(build_tiny_pipe(tokenizer_folder), tmp_path)
    from sdkit.loading import load_pipeline

    mini, _ = load_pipeline("mini", backend="cpu", progress=False)
    with pytest.raises(ValidationError, match=r"was trained on .* this pipeline has a weight of"):
        load_adapter(mini, path, any_base=True)


def test_merge_and_unmerge(tokenizer_folder, tmp_path):
    pipe = build_tiny_pipe(tokenizer_folder)
    base = run_model(pipe)
    load_adapter(pipe, make_trained(build_tiny_pipe(tokenizer_folder), tmp_path, targets=ALL))
    adapted = run_model(pipe)
    merge_adapter(pipe)
    assert measure_distance(run_model(pipe), adapted) < 1e-4
    unmerge_adapter(pipe)
    pipe.unload_lora_weights()
    assert measure_distance(run_model(pipe), base) < 1e-4


def test_a_merge_that_overflows_is_refused(tokenizer_folder, tmp_path):
    pipe = build_tiny_pipe(tokenizer_folder)
    load_adapter(pipe, make_trained(build_tiny_pipe(tokenizer_folder), tmp_path))
    pipe.unet.to(torch.float16)
    before = [p.clone() for p in pipe.unet.parameters()]
    with pytest.raises(ValidationError, match=r"merge: .*finite"):
        merge_adapter(pipe, scale=1e9)
    after = list(pipe.unet.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def read_file(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def without_b(weights, metadata):
    return {k: v for k, v in weights.items() if ".lora_B." not in k}, metadata


def without_one(weights, metadata):
    return dict(sorted(weights.items())[1:]), metadata


def without_a_layer(weights, metadata):
    """Both halves of it: diffusers would leave that layer as the base has it."""
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q."
    return {k: v for k, v in weights.items() if not k.startswith(layer)}, metadata


def with_a_nan(weights, metadata):
    name = sorted(weights)[3]
    return weights | {name: torch.full_like(weights[name], float("nan"))}, metadata


def of_integers(weights, metadata):
    return {name: weight.to(torch.int8) for name, weight in weights.items()}, metadata


def with_damaged_settings(weights, metadata):
    return weights, {**metadata, "lora_adapter_metadata": "{"}


def with_damaged_notes(weights, metadata):
    return weights, {**metadata, "sdkit.config": "{"}


def of_a_block(weights, metadata):
    return {"unet.mid_block.lora_A.weight": torch.ones(3, 3)}, None


def of_xl(weights, metadata):
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    return {f"{name}.lora_down.weight": torch.ones(4, 32),
            f"{name}.lora_up.weight": torch.ones(32, 4),
            f"{name}.alpha": torch.tensor(4.0)}, None  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_b, "damaged, or made for something else"),
        (without_one, "has 63 weights of layers, and its layers in this pipeline 64"),
        (without_a_layer, "no weights for 1 of the 32 layers .*such as unet.mid_block"),
        (with_a_nan, "values are NaN"),
        (of_integers, "diffusers cannot load it"),
        (with_damaged_settings, "diffusers cannot load it"),
        (with_damaged_notes, "what it says of sdkit.config is damaged"),
        (of_a_block, "for its unet.mid_block this pipeline has no such layer"),
        (of_xl, "diffusers cannot load it"),
        (lambda weights, metadata: ({}, None), "damaged, or made for something else"),
        (lambda weights, metadata: ({"a": torch.ones(1)}, None), "diffusers cannot load it"),
    ],
)
def test_an_adapter_that_is_not_whole_is_refused(tokenizer_folder, tmp_path, change, message):
    path = make_trained(build_tiny_pipe(tokenizer_folder), tmp_path)
    pipe = build_tiny_pipe(tokenizer_folder)
    base = run_model(pipe)
    weights, metadata = change(*read_file(path))
    safetensors.torch.save_file(weights, path, metadata)
    with pytest.raises(ValidationError, match=message):
        load_adapter(pipe, path)
    assert measure_distance(run_model(pipe), base) == 0
    assert not getattr(pipe.unet, "peft_config", None)


def test_a_second_adapter_is_counted_alone(tokenizer_folder, tmp_path):
    path = make_trained(build_tiny_pipe(tokenizer_folder), tmp_path, targets=ALL)
    pipe = load_adapter(build_tiny_pipe(tokenizer_folder), path)
    load_adapter(pipe, path)
    assert len(pipe.unet.peft_config) == 2
    weights, metadata = without_one(*read_file(path))
    safetensors.torch.save_file(weights, path, metadata)
    with pytest.raises(ValidationError, match="damaged, or made for something else"):
        load_adapter(pipe, path)
    assert len(pipe.unet.peft_config) == 2


def test_what_kohya_s_layout_cannot_be_made_of_or_written_to(tiny_pipe, tmp_path):
    path = make_trained(tiny_pipe, tmp_path)
    with pytest.raises(ValidationError, match=r"none\.safetensors: cannot be read"):
        export_kohya(tmp_path / "none.safetensors", tmp_path / "kohya.safetensors")
    with pytest.raises(ValidationError, match="cannot be written to"):
        export_kohya(path, path / "kohya.safetensors")
    weights, metadata = with_a_nan(*read_file(path))
    safetensors.torch.save_file(weights, path, metadata)
    with pytest.raises(ValidationError, match="values are NaN"):
        export_kohya(path, tmp_path / "kohya.safetensors")
    assert not (tmp_path / "kohya.safetensors").exists()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValidationError, match="cannot be read"):
        export_kohya(path, tmp_path / "kohya.safetensors")


def test_where_there_is_nothing_to_merge(tiny_pipe, tokenizer_folder, tmp_path):
    for change in (merge_adapter, unmerge_adapter):
        with pytest.raises(ValidationError, match="StableDiffusionPipeline: has no adapter"):
            change(tiny_pipe)
    load_adapter(tiny_pipe, make_trained(build_tiny_pipe(tokenizer_folder), tmp_path))
    for scale in (float("nan"), float("inf"), "1"):
        with pytest.raises(ValidationError, match="scale: got"):
            merge_adapter(tiny_pipe, scale=scale)
