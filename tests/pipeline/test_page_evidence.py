"""What the page says of a controlled audit, from summaries made by hand."""

import copy
import html.parser
import math
import re
from typing import Any

import pytest

from operators.tables import FINDINGS, PAIR_EVIDENCE, REJECTS
from pipeline.page import Page, Shown, render
from pipeline.page_evidence import claims, excess_sentence, grade, not_claimed, sensitivity_sentence, terminal_lines
from pipeline.page_result import cautions, result
from pipeline.roc import roc_figure

ARM = {
    "comparisons": 2_000_000, "candidates": 71, "release_images": 60, "persons": 48, "highest": 0.91,
    "expected_false": 2.0, "expected_false_low": 0.96, "expected_false_high": 3.68,
}  # fmt: skip
EXCESS = {
    "alpha": 0.01, "threshold": 0.21, "members": 2000, "controls": 1000, "member_hits": 46, "control_hits": 10,
    "delta": 0.013, "delta_low": 0.0031, "delta_high": 0.0219, "ratio": 2.3, "ratio_low": 1.2, "ratio_high": 4.8,
    "p": 0.0067,
}  # fmt: skip
HOSTILE = '"><script>alert(1)</script>\u202e'


def rate(value: float | None, low: float | None, high: float | None) -> dict[str, float | None]:
    return {"value": value, "low": low, "high": high}


def planted(name: str, value: float, low: float, leak: str = "near_copy") -> dict[str, Any]:
    found = rate(value, low, 1.0)
    bars: dict[str, Any] = {"over_threshold": found, "excess": found, "listed": None}
    return {"transform": name, "does": "as said", "leak": leak, "planted": 100, "not_audited": 0, "recall": bars}


def audit(letter: str = "A", claim: bool = True, **changes: Any) -> dict[str, Any]:
    """The part `evidence` of a summary: 2,000 training and 1,000 control people."""
    return {
        "grade": letter, "claim": claim, "reasons": ["Because of this."], "source": "hold_out", "anchored": True,
        "models": ["arcface-r50"], "q": 0.05, "listed": 31, "shortest_list": 40, "excess": [EXCESS],
        "frozen": {"digest": "ab", "look": 1, "looks": 1},
        "persons": {
            "training": 2010, "control": 1003, "tested": {"training": 2000, "control": 1000}, "several_labels": 4,
            "largest": 17, "straddlers": 3, "broken_chains": 0, "images_capped_at": 5,
        },
        "gate": {"distance": 0.021, "p": 0.31, "members": 1590, "controls": 810, "passed": claim, "warned": False,
                 "rule": "p"},
        "placebo": {"discoveries": 0, "p": 0.4, "passed": True},
        "auc": {"value": 0.571, "low": 0.55, "high": 0.592, "method": "bootstrap of persons, 1,000 replicates"},
        "operating": [{"fpr": 0.01, "k": 10, "threshold": 0.21, "tpr": 0.023, "tpr_low": 0.0161, "tpr_high": 0.0318,
                       "fpr_low": 0.0044, "fpr_high": 0.0186}],
        "roc": [[0.0, 0.0, 0.01, 1.0], [0.0, 0.01, 0.023, 1.0]],
        "detectable": [{"alpha": 0.01, "share": 0.012}, {"alpha": 0.001, "share": None}],
        "over_threshold": {"threshold": 0.43, "training": 48, "control": 3, "false_at_most": 17},
        "groups": None,
        "hubs": {"flagged": {"training": 6, "control": 2}, "hubs": {"training": 1, "control": 0}, "limit": 50.0,
                 "expected": 2.5, "largest": 61, "queries": 5000, "skewness": None},
        "pairs": {"tiers": {"same photo": 5, "same person": 11, "blend of two people": 1, "look-alike / indeterminate":
                  14, "hub": 1, "not calibrated": 0}, "judged": 32, "copies": None,
                  "blends": {"tested": 5000, "found": 2, "q": 0.1}},
        "sensitivity": [{"what": "without the anchor set", "listed": 12, "p": None}],
        "recall": None,
    } | changes  # fmt: skip


