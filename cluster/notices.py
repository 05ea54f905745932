"""Handing a small JSON object to a command of the user's, or to a web address.

Every delivery carries the `id` of what it tells. A receiver that sees one twice, because this process was killed
between the delivery and writing it down, should take it once.
"""

import http.client
import ipaddress
import json
import logging
import os
import ssl
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, urlsplit

from cluster.faults import ClusterError

log = logging.getLogger(__name__)

AGAIN = (408, 425, 429, 500, 502, 503, 504)
"""Answers after which it is tried again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NotifyConfig:
    """Who is told of a new result. Both may be given."""

    command: list[str] = field(default_factory=list)
    """A program and its arguments, started without a shell; the JSON is its standard input."""
    webhook: str = ""
    """An https address that the JSON is sent to (POST); http on this machine only."""
    webhook_env: str = ""
    """Name of an environment variable that holds such an address, as one with a secret in it should be given."""
    timeout_s: float = 10.0
    """For the command, and for each attempt at the address."""
    retries: int = 3
    """Further attempts at the address, after 1, 2, 4, ... seconds."""

    def __post_init__(self) -> None:
        if self.webhook and self.webhook_env:
            raise ValueError(f"webhook_env and webhook are both given; leave one out. Got {self.webhook_env!r}.")
        if not 0 < self.timeout_s <= 3600:
            raise ValueError(f"timeout_s must be between 0 and 3600. Got {self.timeout_s}.")
        if not 0 <= self.retries <= 10:
            raise ValueError(f"retries must be between 0 and 10. Got {self.retries}.")
        if self.webhook:
            _address(self.webhook, "webhook")

    def __bool__(self) -> bool:
        return bool(self.command or self.webhook or self.webhook_env)


def deliver(options: NotifyConfig, payload: Mapping[str, Any]) -> None:
    """Tell the command and the address; `payload` holds an `id`.

    Raises
    ------
    ClusterError
        If one of them could not be told. The other was tried all the same. No address is named beyond its host.
    """
    faults = []
    for tell, wanted in ((_run, options.command), (_post, options.webhook or options.webhook_env)):
        if wanted:
            try:
                tell(options, payload)
            except ClusterError as error:
                faults.append(str(error))
    if faults:
        raise ClusterError(" ".join(faults))


def _run(options: NotifyConfig, payload: Mapping[str, Any]) -> None:
    name = options.command[0]
    try:
        done = subprocess.run(  # noqa: S603 - the user's own program, and no shell
            options.command,
            input=_bytes(payload) + b"\n",
            timeout=options.timeout_s,
            check=False,
            stdout=subprocess.DEVNULL,
        )
    except OSError as error:
        raise ClusterError(f"notify.command: {name} cannot be started ({error.strerror}).") from error
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"notify.command: {name} took longer than {options.timeout_s:g} s and was ended.") from error
    if done.returncode:
        raise ClusterError(f"notify.command: {name} ended with exit code {done.returncode}.")


def _post(options: NotifyConfig, payload: Mapping[str, Any]) -> None:
    given = options.webhook or os.environ.get(options.webhook_env, "")
    if not given:
        raise ClusterError(f"notify.webhook_env: the environment has no {options.webhook_env}.")
    try:
        address = _address(given, "webhook")
    except ValueError as error:
        raise ClusterError(f"notify.{error}") from error
    for attempt in range(options.retries + 1):
        if attempt:
            time.sleep(2 ** (attempt - 1))
        try:
            status = _answer(address, payload, options.timeout_s)
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            fault = type(error).__name__
        else:
            if 200 <= status < 300:
                return
            fault = f"answer {status}"
            if status not in AGAIN:
                break
        log.info("notify: %s: %s", address.hostname, fault)
    raise ClusterError(f"notify.webhook: {address.hostname} could not be told ({fault}).")


def _answer(address: SplitResult, payload: Mapping[str, Any], timeout_s: float) -> int:
    """The status of one POST. Redirections are not followed: they could lead anywhere."""
    where, port = str(address.hostname), address.port
    connection = (
        http.client.HTTPSConnection(where, port, timeout=timeout_s, context=ssl.create_default_context())
        if address.scheme == "https"
        else http.client.HTTPConnection(where, port, timeout=timeout_s)
    )
    headers = {"Content-Type": "application/json", "Idempotency-Key": str(payload["id"]), "User-Agent": "unveil"}
    try:
        path = (address.path or "/") + (f"?{address.query}" if address.query else "")
        connection.request("POST", path, _bytes(payload), headers)
        return connection.getresponse().status
    finally:
        connection.close()


def _address(text: str, name: str) -> SplitResult:
    """The parts of an address; ValueError if it may not be used, which does not repeat it: it may hold a secret."""
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:
        raise ValueError(f"{name} is no address. Got something that cannot be read as one.") from error
    if not text.isascii():
        raise ValueError(f"{name} must be ASCII; write other characters as %XX. Got some that are not, of {host!a}.")
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"{name} must not hold a user or password; use webhook_env. Got such an address of {host}.")
    if (parts.scheme == "https" and host) or (parts.scheme == "http" and _loopback(host)):
        return parts
    raise ValueError(f"{name} must begin with https:// (http:// on this machine only). Got {parts.scheme or 'none'}.")


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bytes(payload: Mapping[str, Any]) -> bytes:
    return json.dumps(payload, sort_keys=True, allow_nan=False).encode()
