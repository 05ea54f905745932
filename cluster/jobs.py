"""Ray jobs: a command that runs on a cluster, followed from here.

    with Jobs(config) as jobs: jobs.submit(...); jobs.follow(id, write) -> JobState

Requests carry the token in a header and nowhere else: not in addresses, arguments, job metadata or logs.
"""

import asyncio
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cluster.access import is_loopback, one_line, require_closed, require_token, token
from cluster.faults import ClusterError

log = logging.getLogger(__name__)

QUIET_S = 90.0
"""After so long without a line the connection is made anew: it may be dead. Audits log every 30 s."""
RETRY_S = 1.0
LOG_GONE = 10
"""After so many failures in a row a job that ended is not asked for the rest of its log: its machine may be gone."""
NOISY = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env.packaging")
"""Loggers of the client that tell of every step."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
CONTROL = {code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}
"""What a job's log must not send to a terminal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmitConfig:
    """Where a job goes and how. Not part of an audit: given as `cluster=...` and `submit.key=value`."""

    cluster: str = ""
    """Address of the cluster's dashboard: `127.0.0.1:8265`, `https://ray.example.org`; or the name of a file in
    `configs/clusters`, or its path."""
    root: str = ""
    """Folder on the cluster that relative paths of the configuration stand for. Every node must see it. Empty: the
    current folder, if the cluster is on this machine."""
    id: str = ""
    """Name of the submission; given twice, the job runs once, and the second command follows the first. Empty: a new
    one each time."""
    code: str = "upload"
    """`upload`: the cluster runs the code that is here. `installed`: it runs what its image has installed, and refuses
    if that is other code."""
    python: str = "python"
    """Python on the cluster, with this project's dependencies."""
    cpus: float = 0.0
    """CPUs that the job's own process takes. At 0 it runs on the head node; else on any node, with which it may end."""
    upload_mb: float = 20.0
    """A larger package is refused: it cannot be code alone."""
    follow: bool = True
    """Show the job's log until it ends. Else: submit and return."""
    patience_s: float = 300.0
    """How long a lost connection is tried again, in seconds."""
    ca: str = ""
    """File of the certificate authority of an `https` address; empty: those of this machine."""
    insecure: bool = False
    """Use a cluster on other machines that has no token. Whoever reaches it can run code on it."""

    def __post_init__(self) -> None:
        if self.code not in ("upload", "installed"):
            raise ValueError(f"code must be one of upload, installed. Got {self.code!r}.")
        if self.id and not NAME.fullmatch(self.id):
            raise ValueError(f"id must be up to 100 letters, digits, dots, dashes and underscores. Got {self.id!r}.")
        if self.cpus < 0 or self.upload_mb <= 0 or self.patience_s < 0:
            raise ValueError(
                "cpus and patience_s must not be negative, and upload_mb must be positive. "
                f"Got {self.cpus}, {self.patience_s} and {self.upload_mb}."
            )
        if self.root and not self.root.startswith("/"):
            raise ValueError(f"root must be an absolute path on the cluster. Got {self.root!r}.")
        if "@" in self.cluster:
            raise ValueError("cluster must hold no name or password; tokens go into RAY_AUTH_TOKEN.")
        scheme, separator, _ = self.cluster.partition("://")
        if separator and scheme not in ("http", "https"):
            raise ValueError(f"cluster must be an http or https address of a dashboard. Got {self.cluster!r}.")

    @property
    def address(self) -> str:
        """The dashboard's URL."""
        return (self.cluster if "://" in self.cluster else f"http://{self.cluster}").rstrip("/")


class JobState(NamedTuple):
    """How far a job is."""

    id: str
    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    exit_code: int | None
    message: str
    metadata: Mapping[str, str]

    @property
    def ended(self) -> bool:
        """Whether it will not change any more."""
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


