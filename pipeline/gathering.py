"""What a search found of every real image, put together for the evidence on persons: both arms, training first."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from operators import hubs, vectors
from operators.controlled import Images, Matches
from operators.hubs import HubConfig, Occurrence, Screening
from operators.persons import CONTROL, MEMBER, Duplicates, label_codes
from operators.statistic import image_hashes
from operators.tables import CLOSEST, NEIGHBOURS, PAIRS, WITHIN_PAIRS
from pipeline.calibrate import set_columns
from pipeline.embed import unit_store
from pipeline.face_units import face_numbers, face_units
from pipeline.search import results
from pipeline.second import opinions
from pipeline.stage import Run

ARMS = ("training", "control")
"""Order of the rows here: `MEMBER`, then `CONTROL`."""
LISTED, FURTHER = "faces that images are listed for", "further faces of the images"
"""Groups of faces where all faces of an image are audited."""
QUALITIES = ("norm", "sharpness", "face_size")


class Gathered(NamedTuple):
    """All that is known of the images of both arms."""

    columns: pa.Table
    """Key, identity and qualities, training first."""
    starts: tuple[int, int]
    """First row of each arm."""
    images: Images
    release_row_N: NDArray[np.int64]
    """The release image that comes closest; -1 for none."""
    pairs: Duplicates
    group_names: list[str]
    screening: Screening
    occurrence: Occurrence


def gather(run: Run) -> Gathered:
    """Read what the search found of every image of both arms."""
    config = run.config.assess.evidence
    tables = [set_columns(run, arm, ("key", "identity", *QUALITIES)) for arm in ARMS]
    columns = pa.concat_tables(tables).combine_chunks()
    starts, rows = (0, tables[0].num_rows), columns.num_rows
    release_N, release_row_N = _best(run, "coverage", starts, rows)
    occurrence = _occurrence(run, starts, rows)
    qualities = {name: _logarithm(columns[name]) for name in QUALITIES}
    group_N, names = _groups(run, config.group)
    arm_N = np.repeat(np.array([MEMBER, CONTROL], np.int8), [len(table) for table in tables])
    matches = [Matches(release_N, *_others(run, starts, rows))]
    for other in opinions(run):
        matches.append(Matches(_best(other, "coverage", starts, rows)[0], *_others(other, starts, rows)))
    return Gathered(
        columns=columns,
        starts=starts,
        images=Images(
            label_N=np.concatenate([label_codes(table["identity"]) for table in tables]),
            arm_N=arm_N,
            hash_N=image_hashes(columns["key"].to_pylist(), config.seed),
            group_N=group_N,
            matches=matches,
        ),
        release_row_N=release_row_N,
        pairs=_duplicates(run, starts) if config.near_duplicates else Duplicates.none(),
        group_names=names,
        screening=hubs.screen(occurrence, qualities, HubConfig()),
        occurrence=occurrence,
    )


def _others(run: Run, starts: tuple[int, int], rows: int) -> Iterator[NDArray[np.float64] | None]:
    """The best match of every image in the anchor set and in the placebo set, where there are such sets."""
    for role in ("anchor", "placebo"):
        there = role in run.config.sets.given()
        yield _best(run, f"{role}-training-control", starts, rows)[0] if there else None


def _best(run: Run, title: str, starts: tuple[int, int], rows: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The best cosine of every image of both arms with the queries of a search, and the row of that query."""
    cosine_N, row_N = np.full(rows, np.nan), np.full(rows, -1, np.int64)
    for block in results(run, CLOSEST, title):
        first = block.filter(pc.equal(block["rank"], 1))
        for arm, start in zip(ARMS, starts, strict=True):
            own = first.filter(pc.equal(first["arm"], arm))
            at = start + own["gallery_row"].to_numpy()
            cosine_N[at], row_N[at] = own["cosine"].to_numpy(), own["release_row"].to_numpy()
    return cosine_N, row_N


def _duplicates(run: Run, starts: tuple[int, int]) -> Duplicates:
    """Pairs of real images that may show one person, in rows of both arms."""
    found: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]] = []
    for arm, start in zip(ARMS, starts, strict=True):
        for block in results(run, WITHIN_PAIRS, f"within-{arm}"):
            sides = (start + block[name].to_numpy() for name in ("row", "other_row"))
            found.append((*sides, block["cosine"].to_numpy()))
    for block in results(run, PAIRS, "control-training"):
        left, right = starts[1] + block["release_row"].to_numpy(), block["gallery_row"].to_numpy()
        found.append((left, right, block["cosine"].to_numpy()))
    columns = zip(*found, strict=True)
    return Duplicates(*(np.concatenate(column) for column in columns)) if found else Duplicates.none()


def _occurrence(run: Run, starts: tuple[int, int], rows: int) -> Occurrence:
    """How often each image of both arms is among the nearest of a release image."""
    parts = []
    for block in results(run, NEIGHBOURS):
        chosen = block.filter(pc.is_in(block["arm"], pa.array(ARMS)))
        offset = np.where(pc.equal(chosen["arm"], ARMS[1]).to_numpy(zero_copy_only=False), starts[1], 0)
        columns = chosen["release_row"].to_numpy(), chosen["gallery_row"].to_numpy() + offset
        parts.append(hubs.k_occurrence(*columns, chosen["cosine"].to_numpy(), HubConfig().k, rows))
    return hubs.summed(parts, rows)


def _logarithm(column: pa.ChunkedArray) -> NDArray[np.float64]:
    """Logarithms of positive values; NaN where null or zero."""
    value_N = np.asarray(column.cast(pa.float64()).to_numpy(), np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(value_N > 0, np.log(value_N), np.nan)


def _groups(run: Run, attribute: str | None) -> tuple[NDArray[np.int64] | None, list[str]]:
    """The group of every image as a number, and the groups' names.

    Further faces (`faces.several=all`) are a group of their own: they are smaller and poorer than those that images are
    listed for, so an arm with more of them is not like the other.
    """
    several = run.config.faces.several == "all"
    if attribute is None and not several:
        return None, []
    labels: list[str | None] = []
    for arm in ARMS:
        units = face_units(run, arm)
        members = pa.Table.from_struct_array(units["members"].combine_chunks().flatten())
        own = [
            LISTED if attribute is None else dict(one or ()).get(attribute) for one in members["attributes"].to_pylist()
        ]
        faces = face_numbers(run, arm).tolist() if several else [1] * len(own)
        labels += [label if face == 1 else FURTHER for label, face in zip(own, faces, strict=True)]
    if attribute is None and FURTHER not in labels:
        return None, []
    codes_N = label_codes(labels)
    return codes_N, [label for label in dict.fromkeys(labels) if label is not None]


def stored_vectors(run: Run, starts: tuple[int, int]) -> Callable[[NDArray[np.int64]], NDArray[np.float16]]:
    """A function from rows of both arms to stored vectors, for the few components that have to be cut."""

    def chosen(rows_M: NDArray[np.int64]) -> NDArray[np.float16]:
        store = unit_store(run)
        found: dict[int, NDArray[np.float16]] = {}
        for arm, start in zip(ARMS, starts, strict=True):
            for unit in face_units(run, arm).select(["unit", "first_row", "members"]).to_pylist():
                first = start + unit["first_row"]
                wanted = rows_M[(rows_M >= first) & (rows_M < first + len(unit["members"]))]
                if len(wanted):
                    column = store.read(unit["unit"], ["vector"])["vector"].take(pa.array(wanted - first))
                    found.update(zip(wanted.tolist(), vectors.from_arrow(column.combine_chunks()), strict=True))
        return np.stack([found[row] for row in rows_M.tolist()])

    return chosen
