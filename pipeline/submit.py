"""submit: the same verb as a job on a Ray cluster.

    unveil submit VERB CONFIG cluster=ADDRESS [key=value ...]
    unveil submit status|stop|logs ID cluster=ADDRESS

The configuration is resolved here, model cards included, so the cluster needs no file of this machine except the sets,
models and run folder that it names, which must lie where every node sees them. What is uploaded is this project's code
and that configuration: no data, no runs, no weights, no keys. The job refuses to run on other code than what is here.
"""

import json
import logging
import os
import re
import secrets
import shlex
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import yaml

from cluster.access import is_loopback
from cluster.faults import ClusterError, UnlikeNodes
from cluster.jobs import Jobs, JobState, SubmitConfig
from operators.addresses import CREDENTIAL, holds_secret
from operators.errors import ConfigError
from pipeline import __version__
from pipeline.ledger import code_fingerprint

if TYPE_CHECKING:
    from pipeline.config import AuditConfig

log = logging.getLogger(__name__)

VERBS = ("run", "scan", "embed", "search", "assess", "report", "plant", "verify", "clean", "export", "plan", "doctor")
"""What may be a job: not `review`, which is a page on the auditor's machine, nor `seal`, whose key stays there."""
ABOUT = ("status", "stop", "logs")
ROOT = Path(__file__).resolve().parent.parent
PACKED = {
    "operators": "operators",
    "cluster": "cluster",
    "pipeline": "pipeline",
    "configs/models": "pipeline/model_cards",
    "seeds/catalogue": "pipeline/catalogue_entries",
}
"""What is uploaded, and where it lies then: as in an installed package."""
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "deploy", "*.key", "*.pem", "*.env", "*.token")
CONFIG = "audit.yaml"
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""The environment variable in which Ray hands a job its metadata."""
KINDS: dict[str, type] = {one.name: type(one.default) for one in fields(SubmitConfig)}
"""The options of a submission and their types."""


def submit(words: Sequence[str], write: Callable[[str], None]) -> int:
    """Submit a verb and follow it, or ask about a job; return the job's exit code.

    Raises
    ------
    ConfigError
        If the words, the configuration or a named cluster are not as they must be.
    ClusterError
        If the cluster does not answer, refuses, or is not protected by a token.
    """
    if len(words) < 2 or words[0] not in (*VERBS, *ABOUT):
        raise ConfigError(
            "submit is written `unveil submit VERB CONFIG cluster=ADDRESS [key=value ...]`, or "
            f"`unveil submit {'|'.join(ABOUT)} ID cluster=ADDRESS`. Verbs: {', '.join(VERBS)}."
        )
    options, overrides = parsed(words[2:])
    if words[0] not in ABOUT:
        return _submit(words[0], words[1], overrides, options, write)
    if overrides:
        raise ConfigError(f"{overrides[0]!r}: `unveil submit {words[0]}` takes cluster=... and submit.key=value only.")
    jobs = Jobs(options)
    state = jobs.state(words[1])
    if words[0] == "stop":
        stopped = jobs.stop(words[1])
        write(f"{words[1]} {'is asked to end' if stopped else 'was not running'}\n")
        return 0
    if words[0] == "status":
        code = "" if state.exit_code is None else f", exit code {state.exit_code}"
        write(f"{state.id} {state.status}{code}\n")
        return 0
    return _followed(jobs, words[1], options, write)


def parsed(words: Sequence[str]) -> tuple[SubmitConfig, list[str]]:
    """The options of the submission among `key=value` words, and the other words, which are for the audit.

    Those of a named cluster stand below those given.
    """
    given: dict[str, Any] = {}
    rest = []
    for word in words:
        key, _, value = word.partition("=")
        if key == "cluster" or key.startswith("submit."):
            name = key.removeprefix("submit.")
            try:
                given[name] = value if KINDS.get(name) is str else yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise ConfigError(f"{word!r}: not a valid override.") from error
        else:
            rest.append(word)
    named = str(given.get("cluster", ""))
    if named.endswith(".yaml") or (named and not re.search("[.:/]", named)):
        given = {**_named(named), **{key: value for key, value in given.items() if key != "cluster"}}
    if not given.get("cluster"):
        raise ConfigError(
            "cluster is missing: cluster=127.0.0.1:8265, an https address, or a name in configs/clusters."
        )
    return _options(given), rest


def _named(name: str) -> dict[str, Any]:
    """The options in the file of a named cluster."""
    path = Path(name if name.endswith(".yaml") else f"configs/clusters/{name}.yaml")
    try:
        stated = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cluster={name}: {path} cannot be read ({error.strerror}). Write an address as HOST:PORT or https://HOST."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML.") from error
    if not isinstance(stated, dict) or not isinstance(stated.get("cluster"), str):
        raise ConfigError(f"{path}: must hold `cluster: ADDRESS`, and options of submit.")
    return stated


def _options(given: dict[str, Any]) -> SubmitConfig:
    """Options with the types that they must have."""
    for key, value in given.items():
        if key not in KINDS:
            raise ConfigError(f"unknown key 'submit.{key}'. Known here: {', '.join(KINDS)}.")
        kinds = (int, float) if KINDS[key] is float else (KINDS[key],)
        if not isinstance(value, kinds) or (isinstance(value, bool) and KINDS[key] is not bool):
            wanted = {"float": "a number", "bool": "true or false"}.get(KINDS[key].__name__, "a text")
            raise ConfigError(f"submit.{key} must be {wanted}. Got {value!r}.")
    try:
        return SubmitConfig(**given)
    except ValueError as error:
        raise ConfigError(f"submit.{error}") from error


def _submit(verb: str, path: str, overrides: Sequence[str], options: SubmitConfig, write: Callable[[str], None]) -> int:
    from pipeline.config import load

    config = load(path, overrides)
    jobs = Jobs(options)
    code = code_fingerprint()
    with tempfile.TemporaryDirectory(prefix="unveil-submit-") as made:
        folder = Path(made)
        text = resolved(config, options, folder)
        files, size = packed(folder, code=options.code == "upload")
        log.info("submit: %d files, %.2f MB: %s", files, size / 1e6, ", ".join(sorted(os.listdir(folder))))
        if size > options.upload_mb * 1e6:
            raise ConfigError(f"submit.upload_mb: {size / 1e6:.1f} MB are over the limit of {options.upload_mb:g} MB.")
        name = options.id or f"unveil-{verb}-{secrets.token_hex(5)}"
        log.info("submit: %s to %s, code %s", name, jobs.address, code)
        command = shlex.join([options.python, "-m", "pipeline", verb, CONFIG, "ray.address=auto"])
        jobs.submit(name, command, folder, _metadata(verb, text, code))
    return _followed(jobs, name, options, write) if options.follow else 0


def _metadata(verb: str, text: str, code: str) -> dict[str, str]:
    """What the dashboard shows of a job: versions and digests, no names of sets or persons."""
    from pipeline.stage import fingerprint

    return {"unveil": __version__, "unveil_verb": verb, "unveil_code": code, "unveil_config": fingerprint(text)}


def _followed(jobs: Jobs, name: str, options: SubmitConfig, write: Callable[[str], None]) -> int:
    """Show a job's log until it ends; its exit code."""
    hint = f"unveil submit logs {name} cluster={options.cluster}"
    try:
        return exit_code(jobs.follow(name, write))
    except KeyboardInterrupt:
        log.info("submit: %s goes on. Follow it: %s   End it: %s", name, hint, hint.replace(" logs ", " stop ", 1))
        return 130
    except ClusterError as error:
        raise ClusterError(f"{error} {name} goes on if the cluster does. Follow it: {hint}") from error