class Jobs:
    """The jobs of one cluster.

    Raises
    ------
    ClusterError
        If the cluster has no token and is elsewhere, does not answer, or refuses the token.
    """

    def __init__(self, config: SubmitConfig) -> None:
        self.config, self.address = config, config.address
        require_token(self.address, insecure=config.insecure, option="submit.insecure")
        require_closed(self.address, insecure=config.insecure, option="submit.insecure")
        given = token()
        if given and self.address.startswith("http://") and not is_loopback(self.address):
            log.warning(
                "%s: the token travels in clear text over http. Use https, or an ssh or kubectl port forward.",
                self.address,
            )
        headers = {"Authorization": f"Bearer {given}"} if given else {}
        with self._told():
            self._client = _client(self.address, headers, config.ca or True)

    def submit(self, name: str, command: str, folder: Path, metadata: dict[str, str]) -> JobState:
        """Upload `folder` and run the shell command `command` in it, once for each `name`.

        Raises
        ------
        ClusterError
            If another command was submitted under this name, or the cluster refuses.
        """
        if (earlier := self.find(name)) is not None:
            if {key: earlier.metadata.get(key) for key in metadata} != metadata:
                raise ClusterError(f"{name} is the name of another job on this cluster. Give another submit.id.")
            log.info("submit: %s was submitted before; it is %s", name, earlier.status)
            return earlier
        with self._told():
            self._client.submit_job(
                entrypoint=command,
                submission_id=name,
                runtime_env={"working_dir": str(folder)},
                metadata=metadata,
                entrypoint_num_cpus=self.config.cpus or None,
            )
        return self.state(name)

    def state(self, name: str) -> JobState:
        """How far a job is; ClusterError if there is none of that name."""
        found = self.find(name)
        if found is None:
            raise ClusterError(f"the cluster at {self.address} knows no job {name!r}.")
        return found

    def find(self, name: str) -> JobState | None:
        """How far a job is, or None."""
        with self._told():
            try:
                told = self._client.get_job_info(name)
            except RuntimeError as error:
                if "status code 404" in str(error):
                    return None
                raise
        status = str(getattr(told.status, "value", told.status))
        return JobState(name, status, told.driver_exit_code, told.message or "", dict(told.metadata or {}))

    def stop(self, name: str) -> bool:
        """Ask a job to end; whether it was running."""
        self.state(name)
        with self._told():
            return bool(self._client.stop_job(name))

    def follow(self, name: str, write: Callable[[str], None]) -> JobState:
        """Give the log of a job to `write`, from its beginning, as it grows; return how the job ended.

        A broken connection is made again for `patience_s`, and goes on after the last character that was written.

        Raises
        ------
        ClusterError
            If the cluster cannot be reached for so long; the job is not touched by that.
        """
        import aiohttp

        shown, last, failures = _Shown(write), time.monotonic(), 0
        while True:
            before = shown.count
            try:
                whole = asyncio.run(self._tail(name, shown))
                state = self.state(name)
                last, failures = time.monotonic(), 0
                if whole and state.ended:
                    return state
            except (ClusterError, OSError, RuntimeError, aiohttp.ClientError) as error:
                last = time.monotonic() if shown.count > before else last
                failures += 1
                if failures >= LOG_GONE and (gone := self._ended(name)) is not None:
                    log.warning("submit: the rest of the log cannot be read any more")
                    return gone
                if time.monotonic() - last > self.config.patience_s:
                    raise ClusterError(f"no contact to {self.address} any more: {one_line(error)}") from error
                log.info("submit: connection lost, trying again")
            time.sleep(RETRY_S)

    def _ended(self, name: str) -> JobState | None:
        """How a job ended, if the cluster says that it did."""
        try:
            state = self.state(name)
        except ClusterError:
            return None
        return state if state.ended else None

    async def _tail(self, name: str, shown: "_Shown") -> bool:
        """Write what follows until the log ends, or says nothing for a while; whether it ended."""
        lines = self._client.tail_job_logs(name)
        shown.restart()
        try:
            while True:
                shown.take(await asyncio.wait_for(anext(lines), QUIET_S))
        except StopAsyncIteration:
            return True
        except TimeoutError:
            return False
        finally:
            await lines.aclose()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn the client's faults into one sentence."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            what = "takes another token than the one configured here" if token() else "asks for a token; none is set"
            raise ClusterError(
                f"the cluster at {self.address} {what}. Put the cluster's token (on its head: `ray get-auth-token`) "
                "into ~/.ray/auth_token or RAY_AUTH_TOKEN."
            ) from error
        except OSError as error:  # those of `requests` are OSErrors too
            raise ClusterError(f"nothing answers at {self.address}: {_reason(error)}") from error
        except (RuntimeError, ValueError) as error:
            raise ClusterError(f"the cluster at {self.address} refuses: {one_line(error)}") from error


class _Shown:
    """How much of a log was written, over several connections that each begin at its start."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.count, self._write, self._skip = 0, write, 0

    def restart(self) -> None:
        """The next text is the log's beginning again."""
        self._skip = self.count

    def take(self, text: str) -> None:
        """Write what is new."""
        new = text[self._skip :]
        self._skip = max(0, self._skip - len(text))
        if new:
            self.count += len(new)
            self._write(new.translate(CONTROL))


def _client(address: str, headers: dict[str, str], verify: str | bool) -> Any:
    """Ray's client for exactly this address: RAY_ADDRESS would lead it, and the token, to another one."""
    try:
        import aiohttp  # noqa: F401 (Ray's client is there without it, and fails at its first use)
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise ClusterError("jobs need Ray's client: pip install 'unveil[cluster]'.") from error
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    names = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        return JobSubmissionClient(address, headers=headers, verify=verify)
    finally:
        os.environ.update(kept)


def _reason(error: OSError) -> str:
    """Why nothing answers, without the layers that `requests` puts around it."""
    inner: BaseException = error
    while (deeper := inner.__cause__ or inner.__context__) is not None:
        inner = deeper
    return one_line(inner)
