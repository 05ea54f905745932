"""Addresses of remote sets that hold secrets: what of them may be written down.

`https://name:password@host/set.zip?X-Amz-Signature=...` lets its bearer in. The reader is given the whole address; all
that is stored, logged or shown is `https://…@host/set.zip?…`. That also names the set, so that an address that was
signed again is the same set.
"""

import re
from typing import Any

HIDDEN = "…"
"""Stands where something was taken out."""

CREDENTIAL = re.compile(
    r"://[^/@\s]+@|[?&](X-Amz-[\w-]*|X-Goog-[\w-]*|Key-Pair-Id|\w*(?:sig|signature|token|secret|password|"
    r"access_?key(?:_?id)?|access_?id|api_?key))=",
    re.IGNORECASE,
)
"""In an address: a name with a password, or the signature that lets its bearer in."""

PATTERNS = ("s3", "gs")
"""Schemes of addresses in which `?` is a part of a pattern."""

_ADDRESS = re.compile(r"[A-Za-z][\w+.-]*://")
_IN_TEXT = re.compile(rf"[A-Za-z][\w+.-]*://[^\s{HIDDEN}]+?(?=[])}}'\",.:;]*(?:[\s{HIDDEN}]|$))")
_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:\d*)?")


def public(uri: str) -> str:
    """`uri` without what may be secret: name and password, and what follows `?` or `#`; a path as it is.

    In `s3://` and `gs://`, `?` and `#` are parts of keys and patterns, unless a signature follows.
    """
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return uri
    place = re.split("[/?#]", rest, maxsplit=1)[0]
    path = rest[len(place) :]
    _, at, host = place.rpartition("@")
    if _HOST.fullmatch(host) is None or (path[:1] in ("?", "#") and "@" in path):  # a password can hold `/?#`
        return f"{scheme}://{HIDDEN}"
    return f"{scheme}://{f'{HIDDEN}@' if at else ''}{host}{_cut(scheme, path)}"


def _cut(scheme: str, path: str) -> str:
    """The path, with what follows `?` or `#` hidden."""
    if scheme.lower() in PATTERNS and CREDENTIAL.search(path) is None:
        return path
    found = re.search(r"[?#]", path)
    return path if found is None or found.end() == len(path) else f"{path[: found.end()]}{HIDDEN}"


def holds_secret(uri: str) -> bool:
    """Whether something of an address may not be written down."""
    return public(uri) != uri


def hidden(uri: str) -> bool:
    """Whether `uri` is what `public` made of an address with a secret, which nothing can be read from."""
    rest = uri.partition("://")[2]
    return rest.startswith(HIDDEN) or rest.endswith((f"?{HIDDEN}", f"#{HIDDEN}"))


def bare(uri: str) -> str:
    """The address of the file itself, whoever asks for it: without what `public` hides, and its marks."""
    scheme, mark, rest = public(uri).partition("://")
    end = f"[?#]{HIDDEN}$" if scheme.lower() in PATTERNS else f"[?#]{HIDDEN}?$"
    return f"{scheme}{mark}{re.sub(f'^{HIDDEN}@|{end}', '', rest)}"


def public_text(text: str) -> str:
    """`text`, such as what a library says of an error, with `public` for every address in it."""
    return _IN_TEXT.sub(lambda found: public(found[0]), text)


def public_override(text: str) -> str:
    """`key=value` with `public` for a value that is an address."""
    key, equals, value = text.partition("=")
    return public_text(text) if "://" in key else f"{key}{equals}{public_text(public(value.strip()))}"


def public_values(values: Any) -> Any:
    """Nested plain values with `public` for every address among their texts and keys."""
    if isinstance(values, dict):
        return {public_values(name): public_values(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(public_values(value) for value in values)
    return public(values) if isinstance(values, str) and _ADDRESS.match(values) else values
