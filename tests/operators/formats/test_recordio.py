"""RecordIO: files of MXNet's own writer and of one written here from the published layout, read back byte for byte."""

import io
import json
import math
import random
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.errors import FormatError
from operators.formats import SetConfig, SourceLimits, dmlc, recordio, recordscan
from operators.formats.indexes import Offsets, offsets
from operators.formats.listing import Bound, Entry, Listing
from operators.sources import LocalSource

MAGIC = struct.pack("<I", 0xCED7230A)
JPEG = b"\xff\xd8\xff\xe0 an image"

# Written by MXRecordIOWriterWriteRecord of MXNet 1.9.1: InsightFace's header record, three images, two identities.
BY_MXNET = bytes.fromhex(
    "0a23d7ce20000000020000000000000000000000000000000000000000000000000080400000c0400a23d7ce1c000020000000000000e040"
    "01000000000000000000000000000000616263640a23d7ce0700006065660a23d7ce67000a23d7ce18000020000000000000004102000000"
    "0000000000000000000000000a23d7ce000000400a23d7ce050000607461696c350000000a23d7ce27000000030000000000000003000000"
    "000000000000000000000000000010410000003f000080bf78797a000a23d7ce200000000200000000000000040000000000000000000000"
    "000000000000803f000000400a23d7ce200000000200000000000000050000000000000000000000000000000000004000008040"
)
MXNET_IMAGES = {"7/1.jpg": b"abcd" + MAGIC + b"ef" + MAGIC + b"g", "8/2.jpg": MAGIC * 2 + b"tail5", "9/3.jpg": b"xyz"}


def header(label: float, number: int, flag: int = 0, *more: float) -> bytes:
    return struct.pack(f"<IfQQ{len(more)}f", flag, label, number, 0, *more)


