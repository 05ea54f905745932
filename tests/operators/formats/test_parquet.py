"""Parquet: files written by pyarrow, as Hugging Face serves them, read back byte for byte."""

import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators.errors import FormatError
from operators.formats import SetConfig, SourceLimits, pages, parquet
from operators.formats.listing import Entry, Listing
from operators.sources import LocalSource

JPEG = b"\xff\xd8\xff"
IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def images(count: int, seed: int = 0, size: int = 800) -> list[bytes]:
    rng = random.Random(seed)
    return [JPEG + rng.randbytes(rng.randrange(size)) for _ in range(count)]


def table(data: "list[bytes | None]", paths: "list[str | None] | None" = None, **columns: Any) -> pa.Table:
    """As `datasets` writes it: the labels' names are in the schema's metadata."""
    paths = paths or [None] * len(data)
    rows = [{"bytes": one, "path": path} for one, path in zip(data, paths, strict=True)]
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if "label" in columns:
        features["label"] = {"names": ["ann", "ben", "eva"], "_type": "ClassLabel"}
    made = pa.table({"image": pa.array(rows, IMAGE), **columns})
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def listed(uri: Path, **options: Any) -> Listing:
    return parquet.listing(LocalSource(str(uri)), SetConfig(uri=str(uri), **options))


