"""Reading every kind of picture, exact conversions, and files that are whole or not there."""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from kontext_core import images


def levels(width: int = 20, height: int = 12) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def as_uint8(picture: images.Picture) -> np.ndarray:
    return images.to_uint8(picture.image)[0].permute(1, 2, 0).numpy()


def stored(image: Image.Image, kind: str = "PNG", **options) -> io.BytesIO:
    data = io.BytesIO()
    image.save(data, kind, **options)
    data.seek(0)
    return data


def test_every_level_survives_every_conversion():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    floats = images.from_uint8(every)
    assert floats.min() == -1 and floats.max() == 1
    assert torch.equal(images.to_uint8(floats), every)
    comfy = images.to_comfy(floats)
    # The host cuts off when it saves, and loads by dividing by 255.
    assert np.array_equal((255.0 * comfy.numpy()).astype(np.uint8), every.permute(0, 2, 3, 1).numpy())
    again, alpha = images.from_comfy(comfy)
    assert alpha is None and torch.equal(images.to_uint8(again), every)


def test_a_saved_picture_comes_back_bit_for_bit_with_its_text_alpha_and_profile(tmp_path):
    pixels, alpha = levels(), np.random.default_rng(1).integers(0, 256, (12, 20), dtype=np.uint8)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = images.from_pil(Image.fromarray(np.dstack([pixels, alpha])))
    images.save_image(
        tmp_path / "a.png", picture.image, picture.alpha, text={"kontext": "rot 赤 ✓"}, icc_profile=profile
    )
    back = images.load_image(tmp_path / "a.png")
    assert np.array_equal(as_uint8(back), pixels)
    assert np.array_equal((back.alpha[0, 0] * 255).round().byte().numpy(), alpha)
    assert back.text == {"kontext": "rot 赤 ✓"} and back.icc_profile == profile
    assert os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = Image.fromarray(np.repeat(np.repeat(levels(4, 3), 16, 0), 16, 1))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    turned = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    back = images.load_image(stored(turned, exif=exif))
    assert np.array_equal(as_uint8(back), np.asarray(upright))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_mode_becomes_three_channels(mode):
    image = Image.fromarray(levels()).convert("RGB")
    image = image.convert("L").convert("LA") if mode == "LA" else image
    if mode == "LAB":
        profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
        image = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    else:
        image = image.convert(mode)
    picture = images.from_pil(image)
    assert picture.image.shape == (1, 3, 12, 20) and picture.image.dtype == torch.float32
    assert picture.image.abs().max() <= 1
    assert (picture.alpha is not None) == (mode in ("LA", "RGBA"))


