"""The readers of all forms against the usual library for each: `make bench-formats` (QUICK=1: under a minute).

One set of images is written in every form. Ours: listing the set (recognising the form, checking and labelling every
name) and reading every record's bytes through the form's reader, as `scan` does: as it lies in the file, many records
at a time. Peers, in the same run, on the same files, in one thread each. Both sides take each record's bytes and their
length, and in a second pass also their SHA-256, as every scan does. In a third pass our side reads a set that was
listed before.

What peers do not do: none tells names that occur twice, leads out (`..`) or that are too large, none hashes, and none
goes on behind a damaged record. Besides:

- folder (os.walk): asks no file for its size.
- recordio, `.idx` loop: the least that reads such a file in Python, unpacking nothing but a header it then drops;
  `mxnet-style`: what `MXIndexedRecordIO.read_idx` and `recordio.unpack` do for each record, multi-part records and
  labels included, with dmlc-core's part of it in Python.
- parquet, pyarrow: batches as Python objects. arrow, pyarrow: the same of a file that is mapped into memory.
  `datasets` (where installed): a loop over `datasets.Dataset`, images left undecoded, prepared by the call before.
- lmdb, cursor: zero copies of mapped memory until msgpack makes the image; `get by key`: as published loaders of such
  sets index them.
- tfrecord, frame loop: light readers' loop over frames and features; checks no checksum, as they do by default.

Sets are never mapped into memory here: a file that shrinks meanwhile would end the process.

Then listings of 1,000,000 records: seconds and peak memory of a fresh process. Forms can be named as arguments; LIST=0
leaves the listings out, READ=0 the reading. The last line is JSON.
"""

import hashlib
import importlib
import importlib.util
import io
import json
import os
import platform
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from operators.formats import SetConfig, listed, reader
from operators.formats.listing import Entry

