"""Buckets of Google Cloud Storage, through its JSON interface.

Not through `pyarrow.fs`: opening an object for random access there begins by reading all of it, and its listing by
folders passes over folders without a placeholder object. Requests are those of `operators.remote_http`: one for the
state of an object and one for each range.
"""

import json
import os
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote, urlencode

from operators.errors import FormatError
from operators.remote_faults import Gone, persistently
from operators.remote_http import Server

HOST = "https://storage.googleapis.com"
SCOPE = "https://www.googleapis.com/auth/devstorage.read_only"
PAGE = 1000
"""Objects of one answer of a listing."""


class GoogleBucket(Server):
    """The objects of one bucket; the same methods as `operators.remote_objects.Bucket`."""

    def __init__(self, name: str, anonymous: bool) -> None:
        """Prepare for requests and make none.

        Parameters
        ----------
        name
            The bucket's.
        anonymous
            Whether to ask without credentials. Otherwise they are those that `google.auth` finds.
        """
        place = os.environ.get("STORAGE_EMULATOR_HOST", HOST).rstrip("/")
        self._base = place if "://" in place else f"http://{place}"
        super().__init__(*self._base.split("://", 1))
        self.shown, self._name = f"gs://{name}", name
        self._token: Callable[[], str] | None = None if anonymous or self._base != HOST else _tokens()

    def url(self, key: str) -> str:
        """The address of an object's bytes."""
        return f"{self._object(key)}?alt=media"

    def headers(self) -> dict[str, str]:
        """The credentials of a request."""
        return {"Authorization": f"Bearer {self._token()}"} if self._token else {}

    def listed(self, folder: str) -> Iterator[tuple[str, int]]:
        """All objects whose keys begin with `folder/`, page by page, without the placeholders of folders."""
        wanted = {"prefix": f"{folder}/" if folder else "", "maxResults": str(PAGE)}
        wanted["fields"] = "items(name,size),nextPageToken"
        while True:
            page = self._page(f"{self._base}/storage/v1/b/{self._name}/o?{urlencode(wanted)}")
            for item in page.get("items", []):
                key, size = str(item["name"]), int(item["size"])
                if not key.endswith("/") and not (size == 0 and key.endswith("_$folder$")):
                    yield key, size
            if "nextPageToken" not in page:
                return
            wanted["pageToken"] = page["nextPageToken"]

    def _page(self, url: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(persistently(lambda: self.whole(url), self.shown))
        except Gone:
            raise FormatError(f"{self.shown}: there is no such bucket. Correct the set's `uri`.") from None
        except ValueError:
            raise FormatError(f"{self.shown}: the answer is no listing. Check the endpoint.") from None
        return found

    def _object(self, key: str) -> str:
        return f"{self._base}/storage/v1/b/{self._name}/o/{quote(key, safe='')}"


def _tokens() -> Callable[[], str]:
    """Gives a token that is good for the next request, of the credentials in their usual places.

    Raises
    ------
    FormatError
        If `google-auth` is not installed or finds no credentials.
    """
    try:
        import google.auth
        import google.auth.exceptions
        from google.auth.transport.requests import Request
    except ImportError as error:
        raise FormatError(
            "gs://: needs google-auth to find credentials. Install unveil[gs], or give `anonymous: true` for a public "
            "bucket."
        ) from error
    try:
        credentials, _ = google.auth.default(scopes=[SCOPE])
    except google.auth.exceptions.GoogleAuthError:
        raise FormatError(
            "gs://: no credentials. They are looked for in GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth "
            "application-default login`, and the machine's service account; for a public bucket give `anonymous: true`."
        ) from None

    def token() -> str:
        if not credentials.valid:
            try:
                credentials.refresh(Request())
            except google.auth.exceptions.GoogleAuthError:
                raise FormatError("gs://: the credentials were refused. Log in again, or give others.") from None
        return str(credentials.token)

    return token
