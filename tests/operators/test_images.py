"""Decoding: the pixels that a viewer shows, whatever the encoding, and one kind of fault for all else."""

import io
import random
import struct
import time
import tracemalloc
import warnings
import zlib
from collections.abc import Callable

import cv2
import numpy as np
import PIL.ImageFile
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from operators.images import ImageFault, ImageLimits, decode
from operators.tables import STATUSES

LIMITS = ImageLimits()
Encode = Callable[..., bytes]


def noise(height: int = 24, width: int = 40) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def gradient(height: int = 64, width: int = 96) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 / (width - 1), y * 255 / (height - 1), (x + y) % 64 + 90], axis=2).astype(np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG file made by hand; `rows` are the filtered rows before compression."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def fault(data: bytes, limits: ImageLimits = LIMITS) -> tuple[str, str]:
    with pytest.raises(ImageFault) as caught:
        decode(data, limits)
    assert caught.value.status in STATUSES
    return caught.value.status, str(caught.value)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("PNG", {"optimize": True}), ("WEBP", {"lossless": True}), ("BMP", {}), ("PPM", {})],
)
def test_lossless_files_give_their_pixels(encode: Encode, kind: str, options: dict) -> None:
    found = decode(encode(noise(), kind, **options), LIMITS)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, noise())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 90}),
        ("JPEG", {"quality": 90, "progressive": True}),
        ("JPEG", {"quality": 75, "subsampling": 2}),
        ("JPEG", {"quality": 90, "restart_marker_rows": 1}),
        ("WEBP", {"quality": 90}),
    ],
)
def test_lossy_files_give_what_another_decoder_sees(encode: Encode, kind: str, options: dict) -> None:
    data = encode(gradient(), kind, **options)
    theirs = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]
    ours = decode(data, LIMITS)
    assert np.abs(ours.astype(int) - theirs).max() <= 3
    assert np.abs(ours.astype(int) - gradient()).mean() < 6


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "WEBP"])
def test_grey_files_have_three_equal_channels(encode: Encode, kind: str) -> None:
    grey = noise()[:, :, 0]
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(decode(encode(grey, kind, **options), LIMITS), grey[:, :, None].repeat(3, 2))


def test_text_greymaps_are_read() -> None:
    found = decode(b"P2\n# comment\n3 1\n255\n0 100 255\n", LIMITS)
    assert found.tolist() == [[[0, 0, 0], [100, 100, 100], [255, 255, 255]]]


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparent_colour_is_put_on_white(encode: Encode, kind: str) -> None:
    alpha = np.linspace(0, 255, 24 * 40).astype(np.uint8).reshape(24, 40)
    rgba = np.dstack([noise(), alpha])
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    found = decode(encode(rgba, kind, **options), LIMITS)
    assert np.abs(found - on_white(noise(), alpha)).max() <= 1.0


def test_transparent_grey_is_put_on_white(encode: Encode) -> None:
    grey = noise()[:, :, 0]
    alpha = noise()[:, :, 1]
    image = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    expected = on_white(grey[:, :, None].repeat(3, 2), alpha)
    assert np.abs(decode(encode(image), LIMITS) - expected).max() <= 1.0


@pytest.mark.parametrize("transparency", [None, 1, bytes([255, 0, 51])], ids=["opaque", "index", "table"])
def test_palette_colours_are_looked_up_and_transparent_ones_put_on_white(
    encode: Encode, transparency: int | bytes | None
) -> None:
    colours = np.array([[200, 10, 30], [1, 2, 3], [50, 100, 150]], np.uint8)
    index = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    image = Image.fromarray(index, "L").copy()
    image.putpalette(colours.tobytes())
    data = encode(image) if transparency is None else encode(image, transparency=transparency)
    alpha = {None: [255, 255, 255], 1: [255, 0, 255]}.get(transparency if isinstance(transparency, int) else None)
    table = np.array(list(transparency) if isinstance(transparency, bytes) else alpha)
    assert np.abs(decode(data, LIMITS) - on_white(colours[index], table[index])).max() <= 1.0


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(2, 1, 8, 2, b"\0" + bytes([9, 8, 7, 1, 2, 3]), chunk(b"tRNS", b"\0\1\0\2\0\3")), [[9, 8, 7], [255] * 3]),
        (png(2, 1, 8, 0, b"\0" + bytes([9, 1]), chunk(b"tRNS", b"\0\1")), [[9] * 3, [255] * 3]),
        (png(2, 1, 4, 0, b"\0\xf8"), [[255] * 3, [136] * 3]),
        (png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 65535, 32896, 0)), [[255, 128, 0]]),
    ],
    ids=["transparent colour", "transparent grey value", "4-bit grey", "16-bit colour"],
)
def test_rare_kinds_of_png(data: bytes, expected: list[list[int]]) -> None:
    assert decode(data, LIMITS).tolist() == [expected]


