"""Plant one fault in a good image or tensor, and demand its name and its count."""

import io
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from sdkit import verdict as verdict_module
from sdkit.validation import (
    ValidationError,
    check_finite,
    check_image,
    check_image_file,
    check_is_writable,
    judge_image,
    judge_image_file,
    validate_image_array,
)

GOOD = np.random.default_rng(0).random((16, 24, 3)).astype(np.float32)


def planted(value, *, count=1):
    image = GOOD.copy()
    image.reshape(-1)[:count] = value
    return image


FAULTS = {
    "nan": planted(np.nan, count=5),
    "inf": planted(-np.inf, count=2),
    "out-of-range": planted(1.01),
    "all-black": np.zeros((16, 24, 3), np.uint8),
    "flat": np.full((16, 24, 3), 255, np.uint8),
    "transparent": np.zeros((16, 24, 4), np.uint8),
    "wrong-shape": GOOD.transpose(2, 0, 1),
    "wrong-dtype": (GOOD * 255).astype(np.int64),
    "too-small": GOOD[:1, :1],
}


@pytest.mark.parametrize("problem", FAULTS)
def test_each_fault_is_told_by_its_name(problem, capsys):
    verdict = judge_image(FAULTS[problem])
    assert (verdict.valid, verdict.problem) == (False, problem)
    with pytest.raises(ValidationError, match="image: "):
        check_image(FAULTS[problem])
    assert validate_image_array(FAULTS[problem], "black\ncasual shoes") is False
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert "[ERROR] black casual shoes: " in lines[0]


def test_counts_are_exact_and_extremes_are_those_of_the_finite_values():
    image = planted(np.nan, count=5)
    image[8, 8] = (np.inf, -np.inf, 0.5)
    verdict = judge_image(image)
    assert (verdict.problem, verdict.nan_count, verdict.inf_count) == ("nan", 5, 2)
    assert "5 of 1152 values are NaN, 2 are Inf" in verdict.message
    assert verdict.minimum == np.nanmin(image[np.isfinite(image)])
    everything = judge_image(np.full((8, 8, 3), np.nan))
    assert (everything.nan_count, everything.minimum, everything.maximum) == (192, None, None)


