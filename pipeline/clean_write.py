"""The release without what was removed, written anew: image bytes as they are, in another form if asked for."""

import csv
import hashlib
import io
import logging
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.faults import StorageError
from cluster.storage import private_folder, write_private
from operators.formats import reader
from operators.formats.reading import Reader
from operators.tables import UNITS
from pipeline.clean_names import Names, class_numbers
from pipeline.clean_sinks import SINKS, Picture, Sink
from pipeline.progress import Progress
from pipeline.spreadsheet import safe_csv
from pipeline.stage import Run

if TYPE_CHECKING:
    from pipeline.clean import CleanConfig

log = logging.getLogger(__name__)

ASIDE = ".aside-release-"
NOT_WRITTEN = pa.schema({"path": pa.string(), "reason": pa.string()})


def rewrite(
    run: Run,
    members: pa.Table,
    about: Mapping[str, Any],
    options: "CleanConfig",
    out: Path,
    note: Callable[[Mapping[str, Any]], None],
) -> None:
    """Write the images of `members` to the new folder `release` of `out`; what could not be copied is told, not hidden.

    Beside it, `written.csv` lists every image (path, identity, key in the old release), for use as a list file, and
    `not_written.csv` what is missing and why: it could not be read, or has changed since it was listed.

    Parameters
    ----------
    run
        The audit.
    members
        Members of the release, as its units list them, that stay.
    about
        `format`, `uri` and `anonymous` of the release.
    options
        `write` and `shard_images`.
    out
        A folder of our own.
    note
        Takes counts of what was written, before it becomes visible.

    Raises
    ------
    StorageError
        If something cannot be written; nothing stands under the final name then.
    """
    for left in out.glob(f"{ASIDE}*"):  # of killed runs
        shutil.rmtree(left)
    aside = private_folder(out / f"{ASIDE}{uuid.uuid4().hex}")
    try:
        with reader(about["format"], about["uri"], about["anonymous"]) as opened:
            written, lost = _copied(run, members, opened, aside, options)
        _tell(out, written, lost, note)
        os.replace(aside, out / "release")
    except OSError as error:
        raise StorageError(
            f"{out}: cannot be written ({error.strerror}). Free space or choose another clean.out."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    log.info("clean: %d images written to %s", len(written), out / "release")


def _tell(
    out: Path, written: "Written", lost: list[tuple[str, str]], note: Callable[[Mapping[str, Any]], None]
) -> None:
    """The lists of what was written and what was not, and their counts."""
    write_private(out / "written.csv", list_file(("path", "identity", "key"), [row[:3] for row in written]))
    columns = [[row[at] for row in lost] for at in range(2)]
    write_private(out / "not_written.csv", safe_csv(pa.table(columns, schema=NOT_WRITTEN)))
    if lost:
        log.warning("clean: %d images that stay could not be copied; not_written.csv says why", len(lost))
    note(
        {
            "images": len(written),
            "bytes": sum(row[3] for row in written),
            "renamed": sum(row[0] != row[2] for row in written),
            "not_written": dict(sorted(Counter(reason for _, reason in lost).items())),
        }
    )


Written = list[tuple[str, str | None, str, int]]
"""Path, identity, key and bytes."""


def _copied(
    run: Run, members: pa.Table, opened: Reader, aside: Path, options: "CleanConfig"
) -> tuple[Written, list[tuple[str, str]]]:
    """Copy image by image; what was written, and what was not and why."""
    identities = members["identity"].to_pylist()
    numbers = class_numbers(identities)
    names = Names(dotless=options.write == "webdataset")
    sink: Sink = SINKS[options.write](aside, {"shard_images": options.shard_images, "labels": len(numbers)})
    limit, progress = run.config.sets.release.limits.max_member_bytes, Progress("clean", len(members), "images")
    written: Written = []
    lost: list[tuple[str, str]] = []
    columns = [members[name].to_pylist() for name in ("key", "digest", "error", "place", "version")]
    try:
        for identity, key, digest, error, place, version in zip(identities, *columns, strict=True):
            data = _bytes(opened, (place or key, version), digest, error, limit)
            progress.add(1, int(isinstance(data, str)))
            if isinstance(data, str):
                lost.append((key, data))
                continue
            name = names(key, digest, data)
            label = None if identity is None else numbers[identity]
            try:
                sink.add(Picture(name=name, key=key, identity=identity, label=label, data=data))
            except ValueError as fault:
                lost.append((key, str(fault)))
                continue
            written.append((name, identity, key, len(data)))
    finally:
        sink.close()
        progress.end()
    return written, lost


def _bytes(
    opened: Reader, at: tuple[str, str | None], digest: str | None, error: str | None, limit: int
) -> bytes | str:
    """The image as it was listed, or why it cannot be had."""
    if error is not None or digest is None:
        return "could not be read when the release was listed"
    try:
        with opened.open(*at) as file:
            data = file.read(limit + 1)
    except OSError as fault:
        return f"cannot be read: {fault.strerror or 'its place is gone or damaged'}"
    if len(data) > limit:
        return f"more than {limit:,} bytes (limits.max_member_bytes of the set)"
    return data if hashlib.sha256(data).hexdigest() == digest else "has changed since it was audited"


def kept_list(run: Run, kept_N: NDArray[np.bool_]) -> bytes:
    """What stays as a list file: path, identity, and the attributes that the configuration asked for."""
    units = run.table("scan", "release", UNITS)
    members = pa.Table.from_struct_array(units["members"].combine_chunks().flatten()).filter(pa.array(kept_N))
    names = [name for name in run.config.sets.release.attributes if name not in ("path", "identity")]
    attributes = [dict(pairs or ()) for pairs in members["attributes"].to_pylist()] if names else [{}] * len(members)
    columns = (members["key"].to_pylist(), members["identity"].to_pylist(), attributes)
    rows = [(key, who, *(own.get(name) for name in names)) for key, who, own in zip(*columns, strict=True)]
    return list_file(("path", "identity", *names), rows)


def list_file(names: Sequence[str], rows: Sequence[Sequence[str | None]]) -> bytes:
    """A CSV that `list_file` of a set reads: texts as they are, all quoted, so not for a spreadsheet."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerow(names)
    writer.writerows(rows)
    return text.getvalue().encode()
