"""What a re-audit costs when one per cent of a release is new or other: `make bench-watch` (QUICK=1: smaller sets).

Made-up vectors as ready embeddings, so that only listing and search work; the share of images to embed is that of the
images themselves (tests/pipeline/test_earlier.py). Every case starts from a finished audit, and its findings are
compared, byte by byte, with those of a full audit in a fresh folder.
"""

import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline.audit import audit
from pipeline.known_files import set_stamp
from pipeline.watch import watch
from pipeline.watch_ledger import read_lines
from pipeline.watchlist import audit_config, read_watchlist

RELEASE, TRAINING = (6_000, 3_000) if os.environ.get("QUICK") else (40_000, 20_000)
NEW = RELEASE // 100
FILES = 20_000 if os.environ.get("QUICK") else 200_000
SAME = ("assess/findings.parquet", "assess/candidates.parquet", "summary.json")


def hashed(at: int) -> str:
    return hashlib.sha256(str(at).encode()).hexdigest()[:16]


def give(folder: Path, name: str, keys: list[str], vectors: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{name}.npy", vectors)
    (folder / f"{name}.txt").write_text("\n".join(keys))


def prepared(folder: Path) -> np.ndarray:
    """The sets, without what is new, and the watchlist; returns the vectors that are new."""
    rng = np.random.default_rng(0)
    release, training = (rng.standard_normal((n, 128)).astype(np.float32) for n in (RELEASE + NEW, TRAINING))
    release[: RELEASE // 50] = training[: RELEASE // 50] + 0.3 * rng.standard_normal((RELEASE // 50, 128))
    give(folder / "sets" / "release", "first", [f"{hashed(at)}.jpg" for at in range(RELEASE)], release[:RELEASE])
    give(folder / "sets" / "training", "first", [f"{at // 8}/{at}.jpg" for at in range(TRAINING)], training)
    sets = {role: {"uri": str(folder / "sets" / role)} for role in ("release", "training")}
    options = {
        "assess": {"controlled": False, "blend_images": 0},
        "scan": {"unit_images": RELEASE // 40},
        "search": {"block_images": RELEASE // 10, "shard_images": TRAINING // 4, "k": 10},
        "report": {"pairs": 0},
    }
    (folder / "audit.yaml").write_text(yaml.safe_dump({"out": "-", "sets": sets, **options}))
    one = {"name": "made-up", "config": "audit.yaml"}
    (folder / "watch.yaml").write_text(yaml.safe_dump({"out": "watched", "every": "0", "audits": [one]}))
    return release[RELEASE:]


def run(folder: Path) -> tuple[float, dict[str, Any] | None]:
    """Seconds of one `unveil watch`, and the result that it wrote, if any."""
    before, start = len(read_lines(folder / "watched")), time.perf_counter()
    watch(str(folder / "watch.yaml"), [], lambda _: None)
    seconds, lines = time.perf_counter() - start, read_lines(folder / "watched")[before:]
    return seconds, next((line for line in lines if line["event"] == "result"), None)


def full(folder: Path) -> dict[str, bytes]:
    """What a full audit of the sets as they are finds, in a fresh folder."""
    with tempfile.TemporaryDirectory() as fresh:
        made = read_watchlist(str(folder / "watch.yaml"), [f"out={fresh}/watched"])
        config = audit_config(made, made.audits[0])
        audit(config)
        return {name: (Path(config.out) / name).read_bytes() for name in SAME}


def case(start: Path, name: str, change: Any) -> dict[str, Any]:
    """One change after a finished audit."""
    with tempfile.TemporaryDirectory(dir=start.parent) as place:
        folder = Path(place) / "w"
        shutil.copytree(start, folder)
        text = (folder / "audit.yaml").read_text().replace(str(start), str(folder))
        (folder / "audit.yaml").write_text(text)
        run(folder)  # the same sets in another place
        change(folder / "sets" / "release")
        seconds, result = run(folder)
        if result is None:
            raise SystemExit(f"{name}: the change gave no result")
        units = next(reason for reason in result["reasons"] if reason.startswith("changed: release")).split("; ")[1]
        work, own = result["work"], folder / "watched" / "made-up"
        return {
            "case": name,
            "seconds": round(seconds, 1),
            "units": units,
            "share": work["comparisons_now"] / work["comparisons"],
            "equal": full(folder) == {one: (own / one).read_bytes() for one in SAME},
        }


def idle_files() -> float:
    """Seconds to see that a folder of many files looks as it did."""
    with tempfile.TemporaryDirectory() as place:
        for at in range(FILES):
            path = Path(place) / str(at // 1000) / f"{at}.jpg"
            if at % 1000 == 0:
                path.parent.mkdir()
            path.touch()
        from operators.formats import SetConfig

        time.sleep(2.1)
        start = time.perf_counter()
        if set_stamp(SetConfig(uri=place)) is None:
            raise SystemExit("the files say nothing")
        return time.perf_counter() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        start = Path(place) / "start"
        start.mkdir()
        new = prepared(start)
        first, result = run(start)
        time.sleep(2.1)
        run(start)
        idle, none = run(start)
        if result is None or none is not None:
            raise SystemExit("the first run must have a result, and the last one none")

        def changed(folder: Path) -> None:
            vectors = np.load(folder / "first.npy")
            vectors[:: RELEASE // NEW] += 0.01
            np.save(folder / "first.npy", vectors)

        rows = [
            case(start, "new, scattered", lambda f: give(f, "new", [f"{hashed(-1 - n)}.jpg" for n in range(NEW)], new)),
            case(start, "new, together", lambda f: give(f, "new", [f"new/{n}.jpg" for n in range(NEW)], new)),
            case(start, "changed, scattered", changed),
        ]
    looking = idle_files()
    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs; release {RELEASE:,}, training {TRAINING:,}, {NEW:,} new or other"
    )
    print(f"first audit {first:.1f} s; nothing new {idle:.2f} s; {FILES:,} untouched files seen in {looking:.2f} s")
    for row in rows:
        print(
            f"{row['case']:<20} {100 * row['share']:7.2f} % of comparisons  {row['units']:<28} {row['seconds']:6.1f} s"
        )
    figures = {row["case"].replace(", ", "_"): round(row["share"], 5) for row in rows}
    equal = all(row["equal"] for row in rows)
    print(
        json.dumps(
            {"bench": "watch", **figures, "equal": equal, "idle_s": round(idle, 2), "files_s": round(looking, 2)}
        )
    )


if __name__ == "__main__":
    main()