def exit_code(state: JobState) -> int:
    """What the job's verb ended with: 0, 1 or 2; a job that never ran, was ended or crashed counts as 1."""
    if state.status == "SUCCEEDED":
        return 0
    if state.exit_code is None:
        lines = state.message.strip().splitlines()
        log.info("submit: %s %s. %s", state.id, state.status, lines[-1] if lines else "")
    return 2 if state.exit_code == 2 else 1


def packed(folder: Path, *, code: bool) -> tuple[int, int]:
    """Copy the project's code into `folder`, if wanted; return how many files it holds then, and their bytes."""
    for source, target in PACKED.items() if code else ():
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, folder / target, ignore=_left_out, dirs_exist_ok=True)
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes)


def _left_out(folder: str, names: list[str]) -> set[str]:
    """What of a folder is not sent: links lead anywhere."""
    return {*LEFT_OUT(folder, names), *(name for name in names if os.path.islink(os.path.join(folder, name)))}


def resolved(config: "AuditConfig", options: SubmitConfig, folder: Path) -> str:
    """Write the whole configuration, and the cards of its models, into `folder`; return its text.

    Raises
    ------
    ConfigError
        If a path is relative and nothing says to what on the cluster, or an address holds a credential.
    """
    from pipeline.config import to_yaml
    from pipeline.models import model

    root = options.root or (os.getcwd() if is_loopback(options.address) else "")
    cards = [f"cards/{at}.yaml" for at in range(len(config.embedders))]
    for card, name in zip(cards, config.embedders, strict=True):
        stated = model(name)
        stated["path"] = _placed(f"the model {name}", str(stated["path"]), root)
        (folder / card).parent.mkdir(exist_ok=True)
        (folder / card).write_text(yaml.safe_dump(stated), encoding="utf-8")
    values = yaml.safe_load(to_yaml(_with_places(config, root, insecure=options.insecure)))
    text = yaml.safe_dump({**values, "embedders": cards}, sort_keys=False)
    found = CREDENTIAL.search(text)
    if found or any(holds_secret(one.uri) for one in config.sets.listed().values()):
        what = found[1] or "before @" if found else "after ?"
        raise ConfigError(
            f"an address in the configuration holds a credential ({what}), which would lie on the "
            "cluster. Give the nodes access by their role or environment, and take it out of the address."
        )
    (folder / CONFIG).write_text(text, encoding="utf-8")
    return str(text) + "".join((folder / card).read_text(encoding="utf-8") for card in cards)


