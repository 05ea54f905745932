"""Networks as dlib stores them in .dat files; dlib is not needed.

dlib writes a network as a stream without names or offsets, so a reader must know every field of every layer. The
formats used here are those of dlib's headers `serialize.h`, `float_details.h`, `cuda/tensor.h`, `dnn/core.h` and
`dnn/layers.h` (https://github.com/davisking/dlib, Boost Software License):

    integer   one control byte (low four bits: how many bytes follow, top bit: negative), then these, lowest first
    real      two integers m and e, meaning m * 2^e
    text      an integer (its length) and the characters
    tensor    the version 2, four sizes, then little-endian fp32
    alias     the version 1 and four sizes: a window into a tensor, which holds filters first, biases after

A network nests, each layer holding the one below it, so all versions come first and then the layers from the input
upwards, each with its own fields and the state that training left. `read_network` reads all of it and refuses bytes
left over.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from operators.errors import ModelError

Array: TypeAlias = NDArray[np.float32]

FIELDS = {
    "con_4": "tensor integer*7 alias*2 real*4",
    "affine_": "tensor alias*2 integer",
    "relu_": "",
    "add_prev_": "",
    "max_pool_2": "integer*6",
    "avg_pool_2": "integer*6",
    "fc_2": "integer*2 tensor alias*2 integer real*4",
}
"""Fields of each layer, by the version name that it begins with."""
STATE = "flag*3 tensor*3"
"""What follows every layer: three flags of training and its gradients and outputs, which are empty in shipped files."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: its version name, its numbers in order, its parameters and the windows into these."""

    kind: str
    numbers: tuple[int, ...] = ()
    parameters: Array = field(default_factory=lambda: np.zeros(0, np.float32))
    windows: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Network:
    """The layers from the input upwards, the side of the square RGB input in pixels, and its mean colour."""

    pixels: int
    mean_rgb: tuple[float, ...]
    layers: tuple[Layer, ...]


class _Cursor:
    """A place in the stream; every method reads one value and moves on."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.at = 0

    def take(self, count: int) -> bytes:
        part = self.content[self.at : self.at + count]
        if len(part) < count:
            raise ModelError(f"dlib network: ends at byte {len(self.content)} in the middle of a value. Get it again.")
        self.at += count
        return part

    def integer(self) -> int:
        start = self.at
        control = self.take(1)[0]
        if control & 0x70 or not 1 <= control & 0x0F <= 8:
            raise ModelError(f"dlib network: no integer at byte {start} (control byte {control:#04x}).")
        size = int.from_bytes(self.take(control & 0x0F), "little")
        return -size if control & 0x80 else size

    def real(self) -> float:
        mantissa, exponent = self.integer(), self.integer()
        if exponent >= 32_000:
            raise ModelError(f"dlib network: the number before byte {self.at} is infinite or not a number.")
        return float(np.ldexp(float(mantissa), exponent))

    def text(self) -> str:
        start, length = self.at, self.integer()
        if not 0 < length <= 64:
            raise ModelError(f"dlib network: no layer name at byte {start} (length {length}).")
        return self.take(length).decode("ascii", "replace")

    def flag(self) -> int:
        return int(self.take(1) == b"1")

    def alias(self) -> tuple[int, ...]:
        return self.sizes(version=1)

    def tensor(self) -> Array:
        sizes = self.sizes(version=2)
        count = int(np.prod(sizes))
        return np.frombuffer(self.take(4 * count), "<f4").astype(np.float32)

    def sizes(self, *, version: int) -> tuple[int, ...]:
        start, found = self.at, self.integer()
        sizes = tuple(self.integer() for _ in range(4))
        if found != version or min(sizes) < 0:
            raise ModelError(f"dlib network: no tensor of version {version} at byte {start} ({found}, {sizes}).")
        return sizes

    def fields(self, plan: str) -> Iterator[tuple[str, Any]]:
        for part in plan.split():
            kind, _, times = part.partition("*")
            for _ in range(int(times or 1)):
                yield kind, getattr(self, kind)()


def read_network(content: bytes) -> Network:
    """The network in the bytes of a .dat file.

    Raises
    ------
    ModelError
        If the bytes are not a metric-learning network of dlib, or not one of the layers known here.
    """
    cursor = _Cursor(content)
    cursor.integer()
    _expect("loss_metric_2", cursor.text())
    cursor.real(), cursor.real()  # margin and distance threshold of the training loss
    while cursor.integer() != 3:  # versions of the layers above the first: 2 for a layer, 1 for a tag or a skip
        pass
    _expect("input_rgb_image_sized", cursor.text())
    mean = tuple(cursor.real() for _ in range(3))
    rows, columns = cursor.integer(), cursor.integer()
    if rows != columns:
        raise ModelError(f"dlib network: input is {rows} x {columns} pixels; only square inputs are known here.")
    layers = [_layer(cursor)]
    cursor.integer()  # only the first layer holds the input's sample expansion factor
    while cursor.at < len(content):
        layers.append(_layer(cursor))
    return Network(rows, mean, tuple(layers))


def _expect(name: str, found: str) -> None:
    if found != name:
        raise ModelError(f"dlib network: {name} must stand where {found!r} does. Only this kind of network is known.")


def _layer(cursor: _Cursor) -> Layer:
    start, kind = cursor.at, cursor.text()
    if kind not in FIELDS:
        raise ModelError(f"dlib network: layer {kind!r} at byte {start} is not known; known are {', '.join(FIELDS)}.")
    read = list(cursor.fields(FIELDS[kind]))
    if any(name == "tensor" and value.size for name, value in cursor.fields(STATE)):
        raise ModelError(f"dlib network: layer {kind!r} at byte {start} keeps a state of training. Clean it in dlib.")
    return Layer(
        kind,
        tuple(value for name, value in read if name == "integer"),
        next((value for name, value in read if name == "tensor"), np.zeros(0, np.float32)),
        tuple(value for name, value in read if name == "alias"),
    )
