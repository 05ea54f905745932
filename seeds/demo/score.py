"""How many planted leaks an audit found: graded after the fact with the corpus's key, which the audit never reads."""

import csv
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy.stats import beta

from cluster.storage import write_private
from operators.errors import ConfigError
from operators.tables import CANDIDATES
from seeds.demo.leaks import LEAKS

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassScore:
    """One class of leaks: its counts, and the recall among auditable leaks with its Clopper-Pearson 95 % interval."""

    leak: str
    planted: int
    not_auditable: int
    found: int
    recall: float | None
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """The grade of one audit. `total` is over all classes; false alarms are release images."""

    classes: tuple[ClassScore, ...]
    total: ClassScore
    false_alarms: int
    clean_images: int

    def line(self) -> str:
        """The result in one line."""
        t = self.total
        return (
            f"planted leaks found: {t.found} of {t.planted} ({t.not_auditable} not auditable, recall {_share(t)}; "
            f"false alarms: {self.false_alarms} of {self.clean_images} clean release images)"
        )

    def table(self) -> str:
        """The result per class as text."""
        lines = [f"{'leak':<10} {'planted':>8} {'not auditable':>14} {'found':>6}  recall (95 % interval)"]
        for c in (*self.classes, self.total):
            lines.append(f"{c.leak:<10} {c.planted:>8} {c.not_auditable:>14} {c.found:>6}  {_share(c)}")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Leak:
    release_key: str
    leak: str
    sources: tuple[str, ...]


def score(run: Path, corpus: Path) -> Score:
    """Grade the audit in folder `run` by the key of `corpus`, and write the grade to `run`/planted.json.

    A planted leak is *found* if a training candidate pairs its release image with a source person. If not found it is
    *not auditable* where its release image, or all images of all source persons, could not be audited.

    Raises
    ------
    ConfigError
        If the run has no assessment or the corpus no key.
    SchemaMismatch
        If the candidates do not follow their contract.
    """
    key = [_leak(row) for row in _rows(corpus / "planted.csv")]
    candidates = CANDIDATES.check(_table(run / "assess" / "candidates.parquet"))
    candidates = candidates.filter(pc.equal(candidates["arm"], "training"))
    pairs = set(zip(candidates["release_key"].to_pylist(), candidates["gallery_identity"].to_pylist(), strict=True))
    rejects = _table(run / "assess" / "rejects.parquet")
    rejected = set(zip(rejects["set"].to_pylist(), rejects["key"].to_pylist(), strict=True))
    lost = _lost_persons(corpus, {k for name, k in rejected if name == "training"})

    found = [leak for leak in key if any((leak.release_key, s) in pairs for s in leak.sources)]
    missed = [leak for leak in key if leak not in found]
    closed = [k for k in missed if ("release", k.release_key) in rejected or lost.issuperset(k.sources)]
    planted_keys = {leak.release_key for leak in key}
    clean = _images(corpus, "release") - planted_keys
    result = Score(
        classes=tuple(_class_score(name, *(_of(name, part) for part in (key, closed, found))) for name in LEAKS),
        total=_class_score("all", len(key), len(closed), len(found)),
        false_alarms=len({release_key for release_key, _ in pairs} - planted_keys),
        clean_images=len(clean),
    )
    text = json.dumps({"confidence": CONFIDENCE, **asdict(result)}, indent=2) + "\n"
    write_private(run / "planted.json", text.encode())
    return result


def interval(found: int, trials: int) -> tuple[float, float]:
    """The Clopper-Pearson 95 % interval of a share: exact, hence valid for few trials and for shares of 0 and 1.

    Clopper and Pearson, Biometrika 26 (1934), https://doi.org/10.1093/biomet/26.4.404. No trials give (0, 1).
    """
    tail = (1 - CONFIDENCE) / 2
    low = float(beta.ppf(tail, found, trials - found + 1)) if found > 0 else 0.0
    high = float(beta.ppf(1 - tail, found + 1, trials - found)) if found < trials else 1.0
    return low, high


def _class_score(leak: str, planted: int, not_auditable: int, found: int) -> ClassScore:
    trials = planted - not_auditable
    low, high = interval(found, trials)
    recall = found / trials if trials else None
    return ClassScore(
        leak=leak, planted=planted, not_auditable=not_auditable, found=found, recall=recall, low=low, high=high
    )


def _of(name: str, leaks: list[_Leak]) -> int:
    return sum(leak.leak == name for leak in leaks)


def _share(c: ClassScore) -> str:
    return "none auditable" if c.recall is None else f"{c.recall:.3f} ({c.low:.3f} to {c.high:.3f})"


def _leak(row: dict[str, str]) -> _Leak:
    sources = tuple(s for s in (row["source_identity"], row["second_source_identity"]) if s)
    return _Leak(release_key=row["release_key"], leak=row["leak"], sources=sources)


def _lost_persons(corpus: Path, rejected: set[str]) -> set[str]:
    """Training persons of whom no image could be audited."""
    audited = {key.split("/")[0] for key in _images(corpus, "training") - rejected}
    return {folder.name for folder in (corpus / "training").iterdir()} - audited


def _images(corpus: Path, name: str) -> set[str]:
    """Keys of the set's files less those that were broken on purpose."""
    broken = {row["key"] for row in _rows(corpus / "broken.csv") if row["set"] == name}
    folder = corpus / name
    return {p.relative_to(folder).as_posix() for p in folder.glob("*/*")} - broken


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise ConfigError(f"demo corpus: {path} is missing. Make the corpus with: python -m seeds.demo make")
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def _table(path: Path) -> pa.Table:
    if not path.exists():
        raise ConfigError(f"audit run: {path} is missing. Run the audit up to its assess stage first.")
    return pq.read_table(path)
