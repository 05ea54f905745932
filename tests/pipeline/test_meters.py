import re
import time
import urllib.request
from typing import Any

import pytest

from pipeline.meters import Meters


class Recorder:
    """A meter of Ray's that notes what it is given."""

    def __init__(self, name: str, **about: Any) -> None:
        self.name, self.tags, self.given = name, about.get("tag_keys", ()), []

    def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        assert value > 0 and set(tags or {}) == set(self.tags)
        self.given.append((value, tags))

    set = observe = inc


def test_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(f"ray.util.metrics.{kind}", Recorder)
    meters = Meters()
    now = [5.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with meters.stage("embed", 30):
        now[0] += 2.0
    with pytest.raises(OSError), meters.stage("embed", 30):
        raise OSError
    meters.committed({"ok": 27, "no_face": 3}, faces=40, copies=4)
    meters.committed({"ok": 5}, faces=5, copies=0)
    embed = {"stage": "embed"}
    assert meters._seconds.given == meters._spread.given == [(2.0, embed)]
    assert meters._rate.given == [(15.0, embed)]
    assert meters._images.given == [(27, {"status": "ok"}), (3, {"status": "no_face"}), (5, {"status": "ok"})]
    assert [value for value, _ in meters._faces.given] == [40, 5]
    assert [value for value, _ in meters._failures.given] == [3]
    assert [value for value, _ in meters._copies.given] == [4]
    assert len(meters._units.given) == 2


@pytest.mark.ray
def test_prometheus_can_read_them_from_rays_agent(session: None) -> None:
    import ray

    @ray.remote(num_cpus=0.1)
    def count() -> None:
        meters = Meters()
        with meters.stage("prepare", 10):
            time.sleep(0.01)
        meters.committed({"ok": 8, "no_face": 2}, faces=11, copies=3)

    ray.get(count.remote())
    address = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    expected = [
        r'unveil_embed_images\w*\{.*[Ss]tatus="no_face".*\} 2',
        r"unveil_embed_faces\w*\{.*\} 11",
        r"unveil_embed_failures\w*\{.*\} 2",
        r"unveil_embed_copies\w*\{.*\} 3",
        r'unveil_embed_unit_seconds_count\{.*stage="prepare".*\} 1',
    ]
    missing, deadline = expected, time.monotonic() + 60  # workers report every ten seconds
    while missing and time.monotonic() < deadline:
        text = urllib.request.urlopen(address, timeout=5).read().decode()
        missing = [pattern for pattern in expected if not re.search(pattern, text)]
        time.sleep(0.2)
    assert not missing
