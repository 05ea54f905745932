"""What tests of several packages share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.session import SessionConfig, ray_session

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files for `--dist loadfile`, which hands them out as they come: the long ones first.

    At the very start stands the file that compiles all kernels of the search, so that later processes find them on
    disk, instead of each compiling them for itself.
    """
    place: dict[Path, int] = {}
    for item in items:
        own = 0 if item.path.name == "test_neighbors.py" else 3
        own = min(own, *(at for name, at in (("slow", 1), ("ray", 2)) if item.get_closest_marker(name)), 3)
        place[item.path] = min(place.get(item.path, 3), own)
    items.sort(key=lambda item: place[item.path])


@pytest.fixture(scope="session")
def session() -> Iterator[None]:
    """One local Ray session for all tests that need one.

    Its idle workers are kept: to start others for the next test takes seconds of processor time each.
    """
    os.environ.setdefault("RAY_num_workers_soft_limit", "8")
    with ray_session(SessionConfig(cpus=2, object_store_mb=512)):
        yield
