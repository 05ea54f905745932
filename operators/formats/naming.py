"""What the records of tables are called: by a column of names if all are there and differ, else by file and row."""

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from operators.errors import FormatError
from operators.formats.indexes import relative
from operators.formats.listing import name_fault
from operators.formats.members import printable
from operators.sources import File

TEXT_BYTES = 4096
"""A name, label or attribute is not longer."""

UNSAFE = r"[\x00-\x1f\x7f\\]|^/|(^|/)\.\.(/|$)|^$"
"""Names that `name_fault` may refuse."""

SHARD = re.compile(r"^(.*?)-?(\d{5})-of-(\d{5})")


def stem_of(path: str) -> str:
    """What rows without a name are called after: the file's path without its ending."""
    folder, slash, name = path.rpartition("/")
    return printable(folder + slash + (name.rpartition(".")[0] or name))


def one_ending(files: Iterable[str]) -> None:
    """FormatError if two files differ in their endings only, so that their rows would be called alike."""
    seen: dict[str, str] = {}
    for path in files:
        other = seen.setdefault(stem_of(path), path)
        if other != path:
            raise FormatError(f"{other} and {path} differ in their endings only. Rename one, or read them apart.")


def missing_shards(files: Iterable[File]) -> list[str]:
    """What names like `train-00003-of-00010` say of files that are not there."""
    found: dict[tuple[str, str], set[str]] = {}
    for file in files:
        if match := SHARD.match(file.path):
            found.setdefault((match[1], match[3]), set()).add(match[2])
    return [
        f"{len(there):,} of {int(total):,} files of {stem or 'this set'} are there, by their names; get the others, or "
        f"name those that you mean in `uri`"
        for (stem, total), there in sorted(found.items())
        if len(there) < int(total)
    ]


def may_name(column: pa.Array) -> bool:
    """Whether a column can name its records: all are there, differ and are short; codes are looked at before texts."""
    if column.null_count or not len(column):
        return not column.null_count
    if pa.types.is_dictionary(column.type):
        used = np.unique(column.indices.to_numpy())
        if len(used) * 2 < len(column) and len(column) > 1000:
            return False
        longest = pc.max(pc.binary_length(column.dictionary)).as_py() or 0
    elif pa.types.is_integer(column.type):
        return True
    else:
        longest = pc.max(pc.binary_length(column)).as_py() or 0
    return longest <= TEXT_BYTES


def plain_names(column: pa.Array) -> pa.Array:
    """A column of names as plain text; bytes that are not UTF-8 are escaped."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_integer(column.type):
        return column.cast(pa.large_string())
    raw = column.cast(pa.large_binary())
    try:
        return raw.cast(pa.large_string())  # which checks that it is UTF-8
    except pa.ArrowInvalid:
        return pa.array([one.decode("utf-8", "backslashreplace") for one in raw.to_pylist()], pa.large_string())


def plain(names: pa.ChunkedArray) -> bool:
    """Whether nothing in any of the names (large strings) needs a closer look: a quick test that nearly all sets pass.

    No name is empty, has a control character, a backslash or two dots, or begins as paths of a machine do.
    """
    return names.null_count == 0 and all(map(_plain, names.chunks))


def _plain(names: pa.Array) -> bool:
    _, offsets, data = names.buffers()
    if not len(names):
        return True
    offsets_N = np.frombuffer(offsets, np.int64)[names.offset : names.offset + len(names) + 1]
    first, last = int(offsets_N[0]), int(offsets_N[-1])
    if int((offsets_N[1:] - offsets_N[:-1]).min()) < 2:
        return False
    signs = np.frombuffer(data, np.uint8)[:last]
    used = signs[first:]
    if int(used.min()) < 32 or bool((used == 0x7F).any()) or bool((used == 0x5C).any()) or b".." in used.tobytes():
        return False
    begins = signs[offsets_N[:-1]]
    leads = (begins == 0x2F) | (begins == 0x2E) | (begins == 0x7E) | (signs[offsets_N[:-1] + 1] == 0x3A)
    leads |= (begins >= 0x80) & bool((used == 0x3A).any())  # a sign of several bytes, perhaps with a colon behind it
    return not bool(leads.any())


def tidied(names: pa.ChunkedArray) -> pa.ChunkedArray:
    """Names with `/` between folders, without the folder of the publisher's machine that they share."""
    if plain(names):
        return names
    if pc.any(pc.match_substring(names, "\\")).as_py() and not pc.any(pc.match_substring(names, "/")).as_py():
        names = pc.replace_substring(names, "\\", "/")
    if pc.any(pc.match_substring_regex(names, r"^(/|\.\.?/|~|.:)")).as_py():
        names = pa.chunked_array([pa.array(relative(names.to_pylist()), pa.large_string())])
    return names


def unique(names: pa.ChunkedArray) -> bool:
    """Whether all names are there and differ."""
    return bool(names.null_count == 0 and pc.count_distinct(names).as_py() == len(names))


def joined(folders: Sequence[str | None], names: pa.ChunkedArray) -> pa.ChunkedArray:
    """Names with a folder before each."""
    before = pa.array([printable(one or "") for one in folders], pa.large_string())
    slash = pa.scalar("/", pa.large_string())
    return pa.chunked_array([pc.binary_join_element_wise(before, names.combine_chunks(), slash)])


def written(*parts: "str | pa.Array") -> pa.Array:
    """Texts (N) one after another, some of them the same for all records; null where one is null."""
    large = [pa.scalar(one, pa.large_string()) if isinstance(one, str) else one for one in parts]
    return pc.binary_join_element_wise(*large, pa.scalar("", pa.large_string()))


def faults(names: pa.ChunkedArray) -> Iterator[tuple[int, str]]:
    """Rows whose names must not be used, and why."""
    if plain(names):
        return
    for at in pc.indices_nonzero(pc.match_substring_regex(names, UNSAFE)).to_pylist():
        fault = name_fault(names[at].as_py())
        if fault is not None:
            yield at, f"{fault}; give the record a plain relative name"
