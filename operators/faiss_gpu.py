"""faiss on a CUDA device: all that calls the device, for `operators/flat_gpu.py`.

Names and arguments are those of the packages faiss-gpu 1.15.1 and faiss-gpu-cu12 1.14.1. The index stores fp32 or
fp16; bf16 goes through the function under the index (`bfKnn`), which takes all three types. Sums are in fp32 in all of
them: faiss leaves cuBLAS's math mode at its default, which is not TF32, and disallows sums in reduced precision.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from operators.flat_gpu import Lists


class FaissDevice:
    """The device on which torch works, or the first one."""

    limit = 2048
    """Longest list that faiss' selection makes (GPU_MAX_SELECTION_K)."""

    def __init__(self) -> None:
        import faiss
        import torch

        self.faiss: Any = faiss
        self.resources = self.faiss.StandardGpuResources()
        self.torch_sees_it = torch.cuda.is_available()
        self.number = torch.cuda.current_device() if self.torch_sees_it else 0
        self.name: str = torch.cuda.get_device_name(self.number) if self.torch_sees_it else f"cuda:{self.number}"
        self.dtypes: tuple[str, ...] = ("float16", "float32")
        if hasattr(faiss, "DistanceDataType_BF16") and self.resources.supportsBFloat16(self.number):
            self.dtypes += ("bfloat16",)

    def hold(self, low_ND: NDArray[np.float32], dtype: str) -> Any:
        """See `Device`."""
        faiss = self.faiss
        if dtype == "bfloat16":
            return self._bfloat16(low_ND)
        options = faiss.GpuIndexFlatConfig()
        options.device = self.number
        options.useFloat16 = dtype == "float16"
        if hasattr(options, "use_cuvs"):
            options.use_cuvs = False  # another implementation, whose sums are not known here
        index = faiss.GpuIndexFlatIP(self.resources, low_ND.shape[1], options)
        index.add(low_ND)
        return index

    def search(self, held: Any, queries_QD: NDArray[np.float32], k: int, dtype: str) -> Lists:
        """See `Device`."""
        faiss = self.faiss
        if dtype != "bfloat16":
            scores, index = held.search(queries_QD, k)
            return scores, index
        queries = self._bfloat16(queries_QD)
        scores, index = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        given = faiss.GpuDistanceParams()
        given.metric, given.k, given.dims, given.device = faiss.METRIC_INNER_PRODUCT, k, held.shape[1], self.number
        given.vectors, given.numVectors = faiss.cast_integer_to_void_ptr(held.data_ptr()), len(held)
        given.queries, given.numQueries = faiss.cast_integer_to_void_ptr(queries.data_ptr()), len(queries)
        given.vectorType = given.queryType = faiss.DistanceDataType_BF16
        given.outDistances, given.outIndices = faiss.swig_ptr(scores), faiss.swig_ptr(index)
        given.outIndicesType = faiss.IndicesDataType_I64
        if hasattr(given, "use_cuvs"):
            given.use_cuvs = False
        faiss.bfKnn(self.resources, given)
        return scores, index

    def _bfloat16(self, low_ND: NDArray[np.float32]) -> Any:
        """A tensor, on the device where torch can reach it; faiss copies it from the host otherwise."""
        import torch

        tensor = torch.from_numpy(low_ND).to(torch.bfloat16)
        if not self.torch_sees_it:
            return tensor
        tensor = tensor.to(torch.device("cuda", self.number))
        torch.cuda.synchronize(self.number)  # faiss reads it on a stream of its own
        return tensor


def faiss_device() -> FaissDevice | None:
    """The device of `FaissDevice`; None where faiss sees none, or was built without support for one."""
    import faiss

    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() < 1:
        return None  # any other call would end the process
    return FaissDevice()
