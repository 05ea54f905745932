"""Sets that exist only as another model's embeddings, taken into the audit's space by one linear map.

The map is fitted on the bridge: faces outside all audited sets that the audit's model embeds like any set, and whose
embeddings by the foreign model are given. All foreign sets go through the same map, so that training and control are
treated alike. A unit of a foreign set is named by its content and by the bridge: audits that share a store and differ
in the bridge never share translated vectors.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cluster.storage import Store
from operators import translation, vectors
from operators.errors import ConfigError, FormatError
from operators.formats import FORMATS
from operators.records import embeddings, unnest
from operators.tables import UNITS
from operators.translated_units import DEVICE, translated, usable, width_of
from operators.translation import Translation
from pipeline.progress import Progress
from pipeline.stage import Run, fingerprint

if TYPE_CHECKING:
    from pipeline.config import SetsConfig

log = logging.getLogger(__name__)

BRIDGES = BRIDGE, BRIDGE_VECTORS = ("bridge", "bridge_vectors")
"""Sets that are not compared: faces for the audit's model to embed, and the foreign model's embeddings of them."""

VERSION = "mean-free-1"
"""How the map is fitted; part of the names of translated units."""
MOST = 20_000
"""Faces that the map is fitted on."""
POOR = 0.1
"""A map that explains less than this share of where the bridge faces lie is warned of."""


def check_sets(sets: "SetsConfig") -> None:
    """ValueError if a foreign set has no bridge, or an arm goes through the map and the other does not."""
    foreign = sets.foreign()
    if foreign and (sets.bridge is None or sets.bridge_vectors is None):
        raise ValueError(
            f"{foreign[0]} is `foreign`, and nothing leads from there to the audit's embedder. Give sets.bridge "
            f"(faces outside the audited sets) and sets.bridge_vectors (the foreign model's embeddings of them)."
        )
    if sets.control is not None and sets.control.foreign != sets.training.foreign:
        own, other = ("training", "control") if sets.training.foreign else ("control", "training")
        raise ValueError(
            f"{own} is `foreign` and {other} is not: what sets them apart would be the map. Give both as embeddings "
            f"of one model."
        )
    if sets.bridge is not None and sets.bridge.foreign:
        raise ValueError("bridge is embedded by the audit's embedder. Remove `foreign` there.")


def check_embedders(sets: "SetsConfig", names: Sequence[str]) -> None:
    """ValueError if several embedders shall embed foreign sets: the bridge leads to one."""
    if names[1:] and sets.foreign():
        raise ValueError(
            f"embedders must name one model where a set is `foreign` (sets.{sets.foreign()[0]}): the bridge leads to "
            f"one. Got {', '.join(names)}."
        )


def refuse_unused(sets: "SetsConfig") -> None:
    """ConfigError if there is a bridge and no foreign set, which most likely was forgotten to be marked."""
    if not sets.foreign() and (sets.bridge is not None or sets.bridge_vectors is not None):
        raise ConfigError(
            "sets.bridge: no set is another model's embeddings. Set `foreign: true` for those that are, or remove "
            "the bridge."
        )


def unit_names(run: Run, role: str, names: Sequence[str]) -> list[str]:
    """Names of a set's units, given the digests of their content; those of foreign sets depend on the bridge too."""
    if role not in run.config.sets.foreign():
        return list(names)
    bridge = [fingerprint(run.table("scan", one, UNITS)["unit"].to_pylist()) for one in (BRIDGE, BRIDGE_VECTORS)]
    return [fingerprint(VERSION, name, *bridge) for name in names]


def check_form(run: Run, role: str, form: str) -> None:
    """FormatError if a set that should be another model's embeddings holds images."""
    if FORMATS[form].holds == "vectors":
        return
    if role == BRIDGE_VECTORS:
        raise FormatError(f"sets.{role}: holds images ({form}), needed are the foreign model's ready embeddings.")
    if role in run.config.sets.foreign():
        raise FormatError(
            f"sets.{role}: `foreign` is for ready embeddings, and this set holds images ({form}), which the audit's "
            f"model can embed. Remove `foreign`."
        )


def check_bridge(run: Run) -> None:
    """Check the scanned bridge before anything is embedded.

    Raises
    ------
    FormatError
        If its two sets have no key in common, or a face of it is in an audited set.
    """
    sides = {role: _members(run, role) for role in (BRIDGE, BRIDGE_VECTORS)}
    keys = [side["key"] for side in sides.values()]
    if not pc.any(pc.is_in(keys[0], keys[1])).as_py():
        raise FormatError(
            f"sets.bridge and sets.bridge_vectors have no key in common ({len(keys[0]):,} images, {len(keys[1]):,} "
            f"vectors). Name each vector as its image: the path below the set's folder, or its number there."
        )
    for role in run.config.sets.given():
        digests = _members(run, role)["digest"].drop_null()
        for name, side in sides.items():
            shared = pc.sum(pc.is_in(side["digest"].drop_null(), digests)).as_py()
            if shared:
                raise FormatError(
                    f"sets.{name} and sets.{role} share {shared:,} records: a map fitted on audited faces fits them "
                    f"better. Leave them out of the bridge, for example by a `list_file`."
                )


def _members(run: Run, role: str) -> pa.Table:
    """Key and digest of every listed record of a set."""
    members = run.table("scan", role, UNITS)["members"].combine_chunks().flatten()
    return pa.table({name: members.field(name) for name in ("key", "digest")})


