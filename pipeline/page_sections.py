"""The report's sections on a controlled audit as rows of text: checks, people, rates, tiers, groups, sensitivity.

Rates are made only where the audit makes a claim; `sections` leaves them out otherwise, so that the template cannot
show them by mistake. What could not be measured is written as `not estimable`.
"""

from typing import Any, NamedTuple

from pipeline.page_evidence import (
    REVIEWABLE,
    Evidence,
    claims,
    looks_sentence,
    not_claimed,
    ratio_text,
    sensitivity_sentence,
    stats,
)
from pipeline.page_sensitivity import Grid, bounds, looks, power, recall
from pipeline.wording import NOT_ESTIMABLE, count, estimate, known, measured, number, p_value, percent, spread


class Fact(NamedTuple):
    """One row of a table of facts."""

    label: str
    value: str
    detail: str = ""
    hint: str = ""


def sections(evidence: Evidence) -> dict[str, Any]:
    """All that the template shows of the evidence."""
    claim = bool(evidence["claim"])
    made: dict[str, Any] = {
        "claim": claim,
        "claims": claims(evidence),
        "stats": stats(evidence) if claim else [],
        "not_claimed": not_claimed(evidence),
        "sensitivity": sensitivity_sentence(evidence),
        "looks": looks_sentence(evidence),
        "checks": checks(evidence),
        "people": people(evidence),
        "tiers": tiers(evidence),
        "pixels": pixels(evidence),
        "hubs": hubs(evidence),
        "recall": recall(evidence),
        "several_models": len(evidence["models"]) > 1,
        "q": percent(evidence["q"]),
    }
    rates = {
        "excess": excess(evidence),
        "bound": bound(evidence),
        "blends": blends(evidence),
        "area": area(evidence),
        "operating": operating(evidence),
        "groups": groups(evidence),
        "homogeneity": homogeneity(evidence),
        "look_grid": looks(evidence),
        "bounds": bounds(evidence),
        "power": power(evidence),
    }
    return made | (rates if claim else dict.fromkeys(rates))


def checks(evidence: Evidence) -> list[Fact]:
    """What could have refuted the comparison of the two arms."""
    gate, placebo = evidence["gate"], evidence["placebo"]
    found = []
    if gate is None:
        found.append(Fact("Gate", "not run", hint=_GATE))
    else:
        says = f"distance {estimate(gate['distance'])}, p = {p_value(gate['p'])}"
        verdict = "passed" if gate["passed"] else "failed"
        if gate["warned"]:
            verdict = "passed with a warning"
        if not gate["passed"] and evidence["claim"]:
            says += "; with a random hold-out this speaks for many leaks, not against the comparison"
        found.append(Fact("Gate", verdict, says, _GATE))
    if placebo is None:
        found.append(Fact("Placebo", "not run", hint=_PLACEBO))
    else:
        says = f"{count(placebo['discoveries'], 'person', 'people')} listed, p = {p_value(placebo['p'])}"
        found.append(Fact("Placebo", "passed" if placebo["passed"] else "failed", says, _PLACEBO))
    anchored = "with anchor set" if evidence["anchored"] else "unanchored"
    found.append(Fact("Statistic", anchored, hint=_STATISTIC if evidence["anchored"] else _UNANCHORED))
    models = evidence["models"]
    found.append(Fact("Face models", f"{len(models):,}", ", ".join(models)))
    return found


_GATE = "do most training and control people, who did not leak, have alike scores? (Kolmogorov-Smirnov test)"
_PLACEBO = "the same audit of a set that cannot hold training people; it must find nobody"
_STATISTIC = "best match of a person in the release, less the best match in the anchor set"
_UNANCHORED = "best match of a person in the release; without an anchor set, faces that resemble everybody come first"


def people(evidence: Evidence) -> list[Fact]:
    """The persons that were tested, and the limits that their number sets."""
    persons = evidence["persons"]
    tested, capped = persons["tested"], persons["images_capped_at"]
    shortest = evidence["shortest_list"]
    least = count(shortest, "person", "people") if known(shortest) and shortest <= tested["training"] else "none"
    return [
        Fact("Training people tested", number(tested["training"]), hint=f"of {persons['training']:,}"),
        Fact("Control people tested", number(tested["control"]), hint=f"of {persons['control']:,}"),
        Fact("People in both sets", number(persons["straddlers"]), hint="left out of both; assess/straddlers.parquet"),
        Fact(
            "People with several labels",
            number(persons["several_labels"]),
            hint=f"label noise, twins or copies; the largest person has {count(persons['largest'], 'image')}, "
            f"{count(persons['broken_chains'], 'chain')} of look-alikes cut",
        ),
        Fact("Images of a person that count", "all" if capped is None else f"{capped:,} at most"),
        Fact(
            "Shortest list",
            least,
            hint=f"that so many controls can support at a false discovery rate of {percent(evidence['q'])}",
        ),
    ]


def excess(evidence: Evidence) -> Grid:
    """The excess test at every level, also those that so few controls cannot measure."""
    tests = {test["alpha"]: test for test in evidence["excess"]}
    rows = []
    for one in evidence["detectable"]:
        test, least = tests.get(one["alpha"]), percent(one["share"])
        if test is None:
            rows.append([percent(one["alpha"]), *[NOT_ESTIMABLE] * 5, least])
            continue
        delta = {"value": test["delta"], "low": test["delta_low"], "high": test["delta_high"]}
        hits = [f"{test[f'{arm}_hits']:,} of {test[f'{arm}s']:,}" for arm in ("member", "control")]
        rows.append([percent(one["alpha"]), *hits, measured(delta), ratio_text(test), p_value(test["p"]), least])
    names = ("Level", "Members over", "Controls over", "Excess", "Ratio", "Exact p", "Least detectable excess")
    return Grid(names, rows)


