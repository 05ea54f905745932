"""verify: distrust a finished run, and check a random sample of it by another path.

embed    sampled images, rejected ones included, are prepared and embedded again from their files: no Ray, no resume.
         The outcome must be the same, and the vector nearly so.
search   exact cosines of sampled release images with every gallery image, and of sampled gallery images with every
         release image, by a plain fp64 product: no engine, no shards, no merge. What is committed for these images must
         be the same rows in the same order, bit for bit (`pipeline/recheck.py`).

It reads the committed tables and the files as they are, computes in this process, and changes nothing but the manifest.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cluster.faults import IncompleteTable
from operators import vectors
from operators.encoder import Encoder
from operators.face_rows import picked
from operators.faces import FacePreparation
from operators.formats import FORMATS
from operators.records import embeddings, unnest
from operators.tables import UNITS
from pipeline.embed import closed, unit_store
from pipeline.face_units import face_numbers, face_units
from pipeline.recheck import Difference, recheck
from pipeline.sealing import verify_seal
from pipeline.stage import Run

log = logging.getLogger(__name__)

TOLERANCE = 0.999
"""Least cosine of a stored vector with that of the same image embedded again. Inference is not bit-stable across
machines. On 96 demo faces the lowest was 0.9998 with landmarks moved by 0.01 pixels and 0.9994 with a tenth of the
values of a face moved by one grey level; no other image of the 96 reached 0.94."""

SAME = ("key", "identity", "digest", "status")
"""Columns of embeddings that must be the same when an image is embedded again."""

CHANGED = "its file has changed or gone since it was embedded"


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyConfig:
    """How much of a finished run `verify` checks."""

    rows: int = 64
    """Release images, and images of each gallery set, whose comparisons with all images of the other side are computed
    again; more than there are means all."""
    images: int = 64
    """Images of all sets that are prepared and embedded again; more than there are means all."""
    seed: int = 0
    """Another seed checks another sample."""

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("images", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}. Got {getattr(self, name)}.")


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What a verification has checked, and what it found different."""

    release_images: int = 0
    gallery_images: int = 0
    comparisons: int = 0
    images: int = 0
    bit_equal: int = 0
    cosines: list[float] = field(default_factory=list)
    """Of a stored vector with the new one, for every sampled image that has both."""
    differences: list[Difference] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """The outcome as the manifest records it; `lowest_cosine` is null if no sampled image was embedded."""
        return {
            "outcome": "different" if self.differences else "equal",
            "release_images": self.release_images,
            "gallery_images": self.gallery_images,
            "comparisons": self.comparisons,
            "images": self.images,
            "embedded": len(self.cosines),
            "bit_equal": self.bit_equal,
            "lowest_cosine": round(min(self.cosines), 6) if self.cosines else None,
            "differences": len(self.differences),
        }


def verify(run: Run) -> None:
    """Check a sample of the committed search and embeddings, and record the outcome in the manifest.

    Raises
    ------
    IncompleteTable
        If a stage has not run for sets, options and vectors as they are, a part is damaged, or anything differs.
    """
    verify_seal(run)
    run.ledger.stage("verify", {"outcome": "not finished"})
    outcome = Outcome()
    with run.timed("verify") as facts:
        for role in run.config.sets.given():
            closed(run, role, run.table("scan", role, UNITS))
        units = {role: face_units(run, role) for role in run.config.sets.given()}
        facts |= {"search": run.commit("search", "coverage").key, "seed": run.config.verify.seed}
        _verify_embed(run, units, outcome)
        if not outcome.differences:  # a search of other vectors would only repeat the finding
            again = recheck(run, run.config.verify.rows, run.config.verify.seed)
            outcome.release_images, outcome.gallery_images = again.release_images, again.gallery_images
            outcome.comparisons = again.comparisons
            outcome.differences += again.differences
        facts |= outcome.facts()
    if outcome.differences:
        _refuse(run, outcome.differences)
    sets = len(units.keys() - {"release", "placebo"})
    log.info(
        f"verify: {outcome.release_images:,} release images x {sets} sets and {outcome.gallery_images:,} "
        f"gallery images, {outcome.comparisons:,} comparisons recomputed exactly: equal to the bit; "
        f"{outcome.images:,} images prepared again: "
        f"{facts['embedded']:,} embedded, {outcome.bit_equal:,} of them bit-equal, lowest cosine "
        f"{facts['lowest_cosine']}, the others rejected alike"
    )


def _refuse(run: Run, differences: Sequence[Difference]) -> NoReturn:
    """Log the differences and raise the first."""
    for one in differences[:20]:
        log.error("verify: %s", one.what)
    more = f" ({len(differences):,} differences; the first 20 are in unveil.log)" if differences[1:] else ""
    raise IncompleteTable(f"{run.folder}: verification failed. {differences[0].what}{more}. {differences[0].remedy}")


