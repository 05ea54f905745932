"""What may go wrong between here and a remote set, and what is tried again.

Three outcomes, and no other:
- one file is gone or has changed: an `OSError`, which becomes the row of each image in it;
- the place fails for the moment (throttling, 5xx, a broken or silent connection): `Passing`, tried again with growing
  pauses, and a `FormatError` if it stays so, because an outage must stop the stage, not reject images by the thousand;
- the place refuses (no such bucket, no right to read, another region): a `FormatError` at once.

Texts are made here from status codes. What the other side or its library wrote is not passed on: it can hold
account names and signed requests.
"""

import logging
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

from operators.errors import FormatError

log = logging.getLogger(__name__)

Result = TypeVar("Result")

ATTEMPTS = 5
PAUSE_S = 0.5
"""Pause after the first failed attempt; it doubles from attempt to attempt, and a random part spreads workers."""

TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses that may be others a moment later."""

_AWS = re.compile(r"AWS Error (\w+)(?: \(HTTP status (\d+)\))?")
_AWS_NAME = re.compile(r"Unable to parse ExceptionName: (\w+)")

_PASSING = frozenset(
    {
        *(
            "NETWORK_CONNECTION",
            "SLOW_DOWN",
            "THROTTLING",
            "SERVICE_UNAVAILABLE",
            "INTERNAL_FAILURE",
            "REQUEST_TIMEOUT",
        ),
        *(
            "UNAVAILABLE",
            "DEADLINE_EXCEEDED",
            "RESOURCE_EXHAUSTED",
            "INTERNAL",
            "ABORTED",
            "SlowDown",
            "RequestTimeout",
        ),
    }
)
_NO_BUCKET = frozenset({"NO_SUCH_BUCKET", "NoSuchBucket"})
_ELSEWHERE = frozenset({"PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed", "301", "307"})
_REFUSED = frozenset(
    {
        *("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "INVALID_CLIENT_TOKEN_ID"),
        *("EXPIRED_TOKEN", "ExpiredToken", "InvalidToken", "TokenRefreshRequired", "MISSING_AUTHENTICATION_TOKEN"),
        *("INVALID_SIGNATURE", "UNRECOGNIZED_CLIENT", "400", "401", "403"),
    }
)

_KEYS = (
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws/credentials and ~/.aws/config (AWS_PROFILE), and the role of "
    "the machine"
)
"""Where the library looks for credentials."""


class Passing(OSError):
    """Something that another attempt may not meet."""


class Gone(OSError):
    """The file is not there, or not as it was: its text becomes the row of each image in it."""


def changed(known: str | None, found: str | None) -> Gone:
    """The error of a file that is not the one that was listed."""
    return Gone(f"changed since it was listed (ETag {known or 'none'}, now {found or 'none'}); run the audit again")


def persistently(action: Callable[[], Result], place: str) -> Result:
    """What `action` returns, tried again after each `Passing` fault.

    Raises
    ------
    FormatError
        If the fault stays, naming `place`; other errors of `action` as they are.
    """
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            log.info("%s: %s; attempt %s of %s", place, reason, attempt + 1, ATTEMPTS)
            time.sleep(PAUSE_S * 2 ** (attempt - 1) * random.uniform(1, 1.25))
        try:
            return action()
        except Passing as fault:
            reason = str(fault)
    raise FormatError(
        f"{place}: cannot be read, {ATTEMPTS} attempts failed ({reason}). Check the network and the endpoint, and run "
        f"again: it goes on where it stopped."
    )


def understood(error: OSError, place: str) -> Exception:
    """What an error of `pyarrow.fs` means: `Passing`, `Gone` or FormatError, in words of our own."""
    text = str(error)
    codes = _codes(text)
    shown = ", ".join(sorted(codes)) or type(error).__name__
    if codes & _NO_BUCKET:
        return FormatError(f"{place}: there is no such bucket. Correct the set's `uri`.")
    if isinstance(error, FileNotFoundError):
        return Gone("it is not there any more; run the audit again")
    if codes & _ELSEWHERE:
        return FormatError(
            f"{place}: the bucket is in another region ({shown}). Set AWS_REGION to the bucket's, or AWS_ENDPOINT_URL."
        )
    if "REQUEST_TIME_TOO_SKEWED" in codes:
        return FormatError(f"{place}: this machine's clock is wrong (REQUEST_TIME_TOO_SKEWED). Set it.")
    if codes & _REFUSED:
        return FormatError(
            f"{place}: reading is refused ({shown}). Credentials are looked for in {_KEYS}: give some "
            f"that may list and read it and are not expired, or `anonymous: true` for a public bucket."
        )
    if codes & _PASSING or any(code.isdecimal() and int(code) in TRY_AGAIN for code in codes):
        return Passing(f"{_said(text)}{shown}")
    return FormatError(f"{place}: cannot be read ({shown}). Correct the set's `uri` or the endpoint.")


def _said(text: str) -> str:
    """The commonest reasons of a broken connection in words, for the codes of the library are not telling."""
    for mark, words in (
        ("Could not resolve", "its name is not known to the network: "),
        ("Could not connect", "no connection: "),
        ("Timeout", "no answer in time: "),
        ("partial file", "the connection ended inside the answer: "),
    ):
        if mark in text:
            return words
    return ""


def _codes(text: str) -> set[str]:
    """Names and HTTP statuses in the text of an error; an AWS error without a name counts by its status."""
    found: set[str] = set(_AWS_NAME.findall(text))
    for name, status in _AWS.findall(text):
        found |= {name} - {"UNKNOWN"} | {status} - {""}
    return found


def shown(uri: str) -> str:
    """`uri` without what may be secret: name, password, query and fragment."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        return "(an address that cannot be read)"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
