"""The watchlist: which audits `unveil watch` keeps current, how often it looks, and whom it tells.

out: watch                     # ledger, trend page and run folders; relative to the watchlist
every: 1d                      # the least time between two looks at an audit
audits:
  - name: faces-v2
    config: ../audit.yaml      # as for `unveil run`
    limit: 0                   # listed or found people that are tolerated (assess.limit)
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cluster.notices import NotifyConfig
from cluster.schedules import interval
from operators.errors import ConfigError
from pipeline.config import AuditConfig, load

OWNED = ("out", "store", "scan.rehash_days")
"""Options of an audit that the watchlist sets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchedAudit:
    """One audit of the watchlist; what is left open is as for the whole list."""

    name: str
    """Of its run folder, and in the ledger and on the page: letters, digits, `-`, `_` and `.`."""
    config: str
    """Its configuration file, relative to the watchlist."""
    overrides: list[str] = field(default_factory=list)
    """`key=value`, as after `unveil run CONFIG`."""
    every: str | None = None
    when: str | None = None
    limit: int | None = None
    """`assess.limit`: training persons that are tolerated."""
    notify: NotifyConfig | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", self.name):
            raise ValueError(f"name must be letters, digits, '-', '_' and '.'. Got {self.name!r}.")
        for text in self.overrides:
            if (key := text.partition("=")[0].strip()) in OWNED:
                raise ValueError(f"overrides must leave {key} alone: the watchlist sets it. Got {text!r}.")
        if self.limit is not None and self.limit < 0:
            raise ValueError(f"limit must not be negative. Got {self.limit}.")
        _check_schedule(self.every, self.when)


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchConfig:
    """All audits that are kept current in one folder."""

    out: str
    """The watch folder: ledger, trend page, and a run folder for each audit; made private (0700)."""
    audits: list[WatchedAudit]
    store: str = ""
    """Where all these audits keep embeddings; a folder or object storage. Empty: `store` in `out`."""
    every: str = "1d"
    """The least time between two looks at an audit: a number of `min`, `h`, `d` or `w`; 0 for every time."""
    when: str = "changed"
    """`changed`: an audit that is due runs if something is new, changed or stale. `always`: it runs."""
    rehash_days: float = 7.0
    """For so long a file that looks untouched is not read again (`scan.rehash_days`); 0: every file, every time."""
    notify: NotifyConfig = field(default_factory=NotifyConfig)

    def __post_init__(self) -> None:
        if "://" in self.out:
            raise ValueError(f"out must be a folder on this machine; only `store` may be elsewhere. Got {self.out!r}.")
        if not self.audits:
            raise ValueError("audits must name at least one audit. Got none.")
        names = [one.name for one in self.audits]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"audits must have different names. Got {twice!r} twice.")
        if taken := next((name for name in names if name in ("store", "previous")), None):
            raise ValueError(f"audits must not be called like a folder of the watch. Got {taken!r}.")
        if not self.rehash_days >= 0:
            raise ValueError(f"rehash_days must not be negative. Got {self.rehash_days}.")
        _check_schedule(self.every, self.when)


def _check_schedule(every: str | None, when: str | None) -> None:
    if every is not None:
        interval(every)
    if when not in (None, "changed", "always"):
        raise ValueError(f"when must be changed or always. Got {when!r}.")


def read_watchlist(path: str, overrides: Sequence[str] = ()) -> WatchConfig:
    """The watchlist in a YAML file, with `key=value` overrides; `audits.NAME.key=value` is of one audit.

    Paths of the result are absolute.

    Raises
    ------
    ConfigError
        If the file cannot be read, a key is unknown, or a value is not allowed; names the key and the remedy.
    """
    given = _file(path)
    for text in overrides:
        _override(given, text)
    made: WatchConfig = _made(WatchConfig, given, "", path)
    base = Path(path).resolve().parent
    out = str(base / Path(made.out).expanduser())
    store = made.store if "://" in made.store else str(base / Path(made.store or Path(out) / "store").expanduser())
    audits = [dataclasses.replace(one, config=str(base / Path(one.config).expanduser())) for one in made.audits]
    return dataclasses.replace(made, out=out, store=store, audits=audits)


def audit_config(watch: WatchConfig, one: WatchedAudit) -> AuditConfig:
    """The configuration of one audit, in its folder of the watch; ConfigError as `unveil run` has it."""
    limit = [] if one.limit is None else [f"assess.limit={one.limit}"]
    owned = [f"out={Path(watch.out) / one.name}", f"store={watch.store}", f"scan.rehash_days={watch.rehash_days}"]
    return load(one.config, [*one.overrides, *limit, *owned])


def _file(path: str) -> dict[str, Any]:
    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such watchlist.") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML. {str(error).splitlines()[0]}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: must hold `key: value` lines at the top, not a {type(given).__name__}.")
    return given


def _override(given: dict[str, Any], text: str) -> None:
    """Set one value of the file's."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"{text!r}: overrides are written key=value, for example every=0.")
    *above, last = key.split(".")
    at: Any = given
    for part in above:
        if isinstance(at, list):
            found = next((one for one in at if isinstance(one, dict) and one.get("name") == part), None)
        else:
            found = at.setdefault(part, {})
        if not isinstance(found, dict | list):
            raise ConfigError(f"{text!r}: the watchlist has no {part!r} to change.")
        at = found
    if not isinstance(at, dict):
        raise ConfigError(f"{text!r}: name an audit, for example audits.NAME.every=0.")
    try:
        at[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{text!r}: not a valid value. {str(error).splitlines()[0]}") from error


def _made(kind: Any, given: Any, dotted: str, source: str) -> Any:
    """The dataclass `kind` from a mapping; ConfigError names the key."""
    here = f"{dotted}." if dotted else ""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{source}: {dotted} must hold `key: value` lines. Got {given!r}.")
    hints = typing.get_type_hints(kind)
    for key in given:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"Did you mean {here}{near[0]}?" if near else f"Known here: {', '.join(hints)}."
            raise ConfigError(f"{source}: unknown key {f'{here}{key}'!r}. {hint}")
    for one in dataclasses.fields(kind):
        required = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        if required and one.name not in given:
            raise ConfigError(f"{source}: {here}{one.name} is missing. Add it to the watchlist.")
    values = {key: _value(hints[key], value, f"{here}{key}", source) for key, value in given.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ConfigError(f"{source}: {here}{error}") from error


def _value(hint: Any, value: Any, dotted: str, source: str) -> Any:
    """One value, of the type that its key wants."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = kinds[0]
    if dataclasses.is_dataclass(kind):
        return _made(kind, value, dotted, source)
    if typing.get_origin(kind) is list and isinstance(value, list):
        inner = typing.get_args(kind)[0]
        return [_value(inner, one, f"{dotted}[{at}]", source) for at, one in enumerate(value)]
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(kind, type) or not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = "a list" if typing.get_origin(kind) is list else {str: "a text", int: "a whole number"}.get(kind)
        raise ConfigError(f"{source}: {dotted} must be {wanted or 'a number'}. Got {value!r}.")
    return value
