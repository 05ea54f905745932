"""The report in real Chromium: ten thousand findings, names that try to run, two colour schemes, a narrow window."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from operators.tables import CANDIDATES, FINDINGS, PAIR_EVIDENCE, REJECTS
from pipeline.page import Page, render
from pipeline.page_clusters import clusters, mutual

HOSTILE = [
    "<script>window.hit=1</script>",
    '"><img src=x onerror="window.hit=2">',
    "\u202egpj.exe",
    "=1+1",
    "</script>",
]
TIERS = ("same photo", "same person", "look-alike / indeterminate", "hub")


def finding(rank: int) -> dict[str, Any]:
    """Cosines fall with the rank, q-values rise with it, statistics follow neither."""
    name = HOSTILE[rank - 1] if rank <= len(HOSTILE) else f"p{rank:05d}"
    return {
        "rank": rank, "training_identity": name, "training_key": f"{name}/1.jpg", "release_identity": f"s{rank // 2}",
        "release_key": f"s{rank // 2}/{rank}.png", "cosine": 1 - rank / 20_000, "same_bytes": False, "candidates": 1,
        "release_images": 1, "labels": 1, "anchor_cosine": 0.3, "statistic": (rank * 7919 % 10_007) / 10_007,
        "p": 0.001, "q": rank / 20_000, "hub": None, "tier": TIERS[rank % 4], "decision": "candidate: look-alikes",
        "reasons": f"a discovery of the first model; the second model confirms (z {rank % 700 / 100:.2f}, level 1.83)",
    }  # fmt: skip


def evidence() -> dict[str, Any]:
    arms = {"training": 20_000, "control": 20_000}
    return {
        "grade": "A", "claim": True, "reasons": [HOSTILE[0]], "anchored": True, "models": ["one", "two"], "q": 0.25,
        "listed": 5000, "shortest_list": 20, "excess": [], "frozen": {"look": 1, "looks": 1}, "gate": None,
        "placebo": None, "auc": None, "operating": [], "detectable": [], "groups": None, "sensitivity": [],
        "recall": None, "review": None,
        "persons": {**arms, "tested": arms, "several_labels": 0, "largest": 3, "straddlers": 0, "broken_chains": 0,
                    "images_capped_at": None},
        "over_threshold": {"threshold": 0.4, "training": 10, "control": 1, "false_at_most": 3},
        "hubs": {"flagged": arms, "hubs": arms, "limit": 9.0, "expected": 2.0, "largest": 11, "queries": 900,
                 "skewness": None},
        "pairs": {"tiers": dict.fromkeys(TIERS, 7), "judged": 28, "copies": None, "blends": None},
    }  # fmt: skip


def page_of(amount: int) -> Page:
    """A report of so many findings, with pairs and rejects for the first ones."""
    rows = [finding(rank) for rank in range(1, amount + 1)]
    pair = {"arm": "training", "same_bytes": False, "release_multiplicity": 1, "gallery_multiplicity": 1}
    pairs = [
        pair | {"rank": row["rank"], "cosine": row["cosine"]}
        | {f"release_{name}": row[f"release_{name}"] for name in ("identity", "key")}
        | {f"gallery_{name}": row[f"training_{name}"] for name in ("identity", "key")}
        for row in rows[:60]
    ]  # fmt: skip
    pixels = [{"rank": one, "second_z": 5.0, "ncc": 0.99, "blend_partner_key": HOSTILE[1]} for one in range(1, 60)]
    rejects = [{"set": "release", "key": f"k{n}{HOSTILE[n % 5]}", "status": "no_face", "error": "e"} for n in range(9)]
    findings, candidates = FINDINGS.from_rows(rows), CANDIDATES.from_rows(pairs)
    one = {"uri": HOSTILE[1], "images": 9, "audited": 8, "identities": 5, "rejected": {"no_face": 1}, "unlisted": {}}
    arm = {"comparisons": 9, "candidates": 9, "release_images": 9, "persons": 9, "highest": 0.9, "expected_false": 2.0,
           "expected_false_low": 0.9, "expected_false_high": 3.6}  # fmt: skip
    summary = {
        "title": HOSTILE[0], "sets": dict.fromkeys(("release", "training", "control"), one), "limit": None,
        "embedder": {"name": "e", "sha256": "9f", "width": 512}, "arms": {"training": arm, "control": arm},
        "calibration": {"threshold": 0.4, "fmr_wanted": 1e-6, "fmr": 1e-6, "fmr_low": 1e-7, "fmr_high": 1e-5,
                        "pairs": 9, "mated": 6, "over": 10, "images": 9, "labels": True, "reason": "r"},
        "findings": amount, "evidence": evidence(),
    }  # fmt: skip
    return Page(
        summary=summary, manifest={"unveil": "1"}, shown=[], rejects=REJECTS.from_rows(rejects), figures=[],
        faces="covered", findings=findings, pixels=PAIR_EVIDENCE.from_rows(pixels), mutual=mutual(findings, candidates),
        clusters=clusters(findings, candidates), candidates=candidates,
    )  # fmt: skip


def address(folder: Path, amount: int) -> str:
    path = folder / f"{amount}.html"
    path.write_text(render(page_of(amount)), "utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as driver:
        program = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield program
        program.close()


def column(page: Any, number: int) -> list[str]:
    """The first words of a column of the table of people, as they stand on the page."""
    script = (
        "n => [...document.querySelectorAll('#people-table tbody tr')].map(r => r.children[n].firstChild.textContent)"
    )
    return list(page.evaluate(script, number))


def said(page: Any) -> str:
    return str(page.locator("#people-table .said").inner_text())


def test_ten_thousand_findings_are_sorted_filtered_and_paged_and_nothing_runs(chromium: Any, tmp_path: Path) -> None:
    page = chromium.new_page(viewport={"width": 1200, "height": 900})
    trouble: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(report := address(tmp_path, 10_050))
    people = page.locator("#people-table")
    assert said(page) == "Rows 1 to 50 of 10,000" and column(page, 0) == [f"{n:,}" for n in range(1, 51)]
    assert "The table holds the first 10,000 of 10,050 findings" in page.locator("#people").inner_text()
    people.get_by_role("button", name="Next").press("Enter")
    assert said(page) == "Rows 51 to 100 of 10,000" and column(page, 0)[0] == "51"
    people.get_by_role("button", name="Last").click()
    assert column(page, 0)[-1] == "10,000" and people.get_by_text("Page 200 of 200").count() == 1

    head = people.get_by_role("columnheader", name="Statistic")
    head.get_by_role("button").press("Space")
    wanted = sorted(range(1, 10_001), key=lambda rank: -finding(rank)["statistic"])
    assert head.get_attribute("aria-sort") == "descending" and column(page, 0) == [f"{n:,}" for n in wanted[:50]]
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending" and column(page, 0) == [f"{n:,}" for n in wanted[:-51:-1]]

    people.get_by_label("Search names").fill("P0999")
    assert said(page) == "Rows 1 to 10 of 10 that pass the filters, 10,000 in all"
    assert sorted(column(page, 1)) == [f"p{n:05d}" for n in range(9990, 10_000)]
    people.get_by_label("Search names").fill("")
    people.get_by_label("Tier").select_option("same photo")
    people.get_by_label("Least cosine").fill("0.9")
    assert said(page).startswith("Rows 1 to 50 of 500 that pass")  # every fourth of ranks 1 to 2,000
    people.get_by_label("Least cosine").fill("")
    people.get_by_label("listed people only").check()
    assert said(page).startswith("Rows 1 to 50 of 1,250 that pass")  # every fourth of ranks 1 to 5,000
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert len(column(page, 0)) == 200 and not people.locator("form").is_visible()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert len(column(page, 0)) == 50
    assert page.evaluate("window.hit") is None and page.evaluate("document.images.length") == 0
    assert trouble == [] and requests == [report]
    page.close()


def test_a_page_without_scripts_has_the_first_rows(chromium: Any, tmp_path: Path) -> None:
    page = chromium.new_context(java_script_enabled=False).new_page()
    page.goto(address(tmp_path, 210))
    rows = page.locator("#people-table tbody tr")
    assert rows.count() == 200 and "<script>window.hit=1</script>" in rows.first.inner_text()
    assert not page.locator("#people-table form").is_visible() and not page.locator("#people-table nav").is_visible()
    page.close()


def test_the_page_is_accessible_in_both_schemes_and_fits_a_phone(chromium: Any, tmp_path: Path) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = chromium.new_page(viewport={"width": 360, "height": 780})
    page.goto(address(tmp_path, 12))
    for scheme, width, options in (("light", 360, {}), ("dark", 1200, {"runOnly": ["color-contrast"]})):
        page.set_viewport_size({"width": width, "height": 780})
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        found = axe.Axe().run(page, options=options).response["violations"]
        grave = [one for one in found if one["impact"] in ("serious", "critical")]
        assert [(one["id"], one["nodes"][0]["html"]) for one in grave] == []
    page.close()
