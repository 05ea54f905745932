"""Ready embeddings: written by NumPy, pyarrow, h5py and json, they come out as the same float32 vectors."""

import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators.errors import FormatError
from operators.formats import SetConfig, SourceLimits, given, recognised
from operators.formats.indexes import Entries
from operators.formats.listing import Listing
from operators.sources import LocalSource

ROWS, WIDTH = 40, 32
VECTORS = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)
NAMES = [f"p{at % 3}/{at:02d}.jpg" for at in range(ROWS)]


def table(lists: Any) -> pa.Table:
    return pa.table({"path": NAMES, "age": list(range(ROWS)), "embedding": lists})


FIXED = pa.FixedSizeListArray.from_arrays(pa.array(VECTORS.ravel()), WIDTH)


def npy(folder: Path) -> None:
    np.save(folder / "e.npy", VECTORS)
    (folder / "e.txt").write_text("\n".join(NAMES))


def npy_csv(folder: Path) -> None:
    np.save(folder / "e.npy", VECTORS.astype(">f8"))
    (folder / "e.csv").write_text("path,age\n" + "".join(f"{name},{at}\n" for at, name in enumerate(NAMES)))


def npy_json(folder: Path) -> None:
    np.save(folder / "e.npy", VECTORS)
    (folder / "ids.json").write_text(json.dumps({"path": NAMES}))


def npy_npy(folder: Path) -> None:
    np.save(folder / "e.npy", VECTORS)
    np.save(folder / "paths.npy", np.array(NAMES))


def npz(folder: Path) -> None:
    np.savez(folder / "e.npz", emb=VECTORS, paths=np.array(NAMES), age=np.arange(ROWS))


def npz_deflated(folder: Path) -> None:
    np.savez_compressed(folder / "e.npz", emb=VECTORS, path=np.array(NAMES))


def parquet_lists(folder: Path) -> None:
    pq.write_table(table(list(VECTORS)), folder / "e.parquet", row_group_size=7)


def parquet_fixed(folder: Path) -> None:
    pq.write_table(table(FIXED), folder / "e.parquet", compression="zstd")


def arrow_lists(folder: Path) -> None:
    made = table(pa.array(list(VECTORS), pa.large_list(pa.float32())))
    with pa.ipc.new_stream(str(folder / "e.arrow"), made.schema) as writer:
        writer.write_table(made, 7)


def arrow_packed(folder: Path) -> None:
    made = table(FIXED)
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(str(folder / "e.arrow"), made.schema, options=options) as writer:
        writer.write_table(made, 7)


def json_lines(folder: Path) -> None:
    lines = []
    for at, (name, vector) in enumerate(zip(NAMES, VECTORS.astype(float).tolist(), strict=True)):
        person, file = name.split("/")
        lines.append(json.dumps({"identity": person, "image_name": file, "embedding": vector, "age": at}))
    (folder / "embeddings.json").write_text("\n".join(lines) + "\n")


def hdf5(folder: Path) -> None:
    import h5py

    with h5py.File(folder / "e.h5", "w") as file:
        file["embeddings"], file["path"], file["age"] = VECTORS, NAMES, np.arange(ROWS)


def hdf5_packed(folder: Path) -> None:
    import h5py

    with h5py.File(folder / "e.h5", "w") as file:
        options = {"compression": "gzip", "shuffle": True, "fletcher32": True, "chunks": (16, WIDTH)}
        file.create_dataset("embeddings", data=VECTORS, **options)
        file["path"] = NAMES


def hdf5_of_single_records(folder: Path) -> None:
    import h5py

    with h5py.File(folder / "samples.h5", "w") as file:
        for name, vector in zip(NAMES, VECTORS, strict=True):
            file[f"{name}/embedding"], file[f"{name}/w_latent"] = vector, 2 * vector


WRITERS = [
    *(npy, npy_csv, npy_json, npy_npy, npz, npz_deflated, parquet_lists, parquet_fixed, arrow_lists, arrow_packed),
    *(json_lines, hdf5, hdf5_packed, hdf5_of_single_records),
]