QUICK = os.environ.get("QUICK") == "1"
COUNT = 3_000 if QUICK else 20_000
ENTRIES = 20_000 if QUICK else 1_000_000
REPEATS = int(os.environ.get("REPEATS", "3"))
PERSONS, MEAN_BYTES = 100, 8_000
WHOLE = 2**24
"""As `scan` limits what it takes in one piece."""
IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def images(count: int = COUNT) -> Iterator[tuple[str, bytes]]:
    """Names, and noise that begins as JPEGs do: decoding is nobody's part here."""
    rng = np.random.default_rng(0)
    for at, size in enumerate(rng.integers(MEAN_BYTES // 2, MEAN_BYTES * 3 // 2, count).tolist()):
        yield f"{at % PERSONS:03d}/{at:07d}.jpg", b"\xff\xd8\xff" + rng.bytes(size)


def seconds(work: Callable[[], int]) -> float:
    """Best time of `work` after one call that is not counted; it must have met all records."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        met = work()
        times.append(time.perf_counter() - start)
        assert met >= COUNT * MEAN_BYTES // 2, met
    return min(times[1:])


HASHED = [False]


def taken(data: Any) -> int:
    """What both sides do with a record: its length, and its digest where that is measured too."""
    if HASHED[0]:
        hashlib.sha256(data).digest()
    return len(data)


def ours(uri: str) -> int:
    form, listing = listed(SetConfig(uri=uri))
    return read_entries(form, uri, listing.entries)


def read_entries(form: str, uri: str, entries: Sequence[Entry]) -> int:
    total = 0
    with reader(form, uri) as opened:
        for data in opened.each(entries, WHOLE):
            total += taken(data)  # an error has no length
    return total


def write_folder(folder: Path) -> None:
    for name, data in images():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def read_folder(folder: Path) -> int:
    total = 0
    for top, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(top, name), "rb") as file:
                total += taken(file.read())
    return total


def write_zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "set.zip", "w") as archive:
        for name, data in images():
            archive.writestr(name, data)


def read_zip(folder: Path) -> int:
    with zipfile.ZipFile(folder / "set.zip") as archive:
        return sum(taken(archive.read(name)) for name in archive.namelist())


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    one = tarfile.TarInfo(name)
    one.size = len(data)
    archive.addfile(one, io.BytesIO(data))


def write_tar(folder: Path) -> None:
    with tarfile.open(folder / "set.tar", "w") as archive:
        for name, data in images():
            _add(archive, name, data)


def read_tar(folder: Path) -> int:
    total = 0
    with tarfile.open(folder / "set.tar") as archive:
        for member in archive:
            file = archive.extractfile(member)
            total += taken(file.read()) if file is not None else 0
    return total


def write_webdataset(folder: Path) -> None:
    with tarfile.open(folder / "set-0000.tar", "w") as archive:
        for name, data in images():
            _add(archive, f"{name[4:-4]}.jpg", data)
            _add(archive, f"{name[4:-4]}.cls", name[:3].encode())


def read_webdataset(folder: Path) -> int:
    import webdataset

    made = webdataset.WebDataset(str(folder / "set-0000.tar"), shardshuffle=False, empty_check=False)
    return sum(taken(sample["jpg"]) for sample in made)


def write_recordio(folder: Path, found: "Iterator[tuple[str, bytes]] | None" = None) -> None:
    at = 0
    with open(folder / "train.rec", "wb") as file, open(folder / "train.idx", "w") as index:
        for number, (name, data) in enumerate(found or images()):
            body = struct.pack("<IfQQ", 0, float(name[:3]), number, 0) + data
            index.write(f"{number}\t{at}\n")
            at += file.write(struct.pack("<II", 0xCED7230A, len(body)) + body + bytes(-len(body) % 4))


def read_recordio(folder: Path) -> int:
    with open(folder / "train.idx") as file:
        index = {int(key): int(at) for key, at in (line.strip().split("\t") for line in file)}
    total = 0
    with open(folder / "train.rec", "rb") as file:
        for at in index.values():
            file.seek(at)
            magic, length = struct.unpack("<II", file.read(8))
            assert magic == 0xCED7230A
            data = file.read(length & 0x1FFFFFFF)
            struct.unpack("<IfQQ", data[:24])
            total += taken(data[24:])
    return total


IRHeader = namedtuple("IRHeader", "flag label id id2")
"""As MXNet's recordio.py has it."""


def read_recordio_mxnet(folder: Path) -> int:
    """`for key in record.keys: header, image = unpack(record.read_idx(key))`."""
    with open(folder / "train.idx") as file:
        index = {int(key): int(at) for key, at in (line.strip().split("\t") for line in file)}
    total = 0
    with open(folder / "train.rec", "rb") as file:
        for key in index:
            file.seek(index[key])
            _, image = _unpacked(_read_record(file))
            total += taken(image)
    return total


def _read_record(file: Any) -> bytes:
    """dmlc-core's `RecordIOReader::NextRecord`."""
    parts: list[bytes] = []
    while True:
        magic, word = struct.unpack("<II", file.read(8))
        assert magic == 0xCED7230A
        flag, length = word >> 29 & 7, word & 0x1FFFFFFF
        data = file.read(length)
        file.read(-length % 4)
        parts.append(data)
        if flag in (0, 3):
            return data if len(parts) == 1 else struct.pack("<I", magic).join(parts)


def _unpacked(data: bytes) -> tuple[IRHeader, bytes]:
    """MXNet's `recordio.unpack`."""
    header = IRHeader(*struct.unpack("<IfQQ", data[:24]))
    data = data[24:]
    if header.flag > 0:
        header = header._replace(label=np.frombuffer(data, np.float32, header.flag))
        data = data[header.flag * 4 :]
    return header, data


def _table() -> pa.Table:
    found = list(images())
    rows = pa.array([{"bytes": data, "path": name[4:]} for name, data in found], IMAGE)
    return pa.table({"image": rows, "label": [int(name[:3]) for name, _ in found]})


def write_parquet(folder: Path) -> None:
    pq.write_table(_table(), folder / "train-00000-of-00001.parquet", row_group_size=1000)


def read_parquet(folder: Path) -> int:
    total = 0
    file = pq.ParquetFile(folder / "train-00000-of-00001.parquet", pre_buffer=False)
    for batch in file.iter_batches(1000, columns=["image", "label"], use_threads=False):
        total += sum(taken(row["image"]["bytes"]) for row in batch.to_pylist())
    return total


def write_arrow(folder: Path) -> None:
    table = _table()
    with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)


def read_arrow(folder: Path) -> int:
    total = 0
    with pa.memory_map(str(folder / "data-00000-of-00001.arrow")) as file:
        for batch in pa.ipc.open_stream(file):
            total += sum(taken(row["image"]["bytes"]) for row in batch.to_pylist())
    return total


def _read_datasets(kind: str, file: Path) -> int:
    """Rows of a Hugging Face dataset whose images are left as they are stored."""
    datasets = importlib.import_module("datasets")
    datasets.disable_progress_bars()
    if kind == "arrow":
        made = datasets.Dataset.from_file(str(file))
    else:
        made = datasets.Dataset.from_parquet(str(file), cache_dir=str(file.parent.parent / f"{file.parent.name}-cache"))
    return sum(taken(row["image"]["bytes"]) for row in made)


def read_parquet_datasets(folder: Path) -> int:
    return _read_datasets("parquet", folder / "train-00000-of-00001.parquet")


def read_arrow_datasets(folder: Path) -> int:
    return _read_datasets("arrow", folder / "data-00000-of-00001.arrow")


def write_lmdb(folder: Path) -> None:
    import lmdb
    import msgpack

    size = 2 * COUNT * MEAN_BYTES + 2**24
    with lmdb.open(str(folder / "set.lmdb"), subdir=False, map_size=size) as env, env.begin(write=True) as transaction:
        for at, (name, data) in enumerate(images()):
            transaction.put(b"%d" % at, msgpack.packb((data, int(name[:3]))))


def read_lmdb(folder: Path) -> int:
    import lmdb
    import msgpack

    total = 0
    with (
        lmdb.open(str(folder / "set.lmdb"), subdir=False, readonly=True, lock=False) as env,
        env.begin(buffers=True) as transaction,
    ):
        for _, value in transaction.cursor():
            total += taken(msgpack.unpackb(value)[0])
    return total


def read_lmdb_get(folder: Path) -> int:
    """`for i in range(n): msgpack.unpackb(transaction.get(key(i)))`."""
    import lmdb
    import msgpack

    total = 0
    with lmdb.open(str(folder / "set.lmdb"), subdir=False, readonly=True, lock=False, readahead=False) as env:
        for at in range(COUNT):
            with env.begin() as transaction:
                total += taken(msgpack.unpackb(transaction.get(b"%d" % at))[0])
    return total


def write_hdf5(folder: Path) -> None:
    import h5py

    with h5py.File(folder / "set.h5", "w") as file:
        stack = file.create_dataset("images", (COUNT,), h5py.vlen_dtype(np.uint8))
        for at, (_, data) in enumerate(images()):
            stack[at] = np.frombuffer(data, np.uint8)
        file["labels"] = [int(name[:3]) for name, _ in images()]


def read_hdf5(folder: Path) -> int:
    import h5py

    with h5py.File(folder / "set.h5") as file:
        stack = file["images"]
        return sum(taken(stack[at].tobytes()) for at in range(len(stack)))


def _varint(value: int) -> bytes:
    made = b""
    while value > 0x7F:
        made, value = made + bytes([value & 0x7F | 0x80]), value >> 7
    return made + bytes([value])


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _masked(data: bytes) -> bytes:
    import google_crc32c

    crc = google_crc32c.value(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def write_tfrecord(folder: Path) -> None:
    with open(folder / "set.tfrecord", "wb") as file:
        for name, data in images():
            image = _field(1, b"image/encoded") + _field(2, _field(1, _field(1, data)))
            label = _field(1, b"image/class/label") + _field(2, _field(3, _field(1, _varint(int(name[:3])))))
            example = _field(1, _field(1, image) + _field(1, label))
            size = struct.pack("<Q", len(example))
            file.write(size + _masked(size) + example + _masked(example))


def _fields(data: memoryview) -> Iterator[memoryview]:
    """Length-delimited fields of a message."""
    at = 0
    while at < len(data):
        at += 1
        length = shift = 0
        while True:
            one = data[at]
            length |= (one & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if one < 0x80:
                break
        yield data[at : at + length]
        at += length


def read_tfrecord(folder: Path) -> int:
    total = 0
    with open(folder / "set.tfrecord", "rb") as file:
        while head := file.read(12):
            example = file.read(struct.unpack("<Q", head[:8])[0])
            file.read(4)
            found = {}
            for pair in _fields(next(_fields(memoryview(example)))):
                name, feature = _fields(pair)
                found[bytes(name)] = next(_fields(next(_fields(feature))))
            total += taken(bytes(found[b"image/encoded"]))
    return total


PEERS = {
    "folder": "os.walk",
    "zip": "zipfile",
    "tar": "tarfile",
    "webdataset": "webdataset",
    "recordio": ".idx loop",
    "parquet": "pyarrow",
    "arrow": "pyarrow",
    "lmdb": "cursor",
    "hdf5": "h5py",
    "tfrecord": "frame loop",
}
OTHERS = {
    "recordio": ("mxnet-style", read_recordio_mxnet, None),
    "parquet": ("datasets", read_parquet_datasets, "datasets"),
    "arrow": ("datasets", read_arrow_datasets, "datasets"),
    "lmdb": ("get by key", read_lmdb_get, None),
}
"""Second peers, and the package that one needs."""


def compare(form: str) -> list[tuple[float, float]]:
    """Records a second of ours and of the peer: without and with digests, and where the set was listed before.

    Last, of our listing with reading once more, and of the second peer (0 where there is none).
    """
    found = []
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top, "set")
        folder.mkdir()
        name = str(folder)
        globals()[f"write_{form}"](folder)
        for HASHED[0] in (False, True):
            peer = seconds(lambda: globals()[f"read_{form}"](folder))
            found.append((COUNT / seconds(lambda: ours(name)), COUNT / peer))
        HASHED[0] = False
        kind, listing = listed(SetConfig(uri=name))
        found.append((COUNT / seconds(lambda: read_entries(kind, name, listing.entries)), found[0][1]))
        _, read, package = OTHERS.get(form, ("", None, None))
        there = read is not None and (package is None or importlib.util.find_spec(package) is not None)
        found.append((found[0][0], COUNT / seconds(lambda: read(folder)) if read is not None and there else 0.0))
    return found


def many(form: str, folder: Path) -> None:
    """A set of `ENTRIES` tiny records."""
    tiny = ((f"{at % PERSONS:03d}/{at:07d}.jpg", b"\xff\xd8\xff" + at.to_bytes(4, "little")) for at in range(ENTRIES))
    if form == "folder":
        for at in range(ENTRIES // 1000):
            os.mkdir(folder / f"{at:04d}")
        for at in range(ENTRIES):
            os.close(os.open(f"{folder}/{at % (ENTRIES // 1000):04d}/{at:07d}.jpg", os.O_CREAT | os.O_WRONLY))
    elif form == "zip":
        with zipfile.ZipFile(folder / "set.zip", "w") as archive:
            for name, data in tiny:
                archive.writestr(name, data)
    elif form == "tar":
        with open(folder / "set.tar", "wb") as file:
            for name, data in tiny:
                one = tarfile.TarInfo(name)
                one.size = len(data)
                file.write(one.tobuf(tarfile.USTAR_FORMAT) + data.ljust(512, b"\0"))
            file.write(bytes(1024))
    elif form == "recordio":
        write_recordio(folder, tiny)
    else:
        for shard in range(4):
            some = range(shard * ENTRIES // 4, (shard + 1) * ENTRIES // 4)
            rows = pa.array([{"bytes": b"\xff\xd8\xff", "path": f"{at:07d}.jpg"} for at in some], IMAGE)
            table = pa.table({"image": rows, "label": [at % PERSONS for at in some]})
            pq.write_table(table, folder / f"train-{shard:05d}-of-00004.parquet", row_group_size=1000)


def list_once(uri: str) -> None:
    """In a process of its own: list and print seconds, entries and peak memory."""
    start = time.perf_counter()
    _, listing = listed(SetConfig(uri=uri))
    count = sum(entry.error is None for entry in listing.entries)
    taken = time.perf_counter() - start
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
    print(json.dumps({"seconds": round(taken, 2), "entries": count, "peak_mb": round(peak)}))


def listing_of(form: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        many(form, Path(name))
        done = subprocess.run([sys.executable, __file__, "--list", name], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    assert found["entries"] == ENTRIES, found
    return found


def main() -> None:
    if sys.argv[1:2] == ["--list"]:
        list_once(sys.argv[2])
        return
    wanted = sys.argv[1:] or list(PEERS)
    with open("/proc/cpuinfo") as file:
        processor = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    packages = ", ".join(f"{name} {version(name)}" for name in ("pyarrow", "webdataset", "lmdb", "h5py", "numpy"))
    print(f"{processor}, one thread, Python {platform.python_version()}, {packages}")
    print(f"{COUNT:,} records of {MEAN_BYTES:,} bytes on average, files in the page cache; best of {REPEATS}")
    ratios, second, with_digests, of_reading, listings = {}, {}, {}, {}, {}
    if os.environ.get("READ") != "0":
        heads = f"{'form':>10} {'peer':>10} {'peer/s':>10} {'ours/s':>10} {'ratio':>6} {'hashed/s':>10} {'ratio':>6}"
        print(f"{heads} {'read/s':>10} {'ratio':>6}")
        for form in wanted:
            (own, peer), (hashed, peer_hashed), (read, _), (_, other) = compare(form)
            of_reading[form] = round(read / peer, 2)
            ratios[form], with_digests[form] = round(own / peer, 2), round(hashed / peer_hashed, 2)
            line = f"{form:>10} {PEERS[form]:>10} {peer:>10,.0f} {own:>10,.0f} {own / peer:>6.2f}"
            line = f"{line} {hashed:>10,.0f} {hashed / peer_hashed:>6.2f}"
            print(f"{line} {read:>10,.0f} {read / peer:>6.2f}", flush=True)
            if form in OTHERS and not other:
                print(f"{'':>10} {OTHERS[form][0]:>11} is not installed: pip install {OTHERS[form][2]}")
            elif form in OTHERS:
                second[form] = round(own / other, 2)
                print(f"{'':>10} {OTHERS[form][0]:>11} {other:>9,.0f} {own:>10,.0f} {own / other:>6.2f}", flush=True)
    if os.environ.get("LIST") != "0":
        print(f"listing {ENTRIES:,} records: seconds, and peak memory of the process")
        for form in [one for one in ("folder", "zip", "tar", "recordio", "parquet") if one in wanted]:
            listings[form] = listing_of(form)
            print(f"{form:>10} {listings[form]['seconds']:>8.1f} s {listings[form]['peak_mb']:>6.0f} MB", flush=True)
    figures = {
        "bench": "formats",
        "ratios": ratios,
        "ratios_of_second_peers": second,
        "ratios_with_digests": with_digests,
        "ratios_of_reading": of_reading,
    }
    print(json.dumps(figures | {"listings": listings, "quick": QUICK}))


if __name__ == "__main__":
    main()
