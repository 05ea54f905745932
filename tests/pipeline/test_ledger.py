import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import AuditConfig
from pipeline.ledger import Ledger, code_fingerprint
from pipeline.stage import Run, fingerprint

Configured = Callable[..., AuditConfig]


def test_the_manifest_says_what_ran_with_what(configured: Configured) -> None:
    config = configured("search.k=7")
    with Run(config) as run, run.timed("scan") as facts:
        facts["images"] = 3
    record = json.loads((Path(config.out) / "run.json").read_text())
    assert record["config"]["search"]["k"] == 7
    assert record["versions"]["numpy"] == np.__version__
    assert record["weights"] == {
        config.embedder.path: config.embedder.sha256,
        config.faces.detector: config.faces.detector_sha256,
    }
    assert record["stages"]["scan"]["images"] == 3 and record["stages"]["scan"]["seconds"] >= 0
    assert record["code"] == code_fingerprint()


def test_a_later_run_keeps_the_record_of_earlier_stages(configured: Configured, tmp_path: Path) -> None:
    Ledger(tmp_path / "run.json", configured()).stage("scan", {"images": 5})
    later = Ledger(tmp_path / "run.json", configured())
    later.stage("embed", {"images": 6})
    assert json.loads((tmp_path / "run.json").read_text())["stages"] == {"scan": {"images": 5}, "embed": {"images": 6}}


def test_a_stage_that_fails_is_not_recorded(configured: Configured) -> None:
    with Run(configured()) as run:
        with pytest.raises(LookupError), run.timed("scan"):
            raise LookupError
        assert "scan" not in run.ledger.record["stages"]


def test_fingerprints_do_not_depend_on_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2}) and fingerprint("1") != fingerprint(1)
