"""HDF5: files written by h5py in the layouts that sets are published in, and what must never be followed."""

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import PIL.Image
import pytest

from operators.errors import FormatError
from operators.formats import SetConfig, SourceLimits, hdf5
from operators.formats.listing import Entry, Listing
from operators.images import ImageLimits, decode
from operators.sandbox import Fault
from operators.sources import LocalSource

JPEG = b"\xff\xd8\xff\xe0 an image"
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 9, 3), dtype=np.uint8)
BYTES = h5py.vlen_dtype(np.uint8)


def listed(uri: Path, **options: Any) -> Listing:
    return hdf5.listing(LocalSource(str(uri)), SetConfig(uri=str(uri), **options))


def read(uri: Path, entries: "list[Entry] | Any") -> dict[str, bytes]:
    found = {}
    with hdf5.Hdf5Reader(LocalSource(str(uri))) as opened:
        for entry in entries:
            if entry.error is None:
                with opened.open(entry.place) as file:
                    found[entry.key] = file.read()
                assert entry.bytes in (0, len(found[entry.key]))
    return found


def faults(listing: Listing) -> dict[str, str]:
    return {entry.key: entry.error for entry in listing.entries if entry.error is not None}


def pixels_of(data: bytes) -> Any:
    return np.asarray(PIL.Image.open(io.BytesIO(data)))


@pytest.mark.parametrize(
    "packed", [{}, {"chunks": (2, 8, 9, 3), "compression": "gzip", "shuffle": True, "fletcher32": True}]
)
def test_a_stack_of_pixels_with_labels_and_names(tmp_path: Path, packed: dict[str, Any]) -> None:
    names = [f"{n % 2}/{n}.png" for n in range(6)]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("images", data=PIXELS, **packed)
        file["labels"] = np.arange(6) // 2
        file["path"] = names
        file["age"] = np.arange(6) * 10.0
    found = listed(tmp_path, attributes=["age"])
    assert [(e.key, e.identity, e.attributes) for e in found.entries] == [
        (name, str(n // 2), {"age": str(n * 10)}) for n, name in enumerate(names)
    ]
    for n, data in enumerate(read(tmp_path, found.entries).values()):
        assert (pixels_of(data) == PIXELS[n]).all()
        assert (decode(data, ImageLimits()) == PIXELS[n]).all()
    assert [e.identity for e in listed(tmp_path, identity="parent").entries] == ["0", "1"] * 3


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (np.moveaxis(PIXELS, 3, 1), PIXELS),
        (PIXELS[..., 0], PIXELS[..., 0]),
        (PIXELS[..., :1], PIXELS[..., 0]),
        (np.moveaxis(PIXELS, 3, 1)[:, :1], PIXELS[..., 0]),
    ],
    ids=["NCHW", "NHW", "NHW1", "N1HW"],
)
def test_stacks_of_every_axis_order(tmp_path: Path, stored: Any, expected: Any) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = stored
    found = listed(tmp_path)
    assert [(e.key, e.identity) for e in found.entries] == [(f"{n:08d}", None) for n in range(6)]
    assert all((pixels_of(data) == expected[n]).all() for n, data in enumerate(read(tmp_path, found.entries).values()))


