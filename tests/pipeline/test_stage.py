import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from cluster.faults import IncompleteTable
from operators.errors import SchemaMismatch
from operators.tables import REJECTS, UNITS
from pipeline.config import AuditConfig
from pipeline.scan import scan
from pipeline.stage import Run, logged_to

Configured = Callable[..., AuditConfig]


def test_a_missing_table_names_the_stage_to_run(configured: Configured) -> None:
    with (
        Run(configured()) as run,
        pytest.raises(IncompleteTable, match=r"no embed/training table yet\. Run `unveil embed`"),
    ):
        run.table("embed", "training", REJECTS)


def test_a_table_of_another_contract_is_refused(configured: Configured) -> None:
    with Run(configured()) as run:
        run.save("scan", "training", REJECTS, REJECTS.from_rows([]), key="k")
        with pytest.raises(
            IncompleteTable, match=r"scan/training follows rejects/1, needed is units/2\. Run scan again"
        ):
            run.table("scan", "training", UNITS)


def test_nothing_is_committed_that_breaks_its_contract(configured: Configured) -> None:
    with Run(configured()) as run:
        with pytest.raises(SchemaMismatch):
            run.save("scan", "training", UNITS, pa.table({"unit": ["u"]}), key="k")
        assert run.store.child("scan").find("training") is None


def test_the_log_in_the_run_folder_holds_counts_and_no_names(configured: Configured, corpus: Path) -> None:
    config = configured()
    logging.getLogger("pipeline").setLevel("INFO")
    with Run(config) as run:
        scan(run)
    text = (Path(config.out) / "unveil.log").read_text()
    assert "pipeline.scan scan: training, " in text
    assert not [path.name for path in corpus.rglob("*.jpg") if f"{path.parent.name}/{path.name}" in text]
    before = len(text)
    logging.getLogger("pipeline").info("after the run")
    assert len((Path(config.out) / "unveil.log").read_text()) == before


def test_a_log_on_a_full_disk_loses_lines_and_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("pipeline")
    log.setLevel("INFO")
    with logged_to(Path("/dev/full")):
        log.info("a line")
        log.info("a line " * 10_000)
    assert capfd.readouterr().err == ""


def test_a_second_process_is_refused_and_a_reader_is_not(configured: Configured, root: Path) -> None:
    config = configured()
    second = "import pathlib, sys; from cluster.run_lock import locked; locked(pathlib.Path(sys.argv[1])).__enter__()"
    with Run(config), Run(config, alone=False):
        refused = subprocess.run([sys.executable, "-c", second, config.out], cwd=root, capture_output=True, text=True)
        assert f"in use by process {os.getpid()} on " in refused.stderr
    with Run(config, alone=False):
        assert subprocess.run([sys.executable, "-c", second, config.out], cwd=root).returncode == 0
