"""plan: what an audit would do, without doing it."""

from collections.abc import Iterator

from cluster.faults import IncompleteTable
from operators.formats import FORMATS
from operators.tables import UNITS
from pipeline.config import AuditConfig, to_yaml
from pipeline.embed import unit_store
from pipeline.search import current_blocks
from pipeline.stage import Run


def plan(config: AuditConfig) -> str:
    """The resolved configuration, the size of every set, the number of comparisons, and what is already done.

    Sets are listed by name and size; no image is opened, and nothing is written or computed.
    """
    counts: dict[str, int] = {}
    lines = [to_yaml(config), "# What would run"]
    for role, chosen in config.sets.given().items():
        entries = FORMATS[chosen.format].listing(chosen.uri, chosen.identity).entries
        counts[role] = len(entries)
        size_mb = sum(entry.bytes for entry in entries) / 1e6
        lines.append(f"{role:<20} {len(entries):>16,} images      {size_mb:,.1f} MB in {chosen.uri}")
    for role, count in counts.items():
        if role != "release":
            lines.append(f"{'release x ' + role:<20} {counts['release'] * count:>16,} comparisons")
    return "\n".join([*lines, *_done(Run(config))])


def _done(run: Run) -> Iterator[str]:
    """What earlier runs left, stage by stage; scan always lists the sets again."""
    scanned = [role for role in run.config.sets.given() if run.store.child("scan").find(role)]
    if not scanned:
        yield f"{'so far':<20} {'nothing':>16} in {run.folder}"
        return
    for role in scanned:
        units = run.table("scan", role, UNITS)
        done = sum(unit_store(run).find(name) is not None for name in units["unit"].to_pylist())
        yield f"{'embedded ' + role:<20} {f'{done} of {units.num_rows}':>16} units of the last scan"
    yield f"{'search':<20} {_search_state(run):>16}"


def _search_state(run: Run) -> str:
    """Whether the committed search still holds for the sets, vectors and options as they are."""
    made = run.store.child("search").find("blocks")
    if made is None:
        return "not yet"
    try:
        return "up to date" if current_blocks(run, made) is not None else "out of date"
    except IncompleteTable:
        return "out of date"