def record(data: bytes) -> bytes:
    """dmlc-core's recordio.h: cut at every magic that begins at a multiple of 4, flags 1, 2..., 3, or 0 if uncut."""
    cuts = [at for at in range(0, len(data) // 4 * 4, 4) if data[at : at + 4] == MAGIC]
    begins, ends = [0, *(at + 4 for at in cuts)], [*cuts, len(data)]
    made = b""
    for n, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        flag = 0 if not cuts else 1 if n == 0 else 3 if n == len(cuts) else 2
        part = data[begin:end]
        made += MAGIC + struct.pack("<I", flag << 29 | len(part)) + part + bytes(-len(part) % 4)
    return made


def put(folder: Path, records: list[bytes], stem: str = "train", index: list[int] | None = None) -> list[int]:
    """A record file, and its index if numbers are given; the offsets of the records."""
    offsets, whole = [], b""
    for one in records:
        offsets.append(len(whole))
        whole += record(one)
    (folder / f"{stem}.rec").write_bytes(whole)
    if index is not None:
        (folder / f"{stem}.idx").write_text("".join(f"{n}\t{at}\n" for n, at in zip(index, offsets, strict=True)))
    return offsets


def listed(uri: Path, **options: Any) -> Listing:
    return recordio.listing(LocalSource(str(uri)), SetConfig(uri=str(uri), **options))


def read(uri: Path, entries: "list[Entry] | Any") -> dict[str, bytes]:
    found = {}
    with recordio.RecordReader(LocalSource(str(uri))) as opened:
        for entry in entries:
            if entry.error is None:
                with opened.open(entry.place) as file:
                    found[entry.key] = file.read()
    return found


def faults(listing: Listing) -> dict[str, str]:
    return {entry.key: entry.error for entry in listing.entries if entry.error is not None}


def test_a_file_of_mxnets_own_writer_is_read_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "train.rec").write_bytes(BY_MXNET)
    found = listed(tmp_path)
    assert read(tmp_path, found.entries) == MXNET_IMAGES
    assert {e.key: (e.identity, e.bytes) for e in found.entries} == {
        key: (key[0], len(data)) for key, data in MXNET_IMAGES.items()
    }
    assert found.unlisted == {"header or identity record": 3}
    assert found.notes == []


def test_the_writer_of_these_tests_writes_what_mxnet_writes() -> None:
    records = [
        header(0, 0, 2, 4, 6),
        header(7, 1) + MXNET_IMAGES["7/1.jpg"],
        header(8, 2) + MXNET_IMAGES["8/2.jpg"],
        header(0, 3, 3, 9, 0.5, -1) + b"xyz",
        header(0, 4, 2, 1, 2),
        header(0, 5, 2, 2, 4),
    ]
    assert b"".join(map(record, records)) == BY_MXNET


def test_the_index_gives_the_numbers_and_a_single_file_finds_it(tmp_path: Path) -> None:
    put(tmp_path, [header(3, 0) + JPEG, header(3, 0) + JPEG, header(4, 0) + JPEG], index=[10, 20, 30])
    for uri in (tmp_path, tmp_path / "train.rec"):
        assert [e.key for e in listed(uri).entries] == ["3/10.jpg", "3/20.jpg", "4/30.jpg"]
    (tmp_path / "train.idx").unlink()
    assert [e.key for e in listed(tmp_path).entries] == ["3/0.jpg", "3/1.jpg", "4/2.jpg"]


def test_dcface_has_its_identities_in_the_paths_of_list_txt(tmp_path: Path) -> None:
    put(tmp_path, [header(0, n) + JPEG + bytes([n]) for n in range(4)], "file", index=[0, 1, 2, 3])
    (tmp_path / "list.txt").write_text("0\t0/0.jpg\n1\t0/1.jpg\n2\t1/0.jpg\n3\t1/1.jpg\n")
    (tmp_path / "done_list.txt").write_text("image\tx\n")
    found = listed(tmp_path)
    assert {e.key: e.identity for e in found.entries} == {
        "0/0.jpg": "0",
        "0/1.jpg": "0",
        "1/0.jpg": "1",
        "1/1.jpg": "1",
    }
    assert read(tmp_path, found.entries)["1/0.jpg"] == JPEG + b"\2"
    assert found.unlisted == {".txt": 1}


def test_a_label_in_list_txt_counts_more_than_the_header(tmp_path: Path) -> None:
    put(tmp_path, [header(0, 0) + JPEG, header(1, 1) + JPEG], "file")
    (tmp_path / "list.txt").write_text("0\ta/0.jpg\tann\n1\tb/0.jpg\tben\n")
    assert [(e.key, e.identity) for e in listed(tmp_path).entries] == [("a/0.jpg", "ann"), ("b/0.jpg", "ben")]


@pytest.mark.parametrize(
    "lst",
    [
        "1\t/data/faces/0/1.jpg\t0\n1\t/data/faces/7/2.jpg\t7\n",  # InsightFace: flag, path, label; numbered by line
        "1\t0.000000\t0/1.jpg\n2\t7.000000\t7/2.jpg\n",  # MXNet's im2rec: number, label, path
        "1\t0\t1.5\t2.5\t0/1.jpg\n2\t7\t3.5\t4.5\t7/2.jpg\n",  # the same with several labels
        "1\t../x/0/1.jpg\n2\t../x/7/2.jpg\n",
    ],
)
def test_lst_files_of_every_kind_name_the_records(tmp_path: Path, lst: str) -> None:
    put(tmp_path, [header(0, 0, 2, 3, 3), header(0, 1) + JPEG, header(7, 2) + JPEG])
    (tmp_path / "train.lst").write_text(lst)
    found = listed(tmp_path)
    assert [(e.key, e.identity, e.error) for e in found.entries] == [("0/1.jpg", "0", None), ("7/2.jpg", "7", None)]
    assert found.unlisted == {"header or identity record": 1}


def test_labels_are_whole_numbers_where_they_can_be(tmp_path: Path) -> None:
    labels = [5.0, 0.25, -1.0, math.nan, math.inf]
    put(tmp_path, [header(label, n) + JPEG for n, label in enumerate(labels)])
    assert [e.identity for e in listed(tmp_path, identity="label").entries] == ["5", "0.25", "-1", None, None]


def test_several_labels_are_attributes(tmp_path: Path) -> None:
    put(tmp_path, [header(0, 0, 3, 5, 0.5, 30) + JPEG, header(0, 1, 3, 6, 1, 40) + JPEG])
    found = listed(tmp_path, attributes=["label_2"])
    assert [(e.identity, e.attributes) for e in found.entries] == [("5", {"label_2": "30"}), ("6", {"label_2": "40"})]
    assert [e.identity for e in listed(tmp_path, identity="attribute:label_1").entries] == ["0.5", "1"]
    assert [e.attributes for e in listed(tmp_path).entries] == [None, None]


def test_several_files_are_told_apart_by_their_names(tmp_path: Path) -> None:
    put(tmp_path, [header(1, 0) + JPEG], "a")
    put(tmp_path, [header(1, 0) + JPEG], "b")
    assert [e.key for e in listed(tmp_path).entries] == ["a/1/0.jpg", "b/1/0.jpg"]


@pytest.mark.parametrize("left", [1, 4, 7, 8, 20, 31, 32, 40])
def test_a_truncated_file_ends_in_a_rejected_row(tmp_path: Path, left: int) -> None:
    offsets = put(tmp_path, [header(1, n) + JPEG for n in range(3)])
    whole = (tmp_path / "train.rec").read_bytes()
    (tmp_path / "train.rec").write_bytes(whole[: offsets[2] + left])
    found = listed(tmp_path)
    assert len(read(tmp_path, found.entries)) == 2
    assert list(faults(found)) == ["2.jpg"]
    assert "truncated; get the file again" in faults(found)["2.jpg"]


def test_records_that_the_index_names_and_the_file_lost_are_rejected_rows(tmp_path: Path) -> None:
    offsets = put(tmp_path, [header(1, n) + JPEG for n in range(4)], index=[0, 1, 2, 3])
    whole = (tmp_path / "train.rec").read_bytes()
    (tmp_path / "train.rec").write_bytes(whole[: offsets[2]])
    found = listed(tmp_path)
    assert list(read(tmp_path, found.entries)) == ["1/0.jpg", "1/1.jpg"]
    assert list(faults(found)) == ["2.jpg", "3.jpg"]
    assert "where none begins; get the file again" in faults(found)["3.jpg"]


@pytest.mark.parametrize("at", [0, 4, 5, 8])
def test_a_damaged_record_costs_itself_only(tmp_path: Path, at: int) -> None:
    offsets = put(tmp_path, [header(1, n) + JPEG * 3 for n in range(5)], index=[0, 1, 2, 3, 4])
    whole = bytearray((tmp_path / "train.rec").read_bytes())
    whole[offsets[2] + at : offsets[2] + at + 4] = b"\xff\xff\xff\xff"
    (tmp_path / "train.rec").write_bytes(whole)
    found = listed(tmp_path)
    assert list(read(tmp_path, found.entries)) == [f"1/{n}.jpg" for n in (0, 1, 3, 4)]
    assert list(faults(found)) == ["2.jpg"]


def test_a_header_or_property_that_does_not_fit_is_said(tmp_path: Path) -> None:
    put(tmp_path, [header(0, 0, 2, 9, 11), header(1, 1) + JPEG])
    (tmp_path / "property").write_text("85742,112,112")
    notes = listed(tmp_path).notes
    assert notes[0] == "train.rec announces 8 images in its header record and holds 1"
    assert notes[1] == "property announces 85,742 identities and train.rec holds 1"


@pytest.mark.parametrize(
    ("name", "text"),
    [("train.idx", "0\t0\n1\n"), ("train.idx", "0\tx\n"), ("train.idx", "0 " * 70000), ("train.lst", "a\tb\n"),
     ("train.lst", "5\n"), ("list.txt", "0\t\n")],
)  # fmt: skip
def test_a_damaged_index_or_list_is_refused_by_line(tmp_path: Path, name: str, text: str) -> None:
    put(tmp_path, [header(1, 0) + JPEG])
    (tmp_path / name).write_text(text)
    with pytest.raises(FormatError, match=rf"{name}.*(get|Get)"):
        listed(tmp_path)


def test_bad_and_repeated_names_are_rejected_rows(tmp_path: Path) -> None:
    put(tmp_path, [header(1, n) + JPEG for n in range(5)])
    (tmp_path / "list.txt").write_text("0\ta/1.jpg\n1\ta/../../b.jpg\n2\ta/1.jpg\n3\ta/1.jpg\n4\tb\\c\n")
    found = listed(tmp_path)
    assert [e.key for e in found.entries] == ["a/1.jpg", "a/../../b.jpg", "a/1.jpg (2)", "a/1.jpg (3)", "b\\c"]
    assert [e.error is None for e in found.entries] == [True, False, False, False, False]


def test_limits_hold_for_sizes_parts_and_labels(tmp_path: Path) -> None:
    bomb = MAGIC + struct.pack("<I", 1 << 29) + (MAGIC + struct.pack("<I", 2 << 29)) * 2000
    greedy = record(header(0, 1, 2**30) + JPEG)
    (tmp_path / "train.rec").write_bytes(record(header(1, 0) + JPEG) + bomb + greedy + record(header(1, 2) + bytes(99)))
    found = listed(tmp_path, limits=SourceLimits(max_member_bytes=50))
    assert [e.key for e in found.entries if e.error is None] == ["1/0.jpg"]
    assert any("too many" in fault for fault in faults(found).values())
    assert any("claims 1,073,741,824 labels" in fault for fault in faults(found).values())
    assert any("limits.max_member_bytes" in fault for fault in faults(found).values())


@pytest.mark.parametrize("length", [0, 4])
def test_records_too_short_for_an_image_at_the_end_are_rejected_rows(tmp_path: Path, length: int) -> None:
    empty = MAGIC + struct.pack("<I", length) + bytes(length)
    (tmp_path / "train.rec").write_bytes(record(header(1, 0) + JPEG) + empty * 3)
    found = listed(tmp_path)
    assert [e.key for e in found.entries if e.error is None] == ["1/0.jpg"] and len(faults(found)) == 3
    assert all("too short" in fault for fault in faults(found).values())


@pytest.mark.parametrize("indexed", [False, True])
def test_a_file_of_nothing_is_not_looked_through_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indexed: bool
) -> None:
    """Records too short for an image, and an index of places where none begins: faults are kept up to the limit."""
    image = record(header(1.0, 0) + JPEG)
    whole = image * 3 + (b"" if indexed else record(b"") * 20_000)
    nothing = range(len(image) * 3, len(image) * 3 + 20_000 * 4, 4)
    starts = np.array([*range(0, len(image) * 3, len(image)), *nothing] if indexed else [], np.int64)
    index = Offsets(starts=starts, indices=np.arange(len(starts)))
    for bound, said, kept in (
        (Bound("set", 500), r"^set: more than 500 records; raise limits\.max_records", 498),
        (Bound("set", 600, before=100), "more than 600 records", 498),
        (Bound("set", 10**8), r"1,004 records cannot be read and 3 can \(the", 1004),
    ):
        found = recordscan.Found()
        with monkeypatch.context() as patched, pytest.raises(FormatError, match=said):
            patched.setattr("operators.formats.listing.MOST_FAULTS", 1000)
            patched.setattr("operators.formats.recordscan.Found", partial(iter([found]).__next__))
            recordscan.scan(io.BytesIO(whole), len(whole), index, False, bound)
        assert (found.images, len(found.faults)) == (3, kept)
    (tmp_path / "train.rec").write_bytes(image * 3 + record(b"") * 600)
    assert len(faults(listed(tmp_path, limits=SourceLimits(max_records=603)))) == 600
    with pytest.raises(FormatError, match="more than 602 records"):
        listed(tmp_path, limits=SourceLimits(max_records=602))
    monkeypatch.setattr("operators.formats.listing.MOST_FAULTS", 1000)
    (tmp_path / "val.rec").write_bytes(record(b"") * 600)  # the limit is of the set, and not of each file
    with pytest.raises(FormatError, match="1,004 records cannot be read and 3 can"):
        listed(tmp_path)
    (tmp_path / "train.rec").write_bytes(image * 600)
    (tmp_path / "val.rec").write_bytes(record(b"") * 1600)
    assert len(faults(listed(tmp_path))) == 1600