def test_a_nan_is_found_in_the_floats_that_a_cast_would_have_made_black(capsys):
    floats = np.full((8, 8, 3), np.nan, np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cast = (floats * 255).round().astype("uint8")
    assert judge_image(floats).problem == "nan"
    assert judge_image(cast).problem == "all-black"
    assert not validate_image_array(floats, "shoe")
    assert "NaN" in capsys.readouterr().out


def test_good_images_pass_in_every_form(capsys):
    uint8 = (GOOD * 255).round().astype(np.uint8)
    tensor = torch.from_numpy(GOOD).permute(2, 0, 1)
    pil = Image.fromarray(uint8)
    forms = [
        GOOD, GOOD.astype(np.float16), GOOD.astype(float), GOOD[..., :1], uint8, uint8[:, :, 0],
        tensor, tensor.bfloat16(), tensor[None], tensor.requires_grad_(), np.stack([uint8, uint8]),
        pil, pil.convert("L"), pil.convert("P"),
    ]  # fmt: skip
    for image in forms:
        assert judge_image(image).valid, judge_image(image)
        assert check_image(image) is image
    assert validate_image_array(uint8, "brown shoes")
    assert capsys.readouterr().out.startswith("  [OK] brown shoes: ")


@pytest.mark.parametrize("scale", [0, 0.001, 0.0015, 0.003, 0.3])
@pytest.mark.parametrize("texture", [0, 0.001, 0.5])
def test_floats_and_the_file_written_from_them_get_the_same_verdict(scale, texture):
    floats = np.clip(scale + texture * GOOD, 0, 1)
    as_file = (floats * 255).round().astype(np.uint8)
    assert judge_image(floats).problem == judge_image(as_file).problem


def test_rounding_is_forgiven_at_the_ends_of_the_range_and_nothing_more():
    assert judge_image(planted(1.0015)).valid
    assert judge_image(planted(-0.0015)).valid
    assert judge_image(planted(-0.003)).problem == "out-of-range"
    assert judge_image(GOOD * 255).problem == "out-of-range"
    assert "divide by 255" in judge_image(GOOD * 255).message


def test_of_a_batch_the_bad_image_is_named():
    verdict = judge_image(torch.from_numpy(np.stack([GOOD, GOOD * 0])).permute(0, 3, 1, 2))
    assert verdict.problem == "all-black"
    assert verdict.message.startswith("image 1 of 2")


def test_what_alpha_hides_does_not_count():
    black = np.zeros((16, 16, 4), np.uint8)
    black[4:8, 4:8, 3] = 255
    black[:4, :, :3] = 200
    assert judge_image(black).problem == "all-black"
    black[5, 5, :3] = 200
    assert judge_image(black).valid
    hidden = black.copy()
    hidden[..., :3] = np.random.default_rng(0).integers(0, 255, (16, 16, 3))
    hidden[..., 3] = 0
    assert judge_image(hidden).problem == "transparent"
    hidden[..., 3] = 1
    assert judge_image(hidden).valid
    hidden[0, 0] = 9, 9, 9, 200
    hidden[1:, :, 3] = hidden[0, 1:, 3] = 0
    assert judge_image(hidden).problem == "flat"  # one pixel is seen, and has one colour
    glass = np.full((16, 16, 4), 200, np.uint8)
    glass[:8, :, 3] = 100
    assert judge_image(glass).problem == "flat"


@pytest.mark.parametrize(
    "odd", [None, "shoe.png", [GOOD], 3.0, {}, torch.empty(3, 8, 8, device="meta")]
)
def test_judging_never_raises(odd):
    assert not judge_image(odd).valid


def test_why_pixels_cannot_be_read_is_told():
    assert "meta" in judge_image(torch.empty(3, 8, 8, device="meta")).message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_check_finite_counts_and_names(dtype):
    tensor = torch.ones(64, 64, dtype=dtype)
    assert check_finite(tensor, "unet") is tensor
    tensor[:3] = torch.nan
    tensor[5, :7] = -torch.inf
    with pytest.raises(ValidationError) as error:
        check_finite(tensor, "unet")
    name = str(dtype).removeprefix("torch.")
    assert f"unet ({name}, cpu): 192 of 4096 values are NaN, 7 are Inf." in str(error.value)
    assert ('dtype="float32"' in str(error.value)) == (dtype in (torch.float16, torch.bfloat16))


def test_check_finite_takes_whatever_has_numbers():
    large = torch.tensor(1e300, dtype=torch.float64)
    whole = [torch.arange(3), torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.int8)]
    for values in [*whole, np.arange(3), torch.empty(0), large, large.numpy()]:
        assert check_finite(values, "x") is values
    float8 = torch.tensor([1, float("nan")]).to(torch.float8_e4m3fn)
    for values in [np.array([np.inf]), float8, torch.tensor(complex(0, float("inf")))]:
        with pytest.raises(ValidationError, match="1 (of|are)"):
            check_finite(values, "x")
    for values in [None, "text", torch.empty(2, device="meta"), np.array(["a"])]:
        with pytest.raises(ValidationError, match="x: got"):
            check_finite(values, "x")


def save(path, image, **options):
    image.save(path, **options)
    return path


def picture(mode="RGB"):
    return Image.fromarray((GOOD * 255).astype(np.uint8)).convert(mode)


def png_header(width, height):
    """A PNG that claims a size and holds nothing of it."""
    chunk = b"IHDR" + width.to_bytes(4) + height.to_bytes(4) + b"\x08\x02\x00\x00\x00"
    end = b"\0\0\0\0IEND" + zlib.crc32(b"IEND").to_bytes(4)
    idat = b"IDAT" + zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4)
        + (len(idat) - 4).to_bytes(4) + idat + zlib.crc32(idat).to_bytes(4) + end
    )  # fmt: skip


