"""The catalogue: what is known of published releases and real sets, and what follows from it for an audit.

One YAML file per set, in `seeds/catalogue` of a checkout and in `pipeline/catalogue_entries` of an installed package.
The schema is `pipeline.entries`. Nothing here changes an audit by itself: it fills in what the user left open, and
warns.
"""

import difflib
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from operators.errors import ConfigError
from pipeline import entrytext
from pipeline.entries import EmbedderFaces, Entry, Size, build, read

FOLDERS = (Path(__file__).parent / "catalogue_entries", Path(__file__).parents[1] / "seeds" / "catalogue")
"""Where the files are looked for: in an installed package, in a checkout."""
EMBEDDERS = "embedders.yaml"
"""Beside the entries: which sets each shipped model was trained on."""
ROUND = 0.05
"""A rounded number may be off by this part of itself."""
CONSEQUENCE = (
    "Its cosines are not alike for people whom it saw and others, so members and controls cannot be compared fairly: "
    "take an embedder that saw neither, or a control set that it saw as well."
)


def entries() -> list[Entry]:
    """All entries, releases first, each kind in the order of its names.

    Raises
    ------
    ConfigError
        If a file does not follow the schema, or names a set that has no entry.
    """
    return list(_all().values())


def entry(name: str) -> Entry:
    """The entry called `name`; case does not matter, nor whether it is written with - or _.

    Raises
    ------
    ConfigError
        If there is none; it names the nearest ones.
    """
    known = _all()
    plain = re.sub(r"[-\s]+", "_", name.strip().lower())
    if plain in known:
        return known[plain]
    also = {re.sub(r"[-\s]+", "_", other.lower()): e.name for e in known.values() for other in (e.title, *e.aliases)}
    near = dict.fromkeys(
        {**also, **dict.fromkeys(known)}.get(one) or one
        for one in difflib.get_close_matches(plain, [*known, *also], n=4, cutoff=0.5)
    )
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    raise ConfigError(f"catalogue has no entry {name!r}. {hint}`unveil catalogue` lists all {len(known)}.")


def load(folder: Path) -> dict[str, Entry]:
    """The entries of a folder, by their names; ConfigError if one is not as it must be."""
    files = [path for path in sorted(folder.glob("*.yaml")) if path.name != EMBEDDERS]
    found = {path.stem: build(Entry, read(path), path) for path in files}
    for path in files:
        one = found[path.stem]
        if one.name != path.stem:
            raise ConfigError(f"{path}: name must be that of the file. Got {one.name!r}.")
        for key, other in _references(one):
            if other not in found:
                raise ConfigError(f"{path}: {key} names {other!r}, which has no entry. Add {other}.yaml or correct it.")
    return dict(sorted(found.items(), key=lambda item: (item[1].kind != "release", item[0])))


def embedder_sets(name: str, training_data: str = "") -> list[str]:
    """Names of the sets that an embedder was trained on, as far as they are known.

    Parameters
    ----------
    name
        Its name. Those of the shipped model files are looked up; they win over the text.
    training_data
        What its file says in plain words; sets are recognised by their names. What stands in brackets is passed over,
        since there a file says what a set is a part of.
    """
    listed = _embedders().get(name)
    return list(listed.sets) if listed else mentioned(training_data)


def mentioned(text: str) -> list[str]:
    """Sets whose name, title or other name stands in `text`, in the order of the text."""
    text = re.sub(r"\([^)]*\)", " ", text).lower()
    places: dict[str, int] = {}
    called = [(other.lower(), e.name) for e in _all().values() for other in (e.name, e.title, *e.aliases)]
    for other, name in sorted(called, key=lambda pair: -len(pair[0])):
        for match in re.finditer(rf"(?<![\w-]){re.escape(other)}(?![\w-])", text):
            places[name] = min(places.get(name, len(text)), match.start())
        text = re.sub(rf"(?<![\w-]){re.escape(other)}(?![\w-])", lambda m: "\0" * len(m.group()), text)
    return sorted(places, key=lambda name: places[name])


def overlaps(model_training_data: Sequence[str], set_name: str) -> list[str]:
    """Warnings, one for each set that an embedder was trained on and that holds people of `set_name`.

    Parameters
    ----------
    model_training_data
        Names in the catalogue (`embedder_sets`), or plain words in which they stand.
    set_name
        The audited set. For a release: the sets that its generator saw.

    Raises
    ------
    ConfigError
        If `set_name` is not in the catalogue.
    """
    audited, known = entry(set_name), _all()
    saw = audited.generator.trained_on if audited.generator else ()
    targets = dict.fromkeys(one.set for one in saw) if audited.generator else {audited.name: None}
    named = ([one] if one in known else mentioned(one) for one in model_training_data)
    warnings = []
    for trained in dict.fromkeys(name for names in named for name in names):
        found = [(*how, target) for target in targets for how in [_relation(trained, target)] if how]
        if found:
            _, how, target = min(found, key=lambda one: one[0])
            role = f"was seen by the generator of {audited.title}" if audited.generator else "is the audited set"
            warnings.append(
                f"The embedder was trained on {known[trained].title}{how}. {known[target].title} {role}. {CONSEQUENCE}"
            )
    return warnings


