"""Networks as TensorFlow Lite stores them; TensorFlow is not needed.

A .tflite file is a FlatBuffer (https://flatbuffers.dev/internals) under the schema of TensorFlow Lite (schema.fbs,
Apache-2.0): tables whose fields are found by number through a table of offsets, all little-endian. Only what a plain
fp32 network of one graph needs is read; the numbers of the fields stand beside their use.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from operators.errors import ModelError

IDENTIFIER = b"TFL3"
OPERATORS = {
    0: "ADD",
    3: "CONV_2D",
    4: "DEPTHWISE_CONV_2D",
    18: "MUL",
    19: "RELU",
    22: "RESHAPE",
    41: "SUB",
    101: "ABS",
}
"""Built-in operators that are read, by their number in the schema."""
OPTIONS: Mapping[str, tuple[tuple[str, int, str, int], ...]] = {
    "CONV_2D": (
        ("same", 0, "b", 0),
        ("step_x", 1, "i", 0),
        ("step_y", 2, "i", 0),
        ("activation", 3, "b", 0),
        ("dilation_x", 4, "i", 1),
        ("dilation_y", 5, "i", 1),
    ),
    "DEPTHWISE_CONV_2D": (
        ("same", 0, "b", 0),
        ("step_x", 1, "i", 0),
        ("step_y", 2, "i", 0),
        ("multiplier", 3, "i", 0),
        ("activation", 4, "b", 0),
        ("dilation_x", 5, "i", 1),
        ("dilation_y", 6, "i", 1),
    ),
    "ADD": (("activation", 0, "b", 0),),
    "SUB": (("activation", 0, "b", 0),),
    "MUL": (("activation", 0, "b", 0),),
}
"""Fields of an operator's options: name, number, type as in `struct`, default. `same` is 0 for SAME padding."""
TYPES = {0: np.dtype("<f4"), 2: np.dtype("<i4")}
"""Of tensors, by their number in the schema."""


@dataclass(frozen=True, slots=True)
class Step:
    """One operator: its name, its options, and the tensors that it reads and writes, by number."""

    operator: str
    options: dict[str, int]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Graph:
    """A network: shapes of all tensors, the values of those that are constant, the steps in order, input and output."""

    shapes: tuple[tuple[int, ...], ...]
    values: dict[int, NDArray[Any]]
    steps: tuple[Step, ...]
    input: int
    output: int


def read_graph(content: bytes) -> Graph:
    """The network in the bytes of a .tflite file; ModelError if it is none, or holds what is not read here."""
    if content[4:8] != IDENTIFIER:
        raise ModelError("tflite: not a TensorFlow Lite file (it does not say TFL3).")
    try:
        return _graph(_Table(content, _Table(content, 0).follow(0)))
    except (struct.error, IndexError, KeyError, ValueError) as error:
        raise ModelError(
            f"tflite: cannot be read as a plain fp32 network ({type(error).__name__}: {error})."
        ) from error


def _graph(model: "_Table") -> Graph:
    # Model: 1 operator codes, 2 graphs, 4 buffers. SubGraph: 0 tensors, 1 inputs, 2 outputs, 3 operators.
    # Tensor: 0 shape, 1 type, 2 buffer. OperatorCode: 0 builtin as a byte, 3 builtin; the larger counts.
    codes = [max(code.number(0, "b"), code.number(3, "i")) for code in model.tables(1)]
    graphs, buffers = model.tables(2), [buffer.values(0, "B") for buffer in model.tables(4)]
    (inputs,), (outputs,) = (graphs[0].values(field, "i") for field in (1, 2))
    if len(graphs) != 1:
        raise ModelError(f"tflite: one graph can be read, the file has {len(graphs)}.")
    shapes, values = [], {}
    for at, tensor in enumerate(graphs[0].tables(0)):
        shapes.append(tuple(tensor.values(0, "i")))
        kind, data = TYPES[tensor.number(1, "b")], bytes(buffers[tensor.number(2, "I")])
        if data:
            values[at] = np.frombuffer(data, kind).reshape(shapes[-1])
    steps = tuple(_step(operator, codes) for operator in graphs[0].tables(3))
    return Graph(tuple(shapes), values, steps, int(inputs), int(outputs))


def _step(operator: "_Table", codes: list[int]) -> Step:
    # Operator: 0 number of its code, 1 inputs, 2 outputs, 4 options
    name = OPERATORS.get(codes[operator.number(0, "I")])
    if name is None:
        raise ModelError(f"tflite: built-in operator {codes[operator.number(0, 'I')]} is not read here.")
    options = operator.table(4)
    fields = {field: options.number(number, kind, default) for field, number, kind, default in OPTIONS.get(name, ())}
    return Step(name, fields, tuple(operator.values(1, "i")), tuple(operator.values(2, "i")))


class _Table:
    """A table of a FlatBuffer. Its first four bytes say how far back its offsets stand: two bytes for each field."""

    def __init__(self, content: bytes, at: int) -> None:
        self.content, self.at = content, at

    def number(self, field: int, kind: str, default: int = 0) -> int:
        """A field that holds a number; what is not stored has its default."""
        place = self._place(field)
        return int(struct.unpack_from("<" + kind, self.content, place)[0]) if place else default

    def table(self, field: int) -> "_Table":
        """A field that holds a table."""
        return _Table(self.content, self.follow(self._place(field)))

    def values(self, field: int, kind: str) -> list[int]:
        """A field that holds numbers."""
        if not (place := self._place(field)):
            return []
        start = self.follow(place)
        count = struct.unpack_from("<I", self.content, start)[0]
        return list(struct.unpack_from(f"<{count}{kind}", self.content, start + 4))

    def tables(self, field: int) -> list["_Table"]:
        """A field that holds tables."""
        place = self.follow(self._place(field))
        count = struct.unpack_from("<I", self.content, place)[0]
        return [_Table(self.content, self.follow(place + 4 + 4 * at)) for at in range(count)]

    def follow(self, place: int) -> int:
        """Where the offset at `place` leads to."""
        return place + int(struct.unpack_from("<I", self.content, place)[0])

    def _place(self, field: int) -> int:
        """Where a field is, 0 if it is not stored."""
        offsets = self.at - struct.unpack_from("<i", self.content, self.at)[0]
        if 4 + 2 * field >= struct.unpack_from("<H", self.content, offsets)[0]:
            return 0
        back = struct.unpack_from("<H", self.content, offsets + 4 + 2 * field)[0]
        return self.at + int(back) if back else 0
