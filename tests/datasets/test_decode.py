"""Files as users have them, made with Pillow, each against the colours it should show."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from dualcl.datasets.reading import views
from dualcl.datasets.reading.verify import why_unreadable
from dualcl.datasets.reading.views import decode_image, open_image

RED, WHITE = (255, 0, 0), (255, 255, 255)


def stored(image: Image.Image, format: str, **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, format, **options)
    file.seek(0)
    return file


def left_red(mode: str = "RGB") -> Image.Image:
    """4 x 2, the left half red."""
    image = Image.new("RGB", (4, 2), (0, 0, 255))
    image.paste(RED, (0, 0, 2, 2))
    return image.convert(mode)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to see it upright
    image = Image.new("RGB", (32, 16), (0, 0, 255))
    image.paste(RED, (0, 0, 16, 16))
    upright = decode_image(stored(image, "JPEG", exif=exif, quality=95))
    assert upright.size == (16, 32)
    assert np.asarray(upright)[4, 8, 0] > 200  # what was left is now above
    assert np.asarray(upright)[28, 8, 2] > 200


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("block", [b"II*\0\xff\xff\xff\x7f\x01", b"no header"])
def test_a_damaged_exif_block_does_not_lose_the_image(block):
    file = stored(Image.new("RGB", (16, 16), RED), "JPEG", exif=b"Exif\0\0" + block)
    assert np.asarray(decode_image(file))[8, 8] == pytest.approx(RED, abs=3)


def test_cmyk_jpeg():
    pixels = np.asarray(decode_image(stored(Image.new("RGB", (16, 16), RED).convert("CMYK"), "JPEG")))
    assert pixels.shape == (16, 16, 3)
    assert pixels[8, 8] == pytest.approx(RED, abs=12)


@pytest.mark.parametrize("mode", ["1", "L"])
def test_gray_is_gray_in_all_channels(mode):
    pixels = np.asarray(decode_image(stored(Image.linear_gradient("L").resize((8, 8)).convert(mode), "PNG")))
    assert np.array_equal(pixels[..., 0], pixels[..., 1])
    assert np.array_equal(pixels[..., 0], pixels[..., 2])
    assert pixels.min() < 128 <= pixels.max()


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled_not_clipped(format):
    image = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    assert np.asarray(decode_image(stored(image, format)))[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_over_white(mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert np.asarray(decode_image(stored(image.convert(mode), "PNG")))[0].tolist() == [[0, 0, 0], [255, 255, 255]]


def test_half_transparent_is_mixed_with_white():
    pixels = np.asarray(decode_image(stored(Image.new("RGBA", (1, 1), (255, 0, 0, 128)), "PNG")))
    assert pixels[0, 0].tolist() == [255, 127, 127]


def test_palette_with_a_transparent_colour():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    pixels = np.asarray(decode_image(stored(image, "PNG", transparency=1)))[0]
    assert pixels.tolist() == [list(RED), list(WHITE)]


def test_palette_with_alpha_per_colour():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 0])
    image.putpixel((1, 0), 1)
    pixels = np.asarray(decode_image(stored(image, "PNG", transparency=bytes([255, 0]))))[0]
    assert pixels.tolist() == [list(RED), list(WHITE)]


def test_animated_gif_shows_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, (0, 255, 0), (0, 0, 255))]
    pixels = np.asarray(decode_image(stored(frames[0], "GIF", save_all=True, append_images=frames[1:])))
    assert (pixels == RED).all()


@pytest.mark.parametrize("format", ["PNG", "BMP", "WEBP", "TIFF", "PPM", "GIF"])
def test_other_formats(format):
    options = {"lossless": True} if format == "WEBP" else {}
    assert np.array_equal(np.asarray(decode_image(stored(left_red(), format, **options))), np.asarray(left_red()))


def test_cut_off_and_empty_files_raise():
    whole = stored(Image.effect_noise((64, 64), 80).convert("RGB"), "JPEG").getvalue()
    with pytest.raises(OSError, match="truncated"):
        decode_image(io.BytesIO(whole[: len(whole) // 2]))
    with pytest.raises(OSError, match="cannot identify"):
        decode_image(io.BytesIO(b""))


def test_pixels_without_a_range_raise():
    with pytest.raises(OSError, match="floating-point"):
        decode_image(stored(Image.new("F", (2, 2), 0.5), "TIFF"))
    with pytest.raises(OSError, match="more than 16 bits"):
        decode_image(stored(Image.fromarray(np.full((2, 2), 70000, dtype=np.int32)), "TIFF"))


def chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("kind", ["iTXt", "zTXt", "tEXt", "iCCP", "APNG"])
def test_large_texts_and_profiles_of_a_png_are_no_fault(tmp_path, monkeypatch, kind, where):
    """As generators of images store their workflows: more than Pillow unpacks, and more than it keeps."""
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 2**21)  # 64 MB
    image, text, info = Image.effect_noise((9, 8), 80).convert("RGB"), b"workflow " * 300_000, PngImagePlugin.PngInfo()
    blocks = {
        "iTXt": chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(text)),
        "zTXt": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(text)),
        "tEXt": chunk(b"tEXt", b"workflow\0" + b"x" * 3 * 2**20),
        "iCCP": chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(2 * 2**20))),
        "APNG": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(text)),
    }
    exif = Image.Exif()
    exif[0x0112] = 6
    info.add_text("Raw profile type exif", f"\nexif\n{len(exif.tobytes()):8d}\n{exif.tobytes().hex()}", zip=True)
    more = {"save_all": True, "append_images": [Image.new("RGB", (9, 8))]} if kind == "APNG" else {}
    whole = stored(image, "PNG", pnginfo=info, **more).getvalue()
    at = whole.index(b"IDAT") - 4 if where == "before" else whole.index(b"IEND") - 4
    path = tmp_path / "x.png"
    path.write_bytes(whole[:at] + blocks[kind] + whole[at:])
    assert why_unreadable(path) is None
    assert np.array_equal(np.asarray(decode_image(path)), np.rot90(np.asarray(image), -1))
    path.write_bytes(path.read_bytes()[:-30])
    assert why_unreadable(path) is not None
    damaged = bytearray(blocks[kind])
    damaged[30] ^= 1
    path.write_bytes(whole[:at] + damaged + whole[at:])
    assert why_unreadable(path) is not None


@pytest.mark.filterwarnings("ignore:Image size")
def test_large_pictures_are_read_and_larger_ones_refused_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(views, "MAX_PIXELS", 178_956_970)  # fuzzing in the same process lowers it
    Image.new("1", (10_000, 10_000)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").size == (10_000, 10_000)
    Image.new("1", (20_000, 10_000)).save(tmp_path / "b.png")
    reason = why_unreadable(tmp_path / "b.png")
    assert reason is not None
    assert reason.startswith("too many pixels")