def version(one: Entry, images: int | None = None) -> Size:
    """The published version whose number of images is nearest (by ratio); without a number, the main one."""
    sized = [size for size in one.sizes if size.images is not None]
    if images is None or images < 1 or not sized:
        return one.sizes[0]
    return min(sized, key=lambda size: abs(math.log(images / (size.images or 1))))


def differences(
    one: Entry,
    *,
    images: int | None = None,
    identities: int | None = None,
    format: str | None = None,
    pixels: tuple[int, int] | None = None,
) -> list[str]:
    """What a set that was found differs in from its entry, a plain sentence for each; none if it is as published.

    Parameters
    ----------
    one
        The entry.
    images, identities, format
        What the listing found; None: not known or not to be compared.
    pixels
        Width and height of its images, if all are alike.
    """
    size = version(one, images)
    said = []
    for what, found, stated in (("images", images, size.images), ("identities", identities, size.identities)):
        off = abs(found - stated) if found is not None and stated is not None else 0
        if found is None or stated is None or off <= (ROUND * stated if size.rounded else 0):
            continue
        about = "about " if size.rounded else ""
        said.append(
            f"{found:,} {what} were found, {off:,} {'fewer' if found < stated else 'more'} than the {about}{stated:,} "
            f"of {one.title} ({size.version})."
        )
    if format is not None and one.form.format is not None and format != one.form.format:
        said.append(f"The set is a {format}; {one.title} is published as {one.form.format}: this is a converted copy.")
    stated_pixels = (one.crop.width, one.crop.height)
    if pixels is not None and None not in stated_pixels and pixels != stated_pixels:
        said.append(
            f"The images are {pixels[0]} x {pixels[1]} pixels; those of {one.title} are "
            f"{stated_pixels[0]} x {stated_pixels[1]}: this is another version or a resized copy."
        )
    return said


def defaults(one: Entry) -> dict[str, str]:
    """Options that the entry implies where the user states none: `identity`, `mode`, and `format` if it is known."""
    known = {"identity": one.people.option, "mode": one.crop.mode}
    return {**({"format": one.form.format} if one.form.format else {}), **known}


def config_lines(one: Entry) -> str:
    """The YAML that audits a release, or that takes a real set into an audit."""
    return entrytext.config_lines(one, _all())


def text(one: Entry) -> str:
    """All that the catalogue says of a set, for the terminal: each fact with its certainty and source."""
    return entrytext.text(one, _all())


def table() -> str:
    """A line for each entry, for the terminal."""
    return entrytext.table(_all())


@functools.cache
def _all() -> Mapping[str, Entry]:
    return load(_folder())


@functools.cache
def _embedders() -> Mapping[str, EmbedderFaces]:
    path = _folder() / EMBEDDERS
    stated = read(path) if path.exists() else {}
    found = {str(name): build(EmbedderFaces, one, path, str(name)) for name, one in stated.items()}
    for name, one in found.items():
        for other in one.sets:
            if other not in _all():
                raise ConfigError(f"{path}: {name}.sets names {other!r}, which has no entry. Add it or correct it.")
    return found


def _folder() -> Path:
    return next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[-1])


def _references(one: Entry) -> Iterator[tuple[str, str]]:
    """Key and name of every other set that an entry names."""
    yield from (("generator.trained_on", t.set) for t in (one.generator.trained_on if one.generator else ()))
    yield from (("leakage.against", figure.against) for figure in one.leakage if figure.against)
    yield from (("relations", relation.set) for relation in one.relations)
    if one.audit:
        yield from (("audit.training", name) for name in one.audit.training)
        yield from (("audit.controls", arm.set) for arm in one.audit.controls)
        yield from (("audit.anchors", arm.set) for arm in one.audit.anchors)


def _wholes(name: str) -> dict[str, bool]:
    """The set itself and all sets that hold its people, each with: some way to it has no unverified step."""
    found, open_ends = {name: True}, [name]
    while open_ends:
        at = open_ends.pop()
        for relation in _all()[at].relations:
            sure = found[at] and relation.certainty != "unverified"
            if relation.kind != "shares_people" and sure > found.get(relation.set, -1):
                found[relation.set] = sure
                open_ends.append(relation.set)
    return found


def _relation(trained: str, target: str) -> tuple[int, str] | None:
    """How two sets overlap, closest first (0: the same), in words that follow the first one's title."""
    known, wide, other = _all(), _wholes(trained), _wholes(target)
    if trained == target:
        return 0, " itself"
    if target in wide:
        return 1, f", a part of {known[target].title}{_doubt(wide[target])}"
    if trained in other:
        return 2, f", which contains {known[target].title}{_doubt(other[trained])}"
    common = next((name for name in wide if name in other), None)
    if common:
        doubt = _doubt(wide[common] and other[common])
        return 3, f", taken from {known[common].title} as {known[target].title} was{doubt}"
    for here, there in ((wide, other), (other, wide)):
        for name in here:
            for relation in known[name].relations:
                if relation.kind == "shares_people" and relation.set in there:
                    sure = here[name] and there[relation.set] and relation.certainty != "unverified"
                    pair = f"{known[name].title} shares people with {known[relation.set].title}"
                    return 4, f", which may hold some of the same people as {known[target].title}: {pair}{_doubt(sure)}"
    return None


def _doubt(sure: bool) -> str:
    return "" if sure else " (unverified)"
