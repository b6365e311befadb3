"""Pictures come out as viewers show them; what is no picture of a named format, or too much, is refused in time."""

from __future__ import annotations

import io
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encoded, picture
from PIL import EpsImagePlugin, Image

from mea_ray.core.errors import DataError
from mea_ray.core.types import Images
from mea_ray.data import decode as module
from mea_ray.data import memory
from mea_ray.data.decode import FORMATS, MAX_PIXELS, SUFFIXES, Encoded, decode

LOSSLESS = ["PNG", "TIFF", "BMP", "GIF", "PPM"]


def read(*items: bytes | Path, image_size: int | None = None) -> Images:
    return decode([Encoded(f"item {i}", item) for i, item in enumerate(items)], len(items), image_size)


def quarters() -> Image.Image:
    """Four different quarters, so that every turn shows."""
    pixels = np.zeros((16, 16), np.uint8)
    pixels[:8, 8:], pixels[8:, :8], pixels[8:, 8:] = 80, 160, 240
    return Image.fromarray(pixels)


def oriented(tag: object, form: str) -> bytes:
    exif = Image.Exif()
    exif[274] = tag
    return encoded(quarters(), form, exif=exif, **({"quality": 95} if form == "JPEG" else {}))


# What a viewer shows of stored pixels: EXIF 2.32, tag 274, "row 0 is ..., column 0 is ...".
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: a.T[:, ::-1],
    7: lambda a: a[::-1, ::-1].T,
    8: lambda a: a.T[::-1],
}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("tag", sorted(UPRIGHT))
def test_pictures_are_turned_as_they_say(tag: int, form: str) -> None:
    want = UPRIGHT[tag](np.asarray(quarters())).astype(int)
    got = read(oriented(tag, form))[0, 0].astype(int)
    assert np.abs(got - want)[2:6, 2:6].max() < 12 and np.abs(got - want).mean() < 6
    small = read(oriented(tag, form), image_size=4)[0, 0].astype(int)
    assert np.abs(small - want[2::4, 2::4]).mean() < 16


@pytest.mark.parametrize("tag", [0, 9, 255])
def test_an_orientation_that_does_not_exist_turns_nothing(tag: int) -> None:
    assert np.array_equal(read(oriented(tag, "PNG"))[0, 0], np.asarray(quarters()))


def test_damaged_metadata_does_not_spoil_the_pixels() -> None:
    plain = np.asarray(quarters())
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"\0" * 40):
        assert np.array_equal(read(encoded(quarters(), "PNG", exif=exif))[0, 0], plain)


def test_a_box_refers_to_the_turned_picture() -> None:
    photo = Encoded("photo", oriented(6, "PNG"), (8, 0, 16, 8))  # turned, its upper right is the stored upper left
    assert decode([photo], 1, 8).max() == 0


def test_transparent_pixels_lie_on_white() -> None:
    alpha = np.zeros((4, 4, 4), np.uint8)
    alpha[:2] = (10, 20, 30, 255)
    alpha[2, :] = (0, 0, 0, 128)
    for form in ("PNG", "WEBP"):
        got = read(encoded(Image.fromarray(alpha), form, lossless=True))[0].transpose(1, 2, 0)
        assert got[0, 0].tolist() == [10, 20, 30]
        assert got[2, 0].tolist() == [127, 127, 127]
        assert got[3, 0].tolist() == [255, 255, 255]
    grey = np.zeros((4, 4, 2), np.uint8)
    grey[:2, :, 1] = 255
    out = read(encoded(Image.fromarray(grey, "LA")))
    assert out.shape == (1, 1, 4, 4) and out[0, 0, :, 0].tolist() == [0, 0, 255, 255], "grey stays grey"
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    assert read(encoded(palette, "GIF", transparency=1)).tolist() == [[[[255] * 4] * 4] * 3]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "1", "L", "LA"])
def test_opaque_pixels_are_what_pillow_converts(mode: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)).convert(mode)
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1)
    got = read(data)[0]
    assert np.array_equal(got, want[: len(got)]) and len(got) == (1 if mode in {"1", "L", "LA"} else 3)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_other_depths_are_refused(dtype: type) -> None:
    with pytest.raises(DataError, match="item 0 has pixels of mode .*convert it to 8 bits per channel"):
        read(encoded(Image.fromarray(np.zeros((4, 4), dtype)), "TIFF"))


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_read(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **({} if form == "TIFF" else {"loop": 0}))
    assert np.abs(read(data)[0, :, 4, 4].astype(int) - [255, 0, 0]).max() < 12


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_every_suffix_is_of_a_format_that_is_opened(suffix: str, tmp_path: Path) -> None:
    Image.init()
    form = Image.EXTENSION[suffix]
    assert form in FORMATS
    path = tmp_path / f"x{suffix}"
    picture(2, 0, mode="RGB").save(path, form)
    assert np.abs(read(path)[0].astype(int) - np.asarray(picture(2, 0, mode="RGB")).transpose(2, 0, 1)).mean() < 8


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n0 0 10 10 rectfill\nshowpage\n%%EOF\n"


