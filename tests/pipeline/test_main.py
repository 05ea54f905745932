import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import __main__ as command
from pipeline import __version__


def test_help_names_every_verb_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    shown = capsys.readouterr().out
    listed = re.findall(r"^  (\w+)  ", shown, re.MULTILINE)
    assert listed == list(command.VERBS)
    assert "0 done, 1 error, 2 done and more persons" in shown


def test_the_command_line_takes_no_other_flags(root: Path) -> None:
    """Options belong into the configuration: the command line is frozen (DESIGN: VERB CONFIG [key=value ...])."""
    source = ast.parse((root / "pipeline" / "__main__.py").read_text())
    flags = {n.value for n in ast.walk(source) if isinstance(n, ast.Constant) and str(n.value).startswith("-")}
    assert flags == {"--help", "-h", "--version"}


@pytest.mark.parametrize("verb", ["run", "plan", "watch"])
def test_a_secret_does_not_belong_on_the_command_line(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Others see the arguments of a process, and Ray keeps them as the job's entry point."""
    assert command.main([verb, "nowhere.yaml", "sets.release.uri=https://h/my set.zip?sig=SECRET"]) == 1
    said = capsys.readouterr().err
    assert "https://h/my set.zip?…" in said and "${oc.env:NAME}" in said and "SECRET" not in said


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "usage"),
        (["serach", "x.yaml"], "unknown verb 'serach'"),
        (["run"], "needs a configuration file"),
        (["run", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_1(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(words) == 1
    shown = capsys.readouterr()
    assert complaint in shown.err + shown.out
    assert len(shown.err.splitlines()) <= 1 and "Traceback" not in shown.err


def test_verbs_without_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["catalogue"]) == 0
    assert {"dcface", "casia_webface"} <= set(capsys.readouterr().out.split())
    assert command.main(["catalogue", "dcface"]) == 0
    assert "arXiv 2304.07060" in capsys.readouterr().out
    assert command.main(["catalogue", "dcfac"]) == 1
    assert "Did you mean dcface" in capsys.readouterr().err
    assert command.main(["selftest", "nothing"]) == 1
    assert "unveil selftest stats" in capsys.readouterr().err


def test_the_debug_variable_shows_where_an_error_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    from operators.errors import ConfigError

    monkeypatch.setenv("UNVEIL_DEBUG", "1")
    with pytest.raises(ConfigError):
        command.main(["run", "nowhere.yaml"])


def test_help_is_instant_because_nothing_heavy_is_imported(root: Path) -> None:
    heavy = "{'torch', 'faiss', 'ray', 'onnxruntime', 'cv2', 'pyarrow', 'numpy', 'omegaconf', 'matplotlib', 'scipy'}"
    code = f"import sys, pipeline.__main__ as m; m.main(['--help']); print({heavy} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == "set()"


def test_the_version_is_the_installed_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"unveil {__version__}\n"
    assert importlib.metadata.version("unveil") == __version__


@pytest.mark.usefixtures("short_trial")
def test_plan_lists_sets_and_comparisons_and_writes_nothing(
    config_file: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {role: len(list((corpus / role).rglob("*.jpg"))) for role in ("release", "training")}
    assert command.main(["plan", str(config_file)]) == 0
    shown = capsys.readouterr().out
    assert f"release x training {counts['release'] * counts['training']:>18,} comparisons" in shown
    assert "unit_images: 16" in shown and "nothing in" in shown
    assert not (config_file.parent / "run").exists()


@pytest.mark.usefixtures("short_trial")
def test_plan_says_what_is_already_done(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["scan", str(config_file)]) == 0
    capsys.readouterr()
    assert command.main(["plan", str(config_file)]) == 0
    assert re.search(r"embedded training +0 of \d+ units of the last scan", capsys.readouterr().out)


def test_doctor_passes_here_and_fails_with_the_reason(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["doctor", str(config_file)]) == 0
    assert "embedder sface_2021dec: runs on onnxruntime CPUExecutionProvider" in capsys.readouterr().out
    assert command.main(["doctor", str(config_file), "embedder.path=gone.onnx"]) == 1
    assert "FAILED  embedder sface_2021dec: gone.onnx: model file cannot be read" in capsys.readouterr().out


def test_a_stage_without_its_input_says_which_stage_to_run(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb, first in [("embed", "scan"), ("search", "scan"), ("assess", "search"), ("report", "assess")]:
        assert command.main([verb, str(config_file)]) == 1
        assert f"Run `unveil {first}` first" in capsys.readouterr().err


def test_an_unwritable_run_folder_is_one_line(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (config_file.parent / "file").write_text("")
    assert command.main(["scan", str(config_file), f"out={config_file.parent}/file"]) == 1
    assert "not a folder that can be written" in capsys.readouterr().err


def test_the_module_runs_as_the_command_does(root: Path) -> None:
    shown = subprocess.run([sys.executable, "-m", "pipeline", "--version"], cwd=root, capture_output=True, text=True)
    assert shown.stdout == f"unveil {__version__}\n"
    installed = Path(sys.executable).with_name("unveil")
    assert subprocess.run([installed, "--version"], capture_output=True, text=True).stdout == shown.stdout


def test_an_interrupt_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_run", interrupted)
    assert command.main(["run", "x.yaml"]) == 130
    assert "it goes on where it was" in capsys.readouterr().err
