"""Listings kept as columns: their entries, their slices, and their records many at a time and one by one."""

import random
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from operators.formats import SetConfig, SourceLimits, listed, reader
from operators.formats.listing import Part, name_fault, part_of
from operators.formats.naming import plain, tidied
from operators.formats.spans import Ranges, Spans

MAGIC = struct.pack("<I", 0xCED7230A)


def records(path: Path, images: list[bytes]) -> list[int]:
    """A RecordIO file in which every image lies in one part; where its records begin."""
    offsets, whole = [], b""
    for at, image in enumerate(images):
        data = struct.pack("<IfQQ", 0, at % 7, at, 0) + image
        offsets.append(len(whole))
        whole += MAGIC + struct.pack("<I", len(data)) + data + bytes(-len(data) % 4)
    path.write_bytes(whole)
    return offsets


def spans(names: list[str], labels: "list[str | None] | None" = None, **options: object) -> Spans:
    size = np.arange(1, len(names) + 1)
    made = Spans("here", SetConfig(uri="here", **options))  # type: ignore[arg-type]
    ranges = Ranges("a.bin", size * 100, size * 100 + size, size * 100, size)
    made.add(ranges, pa.array(names, pa.large_string()), pa.array(labels or [None] * len(names), pa.large_string()))
    return made.settle()


def test_entries_say_what_was_added() -> None:
    found = spans(["x/1.jpg", "x/2.jpg", "3.jpg"], [None, "ann", None])
    assert [(e.key, e.identity, e.bytes, e.place, e.error) for e in found] == [
        ("x/1.jpg", "x", 1, '["a.bin",100,1]', None),
        ("x/2.jpg", "ann", 2, '["a.bin",200,2]', None),
        ("3.jpg", None, 3, '["a.bin",300,3]', None),
    ]


def test_slices_are_those_of_a_list() -> None:
    found = spans([f"{at}.jpg" for at in range(20)])
    keys = [entry.key for entry in found]
    for some in (slice(3, 9), slice(None), slice(-4, None), slice(9, 3), slice(None, None, -3), slice(2, 99, 5)):
        assert [entry.key for entry in found[some]] == keys[some]
        assert [entry.key for entry in found[2:18][some]] == keys[2:18][some]
    assert (found[-1].key, found[4:][-1].key, found[4:][0].key) == (keys[-1], keys[-1], keys[4])
    assert isinstance(found[3:9], Part)
    assert part_of([found[0]]) is None
    for outside in (20, -21):
        with pytest.raises(IndexError):
            found[outside]


def test_copies_of_names_bad_names_and_large_records_are_rejected_rows() -> None:
    found = spans(["a", "b", "a", "a (2)", "../c", "a", "e" * 9], limits=SourceLimits(max_member_bytes=6))
    assert [e.key for e in found] == ["a", "b", "a (2)", "a (2) (2)", "../c", "a (3)", "e" * 9]
    assert [e.error is None for e in found] == [True, True, False, False, False, False, False]
    assert "limits.max_member_bytes" in str(found[6].error)


@pytest.mark.parametrize("count", [1, 70, 700])
def test_records_read_at_once_are_those_read_one_by_one(tmp_path: Path, count: int) -> None:
    rng = random.Random(count)
    images = [rng.randbytes(rng.choice((0, 1, 3, 500, 4000))) for _ in range(count)]
    records(tmp_path / "train.rec", images)
    form, listing = listed(SetConfig(uri=str(tmp_path)))
    entries = listing.entries
    some = sorted(rng.sample(range(count), count // 3))
    with reader(form, str(tmp_path)) as opened:
        assert [bytes(one) for one in opened.each(entries, 2**20)] == images  # type: ignore[arg-type]
        assert [bytes(one) for one in opened.each(entries[count // 3 :], 2**20)] == images[count // 3 :]  # type: ignore[arg-type]
        assert [bytes(one) for one in opened.each([entries[at] for at in some], 2**20)] == [images[at] for at in some]  # type: ignore[arg-type]
        assert [bytes(one) for one in opened.each(entries, 100)] == [image[:101] for image in images]  # type: ignore[arg-type]


def test_a_file_that_changed_after_listing_costs_the_records_that_changed(tmp_path: Path) -> None:
    images = [bytes([at]) * 300 for at in range(200)]
    offsets = records(tmp_path / "train.rec", images)
    form, listing = listed(SetConfig(uri=str(tmp_path)))
    whole = bytearray((tmp_path / "train.rec").read_bytes())
    whole[offsets[50] + 1] ^= 1
    whole[offsets[90] + 4] ^= 8
    (tmp_path / "train.rec").write_bytes(whole[: offsets[199]])
    with reader(form, str(tmp_path)) as opened:
        found = list(opened.each(listing.entries, 2**20))
    assert [at for at, one in enumerate(found) if isinstance(one, OSError)] == [50, 199]
    assert [bytes(one) for at, one in enumerate(found) if at not in (50, 90, 199)] == [  # type: ignore[arg-type]
        one for at, one in enumerate(images) if at not in (50, 90, 199)
    ]


def test_a_file_that_is_gone_costs_its_records_only(tmp_path: Path) -> None:
    for name in "ab":
        records(tmp_path / f"{name}.rec", [name.encode() * 9] * 5)
    form, listing = listed(SetConfig(uri=str(tmp_path)))
    (tmp_path / "a.rec").unlink()
    with reader(form, str(tmp_path)) as opened:
        found = list(opened.each(listing.entries, 100))
    assert [isinstance(one, OSError) for one in found] == [True] * 5 + [False] * 5


@given(st.lists(st.text(alphabet="ab/.\\~:\x01\x7fé ", max_size=6), min_size=1, max_size=4))
def test_names_that_pass_the_quick_test_have_no_fault(names: list[str]) -> None:
    made = pa.chunked_array([pa.array(["zz", *names], pa.large_string()).slice(1)])
    if plain(made):
        assert all(name_fault(name) is None for name in names)
        assert not any(name.startswith(("/", ".", "~")) or name[1:2] == ":" for name in names)
        assert tidied(made).to_pylist() == names
    assert plain(pa.chunked_array([pa.array(["ab/cd.jpg", "x.y.png"], pa.large_string())]))
