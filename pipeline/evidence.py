"""Evidence for persons, where there is a control set: what the search found, put together by person and tested.

Everything up to the statistic is computed for training and control set alike. What was decided beforehand is written to
`frozen.json` before the two are told apart, with every later look under other options.
"""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.storage import to_json, write_private
from operators import controlled, groups, membership
from operators.controlled import Controlled
from operators.excess import fdp_bound
from operators.persons import CONTROL, MEMBER
from operators.tables import IMAGE_UNITS, PEOPLE, STRADDLERS
from pipeline.calibrate import set_columns
from pipeline.embed import embedding_key
from pipeline.gathering import ARMS, Gathered, stored_vectors
from pipeline.stage import Run, fingerprint


def has_control(run: Run) -> bool:
    """Whether this audit has, and wants, evidence for persons."""
    return "control" in run.config.sets.given() and run.config.assess.controlled


def freeze(run: Run) -> dict[str, Any]:
    """Write down what is fixed before the arms are told apart; says how many other choices were looked at before.

    Looks at sets of another content are no other choices: `unveil watch` audits a release again when it grows.
    """
    config, data = run.config, run.ledger.record["datasets"]
    now = {
        "options": asdict(config.assess),
        "search": run.commit("search", "coverage").key,
        "models": [embedding_key(model, config.faces) for model in config.models()],
    }
    digest = fingerprint(now)
    path = run.folder / "frozen.json"
    looks: list[dict[str, Any]] = json.loads(path.read_bytes()) if path.exists() else []
    if digest not in [look["digest"] for look in looks]:
        at = datetime.now(UTC).isoformat(timespec="seconds")
        looks.append({"digest": digest, "at": at, "datasets": data, **now})
        write_private(path, to_json(looks))
    same = [look["digest"] for look in looks if look.get("datasets", data) == data or look["digest"] == digest]
    return {"digest": digest, "look": same.index(digest) + 1, "looks": len(same)}


def test(run: Run, gathered: Gathered) -> Controlled:
    """People, their evidence, and the tests over all."""
    config = run.config.assess.evidence
    found = controlled.people(gathered.images, gathered.pairs, config, stored_vectors(run, gathered.starts))
    return controlled.controlled(found, config)


def people_table(run: Run, gathered: Gathered, made: Controlled) -> pa.Table:
    """One row per person under the PEOPLE contract."""
    found, release = made.people, set_columns(run, "release", ("key", "identity"))
    rows = pa.array(found.best.row_U, mask=found.best.row_U < 0)
    seen = gathered.columns.take(rows)
    closest = np.where(found.best.row_U < 0, -1, gathered.release_row_N[found.best.row_U])
    match = release.take(pa.array(closest, mask=closest < 0))
    reasons = gathered.screening.reasons
    anchor_U = np.full(len(closest), np.nan) if found.anchor_U is None else found.anchor_U
    named = pa.array([*gathered.group_names, None], pa.string())
    group_U = np.full(len(closest), -1) if found.group_U is None else found.group_U
    columns = {
        "unit": np.arange(len(closest)),
        "arm": pa.array(np.array(ARMS)[found.persons.arm_U]),
        "identity": seen["identity"],
        "labels": found.persons.labels_U,
        "images": found.persons.images_U,
        "key": seen["key"],
        "release_key": match["key"],
        "release_identity": match["identity"],
        "cosine": _null(found.best.cosine_U),
        "anchor_cosine": _null(anchor_U),
        "statistic": _null(found.statistic_U),
        "eligible": found.eligible_U,
        "p": _null(made.p_U),
        "q": _null(made.q_U),
        "group": named.take(pa.array(np.where(group_U < 0, len(gathered.group_names), group_U))),
        "hub": pa.array(["; ".join(reasons.get(row, [])) or None for row in found.best.row_U.tolist()], pa.string()),
    }
    return PEOPLE.check(pa.table(columns, schema=PEOPLE.schema))


def image_units_table(gathered: Gathered, made: Controlled) -> pa.Table:
    """The unit of every image of both arms."""
    arms = np.array(ARMS)[gathered.images.arm_N]
    return pa.table([arms, made.people.persons.unit_N], schema=IMAGE_UNITS.schema)


def straddlers_table(gathered: Gathered, made: Controlled) -> pa.Table:
    """Every image of a person who is in both arms."""
    straddler_N = made.people.persons.straddler_N
    rows = np.flatnonzero(straddler_N >= 0)
    seen = gathered.columns.take(pa.array(rows))
    arms = np.array(ARMS)[gathered.images.arm_N[rows]]
    return pa.table([straddler_N[rows], arms, seen["key"], seen["identity"]], schema=STRADDLERS.schema)


