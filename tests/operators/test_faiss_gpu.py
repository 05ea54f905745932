import ctypes
import sys
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from operators import faiss_gpu, vectors
from operators.engines import Wanted
from operators.faiss_gpu import FaissDevice, faiss_device
from operators.flat_gpu import FlatDeviceEngine, side

BUILT_FOR_GPU = hasattr(faiss, "StandardGpuResources")
NAMES = {
    "GpuIndexFlatConfig": ("device", "useFloat16"),
    "GpuDistanceParams": (
        "metric", "k", "dims", "device", "vectors", "numVectors", "queries", "numQueries", "vectorType", "queryType",
        "outDistances", "outIndices", "outIndicesType",
    ),
}  # fmt: skip
VALUES = ("METRIC_INNER_PRODUCT", "DistanceDataType_BF16", "IndicesDataType_I64")
CALLS = ("GpuIndexFlatIP", "StandardGpuResources", "bfKnn", "cast_integer_to_void_ptr", "swig_ptr", "get_num_gpus")


def best(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    index = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, index, axis=1), index


class Attributes(SimpleNamespace):
    """Takes the attributes of faiss' class of that name, and no others."""

    allowed: tuple[str, ...]

    def __setattr__(self, name: str, value: Any) -> None:
        assert name in self.allowed, name
        super().__setattr__(name, value)


class GpuIndexFlatConfig(Attributes):
    allowed = (*NAMES["GpuIndexFlatConfig"], "use_cuvs")
    use_cuvs = True


class GpuDistanceParams(Attributes):
    allowed = (*NAMES["GpuDistanceParams"], "use_cuvs")
    use_cuvs = True


class GpuIndexFlatIP:
    def __init__(self, resources: object, width: int, options: GpuIndexFlatConfig) -> None:
        assert not options.use_cuvs and options.device == 0
        self.kind = np.float16 if options.useFloat16 else np.float32
        self.held = np.zeros((0, width), self.kind)

    def add(self, vectors_ND: np.ndarray) -> None:
        assert vectors_ND.dtype == np.float32
        self.held = np.concatenate([self.held, vectors_ND.astype(self.kind)])

    def search(self, queries_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        assert queries_QD.dtype == np.float32 and k <= 2048
        return best(queries_QD.astype(self.kind).astype(np.float32) @ self.held.astype(np.float32).T, k)


def pointed_at(pointer: int, count: int, width: int) -> np.ndarray:
    """fp32 copies of numbers of bf16 in memory."""
    bits = np.ctypeslib.as_array((ctypes.c_uint16 * (count * width)).from_address(pointer))
    return (bits.astype(np.uint32) << 16).view(np.float32).reshape(count, width)


def bf_knn(resources: object, given: GpuDistanceParams) -> None:
    assert (given.metric, given.device, given.use_cuvs) == ("inner product", 0, False)
    assert given.vectorType == given.queryType == "bf16" and given.outIndicesType == "int64"
    queries = pointed_at(given.queries, given.numQueries, given.dims)
    scores, index = best(queries @ pointed_at(given.vectors, given.numVectors, given.dims).T, given.k)
    assert given.outDistances.shape == scores.shape and given.outIndices.dtype == index.dtype
    given.outDistances[:], given.outIndices[:] = scores, index


def written_like_faiss(devices: int = 1, bfloat16: bool = True) -> SimpleNamespace:
    """The part of faiss' interface that is used, in NumPy, for a device without torch."""
    return SimpleNamespace(
        StandardGpuResources=lambda: SimpleNamespace(supportsBFloat16=lambda number: bfloat16),
        get_num_gpus=lambda: devices,
        omp_set_num_threads=lambda count: None,
        GpuIndexFlatConfig=GpuIndexFlatConfig,
        GpuIndexFlatIP=GpuIndexFlatIP,
        GpuDistanceParams=GpuDistanceParams,
        METRIC_INNER_PRODUCT="inner product",
        DistanceDataType_BF16="bf16",
        IndicesDataType_I64="int64",
        cast_integer_to_void_ptr=lambda address: address,
        swig_ptr=lambda array: array,
        bfKnn=bf_knn,
    )


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> FaissDevice:
    monkeypatch.setitem(sys.modules, "faiss", written_like_faiss())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = faiss_device()
    assert found is not None
    return found


def some(count: int, seed: int, width: int = 32) -> np.ndarray:
    return vectors.normalise(np.random.default_rng(seed).standard_normal((count, width)))[0]


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_lists_of_every_type_are_those_of_the_rounded_vectors(stand_in: FaissDevice, dtype: str) -> None:
    assert (stand_in.name, stand_in.dtypes) == ("cuda:0", ("float16", "float32", "bfloat16"))
    queries, gallery = side(some(7, 0), dtype).low_ND, side(some(90, 1), dtype).low_ND
    scores, index = stand_in.search(stand_in.hold(gallery, dtype), queries, 5, dtype)
    exact = queries.astype(np.float64) @ gallery.astype(np.float64).T
    np.testing.assert_array_equal(index, np.argsort(-exact, axis=1)[:, :5])
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :5], atol=1e-6)
    assert (scores.dtype, index.dtype) == (np.float32, np.int64)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_the_engine_works_with_it(stand_in: FaissDevice, dtype: str) -> None:
    queries, gallery = some(7, 0), some(90, 1)
    found = FlatDeviceEngine(gallery, stand_in, dtype).propose(queries, Wanted(5, 2, 0.3))
    exact = vectors.exact_matrix(queries, gallery)
    pairs = set(zip(found.query.tolist(), found.group.tolist(), strict=True))
    assert pairs >= {(q, g) for q in range(7) for g in np.argsort(-exact[q])[:5].tolist()}
    assert pairs >= {(q, g) for g in range(90) for q in np.argsort(-exact[:, g])[:2].tolist()}
    assert pairs >= set(map(tuple, np.argwhere(exact >= 0.3).tolist()))


