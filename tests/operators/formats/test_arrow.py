"""Arrow IPC: files and streams written by pyarrow, read back byte for byte."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from operators.errors import FormatError
from operators.formats import SetConfig, arrow
from operators.formats.listing import Listing
from operators.sources import LocalSource

NAME = "data-00000-of-00001.arrow"
JPEG = b"\xff\xd8\xff"


def images(count: int, size: int = 800) -> list[bytes]:
    rng = random.Random(count)
    return [JPEG + rng.randbytes(rng.randrange(size)) for _ in range(count)]


def table(data: "list[bytes | None]", kind: Any = None, paths: "list[str] | None" = None) -> pa.Table:
    """Columns of all layouts around the image, so that its buffers have to be found among others."""
    count = len(data)
    rows = [{"bytes": one, "path": paths[n] if paths else None} for n, one in enumerate(data)]
    rows = [row if n != 1 else None for n, row in enumerate(rows)]
    features = {"image": {"_type": "Image"}, "label": {"names": ["ann", "ben"], "_type": "ClassLabel"}}
    columns = {
        "nothing": pa.nulls(count),
        "vector": pa.array([[1.0, 2.0]] * count, pa.list_(pa.float32(), 2)),
        "boxes": pa.array([[[1, 2]], []] * (count // 2), pa.list_(pa.list_(pa.int32()))),
        "pairs": pa.array([[("a", 1)]] * count, pa.map_(pa.string(), pa.int8())),
        "codes": pa.array(["x"] * count).dictionary_encode(),
        "flag": pa.array([True, None] * (count // 2)),
        "image": pa.array(rows, pa.struct({"bytes": kind or pa.binary(), "path": pa.string()})),
        "label": pa.array([0, 1] * (count // 2)),
        "split": pa.array(["é", None] * (count // 2)),
    }
    made = pa.table(columns)
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write(path: Path, made: pa.Table, form: str = "stream", codec: str | None = None, rows: int = 30) -> None:
    new = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
    with new(str(path), made.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_table(made, max_chunksize=rows)


def listed(uri: Path, **options: Any) -> Listing:
    return arrow.listing(LocalSource(str(uri)), SetConfig(uri=str(uri), **options))


@pytest.mark.parametrize("form", ["stream", "file"])
@pytest.mark.parametrize("codec", [None, "lz4", "zstd"])
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_what_pyarrow_wrote_comes_back(tmp_path: Path, form: str, codec: str | None, kind: pa.DataType) -> None:
    data: list[bytes | None] = [*images(50), None, b"", *images(48)]
    write(tmp_path / NAME, table(data, kind), form, codec)
    (tmp_path / "state.json").write_text("{}")
    source = LocalSource(str(tmp_path))
    assert arrow.recognises(source, list(source.files()))
    found = listed(tmp_path, attributes=["split", "flag"])
    assert [e.identity for e in found.entries] == ["ann", "ben"] * 50
    assert [e.attributes for e in found.entries[:2]] == [{"split": "é", "flag": "True"}, None]
    assert [e.key for e in found.entries[:2]] == [
        "data-00000-of-00001/00000000.jpg",
        "data-00000-of-00001/00000001.jpg",
    ]
    assert found.unlisted == {".json": 1}
    with arrow.ArrowReader(source) as opened:
        for at in random.Random(0).sample(range(100), 100):
            place = str(found.entries[at].place)
            if at in (1, 50):
                with pytest.raises(OSError, match="holds no bytes"):
                    opened.open(place)
            else:
                assert opened.open(place).read() == data[at]


def test_paths_name_the_records(tmp_path: Path) -> None:
    made = table(list(images(4)), paths=["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"])
    write(tmp_path / NAME, made.slice(2))
    assert [e.key for e in listed(tmp_path).entries] == ["b/1.jpg", "b/2.jpg"]


def test_a_slice_of_a_table_and_an_empty_one(tmp_path: Path) -> None:
    data = images(60)
    write(tmp_path / "a.arrow", table(list(data)).slice(20, 30))
    write(tmp_path / "b.arrow", table(list(data)).slice(0, 0))
    entries = listed(tmp_path).entries
    with arrow.ArrowReader(LocalSource(str(tmp_path))) as opened:
        assert [opened.open(str(entry.place)).read() for entry in entries] == data[20:50]


@pytest.mark.parametrize("form", ["stream", "file"])
@pytest.mark.parametrize("left", [0.3, 0.95])
def test_a_truncated_file_is_refused(tmp_path: Path, form: str, left: float) -> None:
    write(tmp_path / NAME, table(list(images(60))), form)
    data = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(data[: int(len(data) * left)])
    with pytest.raises(FormatError, match=r"cannot be read as Arrow \(.*cut short.*Get it again"):
        listed(tmp_path)


def test_a_bomb_is_a_row_that_says_so(tmp_path: Path) -> None:
    write(tmp_path / NAME, pa.table({"image": [JPEG + bytes(40_000_000)]}), codec="zstd")
    entry = listed(tmp_path).entries[0]
    opened = arrow.ArrowReader(LocalSource(str(tmp_path)))
    with opened, pytest.raises(OSError, match="unpacks to 40,000,003 bytes"):
        opened.open(str(entry.place))


def test_views_are_refused_with_the_columns_name(tmp_path: Path) -> None:
    write(tmp_path / NAME, pa.table({"v": pa.array(["a"], pa.string_view()), "image": [JPEG]}))
    with pytest.raises(FormatError, match="'v' is a string_view, which is not read"):
        listed(tmp_path)


def test_wrong_places_are_refused(tmp_path: Path) -> None:
    write(tmp_path / NAME, pa.table({"image": [JPEG], "label": [1]}))
    batch = json.loads(str(listed(tmp_path).entries[0].place))[2]
    with arrow.ArrowReader(LocalSource(str(tmp_path))) as opened:
        assert opened.open(json.dumps([NAME, 0, batch, 0])).read() == JPEG
        for place in (
            [NAME, 0, batch, 1],
            [NAME, 1, batch, 0],
            [NAME, 9, batch, 0],
            [NAME, 0, 8, 0],
            [NAME, 0, 0, 0],
            1,
        ):
            with pytest.raises(OSError, match="again"):
                opened.open(json.dumps(place))


def test_no_vectors_and_no_garbage_are_recognised(tmp_path: Path) -> None:
    source = LocalSource(str(tmp_path))
    for data in (b"", b"ARROW1\0\0", b"\xff\xff\xff\xff\x10\0\0\0" + bytes(16), b"\xff" * 99):
        (tmp_path / NAME).write_bytes(data)
        assert not arrow.recognises(source, list(source.files()))
    write(tmp_path / NAME, pa.table({"embedding": [[1.0, 2.0]]}))
    assert not arrow.recognises(source, list(source.files()))


@pytest.mark.parametrize(("form", "codec"), [("stream", None), ("file", None), ("file", "zstd"), ("stream", "lz4")])
def test_damaged_files_never_do_worse_than_fail(
    tmp_path: Path,
    form: str,
    codec: str | None,
    mutants: Callable[[bytes, int, int], Iterator[bytes]],
    survives: Callable[..., Any],
) -> None:
    write(tmp_path / NAME, table(list(images(6, 200)), paths=list("abcdef")), form, codec, rows=3)
    for data in mutants((tmp_path / NAME).read_bytes(), 0, 60):
        (tmp_path / NAME).write_bytes(data)
        survives("arrow", tmp_path, 5.0, attributes=["split"])
