"""The wheel holds the three packages and their data, and the repository holds no face."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from pipeline import __version__


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(root)]
    subprocess.run(command, check=True, capture_output=True)
    (made,) = out.glob("*.whl")
    assert made.name == f"unveil-{__version__}-py3-none-any.whl"
    return zipfile.ZipFile(made).namelist()


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: list[str], root: Path) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert tops == {"operators", "cluster", "pipeline", f"unveil-{__version__}.dist-info"}
    needed = {
        path.relative_to(root).as_posix()
        for p in ("operators", "cluster", "pipeline")
        for path in (root / p).rglob("*.py")
    }
    assert needed <= set(wheel)
    data = {f"pipeline/templates/{path.name}" for path in (root / "pipeline" / "templates").iterdir()}
    data |= {f"pipeline/catalogue_entries/{path.name}" for path in (root / "seeds" / "catalogue").glob("*.yaml")}
    data |= {f"pipeline/model_cards/{path.name}" for path in (root / "configs" / "models").glob("*.yaml")}
    assert len(data) > 40
    assert {*data, "operators/py.typed", "cluster/py.typed", "pipeline/py.typed"} <= set(wheel)
    assert not [name for name in wheel if "__pycache__" in name]


def tracked(root: Path) -> list[str]:
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    return subprocess.run(["git", "ls-files"], cwd=root, check=True, capture_output=True, text=True).stdout.splitlines()


def test_no_picture_weights_or_data_are_tracked(root: Path) -> None:
    """The only picture is the README's screenshot, in which faces are covered."""
    refused = re.compile(
        r"\.(jpe?g|png|webp|bmp|pgm|gif|tiff?|onnx|pt|pth|safetensors|npy|npz|parquet|rec|h5|lmdb)$", re.I
    )
    assert [name for name in tracked(root) if refused.search(name)] == ["docs/report.png"]


def test_changelog_and_version_agree(root: Path) -> None:
    newest = re.search(r"^## \[?(\d+\.\d+\.\d+)", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest.group(1) == __version__


def test_the_cpu_set_up_pins_every_direct_dependency(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {
        re.split(r"[\[<>=]", need)[0].lower() for need in [*project["dependencies"], *extras["cpu"], *extras["dev"]]
    }
    lines = (root / "constraints-cpu.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert wanted <= pinned


def test_supported_pythons_are_the_classified_ones(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    versions = [c.split(" :: ")[-1] for c in project["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert versions == ["3.11", "3.12", "3.13"] and project["requires-python"] == ">=3.11"
