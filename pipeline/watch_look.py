"""What an audit's last result does not cover any more: the cheap look before `unveil watch` runs anything.

An audit is *new* without a result, *stale* if its face models, face preparation, options or the program are others, and
*changed* if the content of a set is. Files that look as they did are not read, for as long as the watchlist says.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from operators.addresses import public_values
from operators.tables import UNITS
from pipeline import __version__
from pipeline.audit import audit
from pipeline.config import AuditConfig
from pipeline.embed import embedding_key
from pipeline.known_files import set_stamp
from pipeline.ledger import code_fingerprint
from pipeline.stage import Run

READ_ALL = 1e-9
"""`scan.rehash_days` that trusts nothing from before, and still writes down what it reads."""
OF_SEARCH = ("k", "columns", "floor", "counts", "within", "certify")
"""Options of the search that its results depend on."""


class Look(NamedTuple):
    """What was seen of an audit."""

    reasons: list[str]
    """Why it must run; none if its last result stands."""
    state: dict[str, Any]
    """What the next look compares with, once the audit has run."""


def look(config: AuditConfig, state: Mapping[str, Any], begun: datetime) -> Look:
    """Compare an audit with the `state` of its last look, which is empty before the first result.

    Sets are listed again (`unveil scan`) unless all their files look untouched.
    """
    now: dict[str, Any] = {"basis": basis(config), "stamps": _stamps(config)}
    reasons = list(stale(state["basis"], now["basis"])) if state else ["new: it has no result yet"]
    trusted = timedelta(days=min(config.scan.rehash_days, timedelta.max.days))
    hashed = datetime.fromisoformat(state["hashed"]) if state else None
    fresh = hashed is not None and timedelta() <= begun - hashed < trusted
    now["hashed"] = state["hashed"] if fresh else begun.isoformat(timespec="seconds")
    if fresh and not reasons and None not in now["stamps"].values() and now["stamps"] == state["stamps"]:
        return Look([], {**state, **now})
    reading = config if fresh or not config.scan.rehash_days else replace(
        config, scan=replace(config.scan, rehash_days=READ_ALL)
    )  # fmt: skip
    audit(reading, "scan")
    run = Run(config, alone=False)
    now["units"] = {role: run.table("scan", role, UNITS)["unit"].to_pylist() for role in config.sets.listed()}
    now["images"] = {role: run.commit("scan", role).facts["images"] for role in config.sets.listed()}
    return Look([*reasons, *(changed(state, now) if state else ())], now)


def basis(config: AuditConfig) -> dict[str, Any]:
    """Everything but the sets' content that results depend on."""
    weights = {model.name: model.sha256 for model in config.models()}
    if config.faces.mode == "detect":
        weights["the detector"] = config.faces.detector_sha256
    search = {name: value for name, value in asdict(config.search).items() if name in OF_SEARCH}
    sets = {role: asdict(one) for role, one in config.sets.listed().items()}
    options = {"sets": sets, "assess": asdict(config.assess), "search": search, "title": config.title}
    options |= {"scan": {"unit_images": config.scan.unit_images}, "embedders": list(config.embedders)}
    return {
        "weights": weights,
        "embeddings": [embedding_key(model, config.faces) for model in config.models()],
        "program": [__version__, code_fingerprint()],
        "options": dict(_flat(public_values(to_plain(options)), "")),
    }


def to_plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as JSON would give them back: lists for tuples."""
    return {
        name: to_plain(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value
        for name, value in options.items()
    }


def stale(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Why a result on another basis does not stand."""
    weights = sorted(
        name for name in then["weights"] | now["weights"] if then["weights"].get(name) != now["weights"].get(name)
    )
    if weights:
        yield f"stale: other weights of {', '.join(weights)}"
    elif then["embeddings"] != now["embeddings"]:
        yield "stale: faces are prepared or embedded in another way"
    if then["program"][0] != now["program"][0]:
        yield f"stale: Unveil {then['program'][0]} made it, this is {now['program'][0]}"
    elif then["program"] != now["program"]:
        yield "stale: the program has changed"
    old, new = then["options"], now["options"]
    other = sorted(key for key in old | new if key not in old or key not in new or old[key] != new[key])
    if other:
        yield f"stale: other options ({', '.join(other[:5])}{', ...' if len(other) > 5 else ''})"


def changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Which sets have another content."""
    for role, units in now["units"].items():
        known = set(then["units"].get(role, ()))
        if list(then["units"].get(role, ())) != list(units):
            fresh = sum(unit not in known for unit in units)
            images = f"{then['images'].get(role, 0):,} images, now {now['images'][role]:,}"
            yield f"changed: {role}, {images}; {fresh:,} of {len(units):,} units are new"


def _stamps(config: AuditConfig) -> dict[str, str | None]:
    return {role: set_stamp(one) for role, one in config.sets.listed().items()}


def _flat(options: Mapping[str, Any], before: str) -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value