def test_the_next_record_is_found_by_reads_as_small_as_it_is_near() -> None:
    class Counting(io.BytesIO):
        taken = 0

        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            self.taken += len(data)
            return data

    word = MAGIC + bytes(4)
    near, far = Counting(word * 2 + bytes(2**21)), Counting(bytes(3 * 2**20 + 4) + word)
    assert dmlc.next_record(near, 4, 2**21) == 8 and near.taken < 2**14  # type: ignore[arg-type]
    assert dmlc.next_record(far, 0, 3 * 2**20 + 12) == 3 * 2**20 + 4  # type: ignore[arg-type]


def test_a_file_that_changed_after_listing_is_an_os_error(tmp_path: Path) -> None:
    put(tmp_path, [header(1, n) + JPEG for n in range(2)])
    place = str(listed(tmp_path).entries[1].place)
    assert json.loads(place)[0] == "train.rec"
    put(tmp_path, [header(1, 0) + JPEG * 2])
    with (
        recordio.RecordReader(LocalSource(str(tmp_path))) as opened,
        pytest.raises(OSError, match=r"no record|truncated"),
    ):
        opened.open(place)


def test_recognised_by_content(tmp_path: Path) -> None:
    def recognised(uri: Path) -> bool:
        source = LocalSource(str(uri))
        return recordio.recognises(source, list(source.files()))

    for name, data in (
        ("a.rec", b""),
        ("b.rec", b"\x0a\x23"),
        ("c.rec", b"no record"),
        ("d.txt", record(header(0, 0))),
    ):
        (tmp_path / name).write_bytes(data)
    assert not recognised(tmp_path)
    assert recognised(tmp_path / "d.txt")
    put(tmp_path, [header(1, 0) + JPEG])
    assert recognised(tmp_path)


