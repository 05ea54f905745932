"""Embedding a unit: rows stay in place, vectors and norms are those of the model, unusable outputs are rows too."""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx import helper, numpy_helper

from operators.backbones import BackboneConfig
from operators.encoder import UNUSABLE, Encoder
from operators.errors import SchemaMismatch
from operators.records import FACE, FACES, embedded_unit, embeddings, nest, unnest

OnnxFile = Callable[..., BackboneConfig]
FOUND = ("faces_found", "detector_score", "box", "landmarks", "face_size", "sharpness")
KEPT = ("key", "identity", "digest", *FOUND)
needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed")
MEANS = helper.make_node("ReduceMean", ["x"], ["means"], axes=[2, 3], keepdims=0)


def network(onnx_file: OnnxFile, *nodes: object, scale: float = 1.0, **constants: float) -> Encoder:
    weights = [numpy_helper.from_array(np.array(value, np.float32), name) for name, value in constants.items()]
    return Encoder(onnx_file([MEANS, *nodes], weights, scale=scale))


@pytest.fixture(scope="module")
def means(onnx_file: OnnxFile) -> Encoder:
    """The embedding is the mean of each channel."""
    return network(onnx_file, helper.make_node("Identity", ["means"], ["y"]))


def picture(red: int, green: int, blue: int) -> np.ndarray:
    return np.full((112, 112, 3), (red, green, blue), np.uint8)


def row(key: str, face: np.ndarray | None, status: str = "no_face") -> dict:
    shared = {"key": key, "identity": key if key > "c" else None, "digest": key * 64}
    if face is None:
        return shared | {"status": status, "error": f"why {key}", "faces_found": None}
    marks = [at / 4 for at in range(10)]
    found = {"faces_found": 2, "detector_score": 0.75, "box": [1.0, 2.0, 3.0, 4.5], "crop": face.tobytes()}
    found |= {"landmarks": marks, "face_size": 3.0, "sharpness": 55.5}
    return shared | {"status": "ok", "error": None} | found


def faces(*rows: dict) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=pa.schema(list(FACE)))


MIXED = [
    row("a", None, "corrupt"),
    row("b", picture(3, 4, 0)),
    row("c", None, "several_faces"),
    row("d", picture(0, 0, 9)),
    row("e", picture(200, 10, 100)),
    row("f", None, "changed"),
]


def test_failed_rows_stay_in_place_without_a_vector(means: Encoder) -> None:
    found = embeddings(3).check(means.embed(faces(*MIXED))).to_pylist()
    given = faces(*MIXED).to_pylist()
    assert [{name: r[name] for name in KEPT} for r in found] == [{name: r[name] for name in KEPT} for r in given]
    assert [[r[name] is None for name in FOUND] for r in found] == [[r["vector"] is None] * 6 for r in found]
    assert [(r["status"], r["error"]) for r in found] == [(r["status"], r["error"]) for r in given]
    assert [r["vector"] is None for r in found] == [True, False, True, False, False, True]
    assert [r["norm"] is None for r in found] == [True, False, True, False, False, True]
    assert found[1]["norm"] == pytest.approx(5.0)
    assert found[1]["vector"] == [np.float16(0.6), np.float16(0.8), 0.0]
    assert (found[3]["norm"], found[3]["vector"]) == (9.0, [0.0, 0.0, 1.0])


def test_vectors_are_the_unit_vectors_rounded_once_and_norms_their_lengths_before(means: Encoder) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (50, 3))
    found = means.embed(faces(*(row(f"k{at}", picture(*c)) for at, c in enumerate(colours))))
    raw = means.backbone(np.stack([picture(*c) for c in colours])).astype(np.float64)
    np.testing.assert_allclose(raw, colours, rtol=1e-5)
    lengths = np.sqrt((raw**2).sum(axis=1))
    expected = (raw / lengths[:, None]).astype(np.float16)
    assert np.array(found["vector"].to_pylist(), np.float16).tobytes() == expected.tobytes()
    np.testing.assert_allclose(found["norm"].to_numpy(), lengths, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(expected.astype(float), axis=1), 1, atol=1e-3)


