"""What must hold after every fault, and in the end."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

MARKER = ".commit.json"

Digests = dict[str, str]
"""SHA-256 of committed tables by their path in the run folder or store."""


def committed(folder: Path) -> Iterator[tuple[Path, Path, dict[str, Any]]]:
    """Marker, data and promise of every committed part below a folder."""
    for marker in sorted(folder.rglob(f"*{MARKER}")):
        try:
            made = json.loads(marker.read_bytes())
        except FileNotFoundError:  # replaced at this moment by a worker that outlives its driver
            continue
        except ValueError:
            made = {"sha256": "torn marker"}
        yield marker, marker.with_name(marker.name.removesuffix(MARKER) + ".parquet"), made


def torn(folder: Path) -> list[str]:
    """Committed parts whose bytes are not those that their markers promise; there must be none."""
    wrong = []
    for marker, data, made in committed(folder):
        try:
            right = hashlib.sha256(data.read_bytes()).hexdigest() == made["sha256"]
        except FileNotFoundError:
            right = not marker.exists()
        if not right and marker.exists():
            wrong.append(str(data))
    return wrong


def digests(folder: Path) -> Digests:
    """All committed tables of a run but `sample`: which tiles are searched again depends on which are new."""
    return {
        str(data.relative_to(folder)): hashlib.sha256(data.read_bytes()).hexdigest()
        for _, data, _ in committed(folder)
        if data.name != "sample.parquet" and data.exists()
    }


def remote_digests(server: Any, bucket: str) -> Digests:
    """All committed tables in a bucket, by the path that they would have in a folder."""
    names, found = server.names(), {}
    for name in names:
        if name.endswith(MARKER):
            made = json.loads(server.client.get_object(Bucket=bucket, Key=name)["Body"].read())
            stem = name.removesuffix(MARKER)
            data = server.client.get_object(Bucket=bucket, Key=f"{stem}-{made['sha256'][:16]}.parquet")["Body"].read()
            found[f"{stem}.parquet"] = hashlib.sha256(data).hexdigest()
    return found


def uncovered(folder: Path) -> list[str]:
    """What is wrong with the list of tiles: each must be there once, be committed, and count all its comparisons."""
    listed = pq.read_table(folder / "search" / "coverage.parquet")
    tiles = listed["tile"].to_pylist()
    wrong = [f"{tile} is listed twice" for tile in sorted({tile for tile in tiles if tiles.count(tile) > 1})]
    done: dict[str, int] = {}
    for row in listed.to_pylist():
        if not (folder / "search" / f"tile-{row['tile']}{MARKER}").exists():
            wrong.append(f"{row['tile']} is not committed")
        done[row["arm"]] = done.get(row["arm"], 0) + row["queries"] * row["gallery"]
    audited = {role: _audited(folder, role) for role in ("release", *done)}
    wrong += [
        f"{arm}: {made} of {audited['release'] * audited[arm]} comparisons"
        for arm, made in done.items()
        if made != audited["release"] * audited[arm]
    ]
    return wrong


def _audited(folder: Path, role: str) -> int:
    made = json.loads((folder / "embed" / f"{role}{MARKER}").read_bytes())
    return int(made["facts"]["status"]["ok"])


def differences(found: Mapping[str, str], reference: Mapping[str, str]) -> list[str]:
    """Tables that are missing, too many, or of other bytes."""
    return [
        f"{name}: {'missing' if name not in found else 'not expected' if name not in reference else 'other bytes'}"
        for name in sorted({*found, *reference})
        if found.get(name) != reference.get(name)
    ]