def test_bfloat16_only_where_the_device_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", written_like_faiss(bfloat16=False))
    assert "bfloat16" not in FaissDevice().dtypes


def test_the_device_is_that_of_torch_and_bfloat16_lies_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    moved, waited = [], []
    monkeypatch.setitem(sys.modules, "faiss", written_like_faiss())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"device {number}")
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.Tensor, "to", record(torch.Tensor.to, moved))
    device = FaissDevice()
    assert (device.name, device.number) == ("device 1", 1)
    assert device.hold(side(some(4, 0), "bfloat16").low_ND, "bfloat16").dtype == torch.bfloat16
    assert moved == [torch.device("cuda", 1)] and waited == [1]


def record(to: Any, moved: list[torch.device]) -> Any:
    """`Tensor.to`, except that a move to a device is only noted."""

    def move(tensor: torch.Tensor, where: Any) -> torch.Tensor:
        if not isinstance(where, torch.device):
            return to(tensor, where)
        moved.append(where)
        return tensor

    return move


def test_none_where_faiss_sees_none_or_has_no_support(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", written_like_faiss(devices=0))
    assert faiss_device() is None
    monkeypatch.setitem(sys.modules, "faiss", SimpleNamespace(get_num_gpus=lambda: 0))
    assert faiss_device() is None


@pytest.mark.skipif(not BUILT_FOR_GPU, reason="faiss is built without GPU support")
def test_the_installed_faiss_has_what_is_used() -> None:
    for name in (*CALLS, *VALUES):
        assert hasattr(faiss, name), name
    for name, attributes in NAMES.items():
        made = getattr(faiss, name)()
        for attribute in (*attributes, "use_cuvs"):
            assert hasattr(made, attribute), f"{name}.{attribute}"
    assert faiss.GpuDistanceParams().vectorsRowMajor and faiss.GpuDistanceParams().queriesRowMajor


@pytest.mark.gpu
@pytest.mark.skipif(not BUILT_FOR_GPU or faiss.get_num_gpus() < 1, reason="faiss sees no CUDA device")
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("wanted", [Wanted(10, 3, None), Wanted(3, 0, 0.2), Wanted(3000, 0, None)])
def test_the_device_itself_finds_what_is_wanted(dtype: str, wanted: Wanted) -> None:
    queries, gallery = some(200, 0, 128), np.concatenate([some(9000, 1, 128), some(200, 0, 128)])
    device = faiss_gpu.FaissDevice()
    found = FlatDeviceEngine(gallery, device, dtype).propose(queries, wanted)
    exact = vectors.exact_matrix(queries, gallery)
    keep = np.zeros(exact.shape, bool)
    np.put_along_axis(keep, np.argsort(-exact, axis=1, kind="stable")[:, : wanted.k], True, axis=1)
    np.put_along_axis(keep, np.argsort(-exact, axis=0, kind="stable")[: wanted.columns], True, axis=0)
    keep |= exact >= (2.0 if wanted.floor is None else wanted.floor)
    keep[found.query, found.group] = False
    assert not keep.any()
    np.testing.assert_array_equal(found.cosine, exact[found.query, found.group])