@pytest.mark.parametrize("indexed", [True, False])
def test_many_records_of_every_kind_one_after_another(tmp_path: Path, indexed: bool) -> None:
    rng = random.Random(0)
    images, records = {}, [header(0, 0, 2, 1000, 1003)]
    for at in range(1, 1000):
        image = b"\xff\xd8\xff" + rng.randbytes(rng.randrange(60)) + (MAGIC * 2 + b"xyz" if at % 130 == 0 else b"")
        several = at % 3 == 0
        records.append((header(99, at, 2, at % 50, 0.5) if several else header(at % 50, at)) + image)
        images[f"{at % 50}/{at}.jpg"] = image
    records += [header(0, 1000 + at, 2, at, at) for at in range(3)]
    offsets = put(tmp_path, records, index=list(range(len(records))) if indexed else None)
    found = listed(tmp_path)
    assert read(tmp_path, found.entries) == images
    assert [entry.identity for entry in found.entries] == [key.split("/")[0] for key in images]
    assert (found.unlisted, found.notes) == ({"header or identity record": 4}, [])
    whole = bytearray((tmp_path / "train.rec").read_bytes())
    for at in (100, 101, 500):
        whole[offsets[at]] ^= 1
    (tmp_path / "train.rec").write_bytes(whole)
    again = listed(tmp_path)
    left = [image for key, image in images.items() if key not in ("0/100.jpg", "1/101.jpg", "0/500.jpg")]
    assert list(read(tmp_path, again.entries).values()) == left
    assert len(faults(again)) == 2 + indexed  # without an index, two that touch are one gap


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no `\.rec` file"):
        listed(tmp_path)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from([MAGIC, b"a", b"bc", b"", MAGIC[:2]]), max_size=9).map(b"".join), max_size=4))
