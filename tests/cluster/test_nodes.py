import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import nodes
from cluster.faults import UnlikeNodes
from cluster.nodes import Needed, check_nodes, seen, spread
from cluster.storage import ASIDE, Store


class Elsewhere(Store):
    """A store whose folder is another one on other machines."""

    @property
    def address(self) -> str:
        return f"{super().address}-elsewhere"


def needed(store: Store, code: Any = sys.getdefaultencoding, **files: Path) -> Needed:
    return Needed(code, {"out": store}, {option: str(path) for option, path in files.items()})


def test_what_a_machine_lacks_is_told_by_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "PAUSE_S", 0.0)
    store, content = Store(tmp_path / "run"), uuid.uuid4().bytes
    store.note("mark", content)
    there = {"out": (store.address, "mark", content)}
    assert seen({"sets.release.uri": str(tmp_path)}, there) == {}
    assert seen({"sets.release.uri": f"{tmp_path}/gone"}, there) == {"file sets.release.uri": f"{tmp_path}/gone"}
    other = {"out": (store.address, "mark", b"of another folder"), "store": (f"{tmp_path}/none", "mark", content)}
    assert list(seen({}, other)) == ["store out", "store store"]
    assert seen({}, {"store": (f"{tmp_path}/none", "mark", content)})["store store"].startswith(f"{tmp_path}/none (")


def test_a_file_that_shows_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    monkeypatch.setattr(nodes.time, "sleep", lambda seconds: store.note("mark", b"late") if seconds else None)
    assert seen({}, {"out": (str(tmp_path), "mark", b"late")}) == {}


def test_machines_without_cpus_and_gpus_hold_no_workers() -> None:
    works = [nodes._works({"Resources": one}) for one in ({"CPU": 0.0, "memory": 5.0}, {"CPU": 2.0}, {"GPU": 1.0})]
    assert works == [False, True, True]


@pytest.mark.ray
class TestOneMachine:
    """On the session that other tests use, which has one machine."""

    @pytest.fixture(autouse=True)
    def _session(self, session: None) -> Iterator[None]:
        yield

    def test_a_machine_like_this_one_is_taken(self, tmp_path: Path) -> None:
        assert not spread()
        assert check_nodes(needed(Store(tmp_path), **{"sets.release.uri": tmp_path})) == 1
        assert not list(tmp_path.glob(f"{ASIDE}*")), "the markers are removed"

    def test_other_code_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UnlikeNodes, match=r"machine \S+ \(.*, Ray node \w{8}\) has other code \(\d+\) than this"):
            check_nodes(needed(Store(tmp_path), code=os.getpid))

    def test_a_machine_without_the_program_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(nodes, "__name__", "cluster_of_another_version.nodes")
        with pytest.raises(UnlikeNodes, match=r"cannot load this program .*cluster_of_another_version"):
            check_nodes(needed(Store(tmp_path)))

    def test_a_set_that_a_machine_does_not_have_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UnlikeNodes, match=r"has no \S+/gone \(sets\.release\.uri\)\. Put it on a file system"):
            check_nodes(needed(Store(tmp_path), **{"sets.release.uri": tmp_path / "gone"}))

    def test_a_folder_that_is_not_shared_is_refused(self, tmp_path: Path) -> None:
        lost = r"does not see what this one writes to \S+-elsewhere \(.*\) \(out\).*store=s3://"
        with pytest.raises(UnlikeNodes, match=lost):
            check_nodes(needed(Elsewhere(tmp_path)))
        assert not list(tmp_path.glob(f"{ASIDE}*"))
