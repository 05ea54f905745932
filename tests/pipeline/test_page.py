import base64
import dataclasses
import hashlib
import html
import html.parser
import re

import numpy as np
import pytest

from operators.errors import SchemaMismatch
from operators.pictures import picture
from operators.tables import REJECTS
from pipeline.figures import best_match_figure
from pipeline.page import Page, Shown, render
from pipeline.page_result import cautions, result
from pipeline.wording import number, power, without_folders

HOSTILE = [
    "<script>alert(1)</script>.jpg", '"><img src=x onerror=alert(1)>.png', "' onmouseover='alert(1)", "\u202egpj.exe",
    "a\nb\x00\x1b[31m", "{{ 7 * 7 }}", "javascript:alert(1)", "\ud800lone.jpg", "]]><svg onload=alert(1)>", "<!--",
]  # fmt: skip
ARM = {
    "comparisons": 2_000_000, "candidates": 71, "release_images": 60, "persons": 48, "highest": 0.91344,
    "expected_false": 2.0, "expected_false_low": 0.96, "expected_false_high": 3.68,
}  # fmt: skip
CONTROL = ARM | {"comparisons": 1_000_000, "candidates": 3, "persons": 3, "highest": 0.4711}
NOTHING = ARM | {"candidates": 0, "release_images": 0, "persons": 0, "highest": 0.3812}


def a_set(**changes):
    return {
        "uri": "/data/home/someone/faces", "images": 1500, "audited": 1490, "identities": 150,
        "rejected": {"no_face": 10}, "unlisted": {".txt": 4}, **changes,
    }  # fmt: skip


def summary(**arms):
    arms = arms or {"training": ARM}
    return {
        "title": "Demo",
        "sets": {role: a_set() for role in ("release", *arms)},
        "embedder": {"name": "arcface-r50", "sha256": "9f" * 32, "width": 512},
        "calibration": {
            "threshold": 0.43214, "fmr_wanted": 1e-6, "fmr": 9.9e-7, "fmr_low": 4.7e-7, "fmr_high": 1.8e-6,
            "pairs": 1_108_936, "mated": 6_741, "over": 10, "images": 1490, "labels": True, "reason": "as asked",
        },
        "arms": arms,
        "findings": arms["training"]["persons"],
        "limit": None,
    }  # fmt: skip


MANIFEST = {
    "unveil": "0.1.0", "created": "2025-01-01T00:00:00+00:00", "versions": {"numpy": "2.4.0"}, "list": ["/a/b", 2],
    "config": {"out": "/data/home/someone/run", "sets": {"release": {"uri": "/data/home/someone/faces"}}, "none": None},
    "stages": {"scan": {"seconds": 1.5, "status": "done"}},
    "weights": {"/models/one/m.onnx": "aa", "/models/two/m.onnx": "bb"},
}  # fmt: skip
JPEG = picture(np.full((20, 20, 3), 99, np.uint8), None, covered=True)


def candidate(rank=1, **changes):
    given = {
        "rank": rank, "cosine": 0.91344, "release_key": "r/1.png", "release_identity": "r", "gallery_key": "p/1.jpg",
        "gallery_identity": "p", "same_bytes": False, "release_multiplicity": 1, "gallery_multiplicity": 1,
        "release_picture": JPEG, "gallery_picture": JPEG,
    }  # fmt: skip
    return Shown(**(given | changes))


def page(**changes):
    given = {
        "summary": summary(), "manifest": MANIFEST, "shown": [candidate()], "rejects": REJECTS.from_rows([]),
        "figures": [], "faces": "covered",
    }  # fmt: skip
    return Page(**(given | changes))


