"""From an image file to the pixels of a view: decoding, the evaluation view, random crops."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, get_args

import numpy as np
from PIL import Image, ImageOps

from dualcl.benchmark.core.errors import UserError, nearest

with contextlib.suppress(ImportError):  # plug-ins of Pillow's, where they are installed
    import pillow_heif

    pillow_heif.register_heif_opener()
with contextlib.suppress(ImportError):
    import pillow_jxl  # noqa: F401
Image.init()

Augment = Literal["none", "flip", "crop_flip"]

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
#: longer : shorter side beyond which an image is cropped before it is resized, so that a 1 x 20000 strip stays small
MAX_ASPECT = 16
#: of the files that are taken for images, whatever they are called
FORMATS = tuple(
    name
    for name in (
        "JPEG",
        "PNG",
        "BMP",
        "DIB",
        "GIF",
        "WEBP",
        "TIFF",
        "PPM",
        "MPO",
        "JPEG2000",
        "QOI",
        "AVIF",
        "HEIF",
        "JXL",
    )
    if name in Image.OPEN
)
#: of an image, where Pillow too gives up: a file of kilobytes can ask for gigabytes
MAX_PIXELS = 178_956_970
# from half of that on, Pillow warns once per picture
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
PNG = b"\x89PNG\r\n\x1a\n"
#: blocks of a PNG that no pixel depends on, and the texts among them that may say which way is up
IDLE = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
UPRIGHT = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")


@dataclass(frozen=True)
class View:
    """How an image becomes a tensor of shape (3, size, size).

    Evaluation: the shorter side is resized to `resize` (None: to `size`), then the centre is cropped. `augment` is for
    training only: "flip" mirrors half of the evaluation views, "crop_flip" is torchvision's RandomResizedCrop of the
    full image, then a mirror image for half of them. With `cache_size` those crops are cut at the same places out of
    the image reduced to that shorter side (a smaller one stays as it is), which is quick to keep and to read: see
    `reduced`. `mean` and `std` are in units of pixels in [0, 1]. Raises UserError naming the field below `input.`.
    """

    size: int
    resize: int | None = None
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    augment: Augment = "none"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    cache_size: int | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"the input size must be at least 1, got {self.size}")
        if self.resize is not None and self.resize < self.size:
            raise UserError(f"input.resize must be at least the input size ({self.size}), got {self.resize}")
        if self.interpolation not in RESAMPLING:
            raise UserError(
                f"unknown input.interpolation {self.interpolation!r}; {nearest(self.interpolation, RESAMPLING)}"
            )
        if self.augment not in get_args(Augment):
            raise UserError(f"unknown input.augment {self.augment!r}; {nearest(self.augment, get_args(Augment))}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3:
                raise UserError(f"input.{name} must be 3 numbers (red, green, blue), got {getattr(self, name)}")
        if min(self.std) <= 0:
            raise UserError(f"input.std must be positive, got {self.std}")
        if not (len(self.crop_scale) == 2 and 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1):
            raise UserError(
                f"input.crop_scale must be (least, most) with 0 < least <= most <= 1, got {self.crop_scale}"
            )
        if not (len(self.crop_ratio) == 2 and 0 < self.crop_ratio[0] <= self.crop_ratio[1]):
            raise UserError(f"input.crop_ratio must be (least, most) with 0 < least <= most, got {self.crop_ratio}")
        if self.cache_size is not None:
            if self.augment != "crop_flip":
                raise UserError(
                    f"input.cache_size is for input.augment=crop_flip, not for {self.augment}; set it to null"
                )
            if self.cache_size < self.size:
                raise UserError(
                    f"input.cache_size must be at least the input size ({self.size}), got {self.cache_size}"
                )


@dataclass(frozen=True)
class Decoded:
    """Pixels uint8 (h, w, 3) of an image as kept, and the (width, height) of the image they come from."""

    pixels: np.ndarray
    full: tuple[int, int]


def open_image(source: str | Path | IO[bytes]) -> Image.Image:
    """Opens an image in one of FORMATS, of 1 to MAX_PIXELS pixels. Raises OSError otherwise."""
    try:
        image = _opened(source)
    except OSError:
        raise
    except Exception as error:
        if (bare := _without_texts(source)) is None:
            raise _as_os_error(error) from error
        try:
            image = _opened(bare)
        except Exception as again:
            raise _as_os_error(again) from again
    pixels = image.width * image.height
    if not 0 < pixels <= MAX_PIXELS:
        image.close()
        raise OSError(f"too many pixels: {pixels}, at most {MAX_PIXELS}" if pixels else "it has no pixels")
    return image


def _opened(source: str | Path | IO[bytes]) -> Image.Image:
    # not any format: Pillow gives PostScript, whatever the file is called, to an interpreter
    return Image.open(source, formats=FORMATS)


def _without_texts(source: str | Path | IO[bytes]) -> io.BytesIO | None:
    """A PNG without its texts, of which Pillow takes 1 MB each, and its colour profile; None for what is none.

    Raises OSError for a block left out that differs from its checksum.
    """
    if isinstance(source, (str, Path)):
        data = Path(source).read_bytes()
    else:
        source.seek(0)
        data = source.read()
    if not data.startswith(PNG):
        return None
    kept, at = [PNG], len(PNG)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind, content = data[at + 4 : at + 8], data[at + 8 : end - 4]
        if kind not in IDLE or content.startswith(UPRIGHT):
            kept.append(data[at:end])
        elif zlib.crc32(kind + content) != int.from_bytes(data[end - 4 : end], "big"):
            raise OSError(f"broken PNG file (bad header checksum in {kind!r})")
        at = end
    return io.BytesIO(b"".join(kept))


def _as_os_error(error: Exception) -> OSError:
    """One kind of error for the nearly every kind that Pillow's decoders raise on damaged files."""
    text = " ".join(str(error).split()) or type(error).__name__
    return OSError(f"too many pixels: {text}" if isinstance(error, Image.DecompressionBombError) else text)