def test_the_real_embedder_tells_people_apart(backbone_config: BackboneConfig, portraits: list[np.ndarray]) -> None:
    encoder = Encoder(backbone_config)
    crops = [portrait[8:120, 8:120] for portrait in portraits]
    found = encoder.embed(faces(*(row(f"k{at}", np.ascontiguousarray(crop)) for at, crop in enumerate(crops))))
    vectors = np.array(found["vector"].to_pylist(), np.float64)
    norms = found["norm"].to_numpy()
    raw = encoder.backbone(np.stack(crops)).astype(np.float64)
    np.testing.assert_allclose(norms, np.linalg.norm(raw, axis=1), rtol=1e-6)
    np.testing.assert_allclose(vectors, raw / norms[:, None], atol=2**-11)
    cosines = vectors @ vectors.T
    assert (cosines[~np.eye(len(crops), dtype=bool)] < 0.9).all()


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=needs_openvino)])
def test_the_stored_table_is_the_same_bytes_whatever_the_batch(
    backbone_config: BackboneConfig, portraits: list[np.ndarray], runtime: str
) -> None:
    """As Parquet, of the real network: batches of 1, 5 and 32 faces against those of 8, with failed rows between."""
    rows = [row(chr(97 + at), np.ascontiguousarray(face[8:120, 8:120])) for at, face in enumerate(portraits)]
    table = faces(*rows[:5], MIXED[0], *rows[5:], rows[2])

    def stored(batch: int) -> bytes:
        sink = pa.BufferOutputStream()
        pq.write_table(Encoder(replace(backbone_config, runtime=runtime, batch=batch)).embed(table), sink)
        return bytes(sink.getvalue())

    expected = stored(8)
    for batch in (1, 5, 32):
        assert stored(batch) == expected


def test_two_faces_of_one_image_are_embedded_apart(means: Encoder) -> None:
    """Rows of one digest are one image: equal rows are embedded once, its second face is another one."""
    pictures = [picture(3, 4, 0), picture(0, 0, 9), picture(3, 4, 0)]
    rows = [row("a", face) | {"face": number} for face, number in zip(pictures, (1, 2, 1), strict=True)]
    vectors = means.embed(faces(*rows))["vector"].to_pylist()
    assert vectors == [pytest.approx(one, abs=1e-3) for one in ([0.6, 0.8, 0], [0, 0, 1], [0.6, 0.8, 0])]


@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        ([helper.make_node("Identity", ["means"], ["y"])], {}),
        ([helper.make_node("Div", ["means", "means"], ["y"])], {}),
        ([helper.make_node("Reciprocal", ["means"], ["y"])], {}),
        ([helper.make_node("Log", ["means"], ["y"])], {}),
        ([helper.make_node("Sub", ["means", "two"], ["m"]), helper.make_node("Sqrt", ["m"], ["y"])], {"two": 2.0}),
    ],
    ids=["zero", "nan", "infinite", "minus infinite", "nan of root"],
)
def test_an_output_that_is_not_finite_or_is_zero_is_a_bad_embedding(
    onnx_file: OnnxFile, nodes: list, constants: dict[str, float]
) -> None:
    encoder = network(onnx_file, *nodes, **constants)
    rows = [row("a", picture(5, 6, 7)), row("b", picture(0, 0, 0)), row("c", None), row("d", picture(9, 9, 9))]
    found = encoder.embed(faces(*rows)).to_pylist()
    assert [r["status"] for r in found] == ["ok", "bad_embedding", "no_face", "ok"]
    assert [r["error"] for r in found] == [None, UNUSABLE, "why c", None]
    assert [r["vector"] is None for r in found] == [False, True, True, False]
    assert found[1]["box"] == [1.0, 2.0, 3.0, 4.5]
    for good in (found[0], found[3]):
        assert np.linalg.norm(np.array(good["vector"], np.float64)) == pytest.approx(1, abs=1e-3)
        assert np.isfinite(good["norm"])


def test_one_component_that_is_not_finite_spoils_the_whole_vector(onnx_file: OnnxFile) -> None:
    encoder = network(onnx_file, helper.make_node("Reciprocal", ["means"], ["y"]))
    (found,) = encoder.embed(faces(row("a", picture(0, 5, 5)))).to_pylist()
    assert (found["status"], found["vector"]) == ("bad_embedding", None)


def test_very_small_outputs_keep_their_direction(onnx_file: OnnxFile) -> None:
    encoder = network(onnx_file, helper.make_node("Mul", ["means", "tiny"], ["y"]), tiny=1e-30)
    (found,) = encoder.embed(faces(row("a", picture(30, 40, 0)))).to_pylist()
    assert found["norm"] == pytest.approx(5e-29)
    np.testing.assert_allclose(found["vector"], [0.6, 0.8, 0], atol=1e-3)


def test_an_output_whose_length_overflows_never_has_an_infinite_norm(onnx_file: OnnxFile) -> None:
    encoder = network(onnx_file, helper.make_node("Mul", ["means", "huge"], ["y"]), huge=3e38 / 255)
    (found,) = encoder.embed(faces(row("a", picture(255, 255, 255)))).to_pylist()
    assert found["status"] == "bad_embedding" or np.isfinite(found["norm"])


