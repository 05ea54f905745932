"""One and the same small set in every form, written without this project's code: the same images and identities."""

import hashlib
import importlib.util
import io
import json
import struct
import sys
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from operators.errors import FormatError
from operators.formats import FORMATS, SetConfig, hdf5, listed, reader, recognised

PEOPLE = 4


def jpegs() -> dict[str, bytes]:
    """20 images of 4 identities, by name."""
    rng = np.random.default_rng(0)
    made = {}
    for at in range(20):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (16, 12, 3), np.uint8)).save(file, "JPEG", quality=80)
        made[f"{at % PEOPLE}/{at:02d}.jpg"] = file.getvalue()
    return made


IMAGES = jpegs()
DIGESTS = {(name[0], hashlib.sha256(data).hexdigest()) for name, data in IMAGES.items()}


def write_folder(folder: Path) -> None:
    for name, data in IMAGES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def write_zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "set.zip", "w") as archive:
        for name, data in IMAGES.items():
            archive.writestr(name, data)


def _tar(path: Path, members: dict[str, bytes], mode: str) -> None:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            one = tarfile.TarInfo(name)
            one.size = len(data)
            archive.addfile(one, io.BytesIO(data))


def write_tar(folder: Path) -> None:
    _tar(folder / "set.tar", IMAGES, "w")


def write_tar_gz(folder: Path) -> None:
    _tar(folder / "set.tar.gz", IMAGES, "w:gz")


def write_webdataset(folder: Path) -> None:
    for shard in range(2):
        members = {}
        for name, data in list(IMAGES.items())[shard::2]:
            stem = name[2:4]
            members |= {f"{stem}.jpg": data, f"{stem}.cls": name[0].encode()}
        _tar(folder / f"set-{shard:04d}.tar", members, "w")


def write_recordio(folder: Path) -> None:
    """As MXNet's documentation describes: magic, length, header (flag, label, two ids), data, zeros up to 4 bytes."""
    record, index = b"", ""
    for at, (name, data) in enumerate(IMAGES.items()):
        body = struct.pack("<IfQQ", 0, float(name[0]), at, 0) + data
        index += f"{at}\t{len(record)}\n"
        record += struct.pack("<II", 0xCED7230A, len(body)) + body + bytes(-len(body) % 4)
    (folder / "train.rec").write_bytes(record)
    (folder / "train.idx").write_text(index)


def _table() -> pa.Table:
    rows = [{"bytes": data, "path": name[2:]} for name, data in IMAGES.items()]
    kinds = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": [str(n) for n in range(PEOPLE)]}}
    made = pa.table(
        {
            "image": pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()})),
            "label": pa.array([int(name[0]) for name in IMAGES]),
        }
    )
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": kinds}})})


def write_parquet(folder: Path) -> None:
    for shard in range(2):
        pq.write_table(_table()[shard * 10 : shard * 10 + 10], folder / f"train-{shard:05d}-of-00002.parquet")


def write_arrow(folder: Path) -> None:
    with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), _table().schema) as writer:
        writer.write_table(_table(), max_chunksize=7)
    (folder / "state.json").write_text("{}")


def write_lmdb(folder: Path) -> None:
    with (
        lmdb.open(str(folder / "set.lmdb"), subdir=False, map_size=1 << 24) as env,
        env.begin(write=True) as transaction,
    ):
        for at, (name, data) in enumerate(IMAGES.items()):
            transaction.put(b"%d" % at, msgpack.packb((data, int(name[0])), use_bin_type=True))


def write_hdf5(folder: Path) -> None:
    import h5py

    with h5py.File(folder / "set.h5", "w") as file:
        stack = file.create_dataset("images", (len(IMAGES),), h5py.vlen_dtype(np.uint8))
        for at, data in enumerate(IMAGES.values()):
            stack[at] = np.frombuffer(data, np.uint8)
        file["labels"] = [int(name[0]) for name in IMAGES]


def _crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 0xFFFFFFFF


def _masked(data: bytes) -> bytes:
    crc = _crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited field of protocol buffers."""
    size, length = len(data), b""
    while True:
        length += bytes([size & 0x7F | (0x80 if size > 0x7F else 0)])
        size >>= 7
        if not size:
            return bytes([number << 3 | 2]) + length + data


def write_tfrecord(folder: Path) -> None:
    """Records of tf.train.Example (example.proto, feature.proto): features by name, bytes as list 1, integers as 3."""
    records = b""
    for name, data in IMAGES.items():
        image = _field(1, b"image/encoded") + _field(2, _field(1, _field(1, data)))
        label = _field(1, b"image/class/label") + _field(2, _field(3, _field(1, bytes([int(name[0])]))))
        example = _field(1, _field(1, image) + _field(1, label))
        size = struct.pack("<Q", len(example))
        records += size + _masked(size) + example + _masked(example)
    (folder / "set.tfrecord").write_bytes(records)


WRITERS: dict[str, Callable[[Path], None]] = {
    "folder": write_folder,
    "zip": write_zip,
    "tar": write_tar,
    "tar.gz": write_tar_gz,
    "webdataset": write_webdataset,
    "recordio": write_recordio,
    "parquet": write_parquet,
    "arrow": write_arrow,
    "lmdb": write_lmdb,
    "hdf5": write_hdf5,
    "tfrecord": write_tfrecord,
}


def test_every_form_of_images_is_written_here() -> None:
    assert {name.partition(".")[0] for name in WRITERS} == {n for n, form in FORMATS.items() if form.holds == "images"}
    assert zlib.crc32(b"") == 0 and _crc32c(b"123456789") == 0xE3069283


def found(uri: str, form: str) -> set[tuple[str | None, str]]:
    """Identity and digest of every image of the set, which must be recognised as `form`."""
    name, listing = listed(SetConfig(uri=uri))
    assert name == form.partition(".")[0]
    assert [entry.error for entry in listing.entries] == [None] * len(IMAGES)
    assert len({entry.key for entry in listing.entries}) == len(IMAGES)
    images = set()
    with reader(name, uri) as opened:
        for entry in listing.entries:
            place = entry.place or entry.key
            with opened.open(place, opened.version(place)) as stream:
                images.add((entry.identity, hashlib.sha256(stream.read()).hexdigest()))
    return images


@pytest.mark.parametrize("form", WRITERS)
def test_every_form_gives_the_same_images_and_identities(form: str, tmp_path: Path) -> None:
    WRITERS[form](tmp_path)
    assert found(str(tmp_path), form) == DIGESTS


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Any]:
    """An S3 server on this machine."""
    spec = importlib.util.spec_from_file_location("object_store_for_forms", root / "tests" / "object_store.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    with module.object_store() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        patch.setattr(hdf5, "_own", threading.local())  # child processes that know the environment
        yield store


@pytest.mark.parametrize("form", WRITERS)
def test_every_form_is_read_from_object_storage_too(form: str, tmp_path: Path, server: Any) -> None:
    WRITERS[form](tmp_path)
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        server.put(f"{form}/{path.relative_to(tmp_path).as_posix()}", path.read_bytes())
    assert found(f"s3://sets/{form}", form) == DIGESTS


@pytest.mark.parametrize(("first", "second"), [("zip", "parquet"), ("folder", "tar"), ("recordio", "arrow")])
def test_a_folder_of_two_forms_is_refused_with_both_names(first: str, second: str, tmp_path: Path) -> None:
    WRITERS[first](tmp_path)
    WRITERS[second](tmp_path)
    with pytest.raises(FormatError, match="several forms") as refusal:
        recognised(SetConfig(uri=str(tmp_path)))
    assert first in str(refusal.value)
    assert second in str(refusal.value)
