"""Who may use a cluster: tokens, and addresses that other machines can reach.

Whoever reaches a Ray cluster can run code on it and read what it reads; a token is what keeps others out. Ray checks it
on every port from 2.52 on, if RAY_AUTH_MODE=token is set where it starts.
"""

import logging
import os
import urllib.error
import urllib.request
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from cluster.faults import ClusterError

log = logging.getLogger(__name__)

TOKEN_FILE = Path("~/.ray/auth_token")
"""Where Ray looks for a token when neither `RAY_AUTH_TOKEN` nor `RAY_AUTH_TOKEN_PATH` is set."""
PROBE_S = 10.0
"""How long a dashboard may take to answer."""


def is_loopback(address: str) -> bool:
    """Whether `address` (`host:port` or a URL) is reached on this machine only. Names other than localhost are not."""
    host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def token() -> str:
    """The configured token, found as Ray finds it, or an empty string.

    Raises
    ------
    ClusterError
        If `RAY_AUTH_TOKEN_PATH` names a file that cannot be read.
    """
    if given := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return given
    named = os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    path = Path(named).expanduser() if named else TOKEN_FILE.expanduser()
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        if named:
            raise ClusterError(f"RAY_AUTH_TOKEN_PATH: {path} cannot be read ({error.strerror}).") from error
        return ""
    if text and path.stat().st_mode & 0o077:
        log.warning("%s: others on this machine can read the token. Run `chmod 600` on it.", path)
    return text


def require_token(address: str, *, insecure: bool, option: str) -> None:
    """Refuse a cluster that is not on this machine while no token is configured.

    Raises
    ------
    ClusterError
        With how to make a token and where to put it; `option` is the option that allows it all the same.
    """
    if is_loopback(address) or token():
        return
    if insecure:
        log.warning("INSECURE (%s=true): no token for the cluster at %s. Anyone can run code there.", option, address)
        return
    raise ClusterError(
        f"no token is configured for the cluster at {address}, which is not on this machine's loopback: without one, "
        f"anyone who reaches it can run code there. Make a token on the head node (`ray get-auth-token --generate`), "
        f"start Ray on every node with RAY_AUTH_MODE=token, and put the same token here into {TOKEN_FILE} (mode 0600) "
        f"or RAY_AUTH_TOKEN. docs/cluster.md shows each step; {option}=true goes on without."
    )


def require_closed(page: str, *, insecure: bool, option: str) -> None:
    """Refuse a cluster elsewhere whose dashboard at the URL `page` answers without a token; warn of one here.

    Raises
    ------
    ClusterError
        If it answers and `insecure` is not set.
    """
    if not answers_anyone(page):
        return
    told = f"the cluster at {page} answers requests without a token: anyone who reaches it can run code there."
    if is_loopback(page) or insecure:
        log.warning("%s%s", "" if is_loopback(page) else f"INSECURE ({option}=true): ", told)
        return
    raise ClusterError(f"{told} Start Ray on every node with RAY_AUTH_MODE=token; {option}=true goes on all the same.")


def answers_anyone(page: str) -> bool:
    """Whether the dashboard at the URL `page` gives its list of jobs to a request without a token.

    What does not answer, answers with anything but success (Ray: 401), or leads to a page for signing in, does not.
    """
    handlers = [urllib.request.ProxyHandler({})] if is_loopback(page) else []
    request = urllib.request.Request(f"{page.rstrip('/')}/api/jobs/")  # noqa: S310 (http or https, checked by callers)
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=PROBE_S) as answer:
            return bool(answer.url == request.full_url and "json" in answer.headers.get("Content-Type", ""))
    except (OSError, ValueError):
        return False


def one_line(error: BaseException) -> str:
    """The first line of an error's text, or its name."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def make_token() -> None:
    """A token for local sessions where there is none, private. Ray would make it readable for everybody."""
    path = TOKEN_FILE.expanduser()
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH") or path.exists():
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileExistsError), os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(os.urandom(32).hex())
