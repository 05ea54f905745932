"""Damaged files through every form's reader: `make bench-fuzz` (QUICK=1: a minute; forms can be named as arguments).

20,000 damaged copies of small valid files for each form (`tests/operators/formats/conftest.py`: `damaged`, `stands`).
Listing may refuse a set (FormatError) and reading a record may fail (OSError, a rejected row); anything else, more than
5 seconds or 256 MiB for one input, or keys that are not unique, ends the run with the input kept. Each form runs in a
process of its own, so that its peak memory is its own. The last line is JSON.

A form takes part by a function that gives its seeds, each a valid set as file names and bytes, and a line in `SEEDS`.
"""

import gzip
import io
import json
import lzma
import os
import random
import resource
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.operators.formats.conftest import damaged, stands

Seeds = list[dict[str, bytes]]

INPUTS = int(os.environ.get("INPUTS", "500" if os.environ.get("QUICK") == "1" else "20000"))
SECONDS = 5.0
NOISE = random.Random(0).randbytes(700) + bytes(300)
"""Stands for an image: readers do not decode."""


def zip_archives() -> Seeds:
    """Stored and deflated members, zip64 numbers, a comment; two archives in one folder."""
    made = {}
    for name, method in (("a.zip", zipfile.ZIP_STORED), ("b.zip", zipfile.ZIP_DEFLATED)):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as archive:
            for at in range(4):
                with archive.open(f"person {at // 2}/é{at}.jpg", "w", force_zip64=at % 2 == 1) as member:
                    member.write(NOISE)
            archive.writestr("read.me", b"text")
            archive.comment = b"a comment"
        made[name] = file.getvalue()
    return [made, {"b.zip": made["b.zip"]}]


def tar_archive(layout: int, members: dict[str, bytes]) -> bytes:
    """A plain archive, with a link at its end."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=layout) as archive:
        for name, data in members.items():
            one = tarfile.TarInfo(name)
            one.size = len(data)
            archive.addfile(one, io.BytesIO(data))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return file.getvalue()


def tar_archives() -> Seeds:
    """ustar, GNU and pax with long names, and compressed ones."""
    members = {f"person {at // 2}/{'é' * 40 * at}{at}.jpg": NOISE for at in range(4)}
    gnu, pax = tar_archive(tarfile.GNU_FORMAT, members), tar_archive(tarfile.PAX_FORMAT, members)
    ustar = tar_archive(tarfile.USTAR_FORMAT, {"a/1.jpg": NOISE, "b/2.jpg": NOISE})
    packed = [{"x.tar.gz": gzip.compress(pax)}, {"x.tar.xz": lzma.compress(ustar)}]
    return [{"x.tar": gnu}, {"x.tar": pax}, {"x.tar": ustar}, *packed]


def webdataset_shards() -> Seeds:
    """Two shards with labels and attributes, sharing a name."""
    made = {}
    for shard in range(2):
        members = {}
        for at in range(3 * shard, 3 * shard + 4):
            described = json.dumps({"age": at, "more": {"group": "é"}}).encode()
            members |= {f"{at}.jpg": NOISE, f"{at}.cls": b"7", f"{at}.json": described, f"{at}.txt": b"a face"}
        made[f"shard-{shard}.tar"] = tar_archive(tarfile.USTAR_FORMAT, members)
    return [made, {"x.tar": made["shard-1.tar"]}]


def record_file(images: int) -> tuple[bytes, bytes]:
    """MXNet RecordIO and its index: InsightFace's header record, images with one and several labels, one in parts."""
    magic, whole, index = struct.pack("<I", 0xCED7230A), b"", b""
    for at in range(images):
        image = magic + NOISE if at == 2 else NOISE
        labels = (images, images) if at == 0 else (at, 0.5)
        flag = 0 if at % 2 else 2
        data = struct.pack("<IfQQ", flag, at, at, 0) + struct.pack("<2f", *labels) * bool(flag) + image * bool(at)
        index += b"%d\t%d\n" % (at, len(whole))
        parts = data.split(magic) if at == 2 else [data]
        for n, part in enumerate(parts):
            kind = 0 if len(parts) == 1 else 3 if n == len(parts) - 1 else 1
            whole += magic + struct.pack("<I", kind << 29 | len(part)) + part + bytes(-len(part) % 4)
    return whole, index