def test_lines_that_are_no_records_are_not_read_to_their_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vector = '{"embedding": [1.0, 2.0]}\n'
    (tmp_path / "e.jsonl").write_text(vector * 3 + "x\n" * 5000)
    entries: list[Any] = []
    monkeypatch.setattr(
        "operators.formats.given.Entries", lambda options: entries.append(Entries(options)) or entries[-1]
    )
    with pytest.raises(FormatError, match=r"more than 500 records; raise limits\.max_records"):
        listed(tmp_path, limits=SourceLimits(max_records=500))
    monkeypatch.setattr("operators.formats.listing.MOST_FAULTS", 1000)
    with pytest.raises(FormatError, match=r"1,004 records cannot be read and 3 can \(is no JSON object"):
        listed(tmp_path)
    assert [len(one.made) for one in entries] == [501, 1007]
    (tmp_path / "e.jsonl").write_text(vector * 3 + "x\n" * 800)
    (tmp_path / "f.jsonl").write_text("x\n" * 800)
    with pytest.raises(FormatError, match=r"1,004 records cannot be read and 3 can"):
        listed(tmp_path)
    (tmp_path / "e.jsonl").write_text(vector * 600)
    (tmp_path / "f.jsonl").write_text("x\n" * 1600)
    assert len(listed(tmp_path).entries) == 2200


def listed(uri: Path, **options: Any) -> Listing:
    return given.listing(LocalSource(str(uri)), SetConfig(uri=str(uri), **options))


def read(uri: Path, found: Listing) -> dict[str, np.ndarray]:
    vectors = {}
    with given.VectorReader(LocalSource(str(uri))) as opened:
        for entry in random.Random(0).sample(list(found.entries), len(found.entries)):
            with opened.open(str(entry.place)) as stream:
                vectors[entry.key] = np.frombuffer(stream.read(), "<f4")
    return vectors


@pytest.mark.parametrize("write", WRITERS, ids=lambda one: one.__name__)
def test_every_kind_gives_the_same_vectors_names_and_labels(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path)
    if not write.__name__.startswith("hdf5"):  # which costs a child process
        assert recognised(SetConfig(uri=str(tmp_path)))[0] == "vectors"
    found = listed(tmp_path)
    vectors = read(tmp_path, found)
    assert sorted(vectors) == sorted(NAMES)
    assert all((vectors[name] == vector).all() for name, vector in zip(NAMES, VECTORS, strict=True))
    assert {entry.key: entry.identity for entry in found.entries} == {name: name.split("/")[0] for name in NAMES}
    assert (
        {entry.bytes for entry in found.entries} <= {4 * WIDTH}
        or "parquet" in write.__name__
        or "arrow" in write.__name__
    )


@pytest.mark.parametrize("write", [npy_csv, npz, parquet_lists, arrow_packed, json_lines], ids=lambda one: one.__name__)
def test_attributes_come_along(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path)
    found = {entry.key: entry.attributes for entry in listed(tmp_path, attributes=["age"]).entries}
    assert found == {name: {"age": str(at)} for at, name in enumerate(NAMES)}


