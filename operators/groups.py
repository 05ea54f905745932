"""The same threshold in every group of people: does it let controls through evenly, and where is the excess.

Face recognition confuses people of some groups more often than of others (Grother, Ngan and Hanaoka, NISTIR 8280,
2019). One threshold for all can therefore put most false entries of a list into one group.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from operators.calibration import Rate, proportion
from operators.conformal import checked
from operators.errors import ScoreError
from operators.excess import difference

FEWEST = 10
"""Controls over the threshold below which a group's rate takes no part in a ratio of rates."""
TABLES = 20_000
"""Up to so many tables the homogeneity test goes through all; beyond, it draws this many."""
NOT_GIVEN = "not given"
"""The group of persons without a label."""


class GroupRate(NamedTuple):
    """Members and controls of one group at the common threshold. All intervals are at 95 %."""

    group: str
    members: int
    controls: int
    member_hits: int
    """Members at or over the threshold."""
    control_hits: int
    member_rate: Rate
    """NaN between 0 and 1 where the group has no member."""
    control_rate: Rate
    excess: Rate | None
    """Member rate - control rate; None where the group has no member or no control."""
    fdp: float | None
    """Estimated share of false ones among the member hits; None where there is no member hit or no control."""


def by_group(
    member: NDArray[np.float64],
    member_group: Sequence[str | None] | NDArray[np.str_],
    control: NDArray[np.float64],
    control_group: Sequence[str | None] | NDArray[np.str_],
    threshold: float,
) -> list[GroupRate]:
    """One entry per group that occurs in either set, by name; persons without a label form the group `not given`.

    Intervals of rates are those of Clopper and Pearson (Biometrika 26, 1934), the excess joins them by Newcombe's
    method 10 (Statist. Med. 17, 1998). The false discovery proportion of a group is the quotient that a q-value
    minimises (Bates et al., Annals of Statistics 51, 2023), taken inside the group at the common threshold:
    M / (C + 1) * (1 + control hits) / member hits, at most 1.

    Parameters
    ----------
    member, control
        Scores, shapes (M,) and (C,).
    member_group, control_group
        The group of each person, in the same order.
    threshold
        Lowest score that counts, the same for all groups.

    Raises
    ------
    ScoreError
        If scores are missing or not finite, or the labels are not one per score.
    """
    totals, hits = {}, {}
    for name, scores, labels in (("member", member, member_group), ("control", control, control_group)):
        names, codes_N = _coded(name, labels, scores := checked(name, scores))
        totals[name] = dict(zip(names, np.bincount(codes_N, minlength=len(names)).tolist(), strict=True))
        over_N = codes_N[scores >= threshold]
        hits[name] = dict(zip(names, np.bincount(over_N, minlength=len(names)).tolist(), strict=True))
    return [
        _rate(
            group,
            totals["member"].get(group, 0),
            totals["control"].get(group, 0),
            hits["member"].get(group, 0),
            hits["control"].get(group, 0),
        )
        for group in sorted(totals["member"] | totals["control"])
    ]


def homogeneity(hits: Sequence[int], totals: Sequence[int], seed: int = 0) -> float:
    """P-value of the hypothesis that the same share of persons is over the threshold in every group.

    Fisher's exact test as Freeman and Halton extended it (Biometrika 38, 1951): among all tables with these totals and
    this number of hits, the probability of those that are no likelier than the one seen. Exact by enumeration of up to
    `TABLES` tables; beyond, as many are drawn with `seed`, and the one seen is counted among them, so that the p-value
    is valid still (Besag and Clifford, Biometrika 76, 1989). 1.0 where fewer than two groups have persons.

    Raises
    ------
    ValueError
        If a group has more hits than persons, or a count is negative.
    """
    if len(hits) != len(totals) or any(not 0 <= hit <= total for hit, total in zip(hits, totals, strict=True)):
        raise ValueError(f"hits must be between 0 and the group's total, got {list(hits)} of {list(totals)}")
    kept = [(hit, total) for hit, total in zip(hits, totals, strict=True) if total]
    if len(kept) < 2:
        return 1.0
    hits_G, totals_G = np.array(kept, np.int64).T
    limit = _logarithms(hits_G[None], totals_G)[0] + 1e-7
    drawn = int(hits_G.sum())
    if _count(drawn, totals_G) <= TABLES:
        logs_T = _logarithms(np.array(list(_tables(drawn, totals_G.tolist()))), totals_G)
        chances_T = np.exp(logs_T - logs_T.max())
        return min(float(chances_T[logs_T <= limit].sum() / chances_T.sum()), 1.0)
    tables_TG = np.random.default_rng(seed).multivariate_hypergeometric(totals_G, drawn, TABLES, method="marginals")
    return (1 + int((_logarithms(tables_TG, totals_G) <= limit).sum())) / (1 + TABLES)


