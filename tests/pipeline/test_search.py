from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest

from cluster.faults import IncompleteTable
from operators.errors import CapacityError
from operators.tables import CLOSEST, NEIGHBOURS, PAIRS, REJECTS, UNITS, embeddings
from operators.units import Member, cut, unit_digest
from operators.vectors import normalise, to_arrow
from pipeline.config import AuditConfig
from pipeline.embed import closing_key, unit_store
from pipeline.search import BLOCKS, results, search
from pipeline.stage import Run

pytestmark = pytest.mark.ray
Configured = Callable[..., AuditConfig]
WIDTH = 128
SIZES = {"release": 70, "training": 90, "control": 41, "anchor": 5}


def planted(config: AuditConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Commit made-up embeddings (with duplicates, near ties and failed images) as if scan and embed had run."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((6, WIDTH))
    truth = {}
    with Run(config) as run:
        for role, count in SIZES.items():
            noise = rng.choice([0.0, 1e-4, 0.5], (count, 1))
            stored = normalise(centres[rng.integers(6, size=count)] + noise * rng.standard_normal((count, WIDTH)))[0]
            failed = rng.random(count) < 0.1
            truth[role] = np.where(failed[:, None], np.nan, stored.astype(np.float64))
            _commit(run, role, stored, failed)
    return truth


def _commit(run: Run, role: str, stored: np.ndarray, failed: np.ndarray) -> None:
    members = [
        Member(key=f"{i:03d}.jpg", identity=None, bytes=1, digest=f"{role}{i}") for i in range(len(stored))
    ]  # fmt: skip
    first, rows = 0, []
    for unit in cut(members, 16):
        name, span = unit_digest(unit), slice(first, first + len(unit))
        table = pa.table(
            {
                "key": [m.key for m in unit],
                "status": np.where(failed[span], "no_face", "ok"),
                "vector": to_arrow(stored[span], ~failed[span]),
            }
        )
        schema = embeddings(WIDTH).schema
        columns = [table[f.name] if f.name in table.column_names else pa.nulls(len(unit), f.type) for f in schema]
        ok = int((~failed[span]).sum())
        facts = {"status": {"ok": ok, "no_face": len(unit) - ok}, "device": "test"}
        made = pa.table(columns, schema=schema)
        unit_store(run).commit(name, made, contract=embeddings(WIDTH).contract, key=name, facts=facts)
        listed = [{"key": m.key, "identity": None, "bytes": 1, "digest": m.digest, "error": None} for m in unit]
        rows.append({"set": role, "uri": "-", "format": "folder", "unit": name, "first_row": first, "members": listed})
        first += len(unit)
    run.save("scan", role, UNITS, UNITS.from_rows(rows), key="test")
    units = UNITS.from_rows(rows)
    run.save(
        "embed", role, REJECTS, REJECTS.from_rows([]), key=closing_key(run, units), status={"ok": int((~failed).sum())}
    )


def brute(truth: dict[str, np.ndarray], arm: str) -> list[tuple[int, int, float]]:
    """All comparisons of one arm in the total order, from a plain fp64 product."""
    scores = truth["release"] @ truth[arm].T
    pairs = [(s, g, scores[s, g]) for s, g in zip(*np.nonzero(np.isfinite(scores)), strict=True)]
    return sorted(pairs, key=lambda pair: (-pair[2], pair[0], pair[1]))


def found(run: Run, name: str, contract: object, arm: str) -> list[tuple[int, int, float]]:
    table = pa.concat_tables(results(run, name, contract))
    table = table.filter(pa.compute.equal(table["arm"], arm))
    return list(zip(*(table[c].to_pylist() for c in ("release_row", "gallery_row", "cosine")), strict=True))


def by_column(pairs: list[tuple[int, int, float]]) -> dict[int, list[tuple[int, int, float]]]:
    lists: dict[int, list[tuple[int, int, float]]] = {}
    for pair in pairs:
        lists.setdefault(pair[1], []).append(pair)
    return lists


@pytest.mark.parametrize(
    "layout",
    [
        (),
        ("search.shard_images=1", "search.block_images=1", "search.in_flight=1"),
        ("search.shard_images=37", "search.block_images=29", "search.in_flight=7"),
        ("search.shard_images=64", "search.engine=faiss"),
        ("search.shard_images=64", "search.engine=mixed", "search.block_images=20"),
    ],
    ids=["one shard an arm", "a unit a shard", "ragged", "faiss", "mixed"],
)
def test_every_layout_gives_what_brute_force_gives(
    session: None, configured: Configured, layout: tuple[str, ...]
) -> None:
    config = configured("search.k=9", "search.columns=2", "search.floor=0.4", *layout)
    truth = planted(config)
    with Run(config) as run:
        search(run)
        for arm in ("training", "control", "anchor"):
            everything = brute(truth, arm)
            near = found(run, "neighbours", NEIGHBOURS, arm)
            rows = sorted({s for s, _, _ in everything})
            assert near == [pair for s in rows for pair in [p for p in everything if p[0] == s][:9]]
            above = found(run, "pairs", PAIRS, arm)
            near_gallery = found(run, "closest", CLOSEST, arm)
            columns = sorted(everything, key=lambda pair: (pair[1], -pair[2], pair[0]))
            merged = sorted(near_gallery, key=lambda pair: (pair[1], -pair[2], pair[0]))
            assert [p for own in by_column(merged).values() for p in own[:2]] == [
                p for own in by_column(columns).values() for p in own[:2]
            ]
            by_score = sorted(above, key=lambda pair: (-pair[2], pair[0], pair[1]))
            assert by_score == [pair for pair in everything if pair[2] >= 0.4]
            assert run.commit("search", "blocks").facts["comparisons"][arm] == len(everything)


def test_a_second_search_does_nothing_and_a_lost_block_alone_is_searched_again(
    session: None, configured: Configured, caplog: pytest.LogCaptureFixture
) -> None:
    config = configured("search.floor=0.4", "search.block_images=30")
    planted(config)
    caplog.set_level("INFO")
    with Run(config) as run:
        search(run)
        store = run.store.child("search")
        before = {path.name: path.read_bytes() for path in store.root.iterdir()}
        search(run)
        assert "search: nothing to do" in caplog.text
        lost = run.table("search", "blocks", BLOCKS)["block"][1].as_py()
        (store.root / f"pairs-{lost}.commit.json").unlink()
        search(run)
        assert run.ledger.record["stages"]["search"]["searched_now"] == 1
        assert {path.name: path.read_bytes() for path in store.root.iterdir()} == before


def test_other_options_or_vectors_are_another_search(session: None, configured: Configured) -> None:
    names = []
    for overrides, seed in [((), 0), (("search.k=3",), 0), (("search.floor=0.5",), 0)]:
        config = configured("search.floor=0.4", *overrides)
        planted(config, seed)
        with Run(config) as run:
            search(run)
            names.append(run.table("search", "blocks", BLOCKS)["block"].to_pylist())
    assert len({name for listed in names for name in listed}) == sum(map(len, names))


def test_more_pairs_than_allowed_are_refused_not_cut(session: None, configured: Configured) -> None:
    config = configured("search.floor=-1", "search.max_pairs=50")
    planted(config)
    with Run(config) as run, pytest.raises(CapacityError, match=r"search\.max_pairs is 50"):
        search(run)


def test_damaged_embeddings_are_refused_by_name(session: None, configured: Configured) -> None:
    config = configured("search.floor=0.4")
    planted(config)
    with Run(config) as run:
        name = run.table("scan", "training", UNITS)["unit"][0].as_py()
        path = unit_store(run).root / f"{name}.parquet"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(IncompleteTable, match=name):
            search(run)


def test_search_before_embed_says_what_to_run(configured: Configured) -> None:
    with Run(configured()) as run, pytest.raises(IncompleteTable, match="Run `unveil scan` first"):
        search(run)


def test_results_of_an_earlier_search_are_not_used_for_changed_sets(session: None, configured: Configured) -> None:
    """Row numbers of the old search would name other images of the new set."""
    config = configured("search.floor=0.4")
    planted(config)
    with Run(config) as run:
        search(run)
        units = run.table("scan", "training", UNITS)
        run.save("scan", "training", UNITS, units.slice(1), key="changed")
        with pytest.raises(
            IncompleteTable, match=r"training set or its options have changed\. Run `unveil embed` again"
        ):
            next(results(run, "pairs", PAIRS))
        facts = run.commit("embed", "training").facts
        table = REJECTS.from_rows([])
        run.save("embed", "training", REJECTS, table, key=closing_key(run, units.slice(1)), **facts)
        with pytest.raises(IncompleteTable, match="Run `unveil search` again"):
            next(results(run, "pairs", PAIRS))