def record_sets() -> Seeds:
    """As InsightFace and as DCFace publish them."""
    whole, index = record_file(6)
    names = b"".join(b"%d\t%d/%d.jpg\n" % (at, at // 2, at) for at in range(6))
    return [
        {"train.rec": whole, "train.idx": index, "property": b"6,112,112"},
        {"file.rec": whole, "file.idx": index, "list.txt": names},
        {"train.rec": whole, "train.lst": b"".join(b"1\t/data/%d/%d.jpg\t%d\n" % (at, at, at) for at in range(1, 6))},
    ]


def tf_records() -> Seeds:
    """Examples with an encoded image, with pixels and a shape, and with labels of each kind; an index of names."""

    def field(number: int, data: bytes) -> bytes:
        size = len(data)
        return bytes([number << 3 | 2]) + (bytes([size & 127 | 128, size >> 7]) if size > 127 else bytes([size])) + data

    def example(**features: bytes) -> bytes:
        entries = (field(1, field(1, key.encode()) + field(2, value)) for key, value in features.items())
        return field(1, b"".join(entries))

    numbers, pixels = field(3, field(1, b"\x05\x04\x03")), field(1, field(1, bytes(60)))
    messages = [
        example(
            image=field(1, field(1, b"\xff\xd8\xff" + NOISE)),
            label=field(3, field(1, b"\x07")),
            name=field(1, field(1, b"a/b")),
        ),
        example(data=pixels, shape=numbers, label=field(1, field(1, b"\1\0\0\0")), score=field(2, field(1, bytes(8)))),
    ]
    shard = with_sums(b"".join(struct.pack("<QI", len(one), 0) + one + bytes(4) for one in messages))
    at = len(messages[0]) + 16
    return [
        {"a.tfrecord": shard},
        {"S-00000.tfrecord": shard, "S.index": b"../x/1/a.jpg\t0\t0\n../x/1/b.jpg\t0\t%d\n" % at},
    ]


def with_sums(data: bytes) -> bytes:
    """A damaged TFRecord file whose checksums are right, so that damage gets further than that."""
    from google_crc32c import value

    made, at = bytearray(data), 0
    while at + 16 <= len(made):
        size = int.from_bytes(made[at : at + 8], "little")
        for begin, end in ((at, at + 8), (at + 12, at + 12 + size)):
            if end + 4 <= len(made):
                crc = value(bytes(made[begin:end]))
                made[end : end + 4] = struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
        at += 16 + size
    return bytes(made)


def lmdb_databases() -> Seeds:
    """HSFace's layout and plain images, in pages and in leaves, with a branch page."""
    import lmdb
    import msgpack

    made = {}
    for name in ("plain", "packed"):
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "a")
            with lmdb.open(str(path), subdir=False, map_size=2**24) as env, env.begin(write=True) as transaction:
                for at in range(120):
                    image = b"\xff\xd8\xff" + NOISE * (3 if at < 3 else 0) + bytes(40)
                    value = image if name == "plain" else msgpack.packb((image, at * 700))
                    transaction.put(b"%d" % at, value)
                transaction.put(b"__len__", msgpack.packb(120))
            made[name] = path.read_bytes()
    return [{"a.lmdb": made["plain"]}, {"hsface.lmdb": made["packed"]}]


def hdf5_files() -> Seeds:
    """A packed stack with labels and names, encoded images of variable length, and a group for each identity."""
    import h5py

    from operators.formats import hdf5

    hdf5.SECONDS.update(dict.fromkeys(hdf5.SECONDS, 0.5))  # some damage makes libhdf5 hang: it ends its child
    pixels = np.frombuffer(NOISE[:960], np.uint8).reshape(5, 8, 8, 3)
    stacks, groups = io.BytesIO(), io.BytesIO()
    with h5py.File(stacks, "w") as file:
        file.create_dataset(
            "images", data=pixels, chunks=(2, 8, 8, 3), compression="gzip", shuffle=True, fletcher32=True
        )
        file["labels"], file["names"] = np.arange(5), [f"{at}.png" for at in range(5)]
    with h5py.File(groups, "w", libver="latest") as file:
        images = file.create_dataset("jpeg", (3,), h5py.vlen_dtype(np.uint8))
        images[:] = [np.frombuffer(b"\xff\xd8\xff" + NOISE, np.uint8)] * 3
        for at in range(3):
            file[f"0000{at}/reference/image"] = pixels[at]
            file[f"0000{at}"].attrs["age"] = at
    return [{"a.h5": stacks.getvalue()}, {"b.h5": groups.getvalue()}]


def image_table() -> pa.Table:
    """A Hugging Face image dataset of six rows."""
    rows = [{"bytes": b"\xff\xd8\xff" + NOISE[:400] + bytes([at]), "path": f"é{at}.jpg"} for at in range(6)]
    columns = {
        "image": pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        "label": [at % 3 for at in range(6)],
        "group": ["a", "b"] * 3,
        "age": [1.5] * 6,
    }
    features = {"image": {"_type": "Image"}, "label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}
    return pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def parquet_file(table: pa.Table, **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


def arrow_file(new: Callable[..., Any], table: pa.Table, codec: str | None = None) -> bytes:
    file = io.BytesIO()
    with new(file, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_table(table, 3)
    return file.getvalue()


def parquet_files() -> Seeds:
    """Each compression, both versions of pages, with and without dictionaries."""
    several: list[dict[str, Any]] = [
        {},
        {"compression": "zstd", "data_page_version": "2.0", "row_group_size": 3},
        {"use_dictionary": False, "compression": "none"},
        *({"compression": name} for name in ("gzip", "lz4", "brotli")),
    ]
    return [{"x.parquet": parquet_file(image_table(), **options)} for options in several]


def arrow_files() -> Seeds:
    """Files and streams, plain and compressed."""
    kinds = [(pa.ipc.new_stream, None), (pa.ipc.new_file, None), (pa.ipc.new_file, "zstd"), (pa.ipc.new_stream, "lz4")]
    return [{"x.arrow": arrow_file(new, image_table(), codec)} for new, codec in kinds]


def vector_files() -> Seeds:
    """Ready embeddings in each kind of file."""
    made_ND = np.random.default_rng(0).standard_normal((6, 32)).astype("f4")
    plain, stored, packed = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.save(plain, made_ND)
    np.savez(stored, emb=made_ND, paths=np.array(list("abcdef")))
    np.savez_compressed(packed, emb=made_ND, paths=np.array(list("abcdef")))
    table = pa.table({"path": list("abcdef"), "embedding": list(made_ND)})
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(made_ND.ravel()), 32)
    lines = [{"identity": "a", "image_name": f"{at}.jpg", "embedding": one.tolist()} for at, one in enumerate(made_ND)]
    return [
        {"e.npy": plain.getvalue()},
        {"e.npz": stored.getvalue()},
        {"e.npz": packed.getvalue()},
        {"e.parquet": parquet_file(table, row_group_size=3)},
        {"e.arrow": arrow_file(pa.ipc.new_stream, table)},
        {"e.arrow": arrow_file(pa.ipc.new_file, table.set_column(1, "embedding", fixed), "lz4")},
        {"e.json": b"".join(json.dumps(one).encode() + b"\n" for one in lines)},
    ]


SEEDS: dict[str, Callable[[], Seeds]] = {
    "recordio": record_sets,
    "tfrecord": tf_records,
    "lmdb": lmdb_databases,
    "hdf5": hdf5_files,
    "zip": zip_archives,
    "tar": tar_archives,
    "webdataset": webdataset_shards,
    "parquet": parquet_files,
    "arrow": arrow_files,
    "vectors": vector_files,
}

OPTIONS: dict[str, dict[str, object]] = {
    "webdataset": {"attributes": ["age", "more.group"]},
    "parquet": {"attributes": ["group", "age"]},
    "arrow": {"attributes": ["group", "age"]},
}
"""Options of the set (`SetConfig`) for forms that need some to do all their work."""


def with_checksums(data: bytes) -> bytes:
    """A damaged tar archive whose headers have right checksums, so that damage gets further than that."""
    made = bytearray(data)
    for at in range(0, len(made) - 511, 512):
        if made[at + 257 : at + 262] == b"ustar":
            total = sum(made[at : at + 148]) + 8 * 32 + sum(made[at + 156 : at + 512])
            made[at + 148 : at + 156] = b"%06o\0 " % total
    return bytes(made)


REPAIRS: dict[str, Callable[[bytes], bytes]] = {
    "tfrecord": with_sums,
    "tar": with_checksums,
    "webdataset": with_checksums,
}
"""Applied to every second input of forms whose checksums would hide the rest."""


def fuzz(form: str) -> dict[str, float]:
    """Figures of one form."""
    seeds = SEEDS[form]()
    files = [(at, name) for at, seed in enumerate(seeds) for name in seed]
    figures: dict[str, float] = {"inputs": 0, "refused": 0, "rows": 0, "rejected": 0, "read": 0, "worst_s": 0.0}
    pa.array([0])  # the first array looks for pandas, which takes seconds on a busy machine
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        for number, (at, name) in enumerate(files):
            folder = Path(scratch, str(number))
            folder.mkdir()
            for other, data in seeds[at].items():
                (folder / other).write_bytes(data)
            stands(form, folder, SECONDS, **OPTIONS.get(form, {}))
            share = INPUTS // len(files) + (number < INPUTS % len(files))
            for turn, data in enumerate(damaged(seeds[at][name], number, share)):
                if turn % 2 and form in REPAIRS:
                    data = REPAIRS[form](data)
                (folder / name).write_bytes(data)
                try:
                    outcome = stands(form, folder, SECONDS, **OPTIONS.get(form, {}))
                except BaseException:
                    kept = Path(tempfile.mkdtemp(prefix="fuzz-"), name)
                    kept.write_bytes(data)
                    print(f"{form}: input kept as {kept}", file=sys.stderr)
                    raise
                figures["inputs"] += 1
                figures["refused"] += outcome.refused is not None
                figures["rows"] += outcome.listed
                figures["rejected"] += outcome.rejected
                figures["read"] += outcome.read
                figures["worst_s"] = max(figures["worst_s"], round(outcome.seconds, 3))
    figures["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    figures["grown_mb"] = figures["peak_rss_mb"] - base // 1024
    figures["seconds"] = round(time.perf_counter() - start, 1)
    return figures


def main() -> int:
    """All forms, or those named; 1 if one did not stand."""
    if len(sys.argv) == 3 and sys.argv[1] == "--only":
        print(json.dumps(fuzz(sys.argv[2])))
        return 0
    results, failed = {}, []
    for form in sys.argv[1:] or list(SEEDS):
        done = subprocess.run([sys.executable, __file__, "--only", form], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            failed.append(form)
            continue
        results[form] = json.loads(done.stdout.splitlines()[-1])
        if len(results) == 1:
            print("form".ljust(12), *(name.rjust(11) for name in results[form]))
        print(form.ljust(12), *(f"{value:,}".rjust(11) for value in results[form].values()), flush=True)
    print(json.dumps({"bench": "fuzz_formats", "failed": failed, "forms": results}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