def test_half_floats_are_widened_and_rows_are_numbered_without_names(tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", VECTORS.astype(np.float16))
    np.save(tmp_path / "labels.npy", np.arange(ROWS) % 3)
    found = listed(tmp_path)
    assert [e.key for e in found.entries] == [f"e/{at:08d}" for at in range(ROWS)]
    assert [e.identity for e in found.entries] == [str(at % 3) for at in range(ROWS)]
    vectors = read(tmp_path, found)
    assert all((vectors[f"e/{at:08d}"] == VECTORS[at].astype(np.float16)).all() for at in range(ROWS))


def test_what_is_no_vector_is_a_rejected_row_or_left_to_the_reader(tmp_path: Path) -> None:
    lines = [
        {"id": "short", "embedding": [1.0, 2.0]},
        {"id": "text", "embedding": [1.0, "2"]},
        {"id": "none"},
        {"id": "nan", "embedding": [float("nan")] * 3},
        {"id": "huge", "embedding": [10**400, 1.0, True]},
    ]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"id": "cut", "embedding": [1.0,\n\n[1, 2]\n'
    (tmp_path / "e.jsonl").write_text(text)
    found = listed(tmp_path)
    errors = {entry.key: entry.error for entry in found.entries}
    assert list(errors) == ["short", "text", "e-00000002", "nan", "huge", "e-00000005", "e-00000007"]
    assert [key for key, error in errors.items() if error is None] == ["short", "text", "nan", "huge"]
    assert "line 3 is no JSON object with a vector (no list called embedding" in str(errors["e-00000002"])
    with given.VectorReader(LocalSource(str(tmp_path))) as opened:
        places = {entry.key: str(entry.place) for entry in found.entries}
        assert np.frombuffer(opened.open(places["short"]).read(), "<f4").tolist() == [1.0, 2.0]
        assert np.isnan(np.frombuffer(opened.open(places["nan"]).read(), "<f4")).all()
        for key in ("text", "huge"):
            with pytest.raises(OSError, match="no number"):
                opened.open(places[key])


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", np.array([[1.0, object()]], object), allow_pickle=True)
    with pytest.raises(FormatError, match="would have to be unpickled"):
        listed(tmp_path, format="vectors")
    (tmp_path / "e.npy").unlink()
    np.savez(tmp_path / "e.npz", emb=VECTORS, paths=np.array(NAMES, object))
    assert [e.key for e in listed(tmp_path).entries][:1] == ["e/00000000"]


@pytest.mark.parametrize(
    ("made", "reason"),
    [(np.asfortranarray(VECTORS), "column by column"), (VECTORS[0], "no table of floats"), (VECTORS > 0, "no table")],
)
def test_other_arrays_are_refused(tmp_path: Path, made: np.ndarray, reason: str) -> None:
    np.save(tmp_path / "e.npy", made)
    with pytest.raises(FormatError, match=reason):
        listed(tmp_path, format="vectors")


def test_names_of_another_number_and_cut_short_arrays_are_refused(tmp_path: Path) -> None:
    npy(tmp_path)
    (tmp_path / "e.txt").write_text("one\ntwo\n")
    with pytest.raises(FormatError, match="holds 40 vectors, and 'id' beside it has 2 values"):
        listed(tmp_path)
    data = (tmp_path / "e.npy").read_bytes()
    (tmp_path / "e.npy").write_bytes(data[:-1])
    with pytest.raises(FormatError, match="cut short"):
        listed(tmp_path)


def test_several_kinds_in_one_folder_are_refused(tmp_path: Path) -> None:
    npy(tmp_path)
    parquet_lists(tmp_path)
    with pytest.raises(FormatError, match="vectors of several kinds: NumPy, Parquet"):
        listed(tmp_path)


@pytest.mark.parametrize("kind", ["npy", "npz", "npz packed", "parquet", "arrow", "json"])
def test_damaged_files_never_do_worse_than_fail(
    tmp_path: Path,
    kind: str,
    mutants: Callable[[bytes, int, int], Iterator[bytes]],
    survives: Callable[..., Any],
) -> None:
    made = io.BytesIO()
    small, name = VECTORS[:4], f"e.{kind[:3] if kind.startswith('np') else kind}"
    match kind:
        case "npy":
            np.save(made, small)
        case "npz":
            np.savez(made, emb=small, path=np.array(NAMES[:4]))
        case "npz packed":
            np.savez_compressed(made, emb=small, path=np.array(NAMES[:4]))
        case "parquet":
            pq.write_table(table(FIXED)[:4], made)
        case "arrow":
            with pa.ipc.new_stream(made, table(FIXED).schema) as writer:
                writer.write_table(table(list(VECTORS)).cast(table(FIXED).schema)[:4])
        case "json":
            lines = [json.dumps({"id": name, "embedding": [1.0, 2.0]}) for name in NAMES[:4]]
            made.write("\n".join(lines).encode())
    for data in mutants(made.getvalue(), 0, 40):
        (tmp_path / name).write_bytes(data)
        survives("vectors", tmp_path, 5.0)
