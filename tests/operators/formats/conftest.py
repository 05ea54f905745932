"""What the tests of all forms share: damaged files, and the check that a form stands them.

`tests/benchmarks/fuzz_formats.py` uses the same two functions on many more inputs.
"""

import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest

from operators.errors import FormatError
from operators.formats import SetConfig, module, reader
from operators.formats.listing import Listing, part_of
from operators.formats.reading import Reader
from operators.sources import open_source

PIECE = 1 << 16
COMPARED = 2
"""Records that cannot be read in one piece of which it is seen that they cannot be read as a stream: each may hang."""
MEMORY = 256 * 2**20
"""Bytes by which the peak memory of the process may grow over one damaged file."""
NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]


class Outcome(NamedTuple):
    """What a form made of one set."""

    refused: str | None
    """The FormatError's text, or None."""
    listed: int
    """Entries."""
    rejected: int
    """Entries with an error, and those that could not be read."""
    read: int
    """Bytes of all images."""
    seconds: float
    peak_bytes: int
    """Peak memory of this process so far."""


class Hang(BaseException):
    """Not an Exception, so that nothing on the way takes it for bad data."""


def damaged(data: bytes, seed: int, count: int) -> Iterator[bytes]:
    """`count` damaged copies of `data`, the same for the same `seed`.

    Half of the places are near the beginning or the end, where formats keep what they find their way by.
    """
    rng = random.Random(seed)
    for _ in range(count):
        made = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
            _damage(rng, made)
        yield bytes(made)


def _damage(rng: random.Random, made: bytearray) -> None:
    length = len(made)
    near = min(length, 512)
    ends = (rng.randrange(near + 1), length - rng.randrange(near + 1))
    at = rng.choice((rng.randrange(length + 1), rng.randrange(length + 1), *ends))
    span = rng.choice((1, 2, 4, 8, 64, 512, 4096))
    match rng.randrange(8):
        case 0 | 1 if at < length:
            made[at] ^= 1 << rng.randrange(8)
        case 2 if at < length:
            made[at] = rng.randrange(256)
        case 3 | 4:
            width = rng.choice((1, 2, 4, 8))
            number = rng.choice(NUMBERS) % 256**width
            made[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
        case 5:
            del made[at : at + span]
        case 6:
            made[at:at] = made[at : at + span] if rng.random() < 0.5 else rng.randbytes(span)
        case _ if rng.random() < 0.5:
            del made[at:]
        case _:
            other = rng.randrange(length + 1)
            made[at : at + span] = made[other : other + span]


def stands(form: str, uri: Path, seconds: float = 5.0, max_bytes: int = 64 * 2**20, **options: Any) -> Outcome:
    """Recognise, list and read everything at `uri`, a file or folder, in the form called `form`.

    Listing may end in a FormatError, and opening or reading a record in an OSError. Any other exception passes, and an
    AssertionError says that it took more than `seconds`, memory (`MEMORY`) or `max_bytes` of image bytes, or that keys
    are not unique. `options` are those of the set (`SetConfig`).
    """
    before, start = _peak(), time.perf_counter()
    chosen = SetConfig(uri=str(uri), format=form, **options)
    refused, listing, read, failed = None, None, 0, 0
    with _alarm(seconds):
        _recognise(form, chosen)
        try:
            listing = module(form).listing(open_source(chosen.uri), chosen)
        except FormatError as fault:
            refused = str(fault)
            assert refused, "a refusal says why"
        if listing is not None:
            read, failed = _read(form, chosen, listing, max_bytes)
    taken = time.perf_counter() - start
    assert taken <= seconds, f"{form} took {taken:.1f} s"
    assert _peak() - before <= MEMORY, f"{form} took {(_peak() - before) / 2**20:.0f} MiB"
    return Outcome(refused, len(listing.entries) if listing else 0, failed, read, taken, _peak())


def _recognise(form: str, options: SetConfig) -> None:
    source = open_source(options.uri)
    assert module(form).recognises(source, list(source.files())) in (True, False)


def _read(form: str, options: SetConfig, listing: Listing, max_bytes: int) -> tuple[int, int]:
    """Bytes read, and records that cannot be used."""
    keys = [entry.key for entry in listing.entries]
    assert len(set(keys)) == len(keys), f"{form}: keys are not unique"
    "".join(keys).encode()  # what cannot be stored must not get this far
    read = failed = 0
    with reader(form, options.uri) as opened:
        at_once = _at_once(opened, listing, max_bytes)
        for row, entry in enumerate(listing.entries):
            if entry.error is not None:
                failed += 1
                continue
            place = entry.place if entry.place is not None else entry.key
            whole = _whole(opened, place, max_bytes)
            assert at_once is None or at_once[row] == whole, f"{form}: {place} differs among others"
            failed += whole is None
            if whole is None and failed > COMPARED:
                continue
            parts: list[bytes] | None = []
            try:
                with opened.open(place, opened.version(place)) as file:
                    while parts is not None and (piece := file.read(PIECE)):
                        read += len(piece)
                        assert read <= max_bytes, f"{form} gave more than {max_bytes} bytes"
                        parts.append(piece)
            except OSError:
                parts = None
            assert whole == (None if parts is None else b"".join(parts)), f"{form}: {place} differs in one piece"
            assert whole is None or opened.read(place, None, 6) == whole[:7], f"{form}: {place} is not bounded"
    return read, failed


def _at_once(opened: Reader, listing: Listing, limit: int) -> list[bytes | None] | None:
    """All records as they come one after another, where the form has a way of its own to do that."""
    if part_of(listing.entries) is None:
        return None
    found = [None if isinstance(one, OSError) else bytes(one) for one in opened.each(listing.entries, limit)]
    assert len(found) == len(listing.entries)
    assert all(one is None for one, entry in zip(found, listing.entries, strict=True) if entry.error is not None)
    return found


def _whole(opened: Reader, place: str, limit: int) -> bytes | None:
    """A record in one piece, None if it cannot be read."""
    try:
        return opened.read(place, opened.version(place), limit)
    except OSError:
        return None


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise Hang after `seconds`, in the main thread."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang(f"still busy after {seconds} s")

    earlier = signal.signal(signal.SIGALRM, ring)
    remaining = signal.setitimer(signal.ITIMER_REAL, seconds)[0]
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, remaining)
        signal.signal(signal.SIGALRM, earlier)


@pytest.fixture(scope="session")
def mutants() -> Callable[[bytes, int, int], Iterator[bytes]]:
    """`mutants(data, seed, count)`: damaged copies of `data`, the same for the same seed."""
    return damaged


@pytest.fixture(scope="session")
def survives() -> Callable[..., Outcome]:
    """`survives(form, uri, seconds, **options of the set)`: lists and reads everything; see `stands`."""
    return stands
