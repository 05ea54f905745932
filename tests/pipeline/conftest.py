"""A small audit on real images (made-up faces, real models), and made-up embeddings with plain NumPy results."""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from operators.engines import Wanted
from operators.records import embeddings
from operators.tables import REJECTS, UNITS
from operators.units import Member, unit_digest
from operators.vectors import normalise, to_arrow
from pipeline.audit import audit
from pipeline.config import AuditConfig, load
from pipeline.embed import closing_key, unit_store
from pipeline.layout import keep_layout, lay_out
from pipeline.search import comparisons
from pipeline.stage import Run
from pipeline.tiles import ShardActor, read_piece

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo corpus at its smallest scale."""
    from seeds.demo.corpus import make

    out = tmp_path_factory.mktemp("corpus") / "small"
    make(out, scale=0.02)
    return out


@pytest.fixture
def configured(corpus: Path, tmp_path: Path) -> Callable[..., AuditConfig]:
    """Build the configuration of an audit of the small corpus; overrides are `key=value` texts."""

    def build(*overrides: str) -> AuditConfig:
        return load(str(write_config(corpus, tmp_path)), overrides)

    return build


@pytest.fixture
def config_file(corpus: Path, tmp_path: Path) -> Path:
    """The same configuration as a file."""
    return write_config(corpus, tmp_path)


@pytest.fixture(scope="session")
def audited_once(session: None, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an audit that has run; tests get copies of it."""
    folder = tmp_path_factory.mktemp("audited_once")
    audit(load(str(write_config(corpus, folder))))
    return folder


