"""The whole configuration of an audit, composed of the options that live beside their owners.

YAML files hold differences only; `key=value` overrides come last. This is the only module that knows OmegaConf.
"""

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from cluster.keys import EncryptionConfig
from cluster.session import SessionConfig
from operators.addresses import holds_secret, public, public_override, public_text, public_values
from operators.backbones import BackboneConfig
from operators.errors import ConfigError
from operators.faces import FaceConfig
from operators.formats import SetConfig
from operators.sources import absolute, within
from pipeline.assess import AssessConfig
from pipeline.catalogue import defaults, entry
from pipeline.clean import CleanConfig
from pipeline.embed import EmbedConfig
from pipeline.models import model, require_pin
from pipeline.plant import PlantConfig
from pipeline.purge import PurgeConfig
from pipeline.report import ReportConfig
from pipeline.review import ReviewConfig
from pipeline.scan import ScanConfig
from pipeline.sealing import SealConfig
from pipeline.search import SearchConfig
from pipeline.translated import BRIDGES, check_embedders, check_sets, refuse_unused
from pipeline.verify import VerifyConfig

RELEASE = "release"
ARMS = ("training", "control", "anchor")
"""Gallery sets in the order of the tables. Only `training` is required."""
PLACEBO = "placebo"


@dataclass(frozen=True, kw_only=True, slots=True)
class SetsConfig:
    """The sets of an audit."""

    release: SetConfig
    """The synthetic set under audit."""
    training: SetConfig
    """The real set that the generator saw."""
    control: SetConfig | None = None
    """Real faces that the generator never saw, prepared alike: shows what the threshold lets through by chance."""
    anchor: SetConfig | None = None
    """Faces unrelated to training and control, as close to the release in kind as can be: what a person's best match
    in the release is compared with."""
    placebo: SetConfig | None = None
    """A second such set: audited as if it were the release, where nothing must be found."""

    bridge: SetConfig | None = None
    """Faces outside all other sets, which the audit's model embeds: they lead to `foreign` sets."""
    bridge_vectors: SetConfig | None = None
    """Ready embeddings of the `bridge` faces, under the same keys, by the model that made the `foreign` sets."""

    def given(self) -> dict[str, SetConfig]:
        """Role and options of every set of this audit, release first."""
        return self._there((RELEASE, *ARMS, PLACEBO))

    def foreign(self) -> list[str]:
        """Roles of the sets that are another model's embeddings."""
        return [role for role, one in self.given().items() if one.foreign]

    def listed(self) -> dict[str, SetConfig]:
        """Role and options of every set that is scanned: the bridge, where a set is foreign, then those given."""
        return {**(self._there(BRIDGES) if self.foreign() else {}), **self.given()}

    def embedded(self) -> list[str]:
        """Roles of the sets whose embeddings are kept."""
        return [role for role in self.listed() if role != BRIDGES[1]]

    def _there(self, roles: Sequence[str]) -> dict[str, SetConfig]:
        sets = {role: getattr(self, role) for role in roles}
        return {role: one for role, one in sets.items() if one is not None}

    def __post_init__(self) -> None:
        check_sets(self)
        given = self.listed()
        for first, second in _couples(list(given)):
            if (first, second) == BRIDGES:  # the same faces
                continue
            left, right = given[first], given[second]
            if left.uri != right.uri and absolute(left.uri) == absolute(right.uri) and holds_secret(left.uri):
                raise ValueError(
                    f"{first} and {second} are one address with two signatures or passwords ({public(left.uri)}). Give "
                    f"both the same: what is secret tells no sets apart."
                )
            subsets = left.list_file is not None and right.list_file is not None
            if not subsets and (within(left.uri, right.uri) or within(right.uri, left.uri)):
                raise ValueError(
                    f"{first} and {second} overlap ({public(left.uri)} and {public(right.uri)}): a set compared "
                    f"with itself finds itself. Give two separate places, or a `list_file` for each."
                )


