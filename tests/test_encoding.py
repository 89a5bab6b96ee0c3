"""Encoded once, of the very content, model and settings: nothing stale, nothing half, no NaN."""

import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file
from tiny_images import make_image, make_splits, write_jsonl
from tiny_pipelines import build_tiny_pipe
from tiny_training import make_config

from sdkit import ImageCaptionDataset, ValidationError
from sdkit.finetuning import encoding
from sdkit.finetuning.encoding import encode_dataset
from sdkit.finetuning.latent_cache import save_tensors
from sdkit.finetuning.training import train_lora

NAN = float("nan")


@pytest.fixture
def photos(tmp_path):
    folder = make_splits(tmp_path / "photos", train=6, size=(64, 64))
    make_image(2, (64, 64)).save(folder / "train" / "002.png", format="BMP")  # of a fixed size
    return folder


@pytest.fixture
def encoded_images(tiny_pipe):
    """How many images and captions went through the models so far."""
    counts = {"images": 0, "captions": 0}

    def count(name):
        def hook(module, args, kwargs, output):
            counts[name] += len(args[0] if args else kwargs["input_ids"])

        return hook

    tiny_pipe.vae.encoder.register_forward_hook(count("images"), with_kwargs=True)
    tiny_pipe.text_encoder.register_forward_hook(count("captions"), with_kwargs=True)
    return counts


def read(folder, resolution=64):
    return ImageCaptionDataset(folder, resolution=resolution, progress=False)


def encode(pipe, folder, cache, *, resolution=64, **options):
    return encode_dataset(pipe, read(folder, resolution), cache, progress=False, **options)


