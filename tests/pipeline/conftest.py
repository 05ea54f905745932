"""A small audit on real images (made-up faces, real models), and made-up embeddings with plain NumPy results."""

import hashlib
import shutil
import sqlite3
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
from pipeline.certificate import CertifyConfig
from pipeline.config import AuditConfig, load
from pipeline.embed import closing_key, unit_store
from pipeline.layout import keep_layout, lay_out
from pipeline.search import comparisons, search
from pipeline.stage import Run, fingerprint
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


@pytest.fixture
def short_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """`plan` tries the search for a moment only."""
    monkeypatch.setattr("operators.forecast.TRIALS", ((32, 600), (32, 100), (64, 600)))
    monkeypatch.setattr("pipeline.plan.TRIAL_S", 0.0)


@pytest.fixture(scope="session")
def audited_once(session: None, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an audit that has run; tests get copies of it."""
    folder = tmp_path_factory.mktemp("audited_once")
    audit(load(str(write_config(corpus, folder))))
    return folder


@pytest.fixture
def embedded_before(audited_once: Path, tmp_path: Path) -> Path:
    """The folder of the audit that `configured` describes, with all embeddings in its store and nothing else."""
    shutil.copytree(audited_once / "run" / "store", tmp_path / "run" / "store")
    return tmp_path / "run"


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
        "assess": {"controlled": False},
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
        """Commit as if scan and embed had run; what is there already is left alone."""
        for role, units in self.units.items():
            listed = []
            for unit, rows in zip(units, self.rows(role), strict=True):
                name, ok = unit_digest(unit.members), int((~unit.failed).sum())
                facts = {"status": {"ok": ok, "no_face": len(rows) - ok}, "device": "test"}
                contract = embeddings(WIDTH).contract
                if unit_store(run).find(name) is None:
                    unit_store(run).commit(name, unit.table(), contract=contract, key=name, facts=facts)
                whole = {"set": role, "uri": "-", "format": "folder", "unit": name, "first_row": rows.start}
                listed.append(whole | {"members": [asdict(member) for member in unit.members]})
            table = UNITS.from_rows(listed)
            key, status = closing_key(run, table), {"ok": self.audited(role)}
            made = run.store.child("embed").find(role)
            if made is None or made.key != key:
                images = sum(len(rows) for rows in self.rows(role))
                about = {"form": "folder", "images": images, "identities": 0, "unlisted": {}, "notes": []}
                run.save("scan", role, UNITS, table, key="test", **about)
                run.save("embed", role, REJECTS, REJECTS.from_rows([]), key=key, status=status)


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


@pytest.fixture(scope="session")
def embedded(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `planted` is embedded; tests get copies of it."""
    folder = tmp_path_factory.mktemp("embedded")
    with Run(planted_config(folder, "run")) as run:
        planted.commit(run)
    return folder / "run"


def planted_config(folder: Path, name: str, *overrides: str) -> AuditConfig:
    path = write_config(folder / "sets", folder)
    return load(str(path), [f"out={folder / name}", "search.floor=0.4", *overrides])


@pytest.fixture
def plant(planted: Planted, embedded: Path, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Open a run in the folder `name` where `sets` are embedded; overrides are `key=value` texts."""
    with ExitStack() as held:

        def build(*overrides: str, sets: Planted = planted, name: str = "run") -> Run:
            if sets is planted and not (tmp_path / name).exists():
                shutil.copytree(embedded, tmp_path / name)
            run = held.enter_context(Run(planted_config(tmp_path, name, *overrides)))
            sets.commit(run)
            return run

        yield build


def search_tiles(run: Run) -> None:
    """Commit in this process the tiles that a search still needs."""
    options, target = run.config.search, run.store.child("search")
    for comparison in comparisons(run, options.floor):
        grid = lay_out(run, comparison)
        keep_layout(run, grid)
        root = str(unit_store(run).root)
        actor = ShardActor(root, str(target.root), options.engine, Wanted(*comparison.kept), 2)
        for key, block, shard in grid.tiles():
            if target.find(f"tile-{key}") is None:
                actor.tile(key, shard, read_piece(root, block), options.max_pairs, grid.counts)


@pytest.fixture(scope="session")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Run], Run]:
    """Commit in this process the tiles that a search still needs, so that it has only to end.

    Tiles of a run without a search yet are copied, if the same sets were searched with the same options before.
    """
    kept = tmp_path_factory.mktemp("tiled")

    def make(run: Run) -> Run:
        if (folder := run.folder / "search").exists():
            search_tiles(run)
            return run
        sets = [run.commit(stage, role).sha256 for stage in ("scan", "embed") for role in run.config.sets.given()]
        asked = [asdict(comparison) for comparison in comparisons(run, run.config.search.floor)]
        same = kept / fingerprint(sets, asked, asdict(replace(run.config.search, certify=CertifyConfig())))
        if not same.exists():
            search_tiles(run)
            shutil.copytree(folder, same)
        else:
            shutil.copytree(same, folder)
        return run

    return make


@pytest.fixture(scope="session")
def searched_once(
    session: None, embedded: Path, tiled: Callable[[Run], Run], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """The folder of a finished search of the planted sets, made once for each choice of overrides."""
    made: dict[tuple[str, ...], Path] = {}

    def finish(*overrides: str) -> Path:
        if overrides not in made:
            folder = tmp_path_factory.mktemp("searched")
            shutil.copytree(embedded, folder / "run")
            with Run(planted_config(folder, "run", *overrides)) as run:
                search(tiled(run))
            made[overrides] = folder / "run"
        return made[overrides]

    return finish


@pytest.fixture
def searched(searched_once: Callable[..., Path], plant: Callable[..., Run], tmp_path: Path) -> Callable[..., Run]:
    """Open a copy of a finished search of the planted sets in the folder `name`."""

    def build(*overrides: str, name: str = "run") -> Run:
        shutil.copytree(searched_once(*overrides), tmp_path / name)
        return plant(*overrides, name=name)

    return build


@pytest.fixture(scope="session")
def planted_unit() -> Callable[..., PlantedUnit]:
    """Build one unit of made-up vectors: role, number, stored vectors, failed images."""

    def build(role: str, at: int, stored: np.ndarray, failed: np.ndarray) -> PlantedUnit:
        keys = tuple(f"{role}-{at}-{place:03d}.jpg" for place in range(len(stored)))
        return PlantedUnit(keys=keys, vectors=stored, failed=failed)

    return build


@pytest.fixture(scope="session")
def planted_sets() -> Callable[..., Planted]:
    """Build sets of such units, by role."""
    return lambda units: Planted(units=units)


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Run]]:
    """Open a run of its own in which `sets` are embedded; overrides are `key=value` texts."""
    with ExitStack() as held:

        def build(sets: Planted, *overrides: str) -> Run:
            folder = tmp_path_factory.mktemp("committed")
            path = write_config(folder / "sets", folder)
            uris = [f"sets.{role}.uri={folder}/sets/{role}" for role in sets.units]
            run = held.enter_context(Run(load(str(path), [*uris, *overrides])))
            sets.commit(run)
            return run

        yield build


@pytest.fixture
def closed_connections(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close every SQLite connection that a test opens."""
    made: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def kept(*places: Any, **options: Any) -> sqlite3.Connection:
        made.append(connect(*places, **options))
        return made[-1]

    monkeypatch.setattr(sqlite3, "connect", kept)
    yield
    for one in made:
        one.close()
