"""What the workers of embed count for Prometheus, through Ray's metrics; docs/embedding.md says how to read it.

Counts and times only: nothing here names an image, a face or a set.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

STAGES = ("prepare", "embed", "commit")
"""Read, decode, detect and align; the models; Parquet and its marker."""
SECONDS = [0.01, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300]
"""Bounds of the histogram of a unit's seconds."""


class Meters:
    """The meters of one worker process. Make it where a Ray worker runs."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        self._images = Counter(
            "unveil_embed_images", description="Images that are committed, by status.", tag_keys=("status",)
        )
        self._faces = Counter("unveil_embed_faces", description="Faces that are committed with an embedding.")
        self._failures = Counter("unveil_embed_failures", description="Committed images whose status is not ok.")
        self._copies = Counter(
            "unveil_embed_copies", description="Committed images whose bytes another unit had, so taken from there."
        )
        self._units = Counter("unveil_embed_units", description="Units that are committed.")
        self._seconds = Counter(
            "unveil_embed_seconds", description="Seconds of work, by stage, summed over workers.", tag_keys=("stage",)
        )
        self._spread = Histogram(
            "unveil_embed_unit_seconds",
            description="Seconds of a unit in one stage.",
            boundaries=SECONDS,
            tag_keys=("stage",),
        )
        self._rate = Gauge(
            "unveil_embed_images_per_second", description="Of the worker's latest unit, by stage.", tag_keys=("stage",)
        )

    @contextmanager
    def stage(self, name: str, images: int) -> Iterator[None]:
        """Time the work on a unit of `images` in one of `STAGES`; work that fails is not counted."""
        start = time.monotonic()
        yield
        seconds = time.monotonic() - start
        tags = {"stage": name}
        if seconds > 0:  # Ray refuses to count nothing
            self._seconds.inc(seconds, tags)
            self._rate.set(images / seconds, tags)
        self._spread.observe(seconds, tags)

    def committed(self, statuses: Mapping[str, int], faces: int, copies: int) -> None:
        """Count a committed unit: its images by status, their embedded faces, and how many of the images are copies."""
        self._units.inc()
        for status, count in statuses.items():
            self._images.inc(count, {"status": status})
        failures = sum(statuses.values()) - statuses.get("ok", 0)
        for counter, count in ((self._faces, faces), (self._failures, failures), (self._copies, copies)):
            if count:
                counter.inc(count)
