"""Records in one piece: the bytes of the stream, bounded, whether records are read in order or not."""

import hashlib
import io
import random
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from operators.formats import SetConfig, listed, reader
from operators.formats.folder import FolderReader
from operators.formats.reading import AHEAD, GAP, Reader
from operators.sources import LocalSource

DATA = random.Random(0).randbytes(3 * AHEAD)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Reader]:
    (tmp_path / "x").write_bytes(DATA)
    (tmp_path / "y").write_bytes(DATA[::-1])
    with FolderReader(LocalSource(str(tmp_path))) as made:
        yield made


def test_ranges_in_order_and_not_are_those_of_the_file(opened: Reader) -> None:
    rng = random.Random(1)
    at = 0
    for _ in range(3000):
        if rng.random() < 0.1:
            at = rng.randrange(len(DATA))
        size = rng.choice((0, 1, 100, 5000, AHEAD + 1))
        name = rng.choice("xxxxy")
        whole = DATA if name == "x" else DATA[::-1]
        if at + size > len(DATA):
            with pytest.raises(OSError, match="truncated"):
                opened.ahead(opened.held(name), at, size)
            at = 0
            continue
        assert opened.ahead(opened.held(name), at, size) == whole[at : at + size]
        at = min(at + size + rng.choice((0, GAP, GAP + 1)), len(DATA))


def test_nothing_is_read_ahead_where_records_are_not_in_order(opened: Reader) -> None:
    class Counting(io.BytesIO):
        taken = 0

        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            Counting.taken += len(data)
            return data

    file = Counting(DATA)
    for at in range(2 * AHEAD, 0, -20_000):
        opened.ahead(file, at, 100)
    assert Counting.taken == 100 * len(range(2 * AHEAD, 0, -20_000))


def test_records_are_the_same_in_any_order(tmp_path: Path) -> None:
    images = {f"{at}.jpg": random.Random(at).randbytes(3000 + at) for at in range(40)}
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in images.items():
            one = tarfile.TarInfo(name)
            one.size = len(data)
            archive.addfile(one, io.BytesIO(data))
    form, listing = listed(SetConfig(uri=str(tmp_path)))
    entries = list(listing.entries)
    for order in (entries, entries[::-1], random.Random(2).sample(entries, len(entries))):
        with reader(form, str(tmp_path)) as opened:
            for entry in order:
                assert opened.read(str(entry.place), None, 2**20) == images[entry.key]
                assert opened.read(str(entry.place), None, 99) == images[entry.key][:100]


def test_a_record_that_was_replaced_is_not_taken_for_the_one_listed(tmp_path: Path) -> None:
    def record(data: bytes) -> bytes:
        body = struct.pack("<IfQQ", 0, 1.0, 1, 0) + data
        return struct.pack("<II", 0xCED7230A, len(body)) + body + bytes(-len(body) % 4)

    (tmp_path / "a.rec").write_bytes(record(b"\xff\xd8\xff one") + record(b"\xff\xd8\xff two"))
    form, listing = listed(SetConfig(uri=str(tmp_path)))
    (tmp_path / "a.rec").write_bytes(record(b"\xff\xd8\xff longer than the first") + record(b"two"))
    first, second = (str(entry.place) for entry in listing.entries)
    with reader(form, str(tmp_path)) as opened:
        assert opened.read(first, None, 2**20) == b"\xff\xd8\xff longer than the first"
        with pytest.raises(OSError, match="no record begins"):
            opened.read(second, None, 2**20)


def test_a_damaged_row_of_a_stack_does_not_take_its_neighbours_with_it(tmp_path: Path) -> None:
    import h5py
    import numpy as np

    pixels = np.random.default_rng(0).integers(0, 256, (9, 20, 20), dtype=np.uint8)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        made = file.create_dataset("images", data=pixels, chunks=(1, 20, 20), fletcher32=True)
        at = made.id.get_chunk_info(5).byte_offset
    damaged = bytearray((tmp_path / "a.h5").read_bytes())
    damaged[at + 7] ^= 1
    (tmp_path / "a.h5").write_bytes(damaged)
    form, listing = listed(SetConfig(uri=str(tmp_path)))
    found = []
    with reader(form, str(tmp_path)) as opened:
        for entry in listing.entries:
            try:
                found.append(hashlib.sha256(opened.read(str(entry.place), None, 2**20)).hexdigest())
            except OSError:
                found.append("")
    whole = [hashlib.sha256(b"P5\n20 20\n255\n" + one.tobytes()).hexdigest() for one in pixels]
    assert found == [*whole[:5], "", *whole[6:]]