def test_cmyk_is_converted_as_pillow_does(encode: Encode) -> None:
    data = encode(Image.fromarray(gradient()).convert("CMYK"), "JPEG", quality=95)
    found = decode(data, LIMITS)
    np.testing.assert_array_equal(found, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert np.abs(found.astype(int) - gradient()).mean() < 12


@pytest.mark.parametrize("kind", ["PNG", "PPM"])
def test_16_bit_grey_keeps_its_range(encode: Encode, kind: str) -> None:
    wide = np.linspace(0, 65535, 24 * 40).astype(np.uint16).reshape(24, 40)
    found = decode(encode(wide, kind), LIMITS)
    assert (found[0, 0, 0], found[-1, -1, 0]) == (0, 255)
    np.testing.assert_array_equal(found, np.rint(wide / 257)[:, :, None].repeat(3, 2))


def test_1_bit_is_black_and_white(encode: Encode) -> None:
    ink = noise()[:, :, 0] > 127
    found = decode(encode(Image.fromarray(ink)), LIMITS)
    np.testing.assert_array_equal(found, np.where(ink, 255, 0)[:, :, None].repeat(3, 2))


@pytest.mark.parametrize(("kind", "options"), [("WEBP", {"lossless": True}), ("PNG", {}), ("MPO", {"quality": 95})])
def test_of_an_animation_the_first_picture_counts(encode: Encode, kind: str, options: dict) -> None:
    first, second = gradient(), 255 - gradient()
    data = encode(first, kind, save_all=True, append_images=[Image.fromarray(second)], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert np.abs(decode(data, LIMITS).astype(int) - first).mean() < (3 if kind == "MPO" else 1e-9)


def stored_as(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels that a camera stores, by the table of EXIF 2.3: where row 0 and column 0 are seen."""
    flipped = upright.transpose(1, 0, 2)
    return {
        1: upright,  # top, left
        2: upright[:, ::-1],  # top, right
        3: upright[::-1, ::-1],  # bottom, right
        4: upright[::-1],  # bottom, left
        5: flipped,  # left, top
        6: flipped[::-1],  # right, top
        7: flipped[::-1, ::-1],  # right, bottom
        8: flipped[:, ::-1],  # left, bottom
    }[orientation]


def exif(orientation: int, extra: bytes = b"") -> bytes:
    """EXIF with the orientation, and `extra` whole directory entries of 12 bytes before it."""
    count = len(extra) // 12 + 1
    entry = struct.pack(">HHIHH", 0x112, 3, 1, orientation, 0)
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", count) + extra + entry + bytes(4)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_every_exif_orientation_is_made_upright(encode: Encode, kind: str, orientation: int) -> None:
    upright = np.random.default_rng(3).integers(0, 256, (3, 5, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    options = {"PNG": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}[kind]
    found = decode(encode(stored_as(upright, orientation), kind, exif=exif(orientation), **options), LIMITS)
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).max() <= (4 if kind == "JPEG" else 0)


def test_16_bit_pictures_are_made_upright_too(encode: Encode) -> None:
    wide = np.arange(6, dtype=np.uint16).reshape(2, 3) * 257
    data = encode(wide.T[::-1], exif=exif(6))
    assert decode(data, LIMITS)[:, :, 0].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_orientation_that_does_not_exist_is_ignored(encode: Encode, orientation: int) -> None:
    np.testing.assert_array_equal(decode(encode(noise(), exif=exif(orientation)), LIMITS), noise())


@pytest.mark.parametrize(
    "entry",
    [struct.pack(">HHI4s", 0x100, 2, 2, b"x\0"), struct.pack(">HHI4s", 0x11A, 2, 3, b"72\0")],
    ids=["ImageWidth as text", "XResolution as text"],
)
@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_a_wrongly_typed_exif_entry_does_not_cost_the_image(encode: Encode, kind: str, entry: bytes) -> None:
    options = {"PNG": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}[kind]
    upright = gradient()
    found = decode(encode(stored_as(upright, 6), kind, exif=exif(6, entry), **options), LIMITS)
    assert np.abs(found.astype(int) - upright).max() <= 4


@pytest.mark.parametrize("damaged", [b"Exif\0\0II*\0" + b"\xff" * 40, exif(6)[:-6]], ids=["garbage", "cut"])
def test_damaged_exif_costs_neither_the_image_nor_a_warning(encode: Encode, damaged: bytes) -> None:
    """A warning would make the outcome hang on the interpreter's filters: under `-W error` the image is rejected."""
    data = encode(gradient(), "JPEG", quality=100, subsampling=0, exif=damaged)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = decode(data, LIMITS)
    assert sorted(found.shape) == sorted(gradient().shape)
    assert caught == []


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "ICO", "JPEG2000", "TGA", "PDF", "EPS"])
def test_other_kinds_are_no_images_whatever_they_are_called(encode: Encode, kind: str) -> None:
    status, reason = fault(encode(noise(), kind))
    assert status == "not_an_image"
    assert "JPEG, PNG, WEBP, BMP, PPM" in reason


FLOAT_MAP = b"Pf\n2 2\n-1.0\n" + np.array([0, 0.5, 1, np.nan], "<f4").tobytes()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image\n",
        bytes(5000),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8",
        b"\xff\xd8\xff",
        b"BM",
        b"RIFF\x10\0\0\0WEBP",
        b"P5",
        b"P5\n-1 4\n255\n",
        png(0, 0, 8, 2, b""),
        FLOAT_MAP,
    ],
    ids=[
        *("empty", "text", "zeros", "svg", "PNG", "JPEG", "JPEG 3", "BMP", "WEBP", "PGM"),
        *("negative", "no pixels", "floats"),
    ],
)
def test_text_fragments_and_nothing_are_no_images(data: bytes) -> None:
    assert fault(data)[0] == "not_an_image"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "PPM"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_file_that_ends_early_is_corrupt(encode: Encode, kind: str, share: float) -> None:
    data = encode(noise(64, 64), kind)
    status, reason = fault(data[: int(len(data) * share)])
    assert status == "corrupt" or (kind == "WEBP" and status == "not_an_image")
    assert reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_file_whose_second_half_is_zeros_is_corrupt(encode: Encode, kind: str) -> None:
    """What a broken download or a full disk leaves: the right size, and no data."""
    data = encode(noise(64, 64), kind)
    half = len(data) // 2
    assert fault(data[:half] + bytes(len(data) - half))[0] == "corrupt"