def test_a_group_for_each_identity_with_a_dataset_for_each_image(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["00001/reference/image"] = PIXELS[0]
        file["00001/augmentation_00/image"] = np.moveaxis(PIXELS[1], 2, 0)
        file["00002/reference"] = np.frombuffer(JPEG, np.uint8)
        file["00002/opaque"] = np.void(JPEG)
        file["00003/images"] = PIXELS[:2]
        file["00003/embedding"] = np.zeros((1, 512), np.float32)
    found = listed(tmp_path)
    assert {e.key: e.identity for e in found.entries} == {
        "00001/reference": "00001",
        "00001/augmentation_00": "00001",
        "00002/reference": "00002",
        "00002/opaque": "00002",
        "00003/00000000": "00003",
        "00003/00000001": "00003",
    }
    data = read(tmp_path, found.entries)
    assert data["00002/reference"] == data["00002/opaque"] == JPEG
    assert (pixels_of(data["00001/augmentation_00"]) == PIXELS[1]).all()
    assert found.unlisted == {"dataset that is no image": 1}


def test_bob_writes_a_file_for_each_image(tmp_path: Path) -> None:
    for name in ("0001/s1", "0002/s1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with h5py.File(tmp_path / f"{name}.hdf5", "w") as file:
            file["array"] = np.moveaxis(PIXELS[0], 2, 0)
    assert [(e.key, e.identity) for e in listed(tmp_path).entries] == [("0001/s1", "0001"), ("0002/s1", "0002")]


def test_encoded_images_of_variable_length(tmp_path: Path) -> None:
    images = [JPEG, JPEG * 400, JPEG + b"\0"]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        stack = file.create_dataset("jpeg", (3,), BYTES)
        for n, image in enumerate(images):
            stack[n] = np.frombuffer(image, np.uint8)
        file["identity"] = ["ann", "ann", "ben"]
    found = listed(tmp_path)
    assert [e.identity for e in found.entries] == ["ann", "ann", "ben"]
    assert list(read(tmp_path, found.entries).values()) == images


def test_the_column_chooses_the_dataset(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["train/images"], file["masks"] = PIXELS, PIXELS
        file["table"] = PIXELS[0, ..., 0]
    assert len(listed(tmp_path).entries) == 12
    assert {e.key for e in listed(tmp_path, column="train/images").entries} == {f"train/{n:08d}" for n in range(6)}
    assert [e.key for e in listed(tmp_path, column="table").entries] == ["table"]


def test_attributes_of_groups_and_datasets(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["s/image"] = PIXELS[0]
        file["s"].attrs["sex"], file["s/image"].attrs["age"] = "female", 31
    assert listed(tmp_path, attributes=["sex", "age"]).entries[0].attributes == {"sex": "female", "age": "31"}
    assert listed(tmp_path, identity="attribute:sex").entries[0].identity == "female"


def test_links_are_counted_and_never_followed(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.bin", "w") as file:
        file["secret"] = PIXELS
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"] = PIXELS[0]
        file["soft"], file["far"] = h5py.SoftLink("/image"), h5py.ExternalLink("other.bin", "/secret")
        file["again"] = file["image"]
        file["group/itself"] = file["/"]
    found = listed(tmp_path / "a.h5")
    assert len(found.entries) == 1
    assert found.unlisted["link"] >= 4


def test_storage_outside_the_file_is_never_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(JPEG * 100)
    os.mkfifo(tmp_path / "pipe")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"] = PIXELS[0]
        for name in ("secret", "pipe"):
            file.create_dataset(name, (90,), np.uint8, external=[(str(tmp_path / name), 0, 90)])
        layout = h5py.VirtualLayout((6, 8, 9, 3), np.uint8)
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "images", (6, 8, 9, 3))
        file.create_virtual_dataset("virtual", layout)
    found = listed(tmp_path / "a.h5")
    assert list(read(tmp_path / "a.h5", found.entries)) == ["image"] or len(found.entries) == 4
    assert set(faults(found)) == {"secret", "pipe", "virtual"}
    assert all("outside this file" in fault for fault in faults(found).values())


def test_references_floats_and_vectors_are_no_images(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"] = PIXELS[0]
        file.create_dataset("refs", data=[file["image"].ref], dtype=h5py.ref_dtype)
        file["embedding"] = np.zeros((1, 512), np.float32)
        file["floats"] = PIXELS / 255
    found = listed(tmp_path)
    assert found.unlisted == {"dataset that is no image": 2}
    assert faults(found) == {"floats": "its pixels are of the type float64; only uint8 is read"}


def test_a_filter_from_elsewhere_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"] = PIXELS[0]
        made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        made.set_chunk((6, 8, 9, 3))
        made.set_filter(32015, h5py.h5z.FLAG_OPTIONAL)
        space = h5py.h5s.create_simple(PIXELS.shape)
        h5py.h5d.create(file.id, b"zstd", h5py.h5t.NATIVE_UINT8, space, made)
    assert "packed by filter 32015" in faults(listed(tmp_path))["zstd"]


def test_bombs_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"] = PIXELS[0]
        file.create_dataset("zeros", data=np.zeros((40, 128, 128, 3), np.uint8), chunks=True, compression="gzip")
        file.create_dataset("nothing", (10**9, 512, 512, 3), np.uint8, chunks=(1, 512, 512, 3))
        file.create_dataset("wide", (10, 10**5, 10**5), np.uint8, chunks=(1, 10**4, 10**5))
    found = faults(listed(tmp_path, limits=SourceLimits(max_ratio=50)))
    assert "1,966,680 bytes are packed into" in found["zeros"]
    assert "0 bytes of it are stored" in found["nothing"]
    assert "a chunk of 1,000,000,000 bytes" in found["wide"]


def test_names_that_come_twice_give_way_to_rows(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"], file["names"] = PIXELS[:2], ["x", "x"]
    assert [e.key for e in listed(tmp_path).entries] == ["00000000", "00000001"]


def test_embeddings_are_sent_to_their_own_form(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "samples.h5", "w") as file:
        file["00000/reference/embedding"] = np.zeros((1, 512), np.float32)
    with pytest.raises(FormatError, match="format: vectors"):
        listed(tmp_path)
    source = LocalSource(str(tmp_path))
    assert not hdf5.recognises(source, list(source.files()))


def test_recognised_by_content(tmp_path: Path) -> None:
    def recognised(uri: Path) -> bool:
        source = LocalSource(str(uri))
        return hdf5.recognises(source, list(source.files()))

    for name, data in (("a.h5", b""), ("b.h5", b"\x89HDF\r\n\x1a\n" + bytes(99)), ("c.jpg", JPEG)):
        (tmp_path / name).write_bytes(data)
    assert not recognised(tmp_path)
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["images"] = PIXELS
    assert recognised(tmp_path)


def test_a_damaged_file_is_refused_alone_and_a_row_among_others(tmp_path: Path) -> None:
    (tmp_path / "b.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99))
    with pytest.raises(FormatError, match=r"b\.h5 cannot be read \(.*\)\. Get it again"):
        listed(tmp_path)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"] = PIXELS
    assert list(faults(listed(tmp_path))) == ["b.h5"]


def test_a_file_that_changed_after_listing_is_an_os_error(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"] = PIXELS
    entries = listed(tmp_path).entries
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"] = PIXELS[0, 0, 0]
    with pytest.raises(OSError):
        read(tmp_path, entries)


def test_damaged_files_never_crash_or_hang(
    tmp_path: Path, mutants: Callable[[bytes, int, int], Iterator[bytes]], survives: Callable[..., object]
) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("images", data=PIXELS, chunks=(2, 8, 9, 3), compression="gzip", fletcher32=True)
        file["labels"], file["00001/image"] = np.arange(6), PIXELS[0]
        file.create_dataset("jpeg", (2,), BYTES)[:] = [np.frombuffer(JPEG, np.uint8)] * 2
    for data in mutants((tmp_path / "a.h5").read_bytes(), 1, 150):
        (tmp_path / "a.h5").write_bytes(data)
        survives("hdf5", tmp_path, 5)


def test_a_file_that_ends_or_holds_up_its_process_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"] = PIXELS
    place = str(listed(tmp_path).entries[0].place)
    fault = Fault(status="timed_out", reason="its process did not answer within 60 seconds")
    monkeypatch.setattr(hdf5, "_ask", lambda *_: fault)
    with pytest.raises(FormatError, match="a file is damaged: on reading it, its process did not answer within"):
        listed(tmp_path)
    source = LocalSource(str(tmp_path))
    with hdf5.Hdf5Reader(source) as reader, pytest.raises(OSError, match=r"did not answer within .*get it again"):
        reader.open(place)
    assert not hdf5.recognises(source, list(source.files()))