@pytest.fixture(scope="module")
def audited(audited_once: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration file of an audit that has run."""
    folder = tmp_path_factory.mktemp("audited")
    shutil.copytree(audited_once / "run", folder / "run")
    return write_config(corpus, folder)


def write_config(corpus: Path, folder: Path) -> Path:
    values: dict[str, Any] = {
        "out": str(folder / "run"),
        "sets": {role: {"uri": str(corpus / role)} for role in ("release", "training", "control", "anchor")},
        "faces": {"detector": str(ROOT / "models" / "yunet_2023mar.onnx")},
        "embedder": {"path": str(ROOT / "models" / "sface_2021dec.onnx"), "runtime": "onnxruntime"},
        "scan": {"unit_images": 16},
        "search": {"shards": {"workers": 1}},
        "ray": {"cpus": 2, "object_store_mb": 256},
    }
    path = folder / "audit.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


WIDTH = 128
UNITS_OF = {"release": (16, 9, 20, 4, 21), "training": (18, 16, 30, 11, 15), "control": (14, 5, 22), "anchor": (5,)}
NO_VECTOR = (("release", 3), ("control", 1))
"""Units in which every image failed."""


@dataclass(frozen=True, kw_only=True)
class PlantedUnit:
    """Made-up stored vectors of one unit; those of failed images take no part."""

    keys: tuple[str, ...]
    vectors: np.ndarray
    failed: np.ndarray

    @property
    def members(self) -> list[Member]:
        digests = [hashlib.sha256(vector.tobytes()).hexdigest() for vector in self.vectors]
        return [Member(key=key, identity=None, bytes=1, digest=d) for key, d in zip(self.keys, digests, strict=True)]

    def table(self) -> pa.Table:
        columns = {
            "key": self.keys,
            "digest": [member.digest for member in self.members],
            "status": np.where(self.failed, "no_face", "ok"),
            "vector": to_arrow(self.vectors, ~self.failed),
        }
        schema = embeddings(WIDTH).schema
        known = pa.table({name: pa.array(column, schema.field(name).type) for name, column in columns.items()})
        return pa.table([known[f.name] if f.name in columns else pa.nulls(len(known), f.type) for f in schema], schema)

    def other(self, seed: int) -> "PlantedUnit":
        """The same images with other vectors."""
        return replace(self, vectors=self.vectors[np.random.default_rng(seed).permutation(len(self.vectors))])


Hits = list[tuple[int, int, float]]
"""Query row, gallery row and cosine."""


@dataclass(frozen=True, kw_only=True)
class Planted:
    """Made-up sets, and what plain NumPy finds in them."""

    units: dict[str, tuple[PlantedUnit, ...]]

    def without(self, **gone: int) -> "Planted":
        """The same sets without one unit of some of them."""
        left = {role: [unit for at, unit in enumerate(own) if at != gone.get(role)] for role, own in self.units.items()}
        return Planted(units={role: tuple(own) for role, own in left.items()})

    def replaced(self, role: str, at: int) -> "Planted":
        """The same sets with other vectors in one unit."""
        own = self.units[role]
        return Planted(units={**self.units, role: (*own[:at], own[at].other(5), *own[at + 1 :])})

    def audited(self, role: str) -> int:
        """Images with a vector."""
        return sum(int((~unit.failed).sum()) for unit in self.units[role])

    def rows(self, role: str) -> list[range]:
        """The rows of each unit."""
        ends = np.cumsum([0, *(len(unit.keys) for unit in self.units[role])]).tolist()
        return [range(first, end) for first, end in pairwise(ends)]

    def cosines(self, queries: str, gallery: str) -> np.ndarray:
        """All cosines by row numbers; not a number where there is no vector, and for an image with itself."""
        left, right = (
            np.concatenate(
                [np.where(u.failed[:, None], np.nan, u.vectors.astype(np.float64)) for u in self.units[role]]
            )
            for role in (queries, gallery)
        )
        scores = left @ right.T
        if queries == gallery:
            np.fill_diagonal(scores, np.nan)
        return scores

    def nearest(self, queries: str, gallery: str, k: int) -> Hits:
        """The best `k` of every query, by query."""
        found = []
        for row, scores in enumerate(self.cosines(queries, gallery)):
            usable = np.flatnonzero(np.isfinite(scores))
            order = usable[np.argsort(-scores[usable], kind="stable")][:k]
            found += [(row, other, float(scores[other])) for other in order.tolist()]
        return found

    def closest(self, gallery: str, columns: int) -> Hits:
        """The best release images of every gallery image, by gallery image."""
        return [(row, other, cosine) for other, row, cosine in self.nearest(gallery, "release", columns)]

    def above(self, queries: str, gallery: str, floor: float) -> Hits:
        """All pairs from the floor up, for each unit of queries in the total order."""
        scores = self.cosines(queries, gallery)
        with np.errstate(invalid="ignore"):
            hits = [(row, other, float(scores[row, other])) for row, other in np.argwhere(scores >= floor).tolist()]
        ordered = sorted(hits, key=lambda hit: (-hit[2], hit[0], hit[1]))
        return [hit for own in self.rows(queries) for hit in ordered if hit[0] in own]

    def commit(self, run: Run) -> None:
        """Commit as if scan and embed had run."""
        for role, units in self.units.items():
            listed = []
            for unit, rows in zip(units, self.rows(role), strict=True):
                name, ok = unit_digest(unit.members), int((~unit.failed).sum())
                facts = {"status": {"ok": ok, "no_face": len(rows) - ok}, "device": "test"}
                contract = embeddings(WIDTH).contract
                unit_store(run).commit(name, unit.table(), contract=contract, key=name, facts=facts)
                whole = {"set": role, "uri": "-", "format": "folder", "unit": name, "first_row": rows.start}
                listed.append(whole | {"members": [asdict(member) for member in unit.members]})
            table = UNITS.from_rows(listed)
            run.save("scan", role, UNITS, table, key="test")
            status = {"ok": self.audited(role)}
            run.save("embed", role, REJECTS, REJECTS.from_rows([]), key=closing_key(run, table), status=status)


@pytest.fixture(scope="session")
def planted() -> Planted:
    """Sets with more copies of a vector than are kept as neighbours, near ties, and failed images and units."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((6, WIDTH))

    def unit(role: str, at: int, size: int) -> PlantedUnit:
        noise = rng.choice([0.0, 1e-4, 0.5], (size, 1), p=[0.4, 0.3, 0.3])
        stored = normalise(centres[rng.integers(6, size=size)] + noise * rng.standard_normal((size, WIDTH)))[0]
        failed = np.ones(size, bool) if (role, at) in NO_VECTOR else rng.random(size) < 0.1
        keys = tuple(f"{role}-{at}-{place:03d}.jpg" for place in range(size))
        return PlantedUnit(keys=keys, vectors=stored, failed=failed)

    return Planted(
        units={role: tuple(unit(role, at, n) for at, n in enumerate(sizes)) for role, sizes in UNITS_OF.items()}
    )


@pytest.fixture
def plant(planted: Planted, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Open a run in the folder `name` where `sets` are embedded; overrides are `key=value` texts."""
    with ExitStack() as held:

        def build(*overrides: str, sets: Planted = planted, name: str = "run") -> Run:
            path = write_config(tmp_path / "sets", tmp_path)
            run = held.enter_context(Run(load(str(path), [f"out={tmp_path / name}", "search.floor=0.4", *overrides])))
            sets.commit(run)
            return run

        yield build


@pytest.fixture(scope="session")
def tiled() -> Callable[[Run], Run]:
    """Commit in this process the tiles that a search still needs, so that it has only to end."""

    def make(run: Run) -> Run:
        options, target = run.config.search, run.store.child("search")
        for comparison in comparisons(run, options.floor):
            grid = lay_out(run, comparison)
            keep_layout(run, grid)
            root = str(unit_store(run).root)
            actor = ShardActor(root, str(target.root), options.engine, Wanted(*comparison.kept), 2)
            for key, block, shard in grid.tiles():
                if target.find(f"tile-{key}") is None:
                    actor.tile(key, shard, read_piece(root, block), options.max_pairs, grid.counts)
        return run

    return make
