"""Encoded images to upright RGB pixels, within limits that hold before any pixel is decoded."""

import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

UPRIGHT = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
"""Pillow's transposition that undoes each EXIF orientation (CIPA DC-008, tag 0x0112); 1 is upright already."""

KINDS = ("JPEG", "PNG", "WEBP", "BMP", "PPM")
"""Decoders that may be used, by Pillow's names: what a file is called does not matter, what it holds does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLimits:
    """What one image may cost. A small file can unpack to gigabytes, so both sides are bounded."""

    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    seconds: float = 30.0
    """From reading its bytes to its aligned face, where images are isolated (`faces.isolate`)."""
    memory_mb: int = 2048
    """MiB that its decoding and alignment may take, where images are isolated."""

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels", "seconds", "memory_mb"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive. Got {getattr(self, name)}.")


class ImageFault(Exception):
    """One image cannot be used; `status` is one of `tables.STATUSES`. It becomes a row, never a crash."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def decode(data: bytes, limits: ImageLimits) -> NDArray[np.uint8]:
    """Upright RGB pixels of an encoded image, shape (H, W, 3).

    The EXIF orientation is applied; grey, palette, CMYK and 16-bit images are converted; transparency is put on white.

    Raises
    ------
    ImageFault
        `too_large`, `not_an_image` or `corrupt`, with the reason.
    """
    import PIL.Image

    if len(data) > limits.max_bytes:
        raise ImageFault(
            "too_large", f"{len(data):,} bytes; the limit is {limits.max_bytes:,} (faces.limits.max_bytes)"
        )
    if not data:
        raise ImageFault("not_an_image", "the file is empty")
    with warnings.catch_warnings():
        # The pixel limit is ours and is checked right after the header is read; odd metadata does not matter.
        warnings.simplefilter("ignore")
        try:
            image: Image = PIL.Image.open(io.BytesIO(data), formats=KINDS)
        except PIL.Image.DecompressionBombError as error:
            raise ImageFault("too_large", f"over twice Pillow's own pixel limit ({error})") from error
        except (OSError, ValueError, SyntaxError) as error:
            raise ImageFault("not_an_image", f"not one of {', '.join(KINDS)}, or its header is damaged") from error
        if image.width * image.height > limits.max_pixels:
            size = f"{image.width} x {image.height} pixels"
            raise ImageFault(
                "too_large", f"{size}; the limit is {limits.max_pixels:,} pixels (faces.limits.max_pixels)"
            )
        try:
            image.load()
            if image.format == "JPEG" and not _ends(data):
                raise ImageFault("corrupt", "the JPEG data have no end marker: the file is incomplete")
            return np.asarray(_rgb(_upright(image)))
        except (OSError, ValueError, SyntaxError, IndexError, EOFError) as error:
            raise ImageFault("corrupt", f"cannot be decoded: {error}") from error


def _ends(data: bytes) -> bool:
    """Whether a JPEG's last scan is closed. A download that broke off and was filled with zeros decodes without a word.

    Inside scan data the byte FF is never followed by DA or D9 (ITU-T T.81, B.1.1.5), so the last FF DA opens a scan.
    """
    return data.find(b"\xff\xd9", data.rfind(b"\xff\xda")) >= 0


def _upright(image: "Image") -> "Image":
    """`image` turned as its EXIF orientation says; anything but a known orientation leaves it as it is."""
    import PIL.Image

    turn = UPRIGHT.get(image.getexif().get(0x0112, 1))
    return image if turn is None else image.transpose(PIL.Image.Transpose(turn))


def _rgb(image: "Image") -> "Image":
    """`image` as 8-bit RGB; the brightest 16-bit value becomes 255."""
    import PIL.Image

    if image.mode == "F":
        raise ImageFault("not_an_image", "holds floating-point values, not pixels")
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.float32)
        return PIL.Image.fromarray((wide / 257.0).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        front = image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", front.size, "white"), front).convert("RGB")
    return image.convert("RGB")