def read(uri: Path, entries: Any) -> list[bytes]:
    with parquet.ParquetReader(LocalSource(str(uri))) as opened:
        return [opened.open(entry.place).read() for entry in entries]


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd", "gzip", "brotli", "lz4"])
@pytest.mark.parametrize("layout", [{"data_page_version": "2.0", "use_dictionary": False}, {"row_group_size": 70}])
def test_what_pyarrow_wrote_comes_back(tmp_path: Path, codec: str, layout: dict[str, Any]) -> None:
    data: list[bytes | None] = [*images(100), None, b"", *images(100, 0)]  # the second hundred repeat the first
    made = table(data, label=pa.array([n % 3 for n in range(202)]))
    pq.write_table(made, tmp_path / "a.parquet", compression=codec, write_page_checksum=True, **layout)
    found = listed(tmp_path)
    assert [entry.identity for entry in found.entries] == [("ann", "ben", "eva")[n % 3] for n in range(202)]
    keys = [f"a/{n:08d}.jpg" for n in range(202)]
    assert [entry.key for entry in found.entries] == keys
    entries: list[Entry] = list(found.entries)
    with parquet.ParquetReader(LocalSource(str(tmp_path))) as opened:
        with pytest.raises(OSError, match="holds no bytes"):
            opened.open(str(entries.pop(100).place))
        order = random.Random(1).sample(range(201), 201)
        for at in order:
            expected = [*data[:100], *data[101:]][at]
            assert opened.open(str(entries[at].place)).read() == expected


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_plain_binary_columns_and_names_and_attributes(tmp_path: Path, kind: pa.DataType) -> None:
    data = images(4)
    columns = {
        "file_name": ["a/1.jpg", "a/2.jpg", "b/1.jpg", "c.jpg"],
        "age": [31.0, 32.5, None, 7.0],
        "jpg": pa.array(data, kind),
        "group": pa.array(["f", "m", "f", None]).dictionary_encode(),
        "mask": pa.array([b"x"] * 4),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    found = listed(tmp_path, attributes=["age", "group"])
    assert [(e.key, e.identity, e.attributes) for e in found.entries] == [
        ("a/1.jpg", "a", {"age": "31", "group": "f"}),
        ("a/2.jpg", "a", {"age": "32.5", "group": "m"}),
        ("b/1.jpg", "b", {"group": "f"}),
        ("c.jpg", None, {"age": "7"}),
    ]
    assert read(tmp_path, found.entries) == data
    assert [e.identity for e in listed(tmp_path, identity="attribute:group").entries] == ["f", "m", "f", None]
    assert read(tmp_path, listed(tmp_path, column="mask").entries) == [b"x"] * 4
    with pytest.raises(FormatError, match=r"a\.parquet: no column 'png' of images"):
        listed(tmp_path, column="png")
    with pytest.raises(FormatError, match="no column 'eyes' of one value"):
        listed(tmp_path, identity="attribute:eyes")


def test_paths_name_the_records_if_they_differ(tmp_path: Path) -> None:
    data = images(3)
    (tmp_path / "data").mkdir()
    for shard in range(2):
        paths: list[str | None] = [f"{shard}{n}.png" for n in range(3)]
        pq.write_table(table(data, paths), tmp_path / f"data/train-0000{shard}-of-00002.parquet")
    assert [e.key for e in listed(tmp_path).entries] == ["00.png", "01.png", "02.png", "10.png", "11.png", "12.png"]
    assert {e.identity for e in listed(tmp_path).entries} == {None}


def test_repeated_paths_get_the_label_as_their_folder_else_file_and_row(tmp_path: Path) -> None:
    data = images(4)
    labels = pa.array([0, 1, 0, 1])
    pq.write_table(table(data, ["1.png", "1.png", "2.png", "2.png"], label=labels), tmp_path / "a.parquet")
    assert [e.key for e in listed(tmp_path).entries] == ["ann/1.png", "ben/1.png", "ann/2.png", "ben/2.png"]
    pq.write_table(table(data, ["1.png"] * 4, label=labels), tmp_path / "a.parquet")
    found = listed(tmp_path)
    assert [e.key for e in found.entries] == [f"a/{n:08d}.jpg" for n in range(4)]
    assert [e.identity for e in found.entries] == ["ann", "ben", "ann", "ben"]
    assert [e.identity for e in listed(tmp_path, identity="parent").entries] == [None] * 4


def test_names_of_the_publishers_machine_lose_what_they_share(tmp_path: Path) -> None:
    paths: list[str | None] = ["/home/me/set/a/1.jpg", "/home/me/set/b/1.jpg"]
    pq.write_table(table(list(images(2)), paths), tmp_path / "a.parquet")
    assert [e.key for e in listed(tmp_path).entries] == ["a/1.jpg", "b/1.jpg"]


def test_hostile_names_become_rejected_rows(tmp_path: Path) -> None:
    paths: list[str | None] = ["a/../../1.jpg", "a\nb", "ok.jpg", "a/\\b"]
    pq.write_table(table(list(images(4)), paths), tmp_path / "a.parquet")
    found = listed(tmp_path)
    assert [entry.error is None for entry in found.entries] == [False, False, True, False]
    assert len({entry.key for entry in found.entries}) == 4
    assert "leads out" in str(found.entries[0].error)


def test_labels_that_stand_for_nothing(tmp_path: Path) -> None:
    pq.write_table(table(list(images(4)), label=pa.array([-1, 2, None, 7])), tmp_path / "a.parquet")
    assert [e.identity for e in listed(tmp_path).entries] == [None, "eva", None, "7"]


@pytest.mark.parametrize("which", [slice(5, 9), slice(None, None, 3), slice(0, 0), slice(90, 200), slice(9, 2, -1)])
def test_entries_can_be_sliced(tmp_path: Path, which: slice) -> None:
    pq.write_table(table(list(images(100, size=9))), tmp_path / "a.parquet", row_group_size=7)
    entries = listed(tmp_path).entries
    assert list(entries[which]) == list(entries)[which]
    assert entries[-1] == list(entries)[-1]


def test_listing_never_reads_the_images(tmp_path: Path) -> None:
    pq.write_table(table(list(images(2000, size=2000)), [f"{n}" for n in range(2000)]), tmp_path / "a.parquet")
    taken = 0

    class Counting(LocalSource):
        def open(self, path: str, version: str | None = None) -> Any:
            data = super().open(path, version)

            class Stream(io.BufferedReader):
                def read(self, size: int | None = -1) -> bytes:
                    nonlocal taken
                    made = super().read(size)
                    taken += len(made)
                    return made

            return Stream(data)  # type: ignore[arg-type]

    source = Counting(str(tmp_path))
    assert len(parquet.listing(source, SetConfig(uri=str(tmp_path))).entries) == 2000
    assert 1000 < taken < 150_000 < (tmp_path / "a.parquet").stat().st_size / 10


def test_only_files_with_an_image_column_are_recognised(tmp_path: Path) -> None:
    def recognises() -> bool:
        source = LocalSource(str(tmp_path))
        return parquet.recognises(source, list(source.files()))

    assert not recognises()
    for other in ({"path": ["a"], "identity": ["b"]}, {"embedding": [[1.0, 2.0]]}, {"image": [[b"x"]]}):
        pq.write_table(pa.table(other), tmp_path / "a.parquet")
        assert not recognises()
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    assert not recognises()
    pq.write_table(table(list(images(1))), tmp_path / "a.parquet")
    assert recognises()


def test_several_image_columns_must_be_told_apart(tmp_path: Path) -> None:
    pq.write_table(pa.table({"left": [b"x"], "right": [b"y"]}), tmp_path / "a.parquet")
    with pytest.raises(FormatError, match=r"several columns of images .*left, right. Give the set's `column`"):
        listed(tmp_path)
    assert read(tmp_path, listed(tmp_path, column="right").entries) == [b"y"]


@pytest.mark.parametrize("left", [0.2, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, left: float) -> None:
    pq.write_table(table(list(images(50))), tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[: int(len(data) * left)])
    with pytest.raises(FormatError, match=r"a\.parquet: cannot be read as Parquet .*Get it again"):
        listed(tmp_path)


def test_bombs_are_rows_that_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = JPEG + bytes(40_000_000)
    pq.write_table(table([bomb, *images(2)]), tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    entries = listed(tmp_path, limits=SourceLimits()).entries
    opened = parquet.ParquetReader(LocalSource(str(tmp_path)))
    with opened, pytest.raises(OSError, match=r"unpacks to 40,00.* 200 times"):
        opened.open(str(entries[0].place))
    monkeypatch.setattr(pages, "PAGE_BYTES", 1000)
    pq.write_table(table(list(images(20))), tmp_path / "a.parquet", compression="none")
    with pytest.raises(OSError, match=r"the limits are .*smaller pages"):
        read(tmp_path, listed(tmp_path).entries)
    with pytest.raises(FormatError, match="more than 9 records"):
        listed(tmp_path, limits=SourceLimits(max_records=9))


def test_a_page_whose_checksum_is_wrong_is_a_row_that_says_so(tmp_path: Path) -> None:
    data = images(3)
    pq.write_table(table(list(data)), tmp_path / "a.parquet", compression="none", write_page_checksum=True)
    raw = (tmp_path / "a.parquet").read_bytes()
    at = raw.index(data[1][-9:])
    (tmp_path / "a.parquet").write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    with pytest.raises(OSError, match="checksum is wrong"):
        read(tmp_path, listed(tmp_path).entries)


def test_missing_shards_are_said(tmp_path: Path) -> None:
    for shard in (0, 2):
        pq.write_table(table(list(images(1))), tmp_path / f"train-0000{shard}-of-00003.parquet")
    assert "2 of 3 files of train are there" in listed(tmp_path).notes[0]


def test_wrong_places_are_refused(tmp_path: Path) -> None:
    pq.write_table(table(list(images(1)), label=pa.array([1])), tmp_path / "a.parquet")
    with parquet.ParquetReader(LocalSource(str(tmp_path))) as opened:
        for place in ('["a.parquet",0,0,1]', '["a.parquet",2,0,0]', '["a.parquet",0,1,0]', '["a.parquet",9,0,0]', "x"):
            with pytest.raises(OSError, match=r"run the audit again|scan the set again"):
                opened.open(place)


@pytest.mark.parametrize("layout", [{}, {"compression": "none", "data_page_version": "2.0"}, {"compression": "gzip"}])
def test_damaged_files_never_do_worse_than_fail(
    tmp_path: Path,
    layout: dict[str, Any],
    mutants: Callable[[bytes, int, int], Iterator[bytes]],
    survives: Callable[..., Any],
) -> None:
    made = table(list(images(6, size=200)), [f"{n}.jpg" for n in range(6)], label=pa.array([0, 1, 2] * 2))
    pq.write_table(made, tmp_path / "a.parquet", **layout)
    for data in mutants((tmp_path / "a.parquet").read_bytes(), 0, 60):
        (tmp_path / "a.parquet").write_bytes(data)
        survives("parquet", tmp_path, 5.0)
