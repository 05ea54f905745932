"""Ready embeddings as JSON lines, one object each, as replication packages publish them.

`{"identity": "n000001", "image_name": "0001_01.jpg", "embedding": [0.01234, ...]}`, with the names of `columns`.
"""

import json
import math
from collections.abc import Iterator, Mapping
from io import BufferedIOBase
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from operators.errors import FormatError
from operators.formats.columns import FILES, LABELS, VECTORS
from operators.formats.indexes import Entries
from operators.formats.listing import Bound
from operators.formats.naming import stem_of
from operators.formats.tabular import text_of
from operators.sources import File, Source

if TYPE_CHECKING:
    from operators.formats import SetConfig

LINE_BYTES = 2**22
"""A longer line is no record."""
NO_VECTOR = "is no JSON object with a vector"


def vector_of(record: Any, column: str | None) -> tuple[str, list[Any]] | None:
    """The name and the numbers of the vector of one object, or None."""
    if not isinstance(record, dict):
        return None
    lower = {name.lower(): name for name in record}
    names = [column] if column is not None else [lower[one] for one in VECTORS if one in lower]
    for name in names:
        value = record.get(name)
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
            value = value[0]
        if isinstance(value, list):
            return name, value
    return None


def numbers(values: list[Any]) -> NDArray[np.float32]:
    """A vector; ValueError if something in it is no number."""
    if not all(type(one) in (int, float) for one in values):
        raise ValueError("its vector holds something that is no number")
    with np.errstate(over="ignore"):
        return np.array([_bounded(one) for one in values], np.float64).astype("<f4")


def _bounded(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def parsed(line: bytes) -> Any:
    """One line as JSON; ValueError if it is none."""
    try:
        return json.loads(line)
    except RecursionError as fault:
        raise ValueError("nested too deeply") from fault


def is_lines(source: Source, file: File) -> bool:
    """Whether the first line is an object with a vector."""
    try:
        with source.open(file.path) as stream:
            line = stream.readline(LINE_BYTES)
            found = vector_of(parsed(line), None) if line.lstrip()[:1] == b"{" else None
            return found is not None and len(numbers(found[1])) > 1
    except (OSError, ValueError):
        return False


def enter(source: Source, file: File, entries: Entries, options: "SetConfig", lost: int = 0) -> int:
    """Make the entries of one file, of which a line that is no record is a rejected row; return how many are.

    Parameters
    ----------
    source, file
        The file.
    entries
        Those of the files before it; its own are added.
    options
        The set's.
    lost
        How many of `entries` cannot be read.

    Raises
    ------
    FormatError
        If the file cannot be read, or has too many lines, or too many that are no records.
    """
    try:
        if file.error is not None:
            raise OSError(file.error)
        with source.open(file.path) as stream:
            before, faults = len(entries.made), 0
            bound = Bound(source.uri, options.limits.max_records, before, lost)
            for at, count, line in _lines(stream):
                _enter(entries, file, (at, count), line, options)
                faults += entries.made[-1].error is not None
                bound(len(entries.made) - before - faults, faults, NO_VECTOR)
            return faults
    except OSError as fault:
        raise FormatError(f"{source.uri}: {file.path} cannot be read ({fault.strerror or fault}).") from fault


def _lines(stream: BufferedIOBase) -> Iterator[tuple[int, int, bytes]]:
    """Place, number and bytes of each line that is not empty; of too long ones only the beginning."""
    at = count = 0
    while line := stream.readline(LINE_BYTES):
        start, at = at, at + len(line)
        rest = line
        while len(line) == LINE_BYTES and rest and not rest.endswith(b"\n"):
            rest = stream.readline(LINE_BYTES)
            at += len(rest)
        if line.strip():
            yield start, count, line
        count += 1


def _enter(entries: Entries, file: File, where: tuple[int, int], line: bytes, options: "SetConfig") -> None:
    at, count = where
    unnamed = f"{stem_of(file.path)}-{count:08d}"
    try:
        if len(line) == LINE_BYTES:
            raise ValueError(f"longer than {LINE_BYTES:,} bytes")
        record = parsed(line)
        found = vector_of(record, options.column)
        if found is None:
            raise ValueError(f"no list called {options.column or ', '.join(VECTORS[:4])}")
    except ValueError as fault:
        entries.add(unnamed, 0, error=f"line {count + 1:,} {NO_VECTOR} ({fault}); mend the file")
        return
    texts = {name: text for name, one in record.items() if (text := _scalar(one)) is not None}
    label = _first(texts, LABELS)
    name = _first(texts, FILES)
    if name is not None and label is not None and "/" not in name:
        name = f"{label}/{name}"
    place = json.dumps([file.path, "json", found[0], at, len(line)])
    entries.add(name or unnamed, 4 * len(found[1]), place=place, label=label, attributes=texts)


def _scalar(value: object) -> str | None:
    if not isinstance(value, str | int | float):
        return None
    try:
        return text_of(value)
    except (ValueError, OverflowError):  # a number of thousands of digits
        return None


def _first(texts: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    lower = {name.lower(): text for name, text in texts.items()}
    return next((lower[name] for name in names if name in lower), None)


def read(stream: BufferedIOBase, column: str, at: int, size: int) -> NDArray[np.float32]:
    """The vector of the line at `at`; OSError if it is not there."""
    stream.seek(at)
    line = stream.read(min(size, LINE_BYTES))
    try:
        found = vector_of(parsed(line), column)
        if found is None or len(line) < size:
            raise ValueError("the file has changed")
        return numbers(found[1])
    except ValueError as fault:
        raise OSError(f"its line holds no vector: {fault}") from fault