def test_a_palette_with_a_transparent_colour_gives_alpha():
    image = Image.fromarray(np.array([[0, 1], [1, 0]], dtype=np.uint8)).convert("P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    picture = images.load_image(stored(image, transparency=0))
    assert picture.alpha[0, 0].tolist() == [[0, 1], [1, 0]]
    assert picture.image[0, :, 0, 1].tolist() == [-1, -1, 1]


def test_sixteen_bit_grey_keeps_its_precision():
    values = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    picture = images.load_image(stored(Image.fromarray(values)))
    expected = torch.from_numpy(values.astype(np.float64) / 65535 * 2 - 1).float()
    assert torch.allclose(picture.image[0, 1], expected, atol=1e-6)
    tiff = images.load_image(stored(Image.fromarray(values.astype(np.float32) / 65535), "TIFF"))
    assert torch.allclose(tiff.image[0, 1], expected, atol=1e-6)


def test_sixteen_bit_colour_is_read():
    # Pillow writes none, so the file is put together by hand; it reads it to 8 bits.
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    found = as_uint8(images.load_image(io.BytesIO(b"\x89PNG\r\n\x1a\n" + chunks)))
    assert np.abs(found.astype(int) * 257 - values.astype(int)).max() <= 257


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = stored(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert as_uint8(images.load_image(data))[0, 0].tolist() == [255, 0, 0]


def test_cmyk_goes_through_its_own_profile_or_says_that_it_cannot(caplog):
    image = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    assert images.load_image(stored(image, "TIFF")).image[0, :, 0, 0].tolist() == [1, -1, -1]
    bad = images.load_image(stored(image, "TIFF", icc_profile=b"nonsense" * 20))
    assert bad.image[0, :, 0, 0].tolist() == [1, -1, -1] and bad.icc_profile is None
    assert "colour profile cannot be used" in caplog.text


def test_what_is_no_picture_is_refused_by_name(tmp_path):
    (tmp_path / "notes.png").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    whole = stored(Image.fromarray(levels(64, 64))).getvalue()
    (tmp_path / "short.png").write_bytes(whole[: len(whole) // 2])
    jpeg = stored(Image.fromarray(levels(64, 64)), "JPEG").getvalue()
    (tmp_path / "short.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    for name in ("notes.png", "empty.png"):
        with pytest.raises(ValueError, match=f"{name} is not a picture"):
            images.load_image(tmp_path / name)
    for name in ("short.png", "short.jpg"):
        with pytest.raises(ValueError, match=f"{name} is truncated or damaged"):
            images.load_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"there is no picture at .*absent\.png"):
        images.load_image(tmp_path / "absent.png")
    with pytest.raises(ValueError, match="is a folder"):
        images.load_image(tmp_path)


def test_absurd_sizes_are_refused_before_anything_is_unpacked():
    def claims(width: int, height: int) -> io.BytesIO:
        data = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        header = struct.pack(">I", 13) + data + struct.pack(">I", zlib.crc32(data))
        return io.BytesIO(b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 0) + b"IDAT" + b"\0" * 4)

    for size in [(20000, 11000), (100000, 100000)]:
        with pytest.raises(ValueError, match="make it smaller first"):
            images.load_image(claims(*size))
    small = stored(Image.fromarray(levels(64, 64)))
    with pytest.raises(ValueError, match="64x64 pixels"):
        images.load_image(small, max_pixels=1000)


def test_a_failed_or_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "a.png"
    images.save_image(target, torch.zeros(1, 3, 8, 8))
    before = target.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(images.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        images.save_image(target, torch.ones(1, 3, 8, 8))
    assert target.read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_other_formats_are_written_without_text_and_say_so(tmp_path, suffix, caplog):
    path = images.save_image(tmp_path / f"a{suffix}", torch.zeros(1, 3, 8, 8), text={"kontext": "x"})
    assert images.load_image(path).image.shape == (1, 3, 8, 8)
    assert "only PNG keeps" in caplog.text


def test_what_cannot_be_saved_is_refused(tmp_path):
    image = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"use one of \.png"):
        images.save_image(tmp_path / "a.bmpx", image)
    with pytest.raises(ValueError, match="JPEG has no transparency"):
        images.save_image(tmp_path / "a.jpg", image, torch.ones(1, 1, 8, 8))
    with pytest.raises(ValueError, match="NaN"):
        images.save_image(tmp_path / "a.png", image * float("nan"))
    with pytest.raises(ValueError, match="one picture"):
        images.save_image(tmp_path / "a.png", image.repeat(2, 1, 1, 1))
    with pytest.raises(FileNotFoundError, match="make it first"):
        images.save_image(tmp_path / "absent" / "a.png", image)
    assert os.listdir(tmp_path) == []


def test_a_hosts_grey_or_alpha_picture_is_taken_and_others_refused():
    grey, alpha = images.from_comfy(torch.rand(2, 5, 6, 1))
    assert grey.shape == (2, 3, 5, 6) and alpha is None
    four = torch.rand(2, 5, 6, 4)
    image, alpha = images.from_comfy(four)
    assert torch.equal(alpha[:, 0], four[..., 3])
    assert torch.allclose(images.to_comfy(image, alpha), four, atol=1e-6)
    with pytest.raises(ValueError, match="1, 3 or 4 channels"):
        images.from_comfy(torch.rand(5, 6, 3))