def test_good_files_of_every_mode_pass(tmp_path):
    sixteen_bits = Image.fromarray((GOOD[..., 0] * 65535).astype(np.uint16))
    rotated = Image.Exif()
    rotated[0x0112] = 6
    files = [
        save(tmp_path / "rgb.png", picture()),
        save(tmp_path / "rgba.png", picture("RGBA")),
        save(tmp_path / "palette.png", picture("P")),
        save(tmp_path / "grey.png", picture("L")),
        save(tmp_path / "one_bit.png", picture("1")),
        save(tmp_path / "grey_alpha.png", picture("LA")),
        save(tmp_path / "sixteen.png", sixteen_bits),
        save(tmp_path / "float.tiff", Image.fromarray(GOOD[..., 0])),
        save(tmp_path / "cmyk.jpg", picture("CMYK")),
        save(tmp_path / "rotated.jpg", picture(), exif=rotated),
        save(tmp_path / "shoe.webp", picture()),
        save(
            tmp_path / "moving.gif",
            picture(),
            save_all=True,
            append_images=[picture().rotate(90), picture().rotate(180)],
        ),
        save(tmp_path / "no_suffix", picture(), format="PNG"),
    ]
    for path in files:
        assert judge_image_file(path).valid, (path.name, judge_image_file(path))
        assert check_image_file(str(path)) == path
    assert "mode P" in judge_image_file(tmp_path / "palette.png").message
    assert "3 frames" in judge_image_file(tmp_path / "moving.gif").message