def _couples(roles: Sequence[str]) -> Iterator[tuple[str, str]]:
    for at, first in enumerate(roles):
        for second in roles[at + 1 :]:
            yield first, second


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditConfig:
    """Everything that an audit depends on."""

    out: str
    """The run folder; made private (0700)."""
    sets: SetsConfig
    title: str = "Leakage audit"
    store: str = ""
    """Where embeddings are kept, by content. Audits that share it embed no image twice. Empty: inside `out`."""
    faces: FaceConfig = field(default_factory=FaceConfig)
    embedders: list[str] = field(default_factory=list)
    """Models by name (`configs/models`) or by the path of such a file. The first is the audit's, whose options
    `embedder` may change; the others embed all sets too, for a second opinion. Empty: the default model alone."""
    embedder: BackboneConfig = field(default_factory=BackboneConfig)
    scan: ScanConfig = field(default_factory=ScanConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    assess: AssessConfig = field(default_factory=AssessConfig)
    plant: PlantConfig = field(default_factory=PlantConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    review: ReviewConfig = field(default_factory=ReviewConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    clean: CleanConfig = field(default_factory=CleanConfig)
    seal: SealConfig = field(default_factory=SealConfig)
    encryption: EncryptionConfig = field(default_factory=EncryptionConfig)
    purge: PurgeConfig = field(default_factory=PurgeConfig)
    ray: SessionConfig = field(default_factory=SessionConfig)

    def __post_init__(self) -> None:
        if "://" in self.out:
            raise ValueError(
                f"out must be a folder on this machine; only `store` may be in object storage. Got {self.out!r}."
            )
        for role, one in self.sets.listed().items():
            if within(self.out, one.uri):
                raise ValueError(f"out lies inside the {role} set ({public(one.uri)}). Put the run folder elsewhere.")
        names = [one.name for one in self.models()]
        if len(set(names)) < len(names):
            raise ValueError(f"embedders names a model twice: {', '.join(names)}.")
        check_embedders(self.sets, names)

    def models(self) -> list[BackboneConfig]:
        """All embedders of this audit, the one that it searches with first."""
        return [self.embedder, *(_card(name) for name in self.embedders[1:])]


def load(path: str, overrides: Sequence[str] = ()) -> AuditConfig:
    """The configuration in the YAML file `path` with `key=value` overrides.

    Raises
    ------
    ConfigError
        If the file cannot be read, a key is unknown, or a value is not allowed; names the key and the remedy.
    """
    try:
        return _loaded(path, overrides)
    except ConfigError as error:  # texts of values, and of the library, can hold addresses
        raise ConfigError(public_text(str(error))) from None


def _loaded(path: str, overrides: Sequence[str]) -> AuditConfig:
    sources = [(path, _file(path)), *((public_override(text), _override(text)) for text in overrides)]
    merged = _merged(OmegaConf.structured(AuditConfig), sources)
    if merged.embedders:  # the first model stands below what the file and the overrides say of it
        base = OmegaConf.merge(OmegaConf.structured(AuditConfig), {"embedder": model(merged.embedders[0])})
        merged = _merged(base, sources)
    config: AuditConfig = _build(merged)
    for one in config.models():
        require_pin(one)
    refuse_unused(config.sets)
    return replace(config, sets=_filled(config.sets))


def _filled(sets: SetsConfig) -> SetsConfig:
    """The sets, with what the catalogue knows of them where the user left it open; ConfigError for unknown names."""
    changed: dict[str, SetConfig] = {}
    for role, one in sets.listed().items():
        if one.catalogue is not None:
            known = defaults(entry(one.catalogue))  # the form is seen by the content: sets are passed on in several
            changed[role] = replace(one, identity=known["identity"] if one.identity == "auto" else one.identity)
    return replace(sets, **changed)


def _card(name: str) -> BackboneConfig:
    """The model called `name`, or in the file of that name."""
    found: BackboneConfig = _build(OmegaConf.merge(OmegaConf.structured(BackboneConfig), model(name)), name)
    return found


def _merged(base: Any, sources: Sequence[tuple[str, DictConfig]]) -> Any:
    """All sources over `base`, the last one strongest; ConfigError names source and key."""
    merged = base
    for source, given in sources:
        try:
            merged = OmegaConf.merge(merged, given)
        except ConfigKeyError as error:
            raise ConfigError(f"{source}: {_unknown(error, given)}") from error
        except OmegaConfBaseException as error:
            raise ConfigError(f"{source}: {_short(error)}") from error
    return merged


def _file(path: str) -> DictConfig:
    try:
        given = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such configuration file.") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from error
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: not valid YAML. {_short(error)}") from error
    if not isinstance(given, DictConfig):
        raise ConfigError(f"{path}: must hold `key: value` lines at the top, not a {type(given).__name__}.")
    return given


def _override(text: str) -> DictConfig:
    if "=" not in text:
        raise ConfigError(f"{public_override(text)!r}: overrides are written key=value, as report.faces=clear.")
    try:
        given = OmegaConf.from_dotlist([text])
    except (YAMLError, OmegaConfBaseException) as error:
        reason = "" if "://" in text else _short(error)  # it repeats a part of the text
        raise ConfigError(f"{public_override(text)!r}: not a valid override. {reason}") from error
    return given


def _unknown(error: ConfigKeyError, given: DictConfig) -> str:
    """Name an unknown key and the nearest known one."""
    dotted = str(error.full_key or "")
    parent, _, name = dotted.rpartition(".")
    known = _known_keys(parent)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {parent + '.' if parent else ''}{near[0]}?" if near else f"Known here: {', '.join(known)}."
    return f"unknown key {dotted!r}. {hint}"


def _known_keys(dotted: str) -> list[str]:
    """Keys of the section `dotted`, which is known to exist."""
    kind: Any = AuditConfig
    for part in filter(None, dotted.split(".")):
        hint = typing.get_type_hints(kind)[part]
        kind = next((one for one in typing.get_args(hint) if dataclasses.is_dataclass(one)), hint)
    return [one.name for one in dataclasses.fields(kind)]


def _short(error: Exception) -> str:
    return str(error).splitlines()[0].strip() + _at(error)


def _at(error: Exception) -> str:
    key = getattr(error, "full_key", None)
    return f" (key {key!r})" if key else ""


def _build(merged: Any, dotted: str = "") -> Any:
    """Instantiate section by section, so that a refused value is reported with its dotted name."""
    kind: Any = OmegaConf.get_type(merged)
    values: dict[str, Any] = {}
    for name in merged:
        child = f"{dotted}.{name}" if dotted else str(name)
        if OmegaConf.is_missing(merged, name):
            raise ConfigError(f"{child} is missing. Add it to the configuration file, or give {child}=... after it.")
        try:
            value = merged[name]
        except OmegaConfBaseException as error:
            raise ConfigError(f"{child}: {_short(error)}") from error
        if isinstance(value, DictConfig):
            value = _build(value, child)
        elif OmegaConf.is_config(value):
            value = OmegaConf.to_object(value)
        values[str(name)] = value
    try:
        return kind(**values)
    except ValueError as error:
        raise ConfigError(f"{dotted + '.' if dotted else ''}{error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration dataclass as nested plain values."""
    return dataclasses.asdict(config)


def to_yaml(config: AuditConfig, hide: bool = False) -> str:
    """The resolved configuration as YAML; to `hide`, without what is secret in addresses."""
    values = to_dict(config)
    return OmegaConf.to_yaml(OmegaConf.create(public_values(values) if hide else values))