def test_postscript_under_another_name_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    path = tmp_path / "cat.png"
    path.write_bytes(EPS)
    with Image.open(path) as opened, pytest.raises(AssertionError):
        opened.load()  # what Pillow does by itself
    for item in (path, EPS):
        with pytest.raises(DataError, match="cannot decode item 0: it is of none of the formats AVIF, BMP"):
            read(item)


def test_other_formats_are_refused() -> None:
    image = picture(1, 0)
    made = {form: encoded(image.convert("RGB"), form) for form in ("ICO", "PDF", "IM", "DDS", "TGA")}
    made |= {"XBM": encoded(image.convert("1"), "XBM"), "SVG": b"<svg/>", "text": b"a cat", "nothing": b""}
    for name, data in made.items():
        with pytest.raises(DataError, match="cannot decode item 1: it is of none of the formats"):
            read(encoded(image), data)
            raise AssertionError(name)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_pictures_are_refused_or_read_but_never_fail_otherwise(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from([*LOSSLESS, "JPEG", "WEBP"]))
    content = bytearray(encoded(picture(2, 0, mode="RGB"), form))
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    try:
        out = read(bytes(content))
    except DataError as error:
        assert "item 0" in str(error)
    else:
        assert out.dtype == np.uint8 and out.ndim == 4


def test_the_first_damaged_picture_is_named() -> None:
    good, bad = encoded(picture(1, 0)), encoded(picture(1, 1))[:60]
    items = [good] * 700
    items[300] = items[600] = bad
    with pytest.raises(DataError, match=r"cannot decode item 300: .*; replace or remove the image"):
        read(*items)


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces its size and holds next to nothing."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize(("width", "height"), [(8192, 8193), (2**26 + 1, 1), (10_000, 10_000), (2**31 - 1, 2**31 - 1)])
def test_too_many_pixels_are_refused_before_they_are_decoded(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_upright", lambda image: pytest.fail("it was decoded"))
    with pytest.raises(DataError, match="item 0"):
        read(png_header(width, height), image_size=16)


def test_the_limit_is_named() -> None:
    with pytest.raises(
        DataError, match=rf"item 0 has 8,192 x 8,193 pixels, at most {MAX_PIXELS:,} are decoded; shrink"
    ):
        read(png_header(8192, 8193))


def test_a_strip_is_not_blown_up() -> None:
    strip = encoded(Image.new("1", (300_000, 2)))
    with pytest.raises(DataError, match="item 0 resized has 153,600,000 x 1,024 pixels"):
        read(strip, image_size=1024)
    assert read(strip, image_size=8).shape == (1, 1, 8, 8)


def test_memory_is_checked_before_the_second_picture_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 10_000_000)

    def items() -> object:
        yield Encoded("first", encoded(Image.new("L", (100, 100))))
        pytest.fail("a second picture was asked for")

    with pytest.raises(
        DataError, match=r"1,000 images of 100 x 100 pixels need 0.0 GiB .*set a smaller data.image_size"
    ):
        decode(items(), 1000, None)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="the pixels of item 0 need 0.0 GiB of memory.*shrink the image"):
        read(encoded(Image.new("1", (1000, 1000))), image_size=8)


def test_large_pictures_wait_for_each_other() -> None:
    gate = module._Gate(100)
    inside, most = 0, 0
    lock = threading.Lock()

    def work(pixels: int) -> None:
        nonlocal inside, most
        with gate.passing(pixels):
            with lock:
                inside += pixels
                most = max(most, inside)
            time.sleep(0.002)
            with lock:
                inside -= pixels

    threads = [threading.Thread(target=work, args=(pixels,)) for pixels in [40, 60, 100, 30, 70] * 6]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert inside == 0 and 60 < most <= 100
    with gate.passing(1000):  # alone, one that is larger than the limit passes
        pass


def test_order_and_content_survive_many_parts() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (1100, 1, 1, 3), np.uint8)
    out = read(*(encoded(Image.fromarray(each).resize((3, 2))) for each in colours))
    assert out.shape == (1100, 3, 2, 3)
    assert np.array_equal(out[:, :, 1, 2], colours[:, 0, 0])


def test_counts_that_do_not_agree() -> None:
    one = Encoded("x", encoded(picture(1, 0)))
    with pytest.raises(DataError, match="one image more than the 1 that were expected"):
        decode([one, one], 1, None)
    assert len(decode([one, one], 3, None)) == 2
    with pytest.raises(DataError, match="there are no images"):
        decode([], 0, None)
