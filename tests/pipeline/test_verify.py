"""verify on a small real audit: equal as it is, and different wherever a committed part lies."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from cluster.faults import IncompleteTable
from operators.records import embeddings
from operators.tables import CLOSEST, NEIGHBOURS, PAIRS, UNITS, Table
from operators.vectors import to_arrow
from pipeline import __main__ as command
from pipeline import verify as module
from pipeline.audit import STAGES
from pipeline.config import load
from pipeline.coverage import COVERAGE
from pipeline.embed import unit_store
from pipeline.search import finished, search
from pipeline.stage import Run
from pipeline.verify import VerifyConfig, verify

pytestmark = pytest.mark.ray
Opened = Callable[..., Run]
Altered = Callable[[pa.Table], pa.Table]
Operator = Callable[[pa.Table], pa.Table]
ALL = "verify.rows=100000"
ARMS = ("training", "control", "anchor")


@pytest.fixture(scope="module")
def remembered() -> Callable[[Callable[..., Operator]], Callable[..., Operator]]:
    """Lets an operator do the same work once: most tests here damage a table, and embed the same images again."""
    made: dict[str, pa.Table] = {}

    def opening(operator: Callable[..., Operator]) -> Callable[..., Operator]:
        def build(*config: Any) -> Operator:
            held: list[Operator] = []

            def call(table: pa.Table) -> pa.Table:
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, table.schema) as stream:
                    stream.write_table(table)
                key = hashlib.sha256(repr((operator, config)).encode() + sink.getvalue()).hexdigest()
                if key not in made:
                    held[:] = held or [operator(*config)]
                    made[key] = held[0](table)
                return made[key]

            return call

        return build

    return opening


@pytest.fixture
def quick(remembered: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that were embedded again in an earlier test are not embedded once more."""
    for name in ("FacePreparation", "Encoder"):
        monkeypatch.setattr(module, name, remembered(getattr(module, name)))


@pytest.fixture
def opened(audited: Path, tmp_path: Path) -> Iterator[Opened]:
    """Open a copy of the finished audit, which a test may damage."""
    shutil.copytree(audited.parent / "run", tmp_path / "run")

    def build(*overrides: str) -> Run:
        return Run(load(str(audited), [f"out={tmp_path / 'run'}", *overrides]))

    return build


def part(run: Run, contract: Table) -> str:
    """The first part that follows `contract` and has rows."""
    comparison, wanted = finished(run)
    names = (name for name, kind in wanted.names(comparison) if kind is contract)
    return next(name for name in names if run.commit("search", name).rows)


def recommit(run: Run, contract: Table, altered: Altered) -> None:
    """Commit the first part that follows `contract` again, altered, with a marker that fits it."""
    name = part(run, contract)
    made = run.commit("search", name)
    run.save("search", name, contract, altered(run.table("search", name, contract)), key=made.key, **made.facts)


def replaced(table: pa.Table, name: str, at: int, value: object) -> pa.Table:
    values = table[name].to_pylist()
    values[at] = value
    return table.set_column(table.schema.get_field_index(name), table.schema.field(name), pa.array(values))


def stored_unit(run: Run, role: str, statuses: int = 1) -> tuple[dict[str, object], pa.Table]:
    """The first unit of a set whose images have at least so many different statuses, and its embeddings."""
    for unit in run.table("scan", role, UNITS).to_pylist():
        table = unit_store(run).read(unit["unit"])
        if len(set(table["status"].to_pylist())) >= statuses:
            return unit, table
    raise LookupError(role)


def restore(run: Run, name: str, table: pa.Table) -> None:
    made = unit_store(run).find(name)
    assert made is not None
    unit_store(run).commit(name, table, contract=made.contract, key=made.key, facts=made.facts)


def recorded(run: Run) -> dict[str, object]:
    found: dict[str, object] = json.loads((run.folder / "run.json").read_text())["stages"]["verify"]
    return found