def test_any_data_with_the_magic_inside_come_back(
    tmp_path_factory: pytest.TempPathFactory, images: list[bytes]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    put(folder, [header(n, n) + data for n, data in enumerate(images)])
    found = listed(folder)
    assert read(folder, found.entries) == {f"{n}/{n}.jpg": data for n, data in enumerate(images)}
    assert [e.bytes for e in found.entries] == [len(data) for data in images]


@pytest.mark.parametrize(("text", "line"), [(b"0\t0\n1\t40\n2\t692\n2", 4), (b"0\t0\n1\n2\t92\n", 2), (b"0\t0\n\n", 2)])
def test_a_line_of_the_index_that_is_not_two_numbers_is_named(tmp_path: Path, text: bytes, line: int) -> None:
    (tmp_path / "train.rec").write_bytes(BY_MXNET)
    (tmp_path / "train.idx").write_bytes(text)
    with pytest.raises(FormatError, match=rf"line {line} of train\.idx is not a number and an offset"):
        offsets(LocalSource(str(tmp_path)), "train.idx")


def test_damaged_files_never_crash_or_hang(
    tmp_path: Path, mutants: Callable[[bytes, int, int], Iterator[bytes]], survives: Callable[..., object]
) -> None:
    for data in mutants(BY_MXNET, 1, 150):
        (tmp_path / "train.rec").write_bytes(data)
        survives("recordio", tmp_path, 5)
    (tmp_path / "train.rec").write_bytes(BY_MXNET)
    for name, text in (("train.idx", b"0\t0\n1\t40\n2\t92\n"), ("train.lst", b"1\t0.5\ta/b.jpg\n2\t0\tc.jpg\n")):
        for data in mutants(text, 2, 60):
            (tmp_path / name).write_bytes(data)
            survives("recordio", tmp_path, 5)
