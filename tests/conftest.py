"""What tests of several packages share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.session import SessionConfig, ray_session

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def session() -> Iterator[None]:
    """One local Ray session for all tests that need one."""
    with ray_session(SessionConfig(cpus=2, object_store_mb=512)):
        yield
