"""What was embedded before a set changed: units that are listed no more, whose images mostly still are.

One added image makes another unit of the one that it falls into. The rows of all its other images are in the unit that
it was, and are taken from there (`pipeline.repeats`), so that a new version of a set costs the work of its new images.
"""

from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from cluster.storage import Store
from operators.tables import UNITS
from pipeline.repeats import usable
from pipeline.stage import Run, fingerprint


def units_before(run: Run, wanted: pa.Table, stores: Sequence[Store]) -> pa.Table:
    """Units of the last embedding of this audit's sets that are not `wanted` now, and are whole in all `stores`."""
    store, found = run.store.child("embed"), [UNITS.schema.empty_table()]
    for role in run.config.sets.embedded():
        made = store.find(_name(role))
        if made is not None and made.contract == UNITS.contract:
            found.append(store.read(_name(role)))
    earlier = pa.concat_tables(found)
    earlier = earlier.filter(pc.invert(pc.is_in(earlier["unit"], wanted["unit"].combine_chunks())))
    there = [all(usable(store, name) for store in stores) for name in earlier["unit"].to_pylist()]
    return earlier.filter(pa.array(there, pa.bool_())).combine_chunks()


def keep_units(run: Run, units: Mapping[str, pa.Table]) -> None:
    """Remember the units of sets that are embedded."""
    for role, table in units.items():
        key = fingerprint(UNITS.contract, table["unit"].to_pylist())
        made = run.store.child("embed").find(_name(role))
        if made is None or made.key != key:
            run.save("embed", _name(role), UNITS, table, key=key)


def _name(role: str) -> str:
    return f"units-{role}"