def test_a_damaged_png_header_is_no_image(encode: Encode) -> None:
    data = bytearray(encode(noise()))
    data[data.index(b"IHDR") + 4 + 13] ^= 1  # checksum
    assert fault(bytes(data))[0] == "not_an_image"


@pytest.mark.parametrize("at", [0.1, 0.5, 0.95])
def test_one_wrong_bit_in_the_pixels_of_a_png_is_corrupt(encode: Encode, at: float) -> None:
    data = bytearray(encode(noise(64, 64)))
    start = data.index(b"IDAT")
    (length,) = struct.unpack(">I", data[start - 4 : start])
    data[start + 4 + int(at * length)] ^= 4
    assert fault(bytes(data))[0] == "corrupt"


def test_a_wrong_png_checksum_over_right_pixels_never_gives_other_pixels(encode: Encode) -> None:
    """The pixels have a second checksum inside the stream, so a decoder may go on; it must not go wrong."""
    data = bytearray(encode(noise()))
    data[data.index(b"IEND") - 5] ^= 1  # last byte of the checksum of IDAT
    try:
        found = decode(bytes(data), LIMITS)
    except ImageFault as refused:
        assert refused.status == "corrupt"
    else:
        np.testing.assert_array_equal(found, noise())


def test_more_bytes_than_the_limit_are_too_large(encode: Encode) -> None:
    data = encode(noise())
    assert decode(data, ImageLimits(max_bytes=len(data))).shape == noise().shape
    status, reason = fault(data, ImageLimits(max_bytes=len(data) - 1))
    assert status == "too_large"
    assert f"{len(data):,} bytes" in reason
    assert "faces.limits.max_bytes" in reason