def apart(run: Run, pending: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The `pending` units (UNITS) that are embedded as they are, and those to be translated afterwards."""
    chosen = pc.is_in(pending["set"], pa.array(run.config.sets.foreign(), pa.string()))
    return pending.filter(pc.invert(chosen)), pending.filter(chosen)


def translate_units(run: Run, units: pa.Table, store: Store) -> None:
    """Fit the map on the bridge, which is embedded in `store`, and commit the translated `units` there.

    Raises
    ------
    CapacityError
        If too few faces of the bridge have both embeddings.
    FormatError
        If the foreign vectors of the bridge cannot be read.
    """
    if units.num_rows == 0:
        return
    fitted, facts = fit(run, store)
    contract = embeddings(run.config.embedder.width)
    progress = Progress("translate", sum(map(len, units["members"])), "vectors")
    for at in range(units.num_rows):
        unit = units.slice(at, 1)
        images = contract.check(unnest(translated(unit, fitted), "images"))
        counts = {one["values"]: one["counts"] for one in images["status"].value_counts().to_pylist()}
        name = unit["unit"][0].as_py()
        about = {"status": counts, "device": DEVICE, "translation": facts}
        store.commit(name, images, contract=contract.contract, key=name, facts=about)
        progress.add(len(images), len(images) - counts.get("ok", 0))
    progress.end()


def fit(run: Run, store: Store) -> tuple[Translation, dict[str, Any]]:
    """The map from the foreign model to the audit's: a ridge regression where there are pairs enough, else a rotation.

    Both are centred, and the mean of the audit's model is left out: what a map cannot predict it leaves at the mean, so
    that all translated faces would be alike. From dlib's model to SFace 2 % of pairs of strangers were then over cosine
    0.6, and without the mean 0.03 %. The second result says what the map was fitted on and how well; `explained` is the
    share of the spread of the bridge faces about their mean that it predicts (of faces left out of the fit, for a ridge
    map). Raises as `translate_units`.
    """
    own_keys, own_ME = _own(run, store)
    foreign_keys, foreign_MD = _foreign(run)
    place = {key: at for at, key in enumerate(foreign_keys)}
    both = [(place[key], at) for at, key in enumerate(own_keys) if key in place]
    chosen = np.sort(np.random.default_rng(0).permutation(len(both))[:MOST])
    left, right = np.array(both, np.int64).reshape(-1, 2)[chosen].T
    source, target = foreign_MD[left], own_ME[right]
    enough = len(chosen) >= translation.ENOUGH * source.shape[1]
    fitted = (translation.fit_ridge if enough else translation.fit_rotation)(source, target, centred=True)
    mean_E, spread = target.mean(axis=0, dtype=np.float64), float(target.astype(np.float64).var(axis=0).sum())
    facts = {
        "kind": fitted.kind,
        "pairs": fitted.pairs,
        "error": round(fitted.error, 6),
        "explained": round(max(0.0, 1 - fitted.error**2 / spread), 6) if spread else 0.0,
        "source_width": int(source.shape[1]),
        "bridge_without_vector": len(own_keys) - len(both),
        "vectors_without_bridge": len(foreign_keys) - len(both),
    }
    log.info("embed: a %s map from the foreign model, fitted on %d faces: error %.4f", *_shown(facts))
    if len(both) < max(len(own_keys), len(foreign_keys)):
        counts = facts["bridge_without_vector"], facts["vectors_without_bridge"]
        log.warning("embed: %d faces of the bridge have no vector, %d vectors no embedded face", *counts)
    return replace(fitted, offset_E=fitted.offset_E - mean_E), facts


def _shown(facts: dict[str, Any]) -> tuple[str, int, float]:
    return facts["kind"], facts["pairs"], facts["error"]


def _own(run: Run, store: Store) -> tuple[list[str], NDArray[np.float16]]:
    """Keys and vectors of the bridge faces that the audit's model has embedded."""
    keys: list[str] = []
    found = [np.empty((0, run.config.embedder.width), np.float16)]
    for name in run.table("scan", BRIDGE, UNITS)["unit"].to_pylist():
        images = store.read(name, ["key", "vector"])
        good = images.filter(pc.is_valid(images["vector"]))
        keys += good["key"].to_pylist()
        found.append(vectors.from_arrow(good["vector"]))
    return keys, np.concatenate(found)


def _foreign(run: Run) -> tuple[list[str], NDArray[np.float16]]:
    """Keys and vectors of the bridge faces as the foreign model embeds them."""
    units = run.readable(run.table("scan", BRIDGE_VECTORS, UNITS))
    width = width_of(units)
    keys: list[str] = []
    found = [np.empty((0, width), np.float16)]
    for at in range(units.num_rows):
        own, made = usable(units.slice(at, 1), width)
        keys += own
        found.append(made)
    return keys, np.concatenate(found)


def told(run: Run, store: Store) -> dict[str, Any] | None:
    """What manifest and summary say of the map that the foreign sets went through; None where there are none."""
    roles = run.config.sets.foreign()
    if not roles:
        return None
    made = store.find(run.table("scan", roles[0], UNITS)["unit"][0].as_py())
    return {"sets": roles, **(made.facts["translation"] if made is not None else {})}


def cautions(about: dict[str, Any] | None) -> list[str]:
    """Warnings that follow from `told`."""
    if about is None:
        return []
    found = [
        f"These sets are another model's embeddings, translated by a {about['kind']} map: {', '.join(about['sets'])}. "
        f"Their cosines are not those of one model. The false match rate of the threshold, which is measured within "
        f"the training set, does not carry over to pairs of a translated and another set. Evidence against a control "
        f"set stays valid, as the map treats both sets alike, and it finds less."
    ]
    if about["explained"] < POOR:
        found.append(
            f"The map explains {about['explained']:.0%} of where the bridge faces lie, so that hardly anything can be "
            f"found. Check that sets.bridge and sets.bridge_vectors name the same faces alike."
        )
    return found
