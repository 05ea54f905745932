"""A line of the ledger is there as a whole, or its writer hears of it."""

import resource
import signal
from pathlib import Path

import pytest

from cluster.faults import StorageError
from pipeline.watch_ledger import WatchLedger, read_lines


def test_a_line_that_did_not_fit_is_an_error_and_harms_no_other(tmp_path: Path) -> None:
    ledger = WatchLedger(tmp_path)
    ledger.add("result", "2030-01-07T02:00:00+00:00", "one", {"id": "a"})
    size = (tmp_path / "ledger.jsonl").stat().st_size
    limit, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limit[1]))  # the kernel then takes 10 bytes, and says so
    try:
        with pytest.raises(StorageError, match=r"ledger\.jsonl: cannot be written"):
            ledger.add("result", "2030-01-08T02:00:00+00:00", "one", {"id": "b"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [line["id"] for line in ledger.lines] == ["a"]
    ledger.add("result", "2030-01-09T02:00:00+00:00", "one", {"id": "c"})
    assert [line["id"] for line in read_lines(tmp_path)] == ["a", "c"]
