"""Encrypted tables against plain ones: write, read and size of a unit's embeddings; `make bench-encryption`.

The same table (2,000 images, 512 numbers in fp16 each, keys and qualities) goes through `cluster.storage.Store` with
and without a key, by turns. The peer is pyarrow's own encryption without a store: what the library costs, and what the
store adds. Medians; the last line is JSON.
"""

import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe

from cluster.encrypted_parts import Cipher
from cluster.storage import Store

IMAGES, WIDTH = 2000, 512
ROUNDS = int(os.environ.get("ROUNDS", "15" if os.environ.get("QUICK") == "1" else "40"))


def unit() -> pa.Table:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((IMAGES, WIDTH))
    stored = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    return pa.table(
        {
            "key": [f"{at:07d}/image-{at}.jpg" for at in range(IMAGES)],
            "norm": rng.random(IMAGES),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), WIDTH),
        }
    )


def medians(actions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds of each action, by turns."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(ROUNDS):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


def library(table: pa.Table, key: bytes | None) -> bytes:
    sink = io.BytesIO()
    options = pe.create_encryption_properties(key, aad_prefix=b"part", store_aad_prefix=False) if key else None
    pq.write_table(table, sink, compression="zstd", encryption_properties=options)
    return sink.getvalue()


def library_read(data: bytes, key: bytes | None) -> pa.Table:
    options = pe.create_decryption_properties(key, aad_prefix=b"part") if key else None
    return pq.read_table(pa.BufferReader(data), decryption_properties=options)


def main() -> None:
    os.environ["UNVEIL_BENCH_KEY"] = os.urandom(32).hex()
    table, key = unit(), os.urandom(32)
    with tempfile.TemporaryDirectory() as folder:
        plain = Store(Path(folder, "plain")).child("unit")
        locked = Store(Path(folder, "locked"), Cipher.at(Path(folder, "locked"), "env:UNVEIL_BENCH_KEY"))
        locked.make_key()
        locked = locked.child("unit")
        bare = {name: library(table, one) for name, one in (("plain", None), ("encrypted", key))}
        found = medians(
            {
                "store, plain: write": lambda: plain.commit("a", table, contract="c", key="k"),
                "store, encrypted: write": lambda: locked.commit("a", table, contract="c", key="k"),
                "store, plain: read": lambda: plain.read("a"),
                "store, encrypted: read": lambda: locked.read("a"),
                "pyarrow, plain: write": lambda: library(table, None),
                "pyarrow, encrypted: write": lambda: library(table, key),
                "pyarrow, plain: read": lambda: library_read(bare["plain"], None),
                "pyarrow, encrypted: read": lambda: library_read(bare["encrypted"], key),
            }
        )
        sizes = [store.root.joinpath("a.parquet").stat().st_size for store in (plain, locked)]
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, pyarrow {pa.__version__}, {ROUNDS} rounds")
    print(f"{IMAGES:,} images, {WIDTH} x fp16: {sizes[0]:,} bytes plain, {sizes[1]:,} encrypted")
    for name, value in found.items():
        print(f"{name:<28} {value:8.2f} ms")
    ratios = {
        f"{what}_{how}": round(found[f"{what}, encrypted: {how}"] / found[f"{what}, plain: {how}"], 3)
        for what in ("store", "pyarrow")
        for how in ("write", "read")
    }
    print(json.dumps({"bench": "encryption", **ratios, "size": round(sizes[1] / sizes[0], 4)}))


if __name__ == "__main__":
    main()
