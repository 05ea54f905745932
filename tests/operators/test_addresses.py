import pytest

from operators.addresses import bare, hidden, holds_secret, public, public_values
from operators.sources import absolute, within


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
    given = {"sets": {"a": {"uri": "https://h/x?SECRET"}}, "of": ["https://u:SECRET@h/y", 3, None], "t": ("a b://c?d",)}
    assert public_values(given) == {
        "sets": {"a": {"uri": "https://h/x?…"}},
        "of": ["https://…@h/y", 3, None],
        "t": ("a b://c?d",),
    }


def test_one_file_is_one_place_however_it_is_signed() -> None:
    assert bare("https://u:p@h/a.zip?s=1") == bare("https://h/a.zip?s=2") == "https://h/a.zip"
    assert within("https://h/a.zip?s=1", "https://u:p@h/a.zip") and not within("https://h/a.zip?s", "https://h/b.zip?s")
