import io
import warnings

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps
from tiny_images import make_image

from sdkit.finetuning.picture import hash_pixels, read_picture

RESOLUTION = 32


def kinds(picture):
    return [finding.kind for finding in picture.findings]


def read(path, resolution=RESOLUTION):
    return read_picture(path, resolution)


def save_with_orientation(image, path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    image.save(path, exif=exif)


def test_a_plain_picture_has_no_finding(tmp_path):
    path = tmp_path / "a.png"
    make_image(0).save(path)
    picture = read(path)
    assert picture.findings == () and picture.size_pixels == (40, 40)
    assert picture.pixels.shape == (RESOLUTION, RESOLUTION, 3)
    assert picture.pixels.dtype == np.uint8
    assert picture.digest == hash_pixels(picture.pixels)


def test_a_wide_picture_is_cropped_around_its_middle(tmp_path):
    array = np.full((32, 64, 3), 255, np.uint8)
    array[:, 16:48] = (200, 10, 10)
    array[8:24, 24:40] = (10, 10, 200)
    Image.fromarray(array).save(tmp_path / "a.png")
    picture = read(tmp_path / "a.png")
    np.testing.assert_array_equal(picture.pixels, array[:, 16:48])


def test_exif_turns_as_the_camera_meant(tmp_path):
    upright = make_image(1, (48, 40))
    # A camera held sideways: the file has the turned pixels, the tag says how to turn them back.
    save_with_orientation(upright.transpose(Image.Transpose.ROTATE_90), tmp_path / "a.png", 6)
    upright.save(tmp_path / "upright.png")
    turned, expected = read(tmp_path / "a.png"), read(tmp_path / "upright.png")
    assert kinds(turned) == ["turned"] and turned.size_pixels == (48, 40)
    np.testing.assert_array_equal(turned.pixels, expected.pixels)


@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation(tmp_path, orientation):
    """As Pillow turns it; 0 and 9 are none, so nothing is said of them."""
    image = make_image(1, (40, 32))
    save_with_orientation(image, tmp_path / "a.png", orientation)
    picture = read(tmp_path / "a.png")
    assert kinds(picture) == (["turned"] if 2 <= orientation <= 8 else [])
    size = (32, 40) if 5 <= orientation <= 8 else (40, 32)
    assert picture.size_pixels == size
    with Image.open(tmp_path / "a.png") as opened:
        upright = ImageOps.fit(ImageOps.exif_transpose(opened), (32, 32), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(picture.pixels, np.asarray(upright))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_what_is_transparent_becomes_white(tmp_path, mode):
    image = make_image(2, (32, 32), "RGB").convert("L" if mode == "LA" else "RGB")
    alpha = Image.new("L", (32, 32), 255)
    alpha.paste(0, (0, 0, 10, 32))
    if mode == "PA":  # a palette with a transparent colour, as a GIF or PNG has it
        image = image.quantize(16)
        image.paste(15, (0, 0, 10, 32))
        image.save(tmp_path / "a.png", transparency=15)
    else:
        image.putalpha(alpha)
        image.save(tmp_path / "a.png")
    picture = read(tmp_path / "a.png")
    assert kinds(picture) == ["alpha"]
    assert "on white" in picture.findings[0].message
    assert (picture.pixels[:, :10] == 255).all()
    assert not (picture.pixels[:, 10:] == 255).all()


def test_half_transparent_is_mixed_with_white(tmp_path):
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 128))
    image.putpixel((0, 0), (0, 0, 0, 255))
    image.save(tmp_path / "a.png")
    assert read(tmp_path / "a.png").pixels[20, 20].tolist() == [127, 127, 127]


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path):
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    picture = read(tmp_path / "a.png")
    assert kinds(picture) == ["deep"]
    expected = (ramp / 65535 * 255).round().astype(np.uint8)
    np.testing.assert_array_equal(picture.pixels[..., 0], expected)