def _null(values_U: NDArray[np.float64]) -> pa.Array:
    return pa.array(values_U, mask=np.isnan(values_U))


def summary(run: Run, gathered: Gathered, made: Controlled, frozen: dict[str, Any], threshold: float) -> dict[str, Any]:
    """What `summary.json` says of the controlled audit."""
    config, found = run.config.assess.evidence, made.people
    member_M, control_C = found.scores(MEMBER), found.scores(CONTROL)
    persons = found.persons
    taken = {arm: int((found.eligible_U & (persons.arm_U == code)).sum()) for code, arm in enumerate(ARMS)}
    return {
        **made.verdict._asdict(),
        "frozen": frozen,
        "source": config.source,
        "anchored": found.anchor_U is not None,
        "models": [model.name for model in run.config.models()],
        "q": config.q,
        "listed": int((made.q_U <= config.q).sum()),
        "shortest_list": made.shortest,
        "persons": {
            "training": int((persons.arm_U == MEMBER).sum()),
            "control": int((persons.arm_U == CONTROL).sum()),
            "tested": taken,
            "several_labels": persons.several_labels,
            "largest": persons.largest,
            "straddlers": persons.straddlers,
            "broken_chains": persons.broken,
            "images_capped_at": config.cap if found.capped else None,
        },
        "gate": None if made.gate is None else made.gate._asdict(),
        "placebo": None if made.placebo is None else made.placebo._asdict(),
        "excess": [_finite(one._asdict()) for one in made.excesses],
        "auc": None if made.area is None else made.area._asdict(),
        "operating": [one._asdict() for one in made.operating],
        "roc": [axis.tolist() for axis in membership.roc(member_M, control_C)],
        "detectable": [{"alpha": alpha, "share": _or_none(share)} for alpha, share in made.detectable],
        "over_threshold": _over(found, threshold),
        "groups": _by_group(gathered, made),
        "hubs": _hubs(gathered),
        "sensitivity": [
            one._asdict()
            for one in controlled.sensitivity(
                gathered.images, gathered.pairs, config, stored_vectors(run, gathered.starts)
            )
        ],
    }


def _over(found: controlled.People, threshold: float) -> dict[str, Any]:
    """Persons over the plain threshold, which no control set chose, and how many of them can be false."""
    hits, sizes = [], []
    for arm in (MEMBER, CONTROL):
        scores = found.scores(arm, found.best.cosine_U)
        hits.append(int((scores >= threshold).sum()))
        sizes.append(len(scores))
    bound = fdp_bound(hits[0], hits[1], sizes[0], sizes[1])
    return {"threshold": threshold, "training": hits[0], "control": hits[1], "false_at_most": bound}


def _by_group(gathered: Gathered, made: Controlled) -> dict[str, Any] | None:
    found = made.people
    if found.group_U is None or not made.excesses:
        return None
    names = np.array([*gathered.group_names, None], object)
    scores, labels = [], []
    for arm in (MEMBER, CONTROL):
        chosen = found.eligible_U & (found.persons.arm_U == arm)
        scores.append(found.statistic_U[chosen])
        labels.append(names[found.group_U[chosen]].tolist())
    rates = groups.by_group(scores[0], labels[0], scores[1], labels[1], made.excesses[0].threshold)
    return {
        "rates": [
            {name: value._asdict() if hasattr(value, "_asdict") else value for name, value in rate._asdict().items()}
            for rate in rates
        ],
        "control_homogeneity_p": groups.homogeneity([r.control_hits for r in rates], [r.controls for r in rates]),
        "control_max_to_min": groups.ratio_max_min(rates),
    }


def _hubs(gathered: Gathered) -> dict[str, Any]:
    flagged, occurrence = gathered.screening.flagged_N, gathered.occurrence
    near = occurrence.count_G >= gathered.screening.limit
    return {
        "flagged": {arm: int(flagged[gathered.images.arm_N == code].sum()) for code, arm in enumerate(ARMS)},
        "hubs": {arm: int(near[gathered.images.arm_N == code].sum()) for code, arm in enumerate(ARMS)},
        "limit": gathered.screening.limit,
        "expected": occurrence.expected,
        "largest": int(occurrence.count_G.max(initial=0)),
        "queries": occurrence.queries,
        "skewness": _or_none(occurrence.skewness),
    }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _or_none(value) if isinstance(value, float) else value for name, value in values.items()}


def _or_none(value: float) -> float | None:
    return value if np.isfinite(value) else None