class Reader(html.parser.HTMLParser):
    """Tags, attributes and text as a browser would find them."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.parts, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "img", "br", "input", "line", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if "style" not in self.open and "script" not in self.open:
            self.parts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.parts).split())


def hostile_page():
    rejects = [{"set": "release", "key": n, "status": "corrupt", "error": n} for n in HOSTILE if "\ud800" not in n]
    names = ("release_key", "release_identity", "gallery_key", "gallery_identity")
    about = summary(training=ARM, control=CONTROL)
    about["title"] = about["embedder"]["name"] = about["calibration"]["reason"] = HOSTILE[1]
    about["sets"]["release"] |= {"uri": HOSTILE[1], "rejected": {HOSTILE[0]: 1}, "unlisted": dict.fromkeys(HOSTILE, 1)}
    return page(
        summary=about,
        manifest=MANIFEST | {HOSTILE[0]: {HOSTILE[1]: HOSTILE[2]}, "names": HOSTILE, "created": HOSTILE[1]},
        shown=[candidate(i, **dict.fromkeys(names, name)) for i, name in enumerate(HOSTILE, 1)],
        rejects=REJECTS.from_rows(rejects),
        figures=[(HOSTILE[0], best_match_figure({"training": np.array([0.2, 0.5])}, 0.4))],
    )


@pytest.mark.parametrize("faces", ["covered", "clear"])
def test_hostile_names_stay_text(faces):
    made = render(dataclasses.replace(hostile_page(), faces=faces))
    plain = REJECTS.from_rows([{"set": "release", "key": "k", "status": "corrupt", "error": "e"}])
    clean = Reader(render(page(faces=faces, shown=[candidate()] * len(HOSTILE), rejects=plain)))
    found = Reader(made)
    assert found.tags.count("script") == clean.tags.count("script")
    assert found.tags.count("img") == clean.tags.count("img") == 2 * len(HOSTILE)
    assert not [a for a in found.attributes if a[1].startswith("on")]
    drawn = ("svg", "g", "path", "text", "use", "rect", "defs", "clippath", "title", "desc")
    assert {a[:2] for a in found.attributes if a[0] not in drawn} <= {a[:2] for a in clean.attributes}
    assert "<script>alert(1)</script>.jpg" in found.text
    assert "\\u202egpj.exe" in found.text
    assert "a\\u000ab\\u0000\\u001b[31m" in found.text
    assert "\\ud800lone.jpg" in found.text
    assert "{{ 7 * 7 }}" in found.text
    assert all(char.isprintable() or char == "\n" for char in made)
    made.encode("utf-8")


@pytest.mark.parametrize("faces", ["covered", "clear"])
def test_the_page_refers_to_nothing_outside_itself(faces):
    made = render(page(figures=[("caption", best_match_figure({"training": np.array([0.2])}, 0.4))], faces=faces))
    linked = [
        value for _, name, value in Reader(made).attributes if name in ("src", "href", "action", "srcset", "data")
    ]
    assert linked
    assert all(value.startswith(("data:image/jpeg;base64,", "#")) for value in linked)
    assert "http:" not in made and "https:" not in made and "@import" not in made
    assert not re.search(r"url\((?!#)", made)


def test_the_policy_names_the_only_script_and_the_only_style_by_their_digests():
    made = render(page())
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', made)[1])
    parts = dict(one.strip().split(" ", 1) for one in policy.split(";"))
    scripts, styles = (re.findall(rf"<{tag}>(.*?)</{tag}>", made, re.DOTALL) for tag in ("script", "style"))
    assert len(scripts) == len(styles) == 1 and len(scripts[0].encode()) < 8192
    digests = [base64.b64encode(hashlib.sha256(one[0].encode()).digest()).decode() for one in (scripts, styles)]
    assert parts["default-src"] == "'none'" and parts["img-src"] == "data:"
    assert [parts["script-src"], parts["style-src-elem"]] == [f"'sha256-{one}'" for one in digests]
    assert "innerHTML" not in scripts[0] and "eval" not in scripts[0] and "fetch" not in scripts[0]


def test_links_inside_the_page_lead_somewhere():
    attributes = Reader(render(page())).attributes
    ids = [value for _, name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for _, name, value in attributes if name == "href"} <= set(ids)


def test_the_result_is_told_beside_chance_and_control():
    told = result(summary(training=ARM, control=CONTROL))
    assert told[0] == "48 of 150 training people have at least one candidate pair in the release."
    assert "71 candidate pairs; false matches alone would give about 2 (0.96 to 3.68)" in told[1]
    assert "no sign" not in told[1]
    assert "3 candidate pairs in 1,000,000 comparisons" in told[2]
    assert "training gives 11.8 times as many as control" in told[2]


def test_a_count_within_chance_is_called_so():
    told = result(summary(training=ARM | {"candidates": 3, "persons": 1}))
    assert told[0].startswith("1 of 150 training people has")
    assert told[1].endswith("so the count by itself is no sign of leakage.")


def test_without_control_the_page_says_what_is_missing():
    text = Reader(render(page())).text
    assert "There is no control set" in text
    assert "Without a control set there is no rate of error" in text
    assert "Evidence grade C" in text


def test_with_control_and_anchor_all_numbers_are_shown():
    text = Reader(render(page(summary=summary(training=ARM, control=CONTROL, anchor=NOTHING)))).text
    for shown in ("2,000,000", "1,000,000", "0.9134", "0.4711", "0.3812", "0.96 to 3.68", "9.9 × 10⁻⁷", "1,108,936"):
        assert shown in text
    assert "Release compared with training control anchor" in text
    assert "does not control errors for each person" in text


def test_a_control_set_without_candidates_has_no_ratio():
    text = Reader(render(page(summary=summary(training=ARM, control=NOTHING)))).text
    assert "no ratio to state" in text
    assert "times as many" not in text


def test_no_candidate_is_not_called_privacy():
    text = Reader(render(page(summary=summary(training=NOTHING), shown=[]))).text
    assert "No pair of a release and a training image reaches the threshold of cosine 0.4321" in text
    assert "The highest cosine seen is 0.3812" in text
    assert "no evidence of privacy" in text and "This does not show that the release is free of training faces" in text


def test_nothing_compared_is_told():
    told = result(summary(training=NOTHING | {"comparisons": 0, "highest": None}))
    assert told[0].startswith("Nothing was compared")


@pytest.mark.parametrize(("limit", "word"), [(47, "over"), (48, "within")])
def test_the_limit_is_compared(limit, word):
    assert result(summary() | {"limit": limit})[-1].endswith(f"this result is {word} it.")


def test_missing_labels_are_warned_of():
    about = summary()
    about["calibration"]["labels"] = False
    about["sets"]["training"]["identities"] = 0
    text = Reader(render(page(summary=about))).text
    assert "48 of 1,490 training images have" in text
    assert "pushes the threshold up" in text
    assert "No complete labels" in text and "no labels" in text


def test_sets_of_different_size_are_warned_of():
    assert any("differ in size" in one for one in cautions(summary(training=ARM, control=CONTROL)))
    assert not any("differ in size" in one for one in cautions(summary(training=ARM, control=ARM)))


def test_clear_faces_raise_the_banner_and_covered_ones_are_labelled():
    clear, covered = (Reader(render(page(faces=faces))) for faces in ("clear", "covered"))
    assert "contains biometric data. Do not share it" in clear.text
    assert "biometric" not in covered.text
    assert covered.text.count("face covered") == 2
    assert "face covered" not in clear.text
    with pytest.raises(ValueError, match="covered"):
        render(page(faces="blurred"))


def test_badges_and_missing_pictures():
    pairs = [
        candidate(1, same_bytes=True, release_multiplicity=12, gallery_multiplicity=2),
        candidate(2, release_picture=None, gallery_identity=None),
    ]
    text = Reader(render(page(shown=pairs))).text
    assert "identical file bytes" in text
    assert "hub? release image in 12 candidates" in text
    assert " training image in 2 candidates" in text
    assert "hub? training" not in text
    assert "the file is gone" in text
    assert "no label" in text
    assert "Shown: 2 of 71" in text
    assert "assess/candidates.parquet" in text


def test_coverage_lists_the_first_rejects_and_counts_the_rest():
    rows = [{"set": "release", "key": f"k{i:04d}", "status": "no_face", "error": "none found"} for i in range(230)]
    text = Reader(render(page(rejects=REJECTS.from_rows(rows)))).text
    assert "230 in all; assess/rejects.parquet has all of them." in text
    assert "k0199" in text and "k0200" not in text
    assert "no face 10" in text and ".txt 4" in text and "99.33 %" in text
    assert "finding about coverage" in text


def test_a_page_with_covered_faces_has_no_folders():
    rejects = REJECTS.from_rows(
        [{"set": "release", "key": "k", "status": "corrupt", "error": "cannot open '/home/x/k'"}]
    )
    covered, clear = (render(page(faces=faces, rejects=rejects)) for faces in ("covered", "clear"))
    assert "/home/" not in covered and "/models/" not in covered
    assert "…/faces" in covered and "…/run" in covered
    assert covered.count("…/m.onnx") == 2
    assert "/data/home/someone/faces" in clear


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/a/b c/d", "…/d"), ("/a/b/", "…/b"), ("~/x/y", "…/y"), ("file:///x/y", "…/y"), ("C:\\me\\set", "…/set"),
        ("cannot open '/home/me/k.jpg': denied", "cannot open '…/k.jpg': denied"), ("data/demo", "data/demo"),
        ("s3://bucket/set/part", "s3://bucket/set/part"), ("no face or 1/2 a face", "no face or 1/2 a face"),
    ],
)  # fmt: skip
def test_local_folders_are_cut(text, left):
    assert without_folders(text) == left


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0"), (71, "71"), (1234567, "1,234,567"), (146.4, "146"), (2.0, "2"), (0.5712, "0.571"),
     (0.0004, "4.0 × 10⁻⁴"), (float("nan"), "–"), (1e20, "100,000,000,000,000,000,000")],
)  # fmt: skip
def test_numbers_are_written_for_reading(value, text):
    assert number(value) == text
    assert (power(1e-6), power(0.0)) == ("1.0 × 10⁻⁶", "0")


def test_rejects_under_another_contract_are_refused():
    with pytest.raises(SchemaMismatch):
        render(page(rejects=REJECTS.from_rows([]).drop_columns(["error"])))


def test_a_figure_that_is_no_svg_is_refused():
    with pytest.raises(ValueError, match="svg"):
        render(page(figures=[("caption", "<img src=x>")]))