def test_what_is_encoded_is_the_posterior(tiny_pipe, photos, tmp_path):
    encoded = encode(tiny_pipe, photos, tmp_path / "cache", flip=True)
    dataset = read(photos)
    for index in (0, 5):
        image = dataset[index].image[None]
        for mean, std, pixels in (
            (encoded.latent_mean, encoded.latent_std, image),
            (encoded.flipped_mean, encoded.flipped_std, image.flip(-1)),
        ):
            posterior = tiny_pipe.vae.encode(pixels).latent_dist
            assert torch.allclose(mean[index], posterior.mean[0], atol=1e-5)
            assert torch.allclose(std[index], posterior.std[0], atol=1e-5)
    draws = [
        encoded.sample_latents(torch.tensor([0]), torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert encoded.captions[encoded.caption_index.tolist().index(1)] == "shoe number 0"


def test_nothing_is_encoded_twice(tiny_pipe, photos, tmp_path, encoded_images):
    first = encode(tiny_pipe, photos, tmp_path / "cache")
    assert encoded_images == {"images": 6, "captions": 7}  # and the empty one
    shutil.copytree(photos, tmp_path / "moved")
    again = encode(tiny_pipe, tmp_path / "moved", tmp_path / "cache")
    assert encoded_images == {"images": 6, "captions": 7}
    assert torch.equal(first.latent_mean, again.latent_mean)
    assert first.fingerprint == again.fingerprint


def change_model(pipe, photos):
    pipe.vae.encoder.conv_in.weight.data[0, 0, 0, 0] += 1e-3


def change_settings(pipe, photos):
    pipe.vae.register_to_config(force_upcast=False)


def change_image(pipe, photos):
    """In place; its time and its number of bytes stay."""
    path = photos / "train" / "002.png"
    before = path.stat()
    make_image(77, (64, 64)).save(path, format="BMP")
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def change_order(pipe, photos):
    (photos / "train" / "000.png").rename(photos / "train" / "999.png")
    rows = [{"file_name": p.name, "text": "shoe"} for p in (photos / "train").glob("*.png")]
    write_jsonl(photos / "train", rows)


@pytest.mark.parametrize(
    "change", [change_model, change_settings, change_image, change_order], ids=lambda f: f.__name__
)
def test_what_is_stale_is_not_used(tiny_pipe, photos, tmp_path, encoded_images, change):
    before = encode(tiny_pipe, photos, tmp_path / "cache")
    change(tiny_pipe, photos)
    found = encode(tiny_pipe, photos, tmp_path / "cache")
    assert encoded_images["images"] == 12 and found.fingerprint != before.fingerprint
    fresh = encode(tiny_pipe, photos, tmp_path / "other")
    assert torch.equal(found.latent_mean, fresh.latent_mean)


def test_another_resolution_and_other_captions(tiny_pipe, photos, tmp_path, encoded_images):
    encode(tiny_pipe, photos, tmp_path / "cache")
    assert encode(tiny_pipe, photos, tmp_path / "cache", resolution=32).latent_mean.shape[-1] == 4
    assert encoded_images == {"images": 12, "captions": 7}
    names = [f"{i:03d}.png" for i in range(6)]
    write_jsonl(photos / "train", [{"file_name": name, "text": "a boot"} for name in names])
    found = encode(tiny_pipe, photos, tmp_path / "cache")
    assert encoded_images == {"images": 12, "captions": 9} and found.captions == ("a boot",) * 6
    tiny_pipe.text_encoder.get_input_embeddings().weight.data *= 1.1
    encode(tiny_pipe, photos, tmp_path / "cache")
    assert encoded_images == {"images": 12, "captions": 11}


def test_an_interrupted_encode_goes_on(tiny_pipe, photos, tmp_path, encoded_images, monkeypatch):
    monkeypatch.setattr(encoding, "SHARD_IMAGES", 2)

    def interrupt(module, args):
        if encoded_images["images"] == 4:
            raise KeyboardInterrupt

    handle = tiny_pipe.vae.encoder.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        encode(tiny_pipe, photos, tmp_path / "cache")
    handle.remove()
    assert not list((tmp_path / "cache").glob("*.part"))
    found = encode(tiny_pipe, photos, tmp_path / "cache")
    assert encoded_images["images"] == 6
    assert torch.equal(found.latent_mean, encode(tiny_pipe, photos, tmp_path / "b").latent_mean)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_file_is_encoded_again(tiny_pipe, photos, tmp_path, encoded_images, damage):
    before = encode(tiny_pipe, photos, tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("latents-*")
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes({"flip": content, "cut": content[:-20], "empty": b""}[damage])
    with pytest.warns(UserWarning, match="damaged, so its images are encoded again"):
        found = encode(tiny_pipe, photos, tmp_path / "cache")
    assert torch.equal(found.latent_mean, before.latent_mean) and encoded_images["images"] == 12


@pytest.mark.parametrize("kind", ["latents", "captions"])
@pytest.mark.parametrize("change", ["fewer", "others"])
def test_a_whole_file_of_something_else_is_not_used(tiny_pipe, photos, tmp_path, kind, change):
    before = encode(tiny_pipe, photos, tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob(f"{kind}-*")
    fewer = {name: tensor[:2] for name, tensor in load_file(path).items()}
    save_tensors(path, fewer if change == "fewer" else {"other": torch.ones(6)})
    with pytest.warns(UserWarning, match="damaged, so its images are encoded again"):
        found = encode(tiny_pipe, photos, tmp_path / "cache")
    assert torch.equal(found.latent_mean, before.latent_mean)
    assert torch.equal(found.prompt_embeds, before.prompt_embeds)


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_a_latent_that_is_not_finite_names_its_image(tiny_pipe, photos, tmp_path, value):
    def spoil(module, args, output):
        output[3, 0, 0, 0] = value

    tiny_pipe.vae.quant_conv.register_forward_hook(spoil)
    with pytest.raises(ValidationError, match=r"latent mean of train/003\.png"):
        encode(tiny_pipe, photos, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("latents-*"))


def test_an_embedding_that_is_not_finite_names_its_caption(tiny_pipe, photos, tmp_path):
    def spoil(module, args, output):
        output[0][2] = NAN

    tiny_pipe.text_encoder.register_forward_hook(spoil)
    with pytest.raises(ValidationError, match="prompt_embeds of the caption 'shoe number 1'"):
        encode(tiny_pipe, photos, tmp_path / "cache")


def test_what_a_killed_process_left_is_removed(tiny_pipe, photos, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    names = {f".a.{2**22 + 1}.part": 99, f".b.{os.getpid()}.part": 99, f".c.{2**22 + 2}.part": 0}
    for name, age in names.items():
        (cache / name).touch()
        os.utime(cache / name, (time.time() - age,) * 2)
    encode(tiny_pipe, photos, cache)
    assert len(list(cache.glob("*.part"))) == 2 and not (cache / next(iter(names))).exists()


def test_a_cache_that_cannot_be(tiny_pipe, photos, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValidationError, match="choose another cache_folder"):
        encode(tiny_pipe, photos, tmp_path / "file")
    with pytest.raises(ValidationError, match="resolution=60: the VAE divides it by 8"):
        encode(tiny_pipe, photos, tmp_path / "cache", resolution=60)


def test_a_picture_that_is_held_out_and_trained_on_is_told(tokenizer_folder, photos, tmp_path):
    shutil.copy(photos / "train" / "001.png", photos / "validation" / "100.png")
    config = make_config(
        tmp_path / "run", dataset=str(photos), resolution=64, max_train_steps=1, lr_warmup_steps=0
    )
    report = train_lora(config, pipe=build_tiny_pipe(tokenizer_folder), progress=False)
    expected = "1 held-out images are also trained on, such as validation/100.png"
    assert expected in report.notices