def test_more_pixels_than_the_limit_are_too_large(encode: Encode) -> None:
    data = encode(noise(24, 40))
    assert decode(data, ImageLimits(max_pixels=24 * 40)).shape == (24, 40, 3)
    status, reason = fault(data, ImageLimits(max_pixels=24 * 40 - 1))
    assert status == "too_large"
    assert "40 x 24 pixels" in reason
    assert "faces.limits.max_pixels" in reason


def bomb(side: int) -> bytes:
    """A small PNG file with `side` x `side` white pixels of one bit."""
    packer = zlib.compressobj(9)
    row = b"\0" + b"\xff" * (side // 8)
    packed = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [12_000, 20_000], ids=["over our limit", "over Pillow's own limit"])
def test_a_small_file_with_many_pixels_is_refused_before_any_is_decoded(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bomb(side)
    assert len(data) < 100_000

    def load(*_: object) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", load)
    decode_time = -time.perf_counter()
    tracemalloc.start()
    try:
        status, reason = fault(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert status == "too_large"
    assert "limit" in reason
    assert peak < 2_000_000
    assert decode_time + time.perf_counter() < 1.0


def test_text_that_unpacks_to_gigabytes_is_refused() -> None:
    note = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(30_000_000), 9))
    assert fault(png(1, 1, 8, 2, b"\0\1\2\3", note))[0] in ("too_large", "corrupt", "not_an_image")


@pytest.mark.parametrize("limits", [{"max_bytes": 0}, {"max_pixels": 0}, {"max_pixels": -5}])
def test_limits_are_positive(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        ImageLimits(**limits)


@pytest.fixture(scope="module")
def seeds_of_files(encode: Encode) -> list[bytes]:
    picture, grey = noise(16, 24), noise(16, 24)[:, :, 0]
    palette = Image.fromarray(picture).quantize(8)
    return [
        encode(picture, "JPEG", exif=exif(6)),
        encode(picture, "JPEG", progressive=True),
        encode(picture, "PNG", exif=exif(6)),
        encode(palette, "PNG", transparency=1),
        encode(grey.astype(np.uint16) * 257, "PNG"),
        encode(picture, "WEBP", exif=exif(6)),
        encode(picture, "BMP"),
        encode(palette, "BMP"),
        encode(grey, "PPM"),
        b"P2\n3 2\n15\n1 2 3\n4 5 6\n",
    ]


edits = st.lists(st.tuples(st.sampled_from("scdi"), st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=12)


@settings(max_examples=400, deadline=None)
@given(which=st.integers(0, 9), edits=edits)
def test_a_damaged_file_is_an_image_or_an_image_fault(seeds_of_files: list[bytes], which: int, edits: list) -> None:
    check_damaged(seeds_of_files[which], edits)


def test_many_damaged_files_are_images_or_image_faults(seeds_of_files: list[bytes]) -> None:
    """As above with a plain generator, which gets through far more files: faults here are rare, one in 40,000."""
    draw = random.Random(5)
    for _ in range(20_000):
        edits = [(draw.choice("sssscdi"), draw.random() ** 2, draw.randbytes(draw.randint(1, 4))) for _ in range(3)]
        check_damaged(draw.choice(seeds_of_files), edits[: draw.randint(1, 3)])


def check_damaged(data: bytes, edits: list[tuple[str, float, bytes]]) -> None:
    damaged = bytearray(data)
    for kind, where, new in edits:
        at = int(where * len(damaged))
        if kind == "s":
            damaged[at : at + len(new)] = new
        elif kind == "i":
            damaged[at:at] = new
        elif kind == "d":
            del damaged[at : at + len(new)]
        elif kind == "c":
            del damaged[max(at, 16) :]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = decode(bytes(damaged), ImageLimits(max_pixels=1_000_000))
        except ImageFault as refused:
            assert refused.status in ("not_an_image", "corrupt", "too_large")
            assert str(refused)
        else:
            assert found.dtype == np.uint8
            assert found.ndim == 3
            assert found.shape[2] == 3
            assert found.size > 0
