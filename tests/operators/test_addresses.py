import pytest

from operators.addresses import bare, hidden, holds_secret, public, public_override, public_text, public_values
from operators.errors import FormatError
from operators.sources import absolute, remote_scheme, within


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("https://h/a/b.zip?X-Amz-Signature=SECRET&x=1", "https://h/a/b.zip?…"),
        ("https://h/a/b.zip#SECRET", "https://h/a/b.zip#…"),
        ("https://me:SECRET@h:8443/a.zip?t=SECRET", "https://…@h:8443/a.zip?…"),
        ("http://SECRET@[::1]:80/t-{0..9}.tar", "http://…@[::1]:80/t-{0..9}.tar"),
        ("https://me:SE/CRET@h/a", "https://…"),
        ("https://me:12?SECRET@h/a", "https://…"),
        ("https://h?SECRET", "https://h?…"),
        ("ftp://me:SECRET@h/a", "ftp://…@h/a"),
        ("s3://b/x.zip?X-Amz-Signature=SECRET", "s3://b/x.zip?…"),
        ("s3://AKIA:SECRET@b/x", "s3://…@b/x"),
    ],
)
def test_what_may_be_secret_is_cut(given: str, shown: str) -> None:
    assert public(given) == absolute(given) == shown if not given.startswith("ftp") else public(given) == shown
    assert holds_secret(given) and not holds_secret(shown)
    assert hidden(shown) and not hidden(given)


@pytest.mark.parametrize(
    "uri",
    [
        *("/data/what?x=1", "C:/a@b", "s3://b/part-?.tar", "s3://b/#1/x?.tar", "gs://b/a@b/c"),
        *("https://h/@scope/a.zip", "https://h:8443/t-{0000..0031}.tar", "https://h/x.tar?"),
    ],
)
def test_addresses_without_secrets_stay_as_they_are(uri: str) -> None:
    assert public(uri) == uri and not holds_secret(uri) and not hidden(uri)


def test_addresses_are_found_among_options() -> None:
    given = {
        "sets": {"a": {"uri": "https://h/x?SECRET"}, "b": "https://h/my set.zip?SECRET"},
        "of": ["https://u:SECRET@h/y", 3, None],
        "t": ("a b://c?d",),
    }
    assert public_values(given) == {
        "sets": {"a": {"uri": "https://h/x?…"}, "b": "https://h/my set.zip?…"},
        "of": ["https://…@h/y", 3, None],
        "t": ("a b://c?d",),
    }


def test_one_file_is_one_place_however_it_is_signed() -> None:
    assert bare("https://u:p@h/a.zip?s=1") == bare("https://h/a.zip?s=2") == "https://h/a.zip"
    assert within("https://h/a.zip?s=1", "https://u:p@h/a.zip") and not within("https://h/a.zip?s", "https://h/b.zip?s")
    assert bare("https://h/a.zip?") == "https://h/a.zip" and bare("s3://b/a?") == "s3://b/a?"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("'https://h/a?SECRET' is no bool", "'https://h/a?…' is no bool"),
        ("a (https://u:SECRET@h/a?SECRET): b. c?", "a (https://…@h/a?…): b. c?"),
        ("value: {'https://h/a?x=SECRET': 1}", "value: {'https://h/a?…': 1}"),
        ("https://h/a?… and http://h/b.zip.", "https://h/a?… and http://h/b.zip."),
        ("no address? none@all", "no address? none@all"),
    ],
)
def test_addresses_in_a_text_are_cut(given: str, shown: str) -> None:
    assert public_text(given) == shown == public_text(shown)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("sets.release.uri=https://h/my set.zip?sig=SECRET", "sets.release.uri=https://h/my set.zip?…"),
        ("sets.release={uri: https://me:SECRET@h/a}", "sets.release={uri: https://…@h/a}"),
        ("https://h/a?sig=SECRET", "https://h/a?…"),
        ("sets.release.uri=s3://b/part-?.tar", "sets.release.uri=s3://b/part-?.tar"),
        ("title=what? a@b = c", "title=what? a@b = c"),
    ],
)
def test_addresses_in_overrides_are_cut(given: str, shown: str) -> None:
    assert public_override(given) == shown


@pytest.mark.parametrize("uri", ["https:/h/a?SECRET", "HTTP:/me:SECRET@h/a", "s3:/b/SECRET"])
def test_an_address_that_lacks_a_slash_is_no_path(uri: str) -> None:
    with pytest.raises(FormatError, match="lacks a `/`") as error:
        remote_scheme(uri)
    assert "SECRET" not in str(error.value)