def test_bad_files_are_told_apart(tmp_path):
    good = save(tmp_path / "good.png", picture())
    black16 = Image.fromarray(np.zeros((8, 8), np.uint16))
    nan_tiff = Image.fromarray(np.full((8, 8), np.nan, np.float32))
    damaged = bytearray(good.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    contents = {
        "empty-file": b"",
        "not-an-image": b"black casual shoes",
        "unreadable": bytes(damaged),
        "truncated": good.read_bytes()[:-40],
        "too-large": png_header(60_000, 60_000),
    }
    for problem, content in contents.items():
        (tmp_path / problem).write_bytes(content)
    (tmp_path / "not-a-file").mkdir()
    save(tmp_path / "all-black", Image.new("RGB", (64, 64)), format="PNG")
    save(tmp_path / "flat", Image.new("RGB", (64, 64), (128, 128, 128)), format="PNG")
    save(tmp_path / "transparent", Image.new("RGBA", (64, 64), (9, 9, 9, 0)), format="PNG")
    save(tmp_path / "too-small", Image.new("RGB", (1, 1), "red"), format="PNG")
    problems = [*contents, "not-a-file", "all-black", "flat", "transparent", "too-small", "missing"]
    for problem in problems:
        assert judge_image_file(tmp_path / problem).problem == problem
        with pytest.raises(ValidationError, match=problem):
            check_image_file(tmp_path / problem)
    assert judge_image_file(save(tmp_path / "16.png", black16)).problem == "all-black"
    assert judge_image_file(save(tmp_path / "nan.tiff", nan_tiff)).nan_count == 64
    assert not judge_image_file("with\0zero").valid


def test_a_png_cut_anywhere_is_never_valid_and_never_raises(tmp_path):
    whole = save(tmp_path / "whole.png", picture()).read_bytes()
    path = tmp_path / "cut.png"
    for end in range(0, len(whole) - 4, 3):  # the last 4 bytes are the checksum of "the end"
        path.write_bytes(whole[:end])
        assert not judge_image_file(path).valid, end


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_cut_file_is_found_where_pillow_was_told_to_forgive_it(tmp_path, format, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    buffer = io.BytesIO()
    picture().resize((256, 256)).save(buffer, format=format)
    path = tmp_path / "cut"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    assert not judge_image_file(path).valid
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_a_bomb_is_not_unpacked_where_pillow_was_told_to(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "bomb.png").write_bytes(png_header(60_000, 60_000))
    assert judge_image_file(tmp_path / "bomb.png").problem == "too-large"


HALF_A_STEP = 0.5 / 255


@pytest.mark.parametrize("low", [-HALF_A_STEP, 0.0])
@pytest.mark.parametrize("high", [1.0, 1 + HALF_A_STEP])
def test_half_a_step_of_8_bits_beyond_the_range_is_rounding(low, high):
    image = GOOD.astype(np.float64)
    image[0, 0, 0], image[0, 0, 1] = low, high
    verdict = judge_image(image)
    assert (verdict.valid, verdict.minimum, verdict.maximum) == (True, low, high)


@pytest.mark.parametrize(
    ("end", "beyond", "problem"), [(0, -HALF_A_STEP, "all-black"), (1, 1 + HALF_A_STEP, "flat")]
)
def test_what_rounds_to_an_end_of_the_range_is_black_or_white(end, beyond, problem):
    image = np.full((4, 6, 3), end, np.float64)
    image[0, 0] = beyond
    assert judge_image(image).problem == problem


@pytest.mark.parametrize("value", [-HALF_A_STEP * 1.002, 1 + HALF_A_STEP * 1.002])
def test_more_than_that_is_out_of_range_and_counted(value):
    image = GOOD.astype(np.float64)
    image[0, 0] = value
    image[0, 1] = -HALF_A_STEP, 1 + HALF_A_STEP, 0.0  # these are not
    verdict = judge_image(image)
    assert verdict.problem == "out-of-range"
    assert verdict.message.startswith(f"3 of {image.size} values are outside")


def test_a_picture_of_the_extremes_alone_is_one():
    checkers = np.indices((4, 6)).sum(0) % 2
    for image in (checkers.astype(np.float32), np.uint8(checkers * 255)):
        verdict = judge_image(image)
        assert verdict.valid and (verdict.nan_count, verdict.inf_count) == (0, 0)
    assert judge_image(Image.fromarray((checkers * 65535).astype(np.uint16))).maximum == 1


def test_a_picture_in_blue_alone_is_one_with_alpha_too():
    image = np.zeros((4, 6, 4), np.uint8)
    image[:, :, 3] = 255
    image[:2, :, 2] = 200
    assert judge_image(image).valid
    assert judge_image(Image.fromarray(image)).valid


@pytest.mark.parametrize("axis", [0, 1])
def test_stripes_are_a_picture(axis):
    stripes = np.repeat(np.indices((6, 6))[axis][:, :, None] % 2, 3, axis=2)
    assert judge_image(stripes.astype(np.float32)).valid


def test_the_one_colour_is_told_as_in_8_bits():
    assert "(255, 255, 255)" in judge_image(np.ones((4, 6, 3), np.float32)).message
    assert "(51, 0, 0)" in judge_image(np.full((4, 6, 3), (0.2, 0, 0))).message


def test_two_pixels_a_side_are_enough():
    assert judge_image(GOOD[:2, :2]).valid
    assert judge_image(GOOD[:1]).problem == judge_image(GOOD[:, :1]).problem == "too-small"
    assert judge_image(Image.fromarray(np.uint8(GOOD[:2, :2] * 255))).valid


def test_black_pixels_are_counted():
    message = judge_image(np.zeros((16, 24, 3), np.uint8)).message
    assert message.startswith(f"all {16 * 24} pixels are black")


def test_a_file_of_the_most_pixels_is_unpacked_and_none_of_more(tmp_path, monkeypatch):
    assert verdict_module.MAXIMUM_PIXELS * 3 <= 2**28 < (verdict_module.MAXIMUM_PIXELS + 1) * 3
    path = tmp_path / "image.png"
    Image.fromarray(np.uint8(GOOD * 255)).save(path)
    monkeypatch.setattr(verdict_module, "MAXIMUM_PIXELS", 16 * 24)
    assert judge_image_file(path).valid
    monkeypatch.setattr(verdict_module, "MAXIMUM_PIXELS", 16 * 24 - 1)
    assert judge_image_file(path).problem == "too-large"


@pytest.mark.parametrize(
    "shape",
    [(8,), (8, 8, 2), (8, 8, 5), (8, 8, 0), (0, 8, 3), (0, 8, 8, 3), (2, 8, 8, 2), (1, 2, 8, 8, 3)],
)
def test_what_has_no_image_s_shape_is_refused(shape):
    assert judge_image(np.ones(shape, np.float32)).problem == "wrong-shape"


def test_a_folder_is_made_and_left_empty_or_refused_by_name(tmp_path):
    folder = tmp_path / "new" / "newer"
    for _ in range(2):
        assert check_is_writable(str(folder)) == folder and list(folder.iterdir()) == []
    (folder / "file").touch()
    with pytest.raises(ValidationError, match="file/below: cannot be written to .*directory"):
        check_is_writable(folder / "file" / "below")
