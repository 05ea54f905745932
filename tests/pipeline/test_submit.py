"""What is sent to a cluster, and real jobs on a head that asks for a token."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml

from cluster.faults import ClusterError, UnlikeNodes
from cluster.jobs import JobState, SubmitConfig
from operators.errors import ConfigError
from pipeline import submit as module
from pipeline.config import load
from pipeline.ledger import code_fingerprint
from pipeline.submit import JOB, exit_code, packed, parsed, refuse_other_code, resolved, submit

HERE = SubmitConfig(cluster="127.0.0.1:8265")
THERE = SubmitConfig(cluster="https://ray.example.org")


def test_words_are_sorted_into_those_of_the_job_and_of_the_audit() -> None:
    options, rest = parsed(["cluster=10.0.0.5:8265", "title=a=b", "submit.cpus=1", "submit.id=2026-11-22", "out=x"])
    assert options == SubmitConfig(cluster="10.0.0.5:8265", cpus=1, id="2026-11-22")
    assert rest == ["title=a=b", "out=x"]


def test_a_named_cluster_is_a_file_below_what_is_given(root: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert parsed(["cluster=local"])[0] == SubmitConfig(cluster="127.0.0.1:8265")
        kuberay = parsed(["submit.root=/mine", "cluster=kuberay"])[0]
        assert kuberay == SubmitConfig(cluster="127.0.0.1:8265", root="/mine", code="installed")
        with pytest.raises(ConfigError, match=r"cluster=nowhere: configs/clusters/nowhere\.yaml cannot be read"):
            parsed(["cluster=nowhere"])
    (tmp_path / "own.yaml").write_text("cluster: https://x.org\ninsecure: true\n")
    assert parsed([f"cluster={tmp_path}/own.yaml"])[0] == SubmitConfig(cluster="https://x.org", insecure=True)
    (tmp_path / "own.yaml").write_text("- x")
    with pytest.raises(ConfigError, match="must hold `cluster: ADDRESS`"):
        parsed([f"cluster={tmp_path}/own.yaml"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["submit.cpus=1"], "cluster is missing"),
        (["cluster=a:1", "submit.cpu=1"], r"unknown key 'submit\.cpu'"),
        (["cluster=a:1", "submit.cpus=many"], r"submit\.cpus must be a number\. Got 'many'"),
        (["cluster=a:1", "submit.insecure=1"], "must be true or false"),
        (["cluster=a:1", "submit.follow=[", "x=1"], "not a valid override"),
        (["cluster=a:1", "submit.code=x"], r"^submit\.code must be one of"),
    ],
)
def test_a_mistake_in_the_options_is_named(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parsed(words)


@pytest.mark.parametrize("words", [[], ["run"], ["review", "a.yaml"], ["seal", "a.yaml"], ["start", "x"]])
def test_only_verbs_that_can_be_jobs_are_submitted(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="unveil submit VERB CONFIG cluster=ADDRESS"):
        submit(words, lambda _: None)
    with pytest.raises(ConfigError, match=r"takes cluster=\.\.\. and submit\.key=value only"):
        submit(["status", "id", "cluster=127.0.0.1:1", "title=x"], lambda _: None)


def write_config(tmp_path: Path, **more: object) -> str:
    values = {
        "out": "runs/x",
        "store": "s3://bucket/store",
        "sets": {
            "release": {"uri": "s3://bucket/release"},
            "training": {"uri": "data/training", "list_file": "lists/training.txt"},
            "control": {"uri": "/data/control"},
        },
        "embedders": ["sface_2021dec", "dlib_resnet_v1"],
        **more,
    }
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "given.yaml")


def test_the_resolved_configuration_is_the_same_audit_without_files_of_this_machine(tmp_path: Path) -> None:
    config = load(write_config(tmp_path))
    folder = tmp_path / "package"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        resolved(config, HERE, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        again = load("audit.yaml", ["ray.address=auto"])
        assert [one.path for one in again.models()] == [
            f"{tmp_path}/models/sface_2021dec.onnx", f"{tmp_path}/models/dlib_resnet_v1.onnx"
        ]  # fmt: skip
        assert [(one.name, one.sha256) for one in again.models()] == [(one.name, one.sha256) for one in config.models()]
    assert (again.out, again.store) == (f"{tmp_path}/runs/x", "s3://bucket/store")
    sets = again.sets.given()
    assert [one.uri for one in sets.values()] == ["s3://bucket/release", f"{tmp_path}/data/training", "/data/control"]
    assert sets["training"].list_file == f"{tmp_path}/lists/training.txt"
    assert (again.assess, again.search, again.scan) == (config.assess, config.search, config.scan)
    assert again.ray.address == "auto" and not again.ray.insecure


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("file:keys/k", "file:/shared/keys/k"),
        ("file:/k", "file:/k"),
        ("file:~/k", "file:~/k"),
        ("env:NAME", "env:NAME"),
    ],
)
def test_a_key_is_named_and_not_sent(tmp_path: Path, given: str, expected: str) -> None:
    config = load(write_config(tmp_path, encryption={"key": given}))
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "k").write_text("0" * 64)
    rooted = SubmitConfig(cluster="https://ray.example.org", root="/shared")
    (tmp_path / "package").mkdir()
    text = resolved(config, rooted, tmp_path / "package")
    assert f"key: {expected}" in text and "0" * 64 not in text


def test_relative_paths_mean_nothing_on_another_machine_unless_told(tmp_path: Path) -> None:
    config = load(write_config(tmp_path))
    with pytest.raises(ConfigError, match=r"relative path .*submit\.root=/FOLDER"):
        resolved(config, THERE, tmp_path)
    rooted = SubmitConfig(cluster="https://ray.example.org", root="/shared/audits", insecure=True)
    text = yaml.safe_load(resolved(config, rooted, tmp_path).split("\nalignment:")[0])
    assert text["out"] == "/shared/audits/runs/x"
    assert text["faces"]["detector"] == "/shared/audits/models/yunet_2023mar.onnx"
    assert text["sets"]["training"]["uri"] == "/shared/audits/data/training"
    assert text["ray"]["insecure"] is True


@pytest.mark.parametrize(
    "uri",
    [
        "https://me:secret@host/set.tar",
        "https://host/set.tar?X-Amz-Signature=secret",
        "https://h/a?b=1&sig=secret",
        "https://h/a?AWSAccessKeyId=AK&Expires=1&Signature=secret",
        "https://h/a?GoogleAccessId=me&Expires=1",
        "https://h/a?Key-Pair-Id=K",
        "https://h/a?Expires=1&Signature=secret",
        "https://h/a?private_token=secret",
        "https://h/a?code=secret",
    ],
)
def test_addresses_that_hold_a_credential_are_not_sent(tmp_path: Path, uri: str) -> None:
    config = load(write_config(tmp_path, sets={"release": {"uri": uri}, "training": {"uri": "/t"}}))
    with pytest.raises(ConfigError, match="holds a credential") as caught:
        resolved(config, HERE, tmp_path)
    assert "sec" not in str(caught.value) and "me:" not in str(caught.value)


def test_links_and_key_files_are_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "private").mkdir()
    for name in ("operators/code.py", "operators/.env", "operators/master.key", "operators/seal.pem", "private/a.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "operators" / "linked").symlink_to(tmp_path / "private")
    (tmp_path / "operators" / "linked.py").symlink_to(tmp_path / "private" / "a.py")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    assert packed(tmp_path / "package", code=True)[0] == 1
    assert (tmp_path / "package" / "operators" / "code.py").exists()


def test_what_is_packed_is_code_and_is_the_same_code(tmp_path: Path, root: Path) -> None:
    count, size = packed(tmp_path, code=True)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert count == len(files) and size == sum(path.stat().st_size for path in files) < 5e6
    assert {path.relative_to(tmp_path).parts[0] for path in files} == {"operators", "cluster", "pipeline"}
    ends = {path.suffix for path in files}
    assert ends <= {".py", ".yaml", ".html", ".css", ".js", ".typed", ".json", ".jinja", ".j2", ".svg", ".md"}, ends
    for package in ("operators", "cluster", "pipeline"):
        here = {path.relative_to(root) for path in (root / package).rglob("*.py")}
        there = {path.relative_to(tmp_path) for path in (tmp_path / package).rglob("*.py")}
        assert here == there
    told = "from pipeline.ledger import code_fingerprint; from pipeline.models import known_models; " \
        "print(code_fingerprint(), *known_models())"  # fmt: skip
    seen = subprocess.run([sys.executable, "-c", told], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert seen.split()[0] == code_fingerprint() and "sface_2021dec" in seen
    assert packed(tmp_path / "operators" / "formats", code=False)[0] > 0


def test_a_package_over_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Jobs", lambda options: type("J", (), {"address": "x"}))
    words = ["run", write_config(tmp_path), "cluster=127.0.0.1:1", "submit.upload_mb=0.1"]
    with pytest.raises(ConfigError, match=r"submit\.upload_mb: .* over the limit of 0\.1 MB"):
        submit(words, lambda _: None)


def test_a_job_runs_on_the_submitted_code_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(JOB, raising=False)
    refuse_other_code()
    for metadata in (None, {}, {"unveil_code": code_fingerprint()}):
        monkeypatch.setenv(JOB, json.dumps({"runtime_env": {}, "metadata": metadata}))
        refuse_other_code()
    monkeypatch.setenv(JOB, json.dumps({"metadata": {"unveil_code": "0" * 32, "unveil": "9.9"}}))
    with pytest.raises(UnlikeNodes, match=r"other code .*000000000000, version 9\.9.*submit\.code=upload"):
        refuse_other_code()


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", 1, 1), ("FAILED", 127, 1), ("FAILED", -9, 1),
     ("FAILED", None, 1), ("STOPPED", None, 1)],
)  # fmt: skip
def test_the_exit_code_is_that_of_the_verb(status: str, code: int | None, expected: int) -> None:
    assert exit_code(JobState("id", status, code, "why\nlast", {})) == expected


def test_ctrl_c_leaves_the_job_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Interrupted:
        def follow(self, *_: object) -> None:
            raise KeyboardInterrupt

    caplog.set_level("INFO")
    assert module._followed(Interrupted(), "one", HERE, lambda _: None) == 130  # type: ignore[arg-type]
    assert "unveil submit logs one cluster=127.0.0.1:8265" in caplog.text and "submit stop one" in caplog.text


class Head(NamedTuple):
    """A running head: its dashboard, its token, and the folder of everything it writes."""

    address: str
    token: str
    folder: Path

    def command(self, *words: str, token: str | None = None) -> "subprocess.Popen[str]":
        """`unveil submit` in a process of its own, like a user's."""
        unset = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_ADDRESS")
        env = {name: value for name, value in os.environ.items() if name not in unset}
        env |= {"HOME": str(self.folder / "home"), "RAY_AUTH_TOKEN": self.token if token is None else token}
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline", "submit", *words, f"cluster={self.address}"],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def here(self, *words: str) -> tuple[int, str]:
        """The same in this process: exit code and what was written."""
        shown: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_AUTH_TOKEN", self.token)
            code = submit([*words, f"cluster={self.address}"], shown.append)
        return code, "".join(shown)