def _with_places(config: "AuditConfig", root: str, *, insecure: bool) -> "AuditConfig":
    """The configuration with paths that hold on the cluster."""
    sets = {}
    for role, one in config.sets.listed().items():
        listing = None if one.list_file is None else _placed(f"sets.{role}.list_file", one.list_file, root)
        sets[role] = replace(one, uri=_placed(f"sets.{role}.uri", one.uri, root), list_file=listing)
    clean = config.clean.out and _placed("clean.out", config.clean.out, root)
    key = config.encryption.key
    if key.startswith("file:"):  # of the cluster's nodes: it is not sent
        key = f"file:{_placed('encryption.key', key.removeprefix('file:'), root)}"
    return replace(
        config,
        out=_placed("out", config.out, root),
        store=config.store and _placed("store", config.store, root),
        sets=replace(config.sets, **sets),
        faces=replace(config.faces, detector=_placed("faces.detector", config.faces.detector, root)),
        embedder=replace(config.embedder, path=_placed("embedder.path", config.embedder.path, root)),
        clean=replace(config.clean, out=clean),
        encryption=replace(config.encryption, key=key),
        ray=replace(config.ray, address="auto", insecure=insecure),
    )


def _placed(key: str, place: str, root: str) -> str:
    """A place as the cluster finds it."""
    if "://" in place or place.startswith(("/", "~")):
        return place
    if not root:
        raise ConfigError(
            f"{key} is a relative path ({place}), and the cluster is not this machine. Give submit.root=/FOLDER, which "
            "every node of it sees, or an absolute path or address."
        )
    return str(PurePosixPath(root) / place)


def refuse_other_code() -> None:
    """In a job: check that its code is that of the command that submitted it. Elsewhere: nothing.

    Raises
    ------
    UnlikeNodes
        If it is not.
    """
    told = json.loads(os.environ.get(JOB) or "{}").get("metadata") or {}
    wanted = told.get("unveil_code")
    if wanted and wanted != code_fingerprint():
        raise UnlikeNodes(
            f"this cluster runs other code ({code_fingerprint()[:12]}, version {__version__}) than what was submitted "
            f"({wanted[:12]}, version {told.get('unveil', '?')}). Give submit.code=upload, or install the same there."
        )