def test_a_unit_keeps_its_name_and_states_the_device(means: Encoder) -> None:
    unit = nest(faces(*MIXED), FACES, "faces", unit="ab" * 16)
    found = embedded_unit(3).check(means(unit))
    assert found["unit"].to_pylist() == ["ab" * 16]
    assert found["device"].to_pylist() == [means.backbone.device]
    assert unnest(found, "images").equals(means.embed(faces(*MIXED)))


def test_a_unit_cut_out_of_a_longer_table_is_embedded_alike(means: Encoder) -> None:
    units = pa.concat_tables(
        [nest(faces(*rows), FACES, "faces", unit=str(len(rows))) for rows in (MIXED[:2], MIXED[1:])]
    )
    for at, rows in enumerate((MIXED[:2], MIXED[1:])):
        for table in (units, units.combine_chunks()):
            found = unnest(means(table.slice(at, 1)), "images")
            assert found.to_pylist() == means.embed(faces(*rows)).to_pylist()


@pytest.mark.parametrize("rows", [[], [MIXED[0]], [MIXED[0], MIXED[2], MIXED[5]]], ids=["empty", "one", "all failed"])
def test_a_unit_without_a_usable_face_is_embedded_to_the_same_rows(means: Encoder, rows: list[dict]) -> None:
    found = unnest(means(nest(faces(*rows), FACES, "faces", unit="u")), "images")
    assert [(r["key"], r["status"], r["vector"]) for r in found.to_pylist()] == [
        (r["key"], r["status"], None) for r in rows
    ]


def test_more_faces_than_a_batch_keep_their_order(means: Encoder) -> None:
    rows = [row(f"k{at:03}", None if at % 5 == 0 else picture(at, 255 - at, 7)) for at in range(53)]
    for at, found in enumerate(means.embed(faces(*rows)).to_pylist()):
        assert found["key"] == f"k{at:03}"
        if at % 5:
            expected = np.array([at, 255 - at, 7]) / np.linalg.norm([at, 255 - at, 7])
            np.testing.assert_allclose(found["vector"], expected, atol=1e-3)


@pytest.mark.parametrize("count", [0, 2])
def test_a_table_that_is_not_one_unit_is_refused(means: Encoder, count: int) -> None:
    with pytest.raises(SchemaMismatch, match=f"one row; found {count}"):
        means(FACES.from_rows([{"unit": "u", "faces": []}] * count))


def test_a_table_under_another_contract_is_refused(means: Encoder) -> None:
    with pytest.raises(SchemaMismatch, match="faces/3"):
        means(pa.table({"unit": ["u"]}))


def test_vectors_are_stored_in_half_precision(means: Encoder) -> None:
    column = means.embed(faces(*MIXED)).schema.field("vector")
    assert column.type == pa.list_(pa.float16(), 3)


def test_the_crop_of_the_models_alignment_is_embedded(onnx_file: OnnxFile) -> None:
    """Each crop has a colour of its own, and the network says which it saw."""
    chip = np.full((150, 150, 3), (0, 8, 6), np.uint8)
    rows = [row("a", None), row("b", picture(3, 4, 0)) | {"crop_dlib150": chip.tobytes()}]
    nodes = [MEANS, helper.make_node("Identity", ["means"], ["y"])]
    dlib = Encoder(onnx_file(nodes, takes=("N", 3, "H", "W"), alignment="dlib150"))
    arcface = Encoder(onnx_file(nodes, takes=("N", 3, "H", "W")))
    assert arcface.embed(faces(*rows))["vector"].to_pylist() == [None, [np.float16(0.6), np.float16(0.8), 0]]
    assert dlib.embed(faces(*rows))["vector"].to_pylist() == [None, [0, np.float16(0.8), np.float16(0.6)]]


def test_faces_without_the_crop_that_the_model_needs_are_refused(onnx_file: OnnxFile) -> None:
    nodes = [MEANS, helper.make_node("Identity", ["means"], ["y"])]
    dlib = Encoder(onnx_file(nodes, takes=("N", 3, "H", "W"), alignment="dlib150"))
    with pytest.raises(SchemaMismatch, match="3 faces have no dlib150 crop"):
        dlib.embed(faces(*MIXED))


def test_whether_a_face_has_the_same_bits_in_any_place_is_found_out(
    means: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert means.placeless()
    plain = means.backbone

    class Uneven:
        config = plain.config

        def __call__(self, faces_NHWC: np.ndarray) -> np.ndarray:
            raw = plain(faces_NHWC)
            raw[5] = np.nextafter(raw[5], np.float32(np.inf))  # one bit in one place
            return raw

    monkeypatch.setattr(means, "backbone", Uneven())
    assert not means.placeless()
