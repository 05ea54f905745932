import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import pytest

from cluster.faults import IncompleteTable
from operators.errors import SchemaMismatch
from operators.tables import REJECTS, UNITS
from pipeline.audit import audit
from pipeline.config import AuditConfig
from pipeline.embed import unit_store
from pipeline.plan import plan
from pipeline.scan import scan
from pipeline.stage import Run, logged_to
from pipeline.watch_look import basis

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


class Signed(BaseHTTPRequestHandler):
    """One file, given to whoever has the password and a signature that begins right."""

    data: bytes

    def log_message(self, *args: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        """A range of the file, or 403."""
        let_in = self.path.startswith("/release.zip?X-Amz-Signature=SIGNEDBY") and self.headers["Authorization"]
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        part = self.data[first : last + 1] if let_in else b""
        self.send_response(206 if let_in else 403)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(self.data)}")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", '"one"')
        self.end_headers()
        self.wfile.write(part)


@pytest.fixture
def signed(corpus: Path, tmp_path: Path) -> Iterator[str]:
    """The address, up to its signature, of a release that a web server gives to few."""
    with zipfile.ZipFile(tmp_path / "release.zip", "w") as archive:
        for path in sorted((corpus / "release").rglob("*.*")):
            archive.write(path, str(path.relative_to(corpus / "release")))
    Signed.data = (tmp_path / "release.zip").read_bytes()
    with HTTPServer(("127.0.0.1", 0), Signed) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://me:PASSWORD@127.0.0.1:{server.server_address[1]}/release.zip?X-Amz-Signature=SIGNEDBY"
        server.shutdown()
        thread.join()


def test_a_whole_audit_of_a_signed_address_writes_no_secret_and_knows_it_signed_again(
    configured: Configured,
    audited_once: Path,
    tmp_path: Path,
    signed: str,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Signatures begin with SIGNEDBY, and the password is PASSWORD: neither is in any byte of the run folder."""
    shutil.copytree(audited_once / "run", tmp_path / "run")
    caplog.set_level("DEBUG")
    config = configured(f"sets.release.uri={signed}1")
    before = Run(config).table("scan", "release", UNITS)
    unit = before["unit"][0].as_py()
    for path in Path(unit_store(Run(config)).address).glob(f"{unit}.*"):  # for workers to read it
        path.unlink()
    audit(config)
    listed = Run(config).table("scan", "release", UNITS)
    assert listed["unit"].equals(before["unit"])  # by their content
    shown = {f"http://…@{urlsplit(signed).netloc.rpartition('@')[2]}/release.zip?…"}
    assert set(listed["uri"].to_pylist()) == shown
    said = caplog.text + plan(config)
    caplog.clear()
    again = configured(f"sets.release.uri={signed}2")
    assert basis(config) == basis(again) and "SIGNEDBY" not in str(basis(config))  # what `watch` writes down
    audit(again)
    audit(
        configured(f"sets.release.uri={signed}3", "clean.findings=candidates", "clean.write=folder"), "verify", "clean"
    )
    assert "release unchanged" in caplog.text and "embed: nothing to do" in caplog.text
    said += caplog.text + "".join(capfd.readouterr())
    kept = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    record = json.loads((tmp_path / "run" / "run.json").read_bytes())
    assert {record["config"]["sets"]["release"]["uri"]} == shown
    assert any((tmp_path / "run" / "clean" / "release").rglob("*.jpg"))
    for secret in ("SIGNEDBY", "PASSWORD"):
        assert secret not in said
        assert [str(path) for path in kept if secret.encode() in path.read_bytes()] == []
