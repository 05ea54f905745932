"""The session of the tests themselves, and clusters that must not be joined."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.faults import ClusterError
from cluster.session import SessionConfig, ray_session


@pytest.mark.parametrize(("option", "value"), [("cpus", -1), ("object_store_mb", 64)])
def test_options_that_mean_nothing_are_refused(option: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"^{option} .*Got {value}"):
        SessionConfig(**{option: value})


@pytest.mark.ray
def test_nobody_else_can_reach_what_a_local_session_writes(session: None) -> None:
    import ray

    folder = Path(ray.get_runtime_context().worker.node.get_session_dir_path())  # type: ignore[attr-defined]
    above = [stat.S_IMODE(one.stat().st_mode) for one in folder.parents if one.name.startswith("unveil-ray-")]
    assert above == [0o700]
    assert any((folder / "logs").iterdir())
    assert os.environ["RAY_AUTH_MODE"] == "token"


@pytest.mark.ray
def test_a_session_within_a_session_is_the_same(session: None) -> None:
    import ray

    with ray_session(SessionConfig(address="10.0.0.5:6379")):
        pass
    assert ray.is_initialized()


ALONE = """
import os
from pathlib import Path
import ray  # before the session, which must make up for it
from cluster.faults import ClusterError
from cluster.session import SessionConfig, ray_session
for address in ("10.255.0.5:6379", "auto"):
    os.environ["RAY_ADDRESS"] = "10.255.0.6:6379"
    try:
        with ray_session(SessionConfig(address=address)):
            print("joined")
    except ClusterError as error:
        print(error)
with ray_session(SessionConfig(cpus=1, object_store_mb=128)):
    (made,) = Path(os.environ["RAY_TMPDIR"]).glob("unveil-ray-*")
    print(oct(made.stat().st_mode), ray.cluster_resources()["CPU"], len(ray.nodes()))
print(list(Path(os.environ["RAY_TMPDIR"]).iterdir()), oct(Path("~/.ray/auth_token").expanduser().stat().st_mode))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_without_a_token_others_are_refused_and_the_own_session_leaves_nothing(tmp_path: Path, root: Path) -> None:
    """In a process of its own, with an empty home, and RAY_ADDRESS leading elsewhere."""
    (tmp_path / "home").mkdir()
    short = Path(f"/tmp/ut-{os.getpid()}")
    short.mkdir(mode=0o700)
    unset = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "UNVEIL_DEBUG", "RAY_ADDRESS")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env |= {"HOME": str(tmp_path / "home"), "RAY_TMPDIR": str(short), "PYTHONPATH": str(root)}
    try:
        done = subprocess.run([sys.executable, "-c", ALONE], env=env, capture_output=True, text=True, timeout=120)
        left = list(short.iterdir())
    finally:
        short.rmdir()
    assert done.returncode == 0, done.stderr
    first, auto, within, after = done.stdout.splitlines()
    assert "10.255.0.5:6379" in first and "no token is configured" in first
    assert "10.255.0.6:6379" in auto and "ray.insecure=true" in auto
    assert within == "0o40700 1.0 1"
    assert after == "[] 0o100600" and left == []


def test_a_cluster_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refuses(**_: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nmore")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuses)
    told = r"^the cluster at 127\.0\.0\.1:1 cannot be joined: Could not find any running Ray instance\.$"
    with pytest.raises(ClusterError, match=told), ray_session(SessionConfig(address="127.0.0.1:1")):
        raise AssertionError