def ratio_max_min(rates: Sequence[GroupRate]) -> float | None:
    """Highest over lowest control rate, among the groups with at least 10 control hits; None if fewer than two have.

    A ratio of smaller counts says more about chance than about groups. Groups left out are still counted by
    `homogeneity`, which says whether the rates differ at all.
    """
    sure = [rate.control_rate.value for rate in rates if rate.control_hits >= FEWEST]
    return max(sure) / min(sure) if len(sure) > 1 else None


def _coded(
    name: str, labels: Sequence[str | None] | NDArray[np.str_], scores_N: NDArray[np.float64]
) -> tuple[list[str], NDArray[np.int64]]:
    """The distinct labels, and for each person the position of its label among them."""
    if len(labels) != len(scores_N):
        raise ScoreError(
            f"{name}_group must hold one label per score; got {len(labels):,} labels for {len(scores_N):,} scores. "
            f"Give persons without a label None."
        )
    coded = pa.array(labels, pa.string()).fill_null(NOT_GIVEN).dictionary_encode()
    return coded.dictionary.to_pylist(), coded.indices.to_numpy().astype(np.int64)


def _rate(group: str, members: int, controls: int, member_hits: int, control_hits: int) -> GroupRate:
    found, false = proportion(member_hits, members), proportion(control_hits, controls)
    excess = difference(found, false) if members and controls else None
    fdp = None
    if member_hits and controls:
        fdp = min(members * (1 + control_hits) / ((controls + 1) * member_hits), 1.0)
    return GroupRate(group, members, controls, member_hits, control_hits, found, false, excess, fdp)


def _logarithms(tables_TG: NDArray[np.int64], totals_G: NDArray[np.int64]) -> NDArray[np.float64]:
    """Log of the number of ways to fill each table, which is its probability up to one constant; shape (T,)."""
    from scipy.special import gammaln

    ways_TG = gammaln(totals_G + 1) - gammaln(tables_TG + 1) - gammaln(totals_G - tables_TG + 1)
    logs_T: NDArray[np.float64] = ways_TG.sum(axis=1)
    return logs_T


def _count(drawn: int, totals_G: NDArray[np.int64]) -> int:
    """How many tables there are, or a number over `TABLES`."""
    ways = np.zeros(drawn + 1)
    ways[0] = 1
    for total in totals_G.tolist():
        # A group takes 0 to `total` of what is drawn: a sliding sum.
        running = np.concatenate([[0.0], np.cumsum(ways)])
        first = np.maximum(np.arange(drawn + 1) - total, 0)
        ways = np.minimum(running[1:] - running[first], TABLES + 1)
    return int(ways[drawn])


def _tables(drawn: int, totals: list[int]) -> Iterator[list[int]]:
    """All ways to draw so many persons from groups of these sizes."""
    if len(totals) == 1:
        if drawn <= totals[0]:
            yield [drawn]
        return
    for taken in range(max(drawn - sum(totals[1:]), 0), min(drawn, totals[0]) + 1):
        for rest in _tables(drawn - taken, totals[1:]):
            yield [taken, *rest]
