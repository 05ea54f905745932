"""WebDataset: tar shards in which members of one name are one sample (`0001.jpg`, `0001.cls`, `0001.json`).

Names are split as the `webdataset` library does, at the first dot after the folders. Members of a sample may stand
anywhere in its shard. The key is the image's name in the shard; names that occur in several shards get the shard's name
before them. The label is what `.cls` holds, attributes are the fields of `.json` (`a.b` for nested ones), and `cls` and
`txt` are those members' texts.
"""

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from typing import TYPE_CHECKING, Any

import numpy as np

from operators.formats import IDENTITIES
from operators.formats.listing import Listing
from operators.formats.members import Gathered, printable, tidy
from operators.formats.tarheaders import Members, TarMember
from operators.formats.tars import UNUSABLE, TarReader, begun, content, form_of, sample_of
from operators.sources import File, Source

if TYPE_CHECKING:
    from operators.formats import SetConfig

SIDECARS = {"cls": 4096, "json": 2**20, "txt": 2**16}
"""Members that describe a sample, and the bytes that they may have."""
TWICE = "its sample has two members of the same kind (.cls, .json or .txt); leave one"
_AS_WRITTEN: dict[str, Any] = {"parse_int": str, "parse_float": str, "parse_constant": str}
"""Numbers as texts, so that none is rounded or too long."""


@dataclass(slots=True)
class _Sample:
    """What the sidecars of one sample say."""

    label: str | None = None
    attributes: dict[str, str] | None = None
    error: str | None = None
    seen: int = 0
    """A bit for each kind of sidecar."""

    def joined(self, other: "_Sample") -> "_Sample":
        """What both say; an error if both say the same kind of thing."""
        attributes = (self.attributes or {}) | (other.attributes or {})
        error = self.error or other.error or (TWICE if self.seen & other.seen else None)
        return _Sample(self.label if other.label is None else other.label, attributes or None, error)


def recognises(source: Source, files: "list[File]") -> bool:
    """Whether the files hold a tar archive in which images have `.cls` or `.json` members of their name."""
    return form_of(source, files) == "webdataset"


def listing(source: Source, options: "SetConfig") -> Listing:
    """All images of the shards.

    Raises
    ------
    FormatError
        If a shard is missing, cut short, damaged or no tar archive, or there is no image.
    """
    chosen, gathered = begun(source, options, prefixed=False)
    names = {*options.attributes, options.identity.removeprefix("attribute:")} - set(IDENTITIES)
    wanted = {"cls"} & names if options.identity not in ("auto", "label") else {"cls"}
    wanted |= {"txt"} & names
    wanted |= {"json"} if names else set()
    for file in chosen:
        with content(source, file, gathered, options) as opened:
            _gather(opened, file.path, gathered, wanted, names)
    return gathered.listing()


def _gather(file: BufferedIOBase, path: str, gathered: Gathered, wanted: set[str], names: set[str]) -> None:
    """Add the images of one shard; OSError if it is damaged."""
    images, errors = _Images(), {}
    described = array("q")
    members = Members(file)
    for member in members:
        name = tidy(member.name)
        if member.kind == "folder":
            continue
        sample, ending = sample_of(name)
        images.go_to(sample)
        if member.kind == "file" and ending in SIDECARS and not name.rpartition("/")[2].startswith("._"):
            described.append(hash(sample))
            if ending in wanted:
                _describe(images.about(sample), file, member, ending, names)
        elif gathered.passes(name, member.kind if member.kind != "file" else None):
            if member.kind in UNUSABLE:
                errors[len(images.names)] = UNUSABLE[member.kind]
            images.add(name, member)
    quoted = json.dumps(path)
    for at, (name, said) in enumerate(images.described()):
        place, error = f"[{quoted},{images.starts[at]},{images.sizes[at]}]", errors.get(at) or said.error
        gathered.add(path, name, images.sizes[at], place, error, (said.label, said.attributes or {}))
    alone = np.setdiff1d(np.frombuffer(described, np.int64), np.frombuffer(images.samples, np.int64))
    gathered.unlisted["sample without an image"] += len(alone)
    if members.note is not None:
        gathered.notes.append(f"{path} {members.note}.")


class _Images:
    """Images of one shard and what their sidecars say, small enough for a million where samples are not scattered."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.samples, self.starts, self.sizes = array("q"), array("q"), array("q")
        self._said: list[_Sample] = []
        self._current: str | None = None
        self._about: dict[str, _Sample] = {}
        self._shared: dict[tuple[str | None, str | None, int], _Sample] = {}

    def go_to(self, sample: str | None) -> None:
        """Members of `sample` follow; if those of another went before, their images get what is known of it."""
        if sample == self._current:
            return
        if len(self._said) < len(self.names):
            said = self._about.pop(self._current or "", None) or _Sample()
            if said.attributes is None:
                said = self._shared.setdefault((said.label, said.error, said.seen), said)
            self._said.extend([said] * (len(self.names) - len(self._said)))
        self._current = sample

    def about(self, sample: str) -> _Sample:
        """What is known of `sample`, to be added to."""
        return self._about.setdefault(sample, _Sample())

    def add(self, name: str, member: TarMember) -> None:
        """One image of the sample that `go_to` named."""
        self.names.append(name)
        self.samples.append(hash(self._current))
        self.starts.append(member.start)
        self.sizes.append(member.size)

    def described(self) -> Iterator[tuple[str, _Sample]]:
        """All images, with what their sidecars anywhere in the shard say."""
        self.go_to(None)
        for name, said in zip(self.names, self._said, strict=True):
            elsewhere = self._about.get(sample_of(name)[0]) if self._about else None
            yield name, said if elsewhere is None else said.joined(elsewhere)


def _describe(sample: _Sample, file: BufferedIOBase, member: TarMember, ending: str, names: set[str]) -> None:
    """Take the label or the attributes called `names` from one sidecar; what is wrong with it is the sample's error."""
    bit = 1 << list(SIDECARS).index(ending)
    if sample.seen & bit:
        sample.error = TWICE
        return
    sample.seen |= bit
    if member.size > SIDECARS[ending]:
        sample.error = f"its .{ending} member has {member.size:,} bytes; the limit is {SIDECARS[ending]:,}"
        return
    file.seek(member.start)
    try:
        text = file.read(member.size).decode().strip()
        said = {ending: text} if ending != "json" else dict(_fields(json.loads(text, **_AS_WRITTEN), ""))
    except (ValueError, RecursionError):
        sample.error = f"its .{ending} member is no {'JSON' if ending == 'json' else 'UTF-8'} text; mend it"
        return
    if ending == "cls":
        sample.label = printable(text) or None
    kept = {name: printable(said[name]) for name in names & said.keys()}
    if ending == "json":
        sample.attributes = kept | (sample.attributes or {})
    elif kept:
        sample.attributes = (sample.attributes or {}) | kept


def _fields(value: object, name: str) -> Iterator[tuple[str, str]]:
    """Names and texts of all fields but lists; `a.b` for a nested one."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _fields(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, bool):
        yield name, "true" if value else "false"
    elif isinstance(value, str):
        yield name, value


class WebDatasetReader(TarReader):
    """Opens members of shards by `[shard, place, size]`, as of any tar archive."""