class Ended(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str


def ended(command: "subprocess.Popen[str]") -> Ended:
    out, err = command.communicate(timeout=150)
    return Ended(command.returncode, out, err)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head of its own in a process group of its own, with a token, its dashboard on loopback."""
    folder = Path(f"/tmp/uh-{os.getpid()}")  # short: Ray's sockets lie in it
    (folder / "home").mkdir(parents=True, mode=0o700)
    secret, port = secrets.token_hex(16), free_port()
    env = os.environ | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secret, "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(folder / "home"),
    }  # fmt: skip
    options = [
        "--head", "--block", "--num-cpus=2", "--port=0", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}",
        "--dashboard-agent-listen-port=0", f"--ray-client-server-port={free_port()}", f"--temp-dir={folder}/r",
        "--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=134217728",
    ]  # fmt: skip
    with (folder / "head.log").open("w") as log:
        started = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", *options],
            env=env, stdout=log, stderr=log, cwd=folder, start_new_session=True,
        )  # fmt: skip
    made = Head(f"127.0.0.1:{port}", secret, folder)
    try:
        deadline = time.monotonic() + 90
        while status(made.address) != 401:
            assert started.poll() is None and time.monotonic() < deadline, (folder / "head.log").read_text()
            time.sleep(0.2)
        yield made
    finally:
        end(started, folder)
        shutil.rmtree(folder, ignore_errors=True)


def end(started: subprocess.Popen[bytes], folder: Path) -> None:
    """End the head and all that it started, which are those that know its folder."""
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    deadline = time.monotonic() + 10
    while (left := processes_of(folder)) and time.monotonic() < deadline:
        for one in left:
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        time.sleep(0.1)


def processes_of(folder: Path) -> list[int]:
    """Processes whose command line names `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return [one for one in found if one != os.getpid()]


def status(address: str, **headers: str) -> int:
    """HTTP status of the list of jobs; 0 while nobody answers."""
    request = urllib.request.Request(f"http://{address}/api/jobs/", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0


@pytest.fixture(scope="module")
def submitted(head: Head, config: Path) -> dict[str, Ended]:
    """Three jobs at the same time: an audit that finds more than it may, a good stage, and one that fails."""
    other = f"out={config.parent}/other"
    commands = {
        "whole": head.command("run", str(config), "assess.limit=0", "submit.id=whole"),
        "good": head.command("scan", str(config), other),
        "failed": head.command(
            "scan", str(config), "sets.release.uri=/nowhere/at/all", other + "2", "submit.id=failed"
        ),
    }
    return {name: ended(command) for name, command in commands.items()}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An audit of ready embeddings, in which five persons leak: it needs a session, and no models."""
    folder = tmp_path_factory.mktemp("submitted")
    rng = np.random.default_rng(0)
    made = {role: rng.normal(0, 2, (60, 128)).astype(np.float32) for role in ("release", "training")}
    made["release"][:5] = made["training"][:5] + rng.normal(0, 0.1, (5, 128))
    for role, own in made.items():
        (folder / role).mkdir()
        np.save(folder / role / "embeddings.npy", own)
        (folder / role / "embeddings.txt").write_text("\n".join(f"p{at // 2}/{at}.jpg" for at in range(60)))
    values = {
        "out": str(folder / "run"),
        "sets": {role: {"uri": str(folder / role)} for role in made},
        "search": {"shards": {"workers": 1}},
        "assess": {"controlled": False},
    }
    (folder / "audit.yaml").write_text(yaml.safe_dump(values))
    return folder / "audit.yaml"


@pytest.mark.ray
@pytest.mark.long
def test_an_audit_runs_as_a_job_and_its_log_and_exit_code_come_here(
    head: Head, submitted: dict[str, Ended], config: Path
) -> None:
    whole, good, failed = submitted["whole"], submitted["good"], submitted["failed"]
    assert whole.code == 2, whole.err + whole.out
    assert "submit: whole to http://127.0.0.1" in whole.err
    assert "ray: joined the cluster at" in whole.out and "limit         0 persons: exceeded" in whole.out
    record = json.loads((config.parent / "run" / "run.json").read_bytes())
    assert f"code {record['code']}" in whole.err
    assert good.code == 0 and "scan: release, 60 images" in good.out, good
    assert failed.code == 1 and "unveil: " in failed.out and "/nowhere/at/all" in failed.out, failed
    assert "Traceback" not in whole.out + good.out + failed.out


@pytest.mark.ray
@pytest.mark.long
def test_jobs_are_asked_about_and_submitted_once(
    head: Head, submitted: dict[str, Ended], config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert head.here("status", "whole") == (0, "whole FAILED, exit code 2\n")
    assert head.here("stop", "failed") == (0, "failed was not running\n")
    with pytest.raises(ClusterError, match="knows no job 'never'"):
        head.here("logs", "never")
    caplog.set_level("INFO")
    assert head.here("run", str(config), "assess.limit=0", "submit.id=whole") == (2, submitted["whole"].out)
    assert "whole was submitted before; it is FAILED" in caplog.text
    with pytest.raises(ClusterError, match="whole is the name of another job"):
        head.here("run", str(config), "submit.id=whole")
    assert head.token not in caplog.text


@pytest.mark.ray
@pytest.mark.long
def test_without_the_token_nothing_is_told_or_done(head: Head, config: Path) -> None:
    assert status(head.address) == 401
    assert status(head.address, Authorization="Bearer wrong") == 403
    assert status(head.address, Authorization=f"Bearer {head.token}") == 200
    commands = [head.command("run", str(config), token=given) for given in ("", "not-this-one-1234567")]
    none, wrong = map(ended, commands)
    assert none.code == 1 and "asks for a token; none is set" in none.err
    assert wrong.code == 1 and "takes another token than the one configured here" in wrong.err
    assert "not-this-one" not in wrong.err + wrong.out
    assert len(wrong.err.splitlines()) == len(none.err.splitlines()) == 1


@pytest.mark.ray
@pytest.mark.long
def test_the_token_is_in_no_log_and_no_run_folder(head: Head, submitted: dict[str, Ended], config: Path) -> None:
    wanted = head.token.encode()
    places = [config.parent, head.folder / "r"]
    read = [path for place in places for path in place.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(read) > 50 and [str(path) for path in read if wanted in path.read_bytes()] == []
    assert not [one for one in submitted.values() if head.token in one.out + one.err]
    request = urllib.request.Request(
        f"http://{head.address}/api/jobs/", headers={"Authorization": f"Bearer {head.token}"}
    )
    with urllib.request.urlopen(request, timeout=5) as answer:
        jobs = answer.read()
    assert b"whole" in jobs and wanted not in jobs and str(config).encode() not in jobs


def test_a_cluster_elsewhere_without_a_token_is_not_even_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("cluster.jobs.require_closed", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(ClusterError, match=r"10\.255\.0\.5.*no token|no token.*10\.255\.0\.5"):
        submit(["run", write_config(tmp_path), "cluster=10.255.0.5:8265"], lambda _: None)
