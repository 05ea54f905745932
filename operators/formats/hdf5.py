"""HDF5 files of images, through h5py: stacks of uint8 pixels, encoded images, or a dataset for each image in groups.

Known are (N, H, W, C), (N, C, H, W) and (N, H, W) stacks; (H, W, C), (C, H, W) and (H, W) images, as Idiap's Bob writes
them (`array`); encoded images as variable-length or one-dimensional uint8, or opaque scalars. Beside a stack may lie
datasets of its length with names, labels and attributes. Files of vectors, such as the `samples.h5` of Idiap's
generators, are of the form `vectors`.

Nothing outside the file is read: links to elsewhere, external and virtual storage are refused, and so are references
and filters that HDF5 would have to load code for. libhdf5 can be made to hang by a damaged file, so it runs in a child
process with limits (`operators.sandbox`), one for each thread that reads.
"""

import io
import itertools
import json
import threading
from collections.abc import Callable
from io import BufferedIOBase
from typing import TYPE_CHECKING, Any

from operators.errors import FormatError
from operators.formats.h5inside import FILES, InsideReader
from operators.formats.h5inside import listing as inside_listing
from operators.formats.h5inside import recognises as inside_recognises
from operators.formats.listing import Listing
from operators.formats.reading import Reader
from operators.sandbox import Fault, Sandbox
from operators.sources import File, Source

if TYPE_CHECKING:
    from operators.formats import SetConfig

SECONDS: dict[str, float] = {"recognises": 60.0, "listing": 1800.0, "read": 60.0}
"""Time limit of each task of the child."""
MEMORY_BYTES = 4 * 2**30
"""What the child may allocate."""
ROWS, BYTES = 64, 2**22
"""Rows of a stack that are fetched at once while they are read one after another, and about their bytes."""


class _Child:
    """What the child process does with the tasks that it is sent; its last reader stays open for the next one."""

    def __init__(self) -> None:
        self._number = -1
        self._reader: InsideReader | None = None

    def __call__(self, task: tuple[str, Source, Any]) -> Any:
        """The result of one task; refusals and faults of records are results, because an exception ends the child."""
        kind, source, about = task
        self._close()
        try:
            if kind == "recognises":
                return inside_recognises(source, about)
            return inside_listing(source, about)
        except FormatError as refusal:
            return refusal

    def read(self, source: Source, number: int, place: str, version: str | None, count: int) -> list[bytes] | OSError:
        """The bytes of `count` neighbouring rows for the parent's reader `number`, or why they cannot be read."""
        if self._reader is None or self._number != number:
            self._close()
            self._number, self._reader = number, InsideReader(source)
        try:
            if count > 1:
                return self._reader.several(place, version, count)
            with self._reader.open(place, version) as stream:
                return [stream.read()]
        except OSError as fault:
            return OSError(str(fault))

    def _close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader = None


def _serve() -> Callable[[tuple[str, Any, Any]], Any]:
    """What the child applies to every task."""
    child = _Child()

    def answer(task: tuple[str, Any, Any]) -> Any:
        kind, source, about = task
        return child.read(source, *about) if kind == "read" else child(task)

    return answer


_own = threading.local()


def _ask(kind: str, source: Source, about: Any) -> Any:
    """The child's answer to one task, or the Fault that it died of."""
    children: dict[str, Sandbox[Any, Any]] = _own.__dict__.setdefault("children", {})
    if kind not in children:
        children[kind] = Sandbox(_serve, seconds=SECONDS[kind], memory_bytes=MEMORY_BYTES)
    return next(iter(list(children[kind].map([(kind, source, about)]))))


def recognises(source: Source, files: "list[File]") -> bool:
    """Whether an HDF5 file has an image among the first objects in it."""
    some = [file for file in files if FILES.search(file.path) or source.single is not None][:4]
    return any(_begins(source, file) for file in some) and _ask("recognises", source, some) is True


def _begins(source: Source, file: File) -> bool:
    try:
        with source.open(file.path) as stream:
            return stream.read(8) == b"\x89HDF\r\n\x1a\n"
    except OSError:
        return False


def listing(source: Source, options: "SetConfig") -> Listing:
    """All images of all HDF5 files, named by datasets beside them, else by group, dataset and row.

    Raises
    ------
    FormatError
        If there is no HDF5 file, the only one is damaged, none holds an image, or h5py is missing.
    """
    answer = _ask("listing", source, options)
    if isinstance(answer, FormatError):
        raise answer
    if isinstance(answer, Fault):
        raise FormatError(f"{source.uri}: a file is damaged: on reading it, {answer.reason}. Get it again.")
    made: Listing = answer
    return made


_numbers = itertools.count()


class Hdf5Reader(Reader):
    """Opens images of HDF5 files."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._number = next(_numbers)
        self._kept: tuple[str, int, list[bytes]] = ("", 0, [])
        """The dataset, as the beginning of places; the first row, and the rows from there on."""
        self._largest = BYTES
        self._alone = False
        """Rows could not be fetched together: one among them is damaged, or too large."""

    def path(self, place: str) -> str:
        """The HDF5 file."""
        return str(json.loads(place)[0])

    def open(self, place: str, version: str | None = None) -> BufferedIOBase:
        """The image of the dataset and row `place`, as PPM or PGM if it is pixels; OSError if it cannot be read."""
        return io.BytesIO(self._fetched(place, version, 1)[0])

    def read(self, place: str, version: str | None, limit: int) -> bytes:
        """As `open`, at most `limit` + 1 bytes; neighbouring rows are fetched together."""
        dataset, _, last = place.rpartition(" ")
        row = int(last[:-1]) if last[:-1].isdecimal() else -1
        before, first, rows = self._kept
        if dataset != before or not 0 <= row - first < len(rows):
            follows = dataset == before and row == first + len(rows) and not self._alone
            self._kept = dataset, row + 1, []  # if it cannot be read
            rows = self._fetched(place, version, min(ROWS, BYTES // self._largest) if follows and row >= 0 else 1)
            first, self._largest = row, max(1, *map(len, rows))
            self._kept = dataset, row, rows if row >= 0 else []
        return rows[row - first][: limit + 1]

    def _fetched(self, place: str, version: str | None, count: int) -> list[bytes]:
        """The row of `place` and up to `count` - 1 after it; that row alone where one of the others has a fault."""
        answer = _ask("read", self.source, (self._number, place, version, max(1, count)))
        if count > 1 and not (isinstance(answer, list) and answer):
            self._alone = True
            return self._fetched(place, version, 1)
        if isinstance(answer, OSError):
            raise answer
        if isinstance(answer, Fault):
            raise OSError(f"on reading it, {answer.reason}: the file is damaged; get it again")
        rows: list[bytes] = answer
        return rows

    def close(self) -> None:
        """Forget what was fetched."""
        self._kept = "", 0, []
        super().close()