def test_a_run_as_it_was_made_passes_and_the_manifest_says_what_was_checked(
    opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with opened("verify.rows=20", "verify.images=30") as run:
        before = {path: path.read_bytes() for path in run.folder.rglob("*.parquet")}
        verify(run)
        audited = {role: run.commit("embed", role).facts["status"]["ok"] for role in ("release", *ARMS)}
        facts = recorded(run)
        assert facts["outcome"] == "equal" and facts["differences"] == 0
        columns = sum(min(20, audited[arm]) for arm in ARMS)
        made = 20 * sum(audited[arm] for arm in ARMS) + columns * audited["release"]
        assert facts["release_images"] == 20 and facts["gallery_images"] == columns
        assert facts["comparisons"] == made
        assert facts["images"] == 30 and 0 < facts["bit_equal"] <= facts["embedded"] <= 30
        assert facts["lowest_cosine"] >= 0.999
        assert facts["search"] == run.commit("search", "coverage").key
        said = f"20 release images x 3 sets and {columns:,} gallery images, {made:,} comparisons recomputed exactly"
        assert f"{said}: equal" in caplog.text
        assert {path: path.read_bytes() for path in run.folder.rglob("*.parquet")} == before


@pytest.mark.usefixtures("quick")
def test_all_images_can_be_checked_and_rejected_ones_are_among_them(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.recheck.GROUP", 7)
    with opened(ALL, "verify.images=100000") as run:
        status = [run.commit("embed", role).facts["status"] for role in run.config.sets.given()]
        verify(run)
        facts = recorded(run)
        assert facts["images"] == sum(sum(counts.values()) for counts in status)
        assert facts["embedded"] == sum(counts["ok"] for counts in status) < facts["images"]
        assert facts["comparisons"] == 2 * sum(run.commit("search", "coverage").facts["comparisons"].values())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("direction", [-2.0, 2.0])
def test_one_unit_in_the_last_place_of_a_cosine_is_seen(opened: Opened, direction: float) -> None:
    with opened(ALL, "verify.images=1") as run:
        table = run.table("search", part(run, NEIGHBOURS), NEIGHBOURS)
        at = len(table) // 2
        row, arm, rank, cosine = (table[name][at].as_py() for name in ("release_row", "arm", "rank", "cosine"))
        near = float(np.nextafter(cosine, direction))
        recommit(run, NEIGHBOURS, lambda table: replaced(table, "cosine", at, near))
        with pytest.raises(IncompleteTable) as caught:
            verify(run)
        said = f"release row {row}, {arm}, place {rank}: cosine {near!r} is committed, {cosine!r} recomputed"
        assert f"search/neighbours: {said}" in str(caught.value) and "run `unveil run` again" in str(caught.value)
        assert recorded(run)["outcome"] == "different" and recorded(run)["differences"] == 1


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("which", [0, -1])
def test_a_dropped_pair_is_seen(opened: Opened, which: int) -> None:
    with opened(ALL, "verify.images=1") as run:

        def dropped(table: pa.Table) -> pa.Table:
            return table.filter(pa.array(np.arange(len(table)) != which % len(table)))

        recommit(run, PAIRS, dropped)
        with pytest.raises(IncompleteTable, match=r"search/pairs: release row \d+, \w+: \d+ rows are committed, \d+ "):
            verify(run)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("column", ["release_row", "cosine"])
def test_another_closest_release_image_is_seen(opened: Opened, column: str) -> None:
    with opened(ALL, "verify.images=1") as run:
        table = run.table("search", part(run, CLOSEST), CLOSEST)
        row, arm, rank, old = (table[name][-1].as_py() for name in ("gallery_row", "arm", "rank", column))
        new = old + 1 if column == "release_row" else float(np.nextafter(old, 2))
        recommit(run, CLOSEST, lambda table: replaced(table, column, len(table) - 1, new))
        said = rf"search/closest: gallery row {row}, {arm}, place {rank}: {column} {new!r} is committed, {old!r} recomp"
        with pytest.raises(IncompleteTable, match=said):
            verify(run)
        assert recorded(run)["differences"] == 1


@pytest.mark.usefixtures("quick")
def test_a_made_up_pair_is_seen(opened: Opened) -> None:
    with opened(ALL, "verify.images=1") as run:
        recommit(run, PAIRS, lambda table: pa.concat_tables([table, table.slice(0, 1)]))
        with pytest.raises(IncompleteTable, match="search/pairs: release row"):
            verify(run)


@pytest.mark.usefixtures("quick")
def test_tied_neighbours_in_another_order_are_seen(opened: Opened) -> None:
    """Two gallery images with one vector tie; the swapped list has the same cosines and ranks."""
    with opened(ALL, "verify.images=1") as run:
        unit, table = stored_unit(run, "training")
        first, second = np.flatnonzero(np.asarray(table["vector"].is_valid()))[:2].tolist()
        order = [first if at == second else at for at in range(len(table))]
        field = table.schema.get_field_index("vector")
        restore(run, unit["unit"], table.set_column(field, "vector", table["vector"].take(pa.array(order))))
        shutil.rmtree(run.folder / "search")
        search(run)
        verify(run)

        def swapped(near: pa.Table) -> pa.Table:
            rows = list(zip(near["arm"].to_pylist(), near["gallery_row"].to_pylist(), strict=True))
            tied = (("training", first), ("training", second))
            at = next(at for at, pair in enumerate(pairwise(rows)) if pair == tied)
            assert near["cosine"][at] == near["cosine"][at + 1]
            return replaced(replaced(near, "gallery_row", at, second), "gallery_row", at + 1, first)

        recommit(run, NEIGHBOURS, swapped)
        with pytest.raises(IncompleteTable, match=rf"gallery_row {second} is committed, {first} recomputed"):
            verify(run)


@pytest.mark.usefixtures("quick")
def test_a_wrong_number_of_comparisons_is_seen(opened: Opened) -> None:
    with opened("verify.rows=1", "verify.images=1") as run:
        made = run.commit("search", "coverage")
        facts = {**made.facts, "comparisons": {**made.facts["comparisons"], "control": 3}}
        run.save("search", "coverage", COVERAGE, run.table("search", "coverage", COVERAGE), key=made.key, **facts)
        with pytest.raises(IncompleteTable, match=r"search/coverage, control: 3 comparisons are recorded, \d+ counted"):
            verify(run)


@pytest.mark.usefixtures("quick")
def test_another_images_vector_is_seen(opened: Opened) -> None:
    with opened("verify.rows=1", "verify.images=100000") as run:
        unit, table = stored_unit(run, "anchor")
        one, other = np.flatnonzero(np.asarray(table["vector"].is_valid()))[:2]
        order = np.arange(len(table))
        order[one] = other
        column = table["vector"].take(pa.array(order))
        restore(run, unit["unit"], table.set_column(table.schema.get_field_index("vector"), "vector", column))
        with pytest.raises(IncompleteTable) as caught:
            verify(run)
        assert f"embed: anchor row {unit['first_row'] + one}: cosine 0." in str(caught.value)
        assert f"Delete {unit_store(run).root / unit['unit']}* and {run.folder / 'search'}" in str(caught.value)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["key", "identity", "digest", "status"])
def test_a_row_that_says_otherwise_is_seen(opened: Opened, name: str) -> None:
    with opened("verify.rows=1", "verify.images=100000") as run:
        unit, table = stored_unit(run, "release", statuses=2)
        at = (
            table["status"].to_pylist().index("ok")
            if name != "status"
            else np.flatnonzero(np.asarray(pc.not_equal(table["status"], "ok")))[0]
        )
        restore(run, unit["unit"], replaced(table, name, int(at), "corrupt?"))
        with pytest.raises(IncompleteTable, match=f"embed: release row {unit['first_row'] + at}: the stored {name} is"):
            verify(run)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("ok", [True, False], ids=["a vector is missing", "a vector too many"])
def test_a_vector_that_should_not_be_or_should_is_seen(opened: Opened, ok: bool) -> None:
    with opened("verify.rows=1", "verify.images=100000") as run:
        unit, table = stored_unit(run, "release", statuses=2)
        good = np.asarray(table["vector"].is_valid())
        at = int(np.flatnonzero(good == ok)[0])
        filled = np.zeros((len(table), 128), np.float16)
        filled[good] = np.asarray(table["vector"].combine_chunks().drop_null().flatten()).reshape(-1, 128)
        filled[at, 0] = 1
        good[at] = not ok
        column = to_arrow(filled, good)
        field = embeddings(128).schema.field("vector")
        restore(run, unit["unit"], table.set_column(table.schema.get_field_index("vector"), field, column))
        with pytest.raises(IncompleteTable, match=f"embed: release row {unit['first_row'] + at}: cosine -1"):
            verify(run)


@pytest.mark.usefixtures("quick")
def test_a_unit_with_too_few_rows_is_refused_by_name(opened: Opened) -> None:
    with opened("verify.rows=1", "verify.images=100000") as run:
        unit, table = stored_unit(run, "training")
        restore(run, unit["unit"], table.slice(1))
        with pytest.raises(IncompleteTable, match=rf"{unit['unit']} of the training set: {len(table)} images listed"):
            verify(run)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("gone", [False, True], ids=["changed", "gone"])
def test_a_file_that_has_changed_since_is_reported_as_such(
    opened: Opened, corpus: Path, tmp_path: Path, gone: bool
) -> None:
    with opened("verify.rows=1", "verify.images=100000") as run:
        shutil.copytree(corpus / "anchor", tmp_path / "anchor")
        units = run.table("scan", "anchor", UNITS).to_pylist()
        made = run.commit("scan", "anchor")
        moved = [unit | {"uri": str(tmp_path / "anchor")} for unit in units]
        run.save("scan", "anchor", UNITS, UNITS.from_rows(moved), key=made.key, **made.facts)
        first, second = units[0]["members"][:2]
        file = tmp_path / "anchor" / first["key"]
        if gone:
            file.unlink()
        else:
            shutil.copyfile(tmp_path / "anchor" / second["key"], file)
        with pytest.raises(IncompleteTable) as caught:
            verify(run)
        said = f"embed: anchor row 0: {module.CHANGED}. Run `unveil run` again."
        assert said in str(caught.value) and first["key"] not in str(caught.value)
        assert recorded(run)["differences"] == 1


@pytest.mark.usefixtures("quick")
def test_every_difference_is_logged_by_number_and_none_by_name(
    opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(ALL, "verify.images=1") as run:
        recommit(run, NEIGHBOURS, lambda table: table.slice(0, 0))
        with pytest.raises(IncompleteTable, match=r"differences; the first 20 are in unveil\.log"):
            verify(run)
        keys = [
            m["key"]
            for role in ("release", *ARMS)
            for u in run.table("scan", role, UNITS).to_pylist()
            for m in u["members"]
        ]
        errors = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 20 and not any(key in message for key in keys for message in errors)


@pytest.mark.usefixtures("quick")
def test_a_run_of_other_options_or_none_is_refused_and_leaves_no_certificate(opened: Opened) -> None:
    with opened("verify.rows=1", "verify.images=1") as run:
        verify(run)
    with opened("search.k=3") as run:
        with pytest.raises(IncompleteTable, match="Run `unveil search` again"):
            verify(run)
        assert recorded(run) == {"outcome": "not finished"}
    with opened("faces.min_score=0.7") as run, pytest.raises(IncompleteTable, match="Run `unveil embed` again"):
        verify(run)


@pytest.mark.usefixtures("quick")
def test_a_seed_gives_its_sample_again_and_another_seed_another(opened: Opened) -> None:
    samples = []
    with opened() as run:
        units = pa.concat_tables([run.table("scan", role, UNITS) for role in run.config.sets.given()])
        for seed in (0, 0, 1):
            images = list(module._image_sample(opened(f"verify.seed={seed}", "verify.images=9"), units))
            samples.append([(unit["unit"], members.tolist()) for unit, members in images])
            assert sum(len(members) for _, members in images) == 9
    assert samples[0] == samples[1] != samples[2]


@pytest.mark.parametrize(("name", "value"), [("rows", 0), ("images", 0), ("rows", -5), ("seed", -1)])
def test_samples_of_nothing_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be at least \d\. Got {value}\."):
        VerifyConfig(**{name: value})


def test_the_verb_ends_with_1_after_a_difference_and_is_no_part_of_run(
    opened: Opened, audited: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["verify", str(audited), "verify.rows=2", "verify.images=2"]
    run = opened()
    assert command.main([*words, f"out={run.folder}"]) == 0
    recommit(run, NEIGHBOURS, lambda table: table.slice(0, 0))
    assert command.main([*words, ALL, f"out={run.folder}"]) == 1
    assert "unveil: " in capsys.readouterr().err
    assert "verify" not in STAGES
