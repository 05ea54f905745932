"""The JSON Schema of `summary.json` (draft 2020-12), which describes every field with its unit."""

import json
from importlib.resources import files
from typing import Any

SUMMARY = "unveil/summary/1"
"""Name and version of the structure. A field may be added under it; another meaning of a field changes it."""


def summary_schema() -> dict[str, Any]:
    """What the package ships, as Python values: a schema for any validator of JSON Schema."""
    made: dict[str, Any] = json.loads((files("pipeline") / "schemas" / "summary.schema.json").read_bytes())
    return made