def _verify_embed(run: Run, units: Mapping[str, pa.Table], outcome: Outcome) -> None:
    """Prepare and embed sampled images of all sets again, and compare with what is stored; ready vectors are not."""
    images = pa.array([name for name, form in FORMATS.items() if form.holds == "images"])
    listed = run.readable(pa.concat_tables(units.values()))
    listed = listed.filter(pc.is_in(listed["format"], images))
    if not listed.num_rows:
        return
    numbers = {role: face_numbers(run, role) for role in units}
    prepare, encoder = FacePreparation(run.config.faces, (run.config.embedder.alignment,)), Encoder(run.config.embedder)
    for unit, members_N in _image_sample(run, listed):
        stored = _stored(run, unit).take(pa.array(members_N))
        sample = UNITS.from_rows([unit | {"members": [unit["members"][member] for member in members_N.tolist()]}])
        rows_N = unit["first_row"] + members_N
        made = unnest(encoder(picked(prepare(sample), numbers[unit["set"]][rows_N])), "images")
        for row, what in zip(rows_N.tolist(), _again(stored, made, outcome), strict=True):
            if what is not None:
                remedy = "Run `unveil run` again." if what == CHANGED else _delete(run, unit)
                outcome.differences.append(Difference(f"embed: {unit['set']} row {row}: {what}", remedy))


def _delete(run: Run, unit: Mapping[str, Any]) -> str:
    """The remedy for embeddings that are wrong: the search that used them goes too, as it does not see them change."""
    return f"Delete {unit_store(run).address}/{unit['unit']}* and {run.folder / 'search'}, and run `unveil run` again."


def _image_sample(run: Run, units: pa.Table) -> Iterator[tuple[dict[str, Any], NDArray[np.int64]]]:
    """Units with sampled images, and the places (M,) of these among the unit's members."""
    options = run.config.verify
    sizes = pc.list_value_length(units["members"]).to_numpy()
    ends = np.cumsum(sizes, dtype=np.int64)
    rng = np.random.default_rng([options.seed, 1])
    chosen = np.sort(rng.choice(ends[-1], min(options.images, int(ends[-1])), replace=False))
    unit_of = np.searchsorted(ends, chosen, side="right")
    for at in np.unique(unit_of).tolist():
        yield units.slice(at, 1).to_pylist()[0], chosen[unit_of == at] - (ends - sizes)[at]


def _stored(run: Run, unit: Mapping[str, Any]) -> pa.Table:
    """The embeddings of a unit, a row for each of its images, or faces."""
    stored = embeddings(run.config.embedder.width).check(unit_store(run).read(unit["unit"]))
    if len(stored) != len(unit["members"]):
        counts = f"{len(unit['members'])} images listed, {len(stored)} embedded"
        raise IncompleteTable(f"unit {unit['unit']} of the {unit['set']} set: {counts}. {_delete(run, unit)}")
    return stored


def _again(stored: pa.Table, made: pa.Table, outcome: Outcome) -> Iterator[str | None]:
    """What is different for each of some images, None if nothing; counts them in the outcome."""
    old_N, new_N = (np.asarray(table["vector"].is_valid()) for table in (stored, made))
    both_N = old_N & new_N
    old_MD, new_MD = (vectors.from_arrow(table["vector"].filter(pa.array(both_N))) for table in (stored, made))
    cosine_N = np.where(old_N | new_N, -1.0, 1.0)
    cosine_N[both_N] = _cosines(old_MD, new_MD)
    outcome.images += len(both_N)
    outcome.bit_equal += int((old_MD.view(np.uint16) == new_MD.view(np.uint16)).all(axis=1).sum())
    outcome.cosines += cosine_N[both_N].tolist()
    for old, new, cosine in zip(*(t.select(SAME).to_pylist() for t in (stored, made)), cosine_N.tolist(), strict=True):
        unequal = [name for name in SAME if old[name] != new[name]]
        if "status" in unequal and new["status"] in ("changed", "unreadable"):
            yield CHANGED
        elif unequal:
            yield f"the stored {unequal[0]} is not that of the image embedded again"
        elif not cosine >= TOLERANCE:
            yield f"cosine {cosine:.6f} of the stored vector with the image embedded again, needed is {TOLERANCE}"
        else:
            yield None


def _cosines(left_MD: NDArray[np.float16], right_MD: NDArray[np.float16]) -> NDArray[np.float64]:
    """Cosine of row i with row i, whatever their lengths, shape (M,); -1 where there is none."""
    with np.errstate(invalid="ignore"):
        lengths = vectors.exact_cosines(left_MD, left_MD) * vectors.exact_cosines(right_MD, right_MD)
        return np.nan_to_num(vectors.exact_cosines(left_MD, right_MD) / np.sqrt(lengths), nan=-1.0)