def decode_image(source: str | Path | IO[bytes]) -> Image.Image:
    """The whole image, upright (EXIF) and RGB, transparency over white; the first frame of an animation.

    Any bit depth up to 16 is scaled to 8. Raises OSError when the file is damaged, truncated, no image, too large (see
    `open_image`), or has pixels without a defined range (floating point).
    """
    with open_image(source) as opened:
        try:
            return _decoded(opened)
        except OSError:
            raise
        except Exception as error:
            if (bare := _without_texts(source)) is None:
                raise _as_os_error(error) from error
    try:  # its texts come after its pixels
        with open_image(bare) as opened:
            return _decoded(opened)
    except OSError:
        raise
    except Exception as error:
        raise _as_os_error(error) from error


def _decoded(opened: Image.Image) -> Image.Image:
    opened.load()
    try:
        image = ImageOps.exif_transpose(opened)
    except Exception:  # a damaged EXIF block (many error types) says nothing of the pixels, which are there
        image = opened
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise OSError("its pixels need more than 16 bits; save it with 8 or 16 bits per channel")
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise OSError("its pixels are floating-point numbers; save it with 8 or 16 bits per channel")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    # convert() copies even when the mode is right: the result outlives the file
    return image.convert("RGB")


def check_blocks(source: str | Path) -> None:
    """Raises OSError when a block of a PNG differs from its checksum: decoding alone overlooks some of these."""
    try:
        with open_image(source) as image:
            image.verify()
    except Exception as error:  # Pillow raises nearly every type on damaged files
        raise error if isinstance(error, OSError) else OSError(str(error)) from None


def evaluation_view(image: Image.Image, view: View) -> Image.Image:
    """Shorter side to `view.resize` (or `view.size`), then the centre; equal to torchvision's Resize + CenterCrop."""
    width, height = image.size
    if max(width, height) > MAX_ASPECT * min(width, height):
        image = _centre(image, *(min(side, MAX_ASPECT * min(width, height)) for side in (width, height)))
        width, height = image.size
    image = _resized(image, view.resize or view.size, view.interpolation)
    return _centre(image, view.size, view.size)


def _resized(image: Image.Image, shorter: int, interpolation: str) -> Image.Image:
    width, height = image.size
    longer = int(shorter * max(width, height) / min(width, height))
    target = (shorter, longer) if width <= height else (longer, shorter)
    return image if image.size == target else image.resize(target, RESAMPLING[interpolation])


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def reduced(image: Image.Image, view: View) -> Decoded:
    """The pixels that random crops are cut from: shorter side at most `view.cache_size` (None: the whole image).

    A small crop of a reduced image is enlarged from fewer pixels than one of the whole image; by how much they differ
    is measured by `dualcl bench input`. A `cache_size` that no image exceeds changes nothing.
    """
    full = image.size
    if view.cache_size is not None and min(full) > view.cache_size:
        image = _resized(image, view.cache_size, "lanczos")  # the filter that leaves most of the detail
    return Decoded(np.asarray(image), full)


def random_resized_crop(image: Image.Image | Decoded, view: View, rng: np.random.Generator) -> Image.Image:
    """A crop of random area and aspect ratio resized to (size, size), as torchvision's RandomResizedCrop draws it.

    Of a reduced image it is the same part, to a fraction of a pixel.
    """
    full = image.full if isinstance(image, Decoded) else image.size
    columns, rows = image.pixels.shape[1::-1] if isinstance(image, Decoded) else full
    left, top, width, height = _draw_crop(*full, view, rng)
    # multiplied before it is divided: exact at the far edges, and everywhere when the image is whole
    box = [x * columns / full[0] for x in (left, left + width)] + [y * rows / full[1] for y in (top, top + height)]
    x, y, end_x, end_y = int(box[0]), int(box[2]), math.ceil(box[1]), math.ceil(box[3])
    # cut out before it is resized, so that the edges of the crop do not see what lies beyond
    if isinstance(image, Decoded):
        cut = Image.fromarray(image.pixels[y:end_y, x:end_x])
    else:
        cut = image.crop((x, y, end_x, end_y))
    inner = box[0] - x, box[2] - y, box[1] - x, box[3] - y
    return cut.resize((view.size, view.size), RESAMPLING[view.interpolation], box=inner)


def _draw_crop(width: int, height: int, view: View, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random crop of an image."""
    for _ in range(10):
        area = width * height * rng.uniform(*view.crop_scale)
        ratio = math.exp(rng.uniform(math.log(view.crop_ratio[0]), math.log(view.crop_ratio[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h
    ratio = min(max(width / height, view.crop_ratio[0]), view.crop_ratio[1])
    w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    return (width - w) // 2, (height - h) // 2, w, h
