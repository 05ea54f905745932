"""The statistics of an audit at full size: `make bench-stats` (QUICK=1: a tenth).

1,000,000 members and 500,000 controls with two images each: units from labels and close pairs, cap of images, best
cosine per person, statistic, gate, p-values, list, q-values, excess test, AUC. Peers on the same scores: scipy's
`false_discovery_control` and `mannwhitneyu`. Aims: under 2 minutes and 4 GiB in all. The last line is JSON.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np

from operators.comparability import GateConfig, gate
from operators.conformal import benjamini_hochberg, p_values, q_values
from operators.excess import excess
from operators.membership import auc
from operators.persons import CONTROL, MEMBER, Duplicates, PersonsConfig, persons
from operators.statistic import anchored, cap_images, combined, image_hashes, match_groups, unit_best, unit_hashes

QUICK = os.environ.get("QUICK") == "1"
MEMBERS, CONTROLS = (100_000, 50_000) if QUICK else (1_000_000, 500_000)
IMAGES = 2
LEAKED = 0.01
AIM_S, AIM_GIB = 120.0, 4.0


def corpus(rng: np.random.Generator) -> tuple[Any, ...]:
    """Labels, arms, close pairs, chained labels among them, and two columns of best cosines."""
    people = MEMBERS + CONTROLS
    label_N = np.tile(np.arange(people), IMAGES)
    arm_N = np.where(label_N < MEMBERS, MEMBER, CONTROL).astype(np.int8)
    left = rng.integers(0, people * IMAGES, people // 20)
    right = (left + rng.integers(1, people, len(left))) % (people * IMAGES)
    start = rng.choice(MEMBERS - 20, 50, replace=False)  # chains of 15 labels
    left = np.concatenate([left, *(start + step for step in range(14))])
    right = np.concatenate([right, *(start + step + 1 for step in range(14))])
    pairs = Duplicates(left, right, rng.uniform(0.6, 0.9, len(left)))
    anchor_N = rng.normal(0.38, 0.03, len(label_N))
    release_N = anchor_N + rng.normal(0, 0.02, len(label_N)) + 0.2 * (label_N < LEAKED * MEMBERS)
    release_N[rng.random(len(label_N)) < 0.01] = np.nan
    return label_N, arm_N, pairs, release_N, anchor_N


def gib(name: str) -> float:
    """A size from /proc/self/status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) / 2**20


def main() -> None:
    rng = np.random.default_rng(0)
    label_N, arm_N, pairs, release_N, anchor_N = corpus(rng)
    keys = [f"set/{row:08d}.jpg" for row in range(len(label_N))]
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        made = work()
        seconds[name] = time.perf_counter() - begin
        print(f"{name:24}{seconds[name]:9.2f} s   peak {gib('VmHWM'):5.2f} GiB", flush=True)
        return made

    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "scipy"))
    print(
        f"Python {platform.python_version()}, {packages}; {MEMBERS:,} members, {CONTROLS:,} controls, {IMAGES} images"
    )
    import scipy.sparse.csgraph
    import scipy.stats

    def vectors(rows: np.ndarray) -> np.ndarray:
        return np.random.default_rng(1).standard_normal((len(rows), 512)).astype(np.float16) / np.float16(23)

    units = timed("persons", lambda: persons(label_N, arm_N, pairs, PersonsConfig(), vectors))
    count = len(units.arm_U)
    hash_N = timed("image hashes", lambda: image_hashes(keys, 0))
    capped_N = timed("cap", lambda: np.where(cap_images(units.unit_N, hash_N, 5), units.unit_N, -1))
    hash_U = unit_hashes(units.unit_N, hash_N, count)
    timed("match groups", lambda: match_groups(np.arange(count) % 7, units.arm_U, hash_U))
    best = timed("best per person, twice", lambda: [unit_best(capped_N, c, count) for c in (release_N, anchor_N)])
    score_U = anchored(best[0].cosine_U, best[1].cosine_U)
    timed("two models combined", lambda: combined([score_U, score_U + 0.01 * best[1].cosine_U], "min"))
    known = ~np.isnan(score_U)
    member, control = score_U[known & (units.arm_U == MEMBER)], score_U[known & (units.arm_U == CONTROL)]
    timed("gate", lambda: gate(member, control, GateConfig()))
    p_M = timed("p-values", lambda: p_values(member, control))
    listed = timed("list", lambda: benjamini_hochberg(p_M, 0.05))
    q_M = timed("q-values", lambda: q_values(member, control))
    found = timed("excess, three levels", lambda: [excess(member, control, alpha) for alpha in (1e-2, 1e-3, 1e-4)])
    area = timed("auc", lambda: auc(member, control))
    total, peak = sum(seconds.values()), gib("VmHWM")
    peer_q = timed("scipy fdr control", lambda: scipy.stats.false_discovery_control(p_M))
    peer_u = timed("scipy mannwhitneyu", lambda: scipy.stats.mannwhitneyu(member, control, method="asymptotic"))
    agree = bool(np.allclose(peer_q, q_M) and np.isclose(peer_u.statistic / len(member) / len(control), area))
    print(f"{'all of ours':24}{total:9.2f} s   peak {peak:5.2f} GiB (aims: {AIM_S:.0f} s, {AIM_GIB:.0f} GiB)")
    figures = {
        "bench": "statistics",
        "members": len(member),
        "controls": len(control),
        "images": len(label_N),
        "seconds": round(total, 2),
        "persons_s": round(seconds["persons"], 2),
        "peak_rss_gib": round(peak, 2),
        "listed": int(listed.sum()),
        "excess": None if found[0] is None else found[0].member_hits,
        "agrees_with_scipy": agree,
        "within_aims": total < AIM_S and peak < AIM_GIB,
        "quick": QUICK,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