def summary(evidence: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
    one = {"uri": "/home/me/faces", "form": "folder", "notes": [], "images": 10, "audited": 10, "identities": 5,
           "rejected": {}, "unlisted": {}}  # fmt: skip
    control = ARM | {"candidates": 3, "persons": 3}
    return {
        "title": "Demo", "sets": {role: dict(one) for role in ("release", "training", "control")}, "warnings": [],
        "embedder": {"name": "arcface-r50", "sha256": "9f" * 32, "width": 512}, "classes": None,
        "calibration": {
            "threshold": 0.43, "fmr_wanted": 1e-6, "fmr": 9.9e-7, "fmr_low": 4.7e-7, "fmr_high": 1.8e-6,
            "pairs": 1_108_936, "mated": 6_741, "over": 10, "images": 1490, "labels": True, "reason": "as asked",
        },
        "arms": {"training": ARM, "control": control}, "findings": 48, "limit": None, "evidence": evidence,
    } | changes  # fmt: skip


def finding(rank: int, **changes: Any) -> dict[str, Any]:
    return {
        "rank": rank, "training_identity": "p1", "training_key": f"p1/{rank}.jpg", "release_identity": None,
        "release_key": "s/1.png", "cosine": 0.8, "same_bytes": False, "candidates": 1, "release_images": 1, "labels": 1,
        "anchor_cosine": 0.3, "statistic": 0.5, "p": 0.000999, "q": 0.0123, "hub": None, "tier": "same person",
        "reasons": "both models", "decision": "listed",
    } | changes  # fmt: skip


def page(evidence: dict[str, Any] | None, about: dict[str, Any] | None = None, **changes: Any) -> str:
    given: dict[str, Any] = {
        "summary": summary(evidence, **(about or {})), "manifest": {}, "shown": [], "rejects": REJECTS.from_rows([]),
        "figures": [], "faces": "covered", "findings": FINDINGS.from_rows([finding(1)]),
        "pixels": PAIR_EVIDENCE.from_rows([]),
    }  # fmt: skip
    return render(Page(**(given | changes)))


class Reader(html.parser.HTMLParser):
    """Tags, attributes and text as a browser would find them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.parts: list[str] = []
        self.style = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.style = tag in ("style", "script")

    def handle_endtag(self, tag: str) -> None:
        self.style = False

    def handle_data(self, data: str) -> None:
        if not self.style:
            self.parts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.parts).split())


def text(*args: Any, **changes: Any) -> str:
    return Reader(page(*args, **changes)).text


def test_grade_a_states_the_list_and_the_excess() -> None:
    assert claims(audit()) == [
        "31 of 2,000 tested training people are listed. Of those listed, an expected 5 % or fewer are not linked to "
        "training membership.",
        "Members match the release more closely than controls: 2.3 % of members and 1 % of controls are over the bar "
        "that was set for 1 % of controls (exact p = 0.0067), an excess of 1.3 % (95 % interval 0.31 % to 2.19 %).",
    ]
    shown = text(audit())
    for said in ("Evidence grade A", "Because of this.", "31 of 2,000 tested", "What is not claimed", "no real person"):
        assert said in shown
    assert "Evidence grade C" not in shown


def test_grade_b_puts_its_condition_before_every_claim() -> None:
    told = claims(audit("B"))
    assert all(sentence.startswith("Conditional on comparability: ") for sentence in told)
    assert told[0].startswith("Conditional on comparability: 31 of 2,000") and ": members match" in told[1]
    assert text(audit("B")).count("conditional on comparability") >= 2


@pytest.mark.parametrize("letter", ["A", "B", "C"])
def test_without_a_claim_there_is_a_ranked_list_and_no_rate(letter: str) -> None:
    evidence = audit(letter, claim=False, recall=[planted("copy", 0.95, 0.9)], groups=GROUPS)
    shown = text(evidence)
    assert "Ranked list only" in shown and "Ranked list only" in result(summary(evidence))[0]
    assert "p1/1.jpg" in shown and "0.8000" in shown
    for said in ("0.0067", "0.31 %", "2.19 %", "0.571", "0.023", "31 of 2,000", "At most 17", "at most 17 of", "0.0123",
                 "membership metrics", "false discovery rate of 10 %", "times as many", "group-a",
                 "without the anchor set", "#membership"):  # fmt: skip
        assert said not in shown
    assert "Membership metrics" not in shown
    assert "failed" in shown and "95 % (90 % to 100 %)" in shown


def test_no_excess_is_said_with_what_would_have_been_found() -> None:
    none = EXCESS | {"member_hits": 21, "delta": 0.0005, "delta_low": -0.008, "delta_high": 0.007, "p": 0.44}
    told = claims(audit(listed=0, excess=[none]))
    assert told[0].startswith("None of 2,000 tested training people is listed at a false discovery rate of 5 %")
    assert "40 people" in told[0]
    assert told[1].startswith("No excess found")
    assert "−0.8 % to 0.7 %" in told[1]
    assert "with 80 % power it would have found 1.2 % or more" in told[1]
    shown = text(audit(excess=[none], recall=[planted("copy", 0.95, 0.8), planted("blend_50", 0.5, 0.4, "blend")]))
    assert "would have found an excess of 1.5 % or more for leak classes with recall 80 % or more" in shown
    assert "3 % or more for leak classes with recall 40 % or more" in shown


def test_a_bound_is_given_where_nobody_is_over_the_threshold() -> None:
    over = {"threshold": 0.43, "training": 0, "control": 0, "false_at_most": 0}
    recall = [planted("copy", 1.0, 0.9), planted("blur", 0.0, 0.0)]
    shown = text(audit(over_threshold=over, recall=recall))
    assert f"at most: {100 * (1 - 0.05 ** (1 / 2000)) / 0.9:.3g} %" not in shown
    assert f"{100 * (1 - 0.05 ** (1 / 2000)) / 0.9:.3g} %" in shown  # 0.166 %
    assert "Nobody is over the threshold" in shown and "blur 100 %" in shown
    assert "Nobody is over" not in text(audit(recall=recall))


def test_sensitivity_is_measured_or_said_not_to_be() -> None:
    assert "run `unveil plant CONFIG`" in sensitivity_sentence(audit())
    shown = text(audit(recall=[planted("copy", 0.95, 0.9), planted("blend_50", 0.4, 0.3, "blend")]))
    assert "between 40 % and 95 % of a class reach the bar of the excess test" in shown
    assert "blend 50: as said" in shown and "40 % (30 % to 100 %)" in shown


def test_other_looks_are_said() -> None:
    assert "looked at under" not in text(audit())
    shown = text(audit(frozen={"digest": "ab", "look": 2, "looks": 3}))
    assert "looked at under 3 sets of options; this is number 2" in shown


def test_what_is_missing_is_not_estimable_and_never_a_number() -> None:
    nothing = EXCESS | {
        "member_hits": 0, "control_hits": 0, "ratio": None, "ratio_low": None, "ratio_high": None,
        "delta": math.nan, "delta_low": None, "delta_high": math.inf, "p": None,
    }  # fmt: skip
    for made in ([], [nothing | {"p": 1.0}]):
        missing = audit(
            excess=made, auc=None, operating=[], gate=None, placebo=None, shortest_list=3000, anchored=False, listed=0,
            detectable=[{"alpha": 0.01, "share": None}], recall=[planted("copy", math.nan, math.nan)],
        )  # fmt: skip
        shown = text(missing)
        for said in ("no list can be supported", "not estimable", "not run", "unanchored"):
            assert said in shown
        assert not re.search(r"\b(nan|inf|None)\b", shown.replace("None of", ""))


GROUPS = {
    "rates": [
        {"group": "group-a", "members": 900, "controls": 500, "member_hits": 20, "control_hits": 10,
         "member_rate": rate(0.0222, 0.0136, 0.0341), "control_rate": rate(0.02, 0.0096, 0.0365),
         "excess": rate(0.0022, -0.01, 0.02), "fdp": 0.98},
        {"group": HOSTILE, "members": 0, "controls": 500, "member_hits": 0, "control_hits": 0,
         "member_rate": rate(math.nan, 0.0, 1.0), "control_rate": rate(0.0, 0.0, 0.007), "excess": None, "fdp": None},
    ],
    "control_homogeneity_p": 0.0019, "control_max_to_min": None,
}  # fmt: skip


def test_groups_are_shown_with_intervals() -> None:
    shown = text(audit(groups=GROUPS))
    assert (
        "group-a 2.22 % (1.36 % to 3.41 %), 20 of 900 2 % (0.96 % to 3.65 %), 10 of 500 0.22 % (−1 % to 2 %) 98 %"
        in shown
    )
    assert "homogeneity p = 0.0019" in shown and "their ratio is not estimable" in shown


def test_rates_that_controls_cannot_measure_are_not_estimable() -> None:
    shown = text(audit())
    assert "1 % 2.3 % (1.61 % to 3.18 %) 0.44 % to 1.86 % 10" in shown
    assert "0.1 % not estimable fewer than 10 of 1,000 controls are over it" in shown
    assert "under 1 %, which 1,000 controls cannot measure" in shown


def test_people_are_listed_with_tier_second_model_and_partner() -> None:
    rows = [finding(1), finding(2, q=0.2, tier="blend of two people", hub="near to 91 images")]
    rows += [finding(rank, tier=None, reasons=None, q=None, p=None) for rank in range(3, 330)]
    pixels: list[dict[str, Any]] = [{"rank": 1, "second_z": 4.256}, {"rank": 2, "blend_partner_key": "p9/7.jpg"}]
    made = {"findings": FINDINGS.from_rows(rows), "pixels": PAIR_EVIDENCE.from_rows(pixels)}
    shown = text(audit(models=["one", "two"]), **made)
    said = "0.8000 0.5000 anchor 0.3000 0.012 p 1.0 × 10⁻³ 4.26 same person decision: listed reasons both models"
    assert said in shown
    assert (
        "0.2 p 1.0 × 10⁻³ not listed" in shown and "second source: p9/7.jpg" in shown and "near to 91 images" in shown
    )
    assert "p1/200.jpg" in shown and "p1/201.jpg" not in shown and "All 329 are in findings.csv" in shown
    assert "4.26" not in text(audit(), **made)
    assert "p9/7.jpg" not in text(audit("C", claim=False), **made)


def test_cards_carry_tier_and_q() -> None:
    card = Shown(
        rank=1, cosine=0.9, release_key="r", release_identity=None, gallery_key="g", gallery_identity=None,
        same_bytes=False, release_multiplicity=1, gallery_multiplicity=1, release_picture=None, gallery_picture=None,
    )  # fmt: skip
    known = Shown(**{name: getattr(card, name) for name in Shown.__slots__} | {"tier": "hub", "q": 0.02})
    listed = Shown(**{name: getattr(known, name) for name in Shown.__slots__} | {"listed": True})
    other = Shown(**{name: getattr(known, name) for name in Shown.__slots__} | {"judged": False})
    made = page(audit(), shown=[card, known, listed, other])
    assert made.count('<li class="hub">hub</li>') == 2 and '<li class="hub">person: hub</li>' in made
    assert "<li>q 0.02</li>" in made and "<li>listed, q 0.02</li>" in made


def test_notes_warnings_and_labels_are_shown_without_folders() -> None:
    about = summary(None, warnings=["one: trained on /home/me/casia"])
    del about["evidence"]
    about["sets"]["control"]["notes"] = ["5 shards of /home/me/faces are missing"]
    classes = {"test": "alignment", "identities": 30, "aligned": 21, "share": rate(0.7, 0.5, 0.85), "expected": 0.3,
               "within": 5, "p_value": 0.0001, "permutations": 9999}  # fmt: skip
    about["classes"] = classes
    shown = text(None, about)
    assert "trained on …/casia" in shown and "5 shards of …/faces are missing" in shown
    assert "There are notes on control; see Coverage." in shown
    assert "21 are closest to a training person within 5 places of their own label: 70 % (50 % to 85 %)" in shown
    assert "conditioned on the training labels" in shown
    other = {"test": "order", "identities": 30, "correlation": 0.02, "p_value": 0.4, "permutations": 9999}
    assert "no sign that labels" in text(audit(), {"classes": other})


@pytest.mark.parametrize("letter", ["A", "C"])
def test_hostile_names_stay_text_in_every_new_field(letter: str) -> None:
    hostile = audit(letter, claim=letter == "A", reasons=[HOSTILE], models=[HOSTILE, HOSTILE], groups=GROUPS)
    hostile["recall"] = [planted(HOSTILE, 0.9, 0.8) | {"does": HOSTILE}]
    hostile["sensitivity"][0]["what"] = hostile["auc"]["method"] = HOSTILE
    hostile["pairs"]["tiers"] = {HOSTILE: 3}
    hostile["pairs"]["copies"] = {"level": HOSTILE, "hash_distance": 0.1, "ncc": 0.9, "ssim": 0.9, "control_pairs": 3,
                                  "other_photo_pairs": 3}  # fmt: skip
    about = summary(None, warnings=[HOSTILE])
    about["sets"]["release"] |= {"notes": [HOSTILE], "form": HOSTILE}
    del about["evidence"]
    names = ("training_identity", "training_key", "release_identity", "release_key", "hub", "tier", "reasons")
    findings = FINDINGS.from_rows([finding(1, **dict.fromkeys(names, HOSTILE))])
    pixels = PAIR_EVIDENCE.from_rows([{"rank": 1, "blend_partner_key": HOSTILE}])
    made = page(hostile, about, findings=findings, pixels=pixels)
    found = Reader(made)
    assert found.tags.count("script") == 2 and "alert(1)" in found.text
    assert "\u202e" not in made and "\\u202e" in made
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert all(char.isprintable() or char == "\n" for char in made)


def test_links_lead_somewhere_and_ids_are_unique() -> None:
    figure = roc_figure(audit()["roc"], 2000, 1000, audit()["operating"])
    for evidence in (audit(), audit("C", claim=False), None):
        attributes = Reader(page(evidence, roc=figure)).attributes
        ids = [value for name, value in attributes if name == "id"]
        assert len(ids) == len(set(ids))
        assert {value[1:] for name, value in attributes if name == "href"} <= set(ids)


ALLOWED = (
    "What is not claimed", "That the release is private, anonymous", "either the controls are not comparable or many",
    "leaked in this way", "It does not claim", "That a listed person leaked",
    "training people leaked",  # at most a share of them, after the bound's own sentence
)  # fmt: skip


@pytest.mark.parametrize("letter", ["A", "B", "C"])
@pytest.mark.parametrize("over", [0, 48])
def test_words_that_claim_too_much_stand_only_where_they_are_refused(letter: str, over: int) -> None:
    evidence = audit(letter, claim=letter != "C", recall=[planted("copy", 1.0, 0.9)])
    evidence["over_threshold"]["training"] = over
    for sentence in re.split(r"(?<=[.:])\s", text(evidence)):
        if re.search(r"\b(leaked|private|anonymous|GDPR)\b", sentence):
            assert any(allowed.lower() in sentence.lower() for allowed in ALLOWED), sentence


def test_no_grade_promises_that_nobody_leaked() -> None:
    for evidence in (audit(), audit("B"), audit("C", claim=False)):
        assert any("private, anonymous" in one for one in not_claimed(evidence))
        shown = " ".join([*claims(evidence), grade(evidence).meaning, excess_sentence(evidence)])
        assert not re.search(r"leaked|private|anonymous|no leak|proven|memoris", shown)


def test_a_grade_without_claim_says_so() -> None:
    assert "Evidence grade A, no claim" in text(audit("A", claim=False))
    assert "but a check failed" in grade(audit("A", claim=False)).meaning
    assert "cannot carry a claim" in grade(audit("C", claim=False)).meaning


def test_an_audit_without_control_says_what_it_said_before() -> None:
    about = summary(None)
    del about["arms"]["control"], about["sets"]["control"]
    shown = text(None, {"arms": about["arms"], "sets": about["sets"]})
    assert "Evidence grade C: a ranked list for human review." in shown
    assert "There is no control set" in shown
    assert "Sensitivity" not in shown and "not looked at" not in shown
    assert "No control set was tested" in shown
    assert "it has no rates of error" in shown and "Anchor" not in shown.split("Glossary")[0]


def test_sizes_are_not_compared_where_the_comparison_failed() -> None:
    about = summary(audit())
    about["arms"]["control"]["comparisons"] = 1_000
    assert any("differ in size" in one for one in cautions(about))
    failed = copy.deepcopy(about)
    failed["evidence"] = audit("C", claim=False)
    assert not any("differ in size" in one for one in cautions(failed))


def test_the_terminal_says_grade_list_excess_and_recall() -> None:
    assert dict(terminal_lines(audit("B", recall=[planted("copy", 1.0, 0.9), planted("blur", 0.4, 0.3)]))) == {
        "evidence": "grade B, conditional on comparability",
        "listed": "31 of 2,000 persons at a false discovery rate of 0.05",
        "excess": "1.3 % of members over controls (0.31 % to 2.19 %), exact p 0.0067",
        "recall": "40 % to 100 % of planted copies, in 2 classes",
    }
    failed = dict(terminal_lines(audit("C", claim=False)))
    assert failed["evidence"] == "grade C, no rates are claimed" and failed[""] == "Because of this."
    assert "unveil plant" in failed["recall"] and {"listed", "excess"}.isdisjoint(failed)
    assert dict(terminal_lines(audit(excess=[])))["excess"] == "not estimable"


def test_a_public_page_says_so_and_has_no_commands_pictures_or_files() -> None:
    shown = text(audit(), audience="public")
    assert "names of images and of people are keyed hashes" in shown and "What to do next" not in shown
    assert "findings.csv" not in shown and "unveil review" not in shown and "the file is gone" not in shown
    assert "What to do next" in text(audit()) and "unveil review CONFIG" in text(audit())
    card = Shown(
        rank=1, cosine=0.9, release_key="r", release_identity=None, gallery_key="g", gallery_identity=None,
        same_bytes=False, release_multiplicity=1, gallery_multiplicity=1, release_picture=b"x", gallery_picture=None,
    )  # fmt: skip
    for changes in ({"shown": [card]}, {"faces": "clear"}):
        with pytest.raises(ValueError, match="must hold no picture"):
            page(audit(), audience="public", **changes)
    with pytest.raises(ValueError, match="'private' or 'public'"):
        page(audit(), audience="all")


def test_what_reviewers_said_and_mutual_ranks_stand_with_the_finding() -> None:
    made = {"mutual": {1: (1, 1)}, "reviewed": {1: "look-alike"}}
    shown = text(audit(), **made)
    assert "1 / 1 mutual same person" in shown and "reviewed: look-alike" in shown
    assert "Ranks" not in text(audit())
    pixels = PAIR_EVIDENCE.from_rows([{"rank": 1, "hash_distance": 0.0312, "ncc": 0.99, "mirrored": True}])
    assert "hash distance 0.031, correlation 0.990, mirrored" in text(audit(), pixels=pixels)
