"""The rules of the house, as failing tests. Import contracts are checked by import-linter (`make check`)."""

import ast
from collections import Counter
from pathlib import Path

import pytest

PACKAGES = ("operators", "cluster", "pipeline")
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 40


def modules(root: Path) -> list[Path]:
    return [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]


def test_no_module_name_occurs_twice(root: Path) -> None:
    names = Counter(path.name for path in modules(root) if path.name not in ("__init__.py", "__main__.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_tests_mirror_the_packages(root: Path) -> None:
    """A test file is named after a module of the same folder, and every test folder is without __init__.py."""
    for path in (root / "tests").rglob("test_*.py"):
        folder = path.parent.relative_to(root / "tests")
        if folder.parts and folder.parts[0] in PACKAGES:
            name = path.stem.removeprefix("test_")
            candidates = [root / folder / f"{name}.py", root / folder / f"__{name}__.py"]
            assert any(candidate.exists() for candidate in candidates), path
    assert list((root / "tests").rglob("__init__.py")) == []


def test_files_and_functions_stay_short(root: Path) -> None:
    long = []
    for path in [*modules(root), *sorted((root / "seeds").rglob("*.py"))]:
        text = path.read_text()
        if len(text.splitlines()) > MAX_FILE_LINES:
            long.append(str(path))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and _body_lines(node) > MAX_FUNCTION_LINES:
                long.append(f"{path}:{node.lineno} {node.name}")
    assert long == []


def _body_lines(node: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return (node.end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_broad_excepts_stand_at_the_per_image_boundary_only(root: Path) -> None:
    found = []
    for path in modules(root):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                names = [n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)] if node.type else ["bare"]
                if {"Exception", "BaseException", "bare"} & set(names):
                    found.append(path.relative_to(root).as_posix())
    assert found == ["operators/faces.py"]


def test_only_the_command_line_prints(root: Path) -> None:
    for path in modules(root):
        calls = [
            n.func.id
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        ]
        assert "print" not in calls or path.name == "__main__.py", path


@pytest.mark.parametrize("package", PACKAGES)
def test_heavy_libraries_are_not_imported_at_module_level(root: Path, package: str) -> None:
    heavy = {"torch", "faiss", "ray", "onnxruntime", "onnx", "cv2", "scipy", "matplotlib", "numba", "llvmlite"}
    compiled = {f"operators.{name}" for name in ("kernels", "microkernels", "fused")}  # imported where they are used
    for path in sorted((root / package).rglob("*.py")):
        if f"{package}.{path.stem}" in compiled:
            continue
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & heavy, path
            assert not compiled & set(names), path