def bound(evidence: Evidence) -> str:
    """People over the plain threshold, and how many of them can be false."""
    over = evidence["over_threshold"]
    if not over["training"]:
        people = count(over["control"], "control person", "control people")
        return f"Over the threshold of cosine {over['threshold']:.4f}: no training person, and {people}."
    return (
        f"Over the threshold of cosine {over['threshold']:.4f}, which was set without the controls: "
        f"{over['training']:,} training people and {over['control']:,} control people. With 95 % confidence at most "
        f"{over['false_at_most']:,} of the {over['training']:,} are there without a link to training membership."
    )


def area(evidence: Evidence) -> Fact | None:
    """Area under the ROC curve."""
    found = evidence["auc"]
    if found is None:
        return Fact("Area under the ROC curve", NOT_ESTIMABLE)
    limits = f"{estimate(found['low'])} to {estimate(found['high'])}"
    return Fact("Area under the ROC curve", estimate(found["value"]), limits, f"0.5 is chance; 95 %, {found['method']}")


def operating(evidence: Evidence) -> Grid:
    """True positive rates at low false positive rates, with the box of both."""
    known_at = {one["fpr"]: one for one in evidence["operating"]}
    rows = []
    for alpha in (one["alpha"] for one in evidence["detectable"]):
        at = known_at.get(alpha)
        if at is None:
            controls = evidence["persons"]["tested"]["control"]
            why = f"fewer than {REVIEWABLE} of {controls:,} controls are over it"
            rows.append([percent(alpha), NOT_ESTIMABLE, why, f"under {REVIEWABLE}"])
            continue
        tpr = {"value": at["tpr"], "low": at["tpr_low"], "high": at["tpr_high"]}
        rows.append([percent(alpha), measured(tpr), spread(at["fpr_low"], at["fpr_high"]), f"{at['k']:,}"])
    return Grid(("False positive rate", "True positive rate", "True false positive rate", "Controls over"), rows)


def tiers(evidence: Evidence) -> list[tuple[str, int]]:
    """How many findings have each tier."""
    return list(evidence["pairs"]["tiers"].items())


def pixels(evidence: Evidence) -> str:
    """How the signals of pixels were calibrated."""
    found, judged = evidence["pairs"]["copies"], evidence["pairs"]["judged"]
    looked = f"{count(judged, 'finding')} {'was' if judged == 1 else 'were'} looked at."
    if not evidence["claim"]:
        return (
            f"{looked} What counts as a copy is measured on control people too, so without a claim only equal files "
            f"and hubs are told apart."
        )
    if found is None:
        return f"{looked} No control pair could be opened, so no level of pixels says “same photo”."
    return (
        f"{looked} A pair passes as the same photo by perceptual hash, correlation or structural similarity, from "
        f"levels that few control pairs reach: {found['level']}. They were set on "
        f"{count(found['control_pairs'], 'control pair')} and {count(found['other_photo_pairs'], 'pair')} of different "
        f"photos of one training person: hash distance {estimate(found['hash_distance'])} or less, correlation "
        f"{estimate(found['ncc'])} or more, structural similarity {estimate(found['ssim'])} or more."
    )


def blends(evidence: Evidence) -> str:
    """The test for second sources."""
    found = evidence["pairs"]["blends"]
    if found is None:
        return "Release images were not tested for a second source."
    images = count(found["found"], "release image")
    return (
        f"{images} of {found['tested']:,} tested {'has' if found['found'] == 1 else 'have'} a second training person "
        f"as a source, at a false discovery rate of {percent(found['q'])} (decoy partners from the control set)."
    )


def hubs(evidence: Evidence) -> list[Fact]:
    """Images that are near to everything."""
    found = evidence["hubs"]
    near, flagged = (
        f"{one['training']:,} training and {one['control']:,} control images"
        for one in (found["hubs"], found["flagged"])
    )
    return [
        Fact(
            "Hubs",
            near,
            hint=f"among the nearest of {estimate(found['limit'])} or more of {found['queries']:,} release images; the "
            f"average is {estimate(found['expected'])}",
        ),
        Fact("Largest count of one image", f"{found['largest']:,}", hint="release images that it is near to"),
        Fact("Flagged in all", flagged, hint="hubs, and images of poor quality"),
        Fact("Skewness of the counts", estimate(found["skewness"])),
    ]


def groups(evidence: Evidence) -> Grid | None:
    """Rates by declared group at the threshold of the first excess test."""
    if evidence["groups"] is None:
        return None
    rows = [
        [
            rate["group"],
            f"{measured(rate['member_rate'])}, {rate['member_hits']:,} of {rate['members']:,}",
            f"{measured(rate['control_rate'])}, {rate['control_hits']:,} of {rate['controls']:,}",
            measured(rate["excess"]),
            percent(rate["fdp"]),
        ]
        for rate in evidence["groups"]["rates"]
    ]
    names = ("Group", "Members over", "Controls over", "Excess", "False among those over")
    return Grid(names, rows)


def homogeneity(evidence: Evidence) -> str:
    """Whether controls of all groups pass alike."""
    if evidence["groups"] is None:
        return ""
    ratio = evidence["groups"]["control_max_to_min"]
    told = f"the highest is {number(ratio)} times the lowest" if known(ratio) else f"their ratio is {NOT_ESTIMABLE}"
    p = p_value(evidence["groups"]["control_homogeneity_p"])
    return f"Controls of all groups should pass alike: homogeneity p = {p} (exact), and of the control rates {told}."