def make_png_of_16_bit_colours(width, height):
    """Pillow writes none, so the chunks are put together here."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(
            ">I", zlib.crc32(kind + data)
        )  # fmt: skip

    rng = np.random.default_rng(0)
    rows = rng.integers(0, 65536, (height, width * 3)).astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )  # fmt: skip


def test_sixteen_bit_colours_are_told(tmp_path):
    (tmp_path / "a.png").write_bytes(make_png_of_16_bit_colours(32, 32))
    picture = read(tmp_path / "a.png")
    assert kinds(picture) == ["deep"] and picture.pixels is not None


def test_floats_are_in_zero_to_one(tmp_path):
    values = np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(32, 32)
    Image.fromarray(values).save(tmp_path / "a.tiff")
    assert kinds(read(tmp_path / "a.tiff")) == ["deep"]
    Image.fromarray(values * 300).save(tmp_path / "b.tiff")
    assert kinds(read(tmp_path / "b.tiff")) == ["unreadable"]
    values[3, 3] = np.nan
    Image.fromarray(values).save(tmp_path / "c.tiff")
    assert "NaN" in read(tmp_path / "c.tiff").findings[0].message


@pytest.mark.parametrize(
    ("mode", "ending", "kind"),
    [("CMYK", "jpg", "cmyk"), ("P", "png", "palette"), ("1", "png", "mode"), ("L", "png", None)],
)
def test_other_modes_become_rgb(tmp_path, mode, ending, kind):
    path = tmp_path / f"a.{ending}"
    make_image(3, (32, 32), mode).save(path, quality=95)
    picture = read(path)
    assert kinds(picture) == ([kind] if kind else [])
    shown = np.asarray(Image.open(path).convert("RGB"))
    np.testing.assert_array_equal(picture.pixels, shown)


def test_of_an_animation_the_first_frame(tmp_path):
    frames = [make_image(seed, (32, 32)) for seed in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    picture = read(tmp_path / "a.gif")
    assert "animated" in kinds(picture) and picture.pixels is not None
    assert "3 frames" in next(f.message for f in picture.findings if f.kind == "animated")


def cut(path, count=60):
    path.write_bytes(path.read_bytes()[:-count])


def spoil_middle(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_a_file_that_is_cut_off_is_not_used(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    make_image(4, (64, 64)).save(path)
    cut(path)
    picture = read(path)
    assert picture.pixels is None and set(kinds(picture)) <= {"truncated", "unreadable"}


def test_a_cut_file_is_found_where_a_script_allowed_it(tmp_path, monkeypatch):
    from sdkit.verdict import strict_pillow

    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    path = tmp_path / "a.jpg"
    make_image(4, (64, 64)).save(path)
    cut(path)
    with strict_pillow():
        assert read(path).pixels is None


def test_a_flipped_bit_of_a_png_is_found(tmp_path):
    make_image(5, (64, 64)).save(tmp_path / "a.png")
    spoil_middle(tmp_path / "a.png")
    assert read(tmp_path / "a.png").pixels is None


def test_what_is_no_picture(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("<html>not found</html>")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    Image.new("RGB", (40, 40), "white").save(tmp_path / "flat.png")
    Image.new("RGB", (40, 40)).save(tmp_path / "black.png")
    Image.new("RGBA", (40, 40)).save(tmp_path / "clear.png")
    make_image(6, (31, 200)).save(tmp_path / "thin.png")
    expected = {
        "empty": "empty-file", "text": "not-an-image", "folder": "not-a-file", "link": "missing",
        "gone": "missing", "flat": "flat", "black": "all-black", "clear": "unreadable",
        "thin": "too-small",
    }  # fmt: skip
    assert {name: kinds(read(tmp_path / f"{name}.png"))[0] for name in expected} == expected
    assert "31x200 pixels, expected at least 32" in read(tmp_path / "thin.png").findings[0].message


def test_a_bomb_is_not_unpacked(tmp_path):
    image = Image.new("1", (20_000, 20_000))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    (tmp_path / "a.png").write_bytes(stream.getvalue())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert kinds(read(tmp_path / "a.png")) == ["too-large"]


def test_a_large_jpeg_is_unpacked_small_and_looks_the_same(tmp_path):
    path = tmp_path / "a.jpg"
    make_image(7, (1024, 1024)).save(path, quality=95)
    small = np.asarray(Image.open(path).resize((32, 32), Image.Resampling.LANCZOS), np.float32)
    assert abs(read(path).pixels - small).mean() < 1.0
