import importlib.metadata

import pytest

from operators.errors import ModelError
from pipeline.doctor import one_build


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    packages: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in packages:
            raise importlib.metadata.PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return packages


def test_one_build_is_well(installed: dict[str, str]) -> None:
    installed["onnxruntime-gpu"] = "1.2.3"
    assert one_build("onnxruntime") == "onnxruntime-gpu 1.2.3"


def test_no_build_says_what_to_install(installed: dict[str, str]) -> None:
    with pytest.raises(ModelError, match=r"faiss is not installed\. Install `unveil\[cpu\]`, or `unveil\[gpu\]`"):
        one_build("faiss")


def test_two_builds_overwrite_each_other(installed: dict[str, str]) -> None:
    installed |= {"faiss-cpu": "1", "faiss-gpu-cu12": "2"}
    with pytest.raises(ModelError, match="faiss-cpu 1 and faiss-gpu-cu12 2 overwrite each other"):
        one_build("faiss")
    installed |= {"faiss-gpu-cuvs": "3"}
    with pytest.raises(ModelError, match="and faiss-gpu-cuvs 3 and"):
        one_build("faiss")
