"""Rows of the checklist of docs/security.md that fit no module's own tests, and that the page is true."""

import importlib.util
import json
import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.storage import to_json
from operators.backbones import open_model
from operators.errors import ModelError
from pipeline.doctor import old_python
from pipeline.page import render


def module_at(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"security_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    made = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(made)
    return made


def test_every_row_of_the_checklist_names_tests_that_exist_or_a_reason(root: Path) -> None:
    page = (root / "docs" / "security.md").read_text()
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", page, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 19))
    for number, row in rows:
        assert len(row.split(" | ")) == 2, number
        assert "`tests/" in row or "make " in row or "unveil " in row, number
    last = ""
    for name, test in re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", page):
        last = name or last  # `::test` is of the file before
        if name or test:
            assert f"def {test}" in (root / last).read_text(), f"{last}::{test}"
    targets = (root / "Makefile").read_text()
    for target in set(re.findall(r"`(?:[A-Z]+=\d+ )?make ([\w-]+)", page)):
        assert f"\n{target}:" in targets, target


@pytest.mark.parametrize("trick", ["parent", "absolute", "dots inside", "link", "hard link", "linked folder"])
def test_a_model_with_data_elsewhere_is_refused_wherever_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trick: str
) -> None:
    """Row 10: the six ways out of a model's folder; whether the file is there does not matter."""
    import hashlib

    from onnx import TensorProto, helper, numpy_helper
    from onnx.external_data_helper import set_external_data

    inside, outside = tmp_path / "model", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "w.bin").write_bytes(np.ones(3, np.float32).tobytes())
    if trick == "link":
        (inside / "w.bin").symlink_to(outside / "w.bin")
    elif trick == "hard link":
        (inside / "w.bin").hardlink_to(outside / "w.bin")
    elif trick == "linked folder":
        (inside / "sub").symlink_to(outside)
    location = {
        "parent": "../outside/w.bin",
        "absolute": str(outside / "w.bin"),
        "dots inside": "sub/../../outside/w.bin",
        "linked folder": "sub/w.bin",
    }.get(trick, "w.bin")
    weights = numpy_helper.from_array(np.ones(3, np.float32), "w")
    set_external_data(weights, location)
    weights.ClearField("raw_data")
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, (3,))
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [value],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (3,))],
        [weights],
    )
    data = helper.make_model(graph).SerializeToString()
    (inside / "m.onnx").write_bytes(data)
    monkeypatch.chdir(inside)
    with pytest.raises(ModelError, match="keeps weights in other files"):
        open_model(str(inside / "m.onnx"), hashlib.sha256(data).hexdigest())


def test_a_report_of_hostile_names_runs_nothing_in_a_browser(root: Path, tmp_path: Path) -> None:
    """Row 11: no script runs, nothing is asked for elsewhere, and no dialog opens."""
    playwright = pytest.importorskip("playwright.sync_api")
    browsers = ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
    program = next((name for name in browsers if os.path.exists(name)), None)
    if program is None:
        pytest.skip("no Chromium")
    pages = module_at(root / "tests" / "pipeline" / "test_page.py")
    (tmp_path / "report.html").write_text(render(pages.hostile_page()))
    own = len(re.findall(r"<script(?! type=.application/json)", render(pages.page(shown=[pages.candidate()]))))
    asked: list[str] = []
    dialogs: list[str] = []
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        seen = browser.new_page()
        seen.on("request", lambda request: asked.append(request.url))
        seen.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        seen.goto((tmp_path / "report.html").as_uri())
        scripts = seen.evaluate("[...document.scripts].filter(e => e.type != 'application/json').length")
        handlers = seen.evaluate(
            "[...document.querySelectorAll('*')].filter(e => e.onerror || e.onclick || e.onload).length"
        )
        text = seen.inner_text("body")
        browser.close()
    assert (scripts, handlers, dialogs) == (own, 0, [])
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert "<script>alert(1)</script>.jpg" in text


def test_json_files_hold_no_raw_control_characters() -> None:
    """Row 11: what a terminal or an editor would obey."""
    hostile = "".join(map(chr, range(32))) + "\x7f"
    made = to_json({hostile: [hostile]})
    assert json.loads(made) == {hostile: [hostile]}
    assert not re.search(rb"[\x00-\x09\x0b-\x1f]", made)


def test_no_version_below_the_floors_of_the_checklist_is_allowed(root: Path) -> None:
    """Row 18: PROTOCOL of known holes, SECURITY: torch 2.10, onnx 1.21, Pillow 12.3, Ray 2.52."""
    wanted = {"torch": (2, 10), "onnx": (1, 21), "pillow": (12, 3), "ray[data]": (2, 52)}
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    floors = dict(re.fullmatch(r"([\w\[\]-]+)>=([\d.]+)", line).groups() for line in project["dependencies"])  # type: ignore[union-attr]
    pinned = dict(
        line.strip().lower().split("==")
        for line in (root / "constraints-cpu.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    for name, least in wanted.items():
        assert version(floors[name]) >= least, name
        assert version(pinned[name.partition("[")[0]]) >= least, name
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    assert all(">=" in line for line in [*project["dependencies"], *extras])


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0]))


@pytest.mark.parametrize(
    ("found", "warned"), [((3, 11, 12), True), ((3, 11, 13), False), ((3, 12, 10), True), ((3, 13, 0), False)]
)
def test_an_old_python_is_warned_of(found: tuple[int, int, int], warned: bool) -> None:
    assert bool(old_python(found)) == warned
