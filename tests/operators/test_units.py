"""Units: a partition in key order whose cuts and names depend on content only."""

import hashlib
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.errors import FormatError
from operators.units import Member, cut, unit_digest


def image(key: str) -> Member:
    return Member(key=key, identity=key.partition("/")[0], bytes=9, digest=hashlib.sha256(key.encode()).hexdigest())


def a_set(images: int) -> list[Member]:
    return [image(f"person_{number // 4:05}/{number % 4}.jpg") for number in range(images)]


def names(members: list[Member], unit_images: int) -> set[str]:
    return {unit_digest(unit) for unit in cut(members, unit_images)}


keys = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), unique=True, max_size=60)


@settings(max_examples=100, deadline=None)
@given(keys=keys, unit_images=st.integers(1, 20), shuffle=st.randoms(use_true_random=False))
def test_cut_is_a_partition_in_key_order_of_bounded_units(
    keys: list[str], unit_images: int, shuffle: random.Random
) -> None:
    members = [image(key) for key in keys]
    units = list(cut(members, unit_images))
    assert [m for unit in units for m in unit] == sorted(members, key=lambda m: m.key)
    assert all(1 <= len(unit) <= 2 * unit_images for unit in units)
    shuffle.shuffle(members)
    assert list(cut(iter(members), unit_images)) == units


@pytest.mark.parametrize("unit_images", [1, 2, 10, 64, 500])
def test_units_are_about_as_long_as_asked(unit_images: int) -> None:
    lengths = [len(unit) for unit in cut(a_set(6000), unit_images)]
    assert 0.6 * unit_images <= sum(lengths) / len(lengths) <= 1.6 * unit_images
    assert max(lengths) <= 2 * unit_images


def test_nothing_is_cut_into_no_units() -> None:
    assert list(cut([], 10)) == []


@settings(max_examples=20, deadline=None)
@given(at=st.integers(0, 3999), key=st.integers(0, 999))
def test_one_image_more_or_less_renames_only_the_units_around_it(at: int, key: int) -> None:
    members = a_set(4000)
    before = names(members, 40)
    assert len(before) > 60
    removed = names(members[:at] + members[at + 1 :], 40)
    added = names([*members, image(f"person_{key:05}/new.jpg")], 40)
    changed = names([*members[:at], replace(members[at], digest="0" * 64), *members[at + 1 :]], 40)
    assert before != removed
    assert before != added
    assert len(before - removed) <= 8
    assert len(before - added) <= 8
    assert len(before - changed) == 1


def test_on_average_one_image_more_renames_hardly_more_than_one_unit() -> None:
    members = a_set(4000)
    before = names(members, 40)
    renamed = [len(before - names([*members, image(f"person_{at:05}/new.jpg")], 40)) for at in range(0, 1000, 25)]
    assert sum(renamed) / len(renamed) < 2.5


def test_a_key_that_stands_for_two_images_is_named() -> None:
    members = [image("a/1.jpg"), image("b/2.jpg"), replace(image("a/1.jpg"), digest="0"), image("a/1.jpg")]
    with pytest.raises(FormatError, match=r"'a/1\.jpg' stands for 3 images.*unique"):
        list(cut(members, 10))


def test_the_name_of_a_unit_never_changes_between_versions_of_the_program() -> None:
    """Stored embeddings are found by this name. Computed by hand: length (8 bytes) and `=value`, nothing for null."""
    written = b"".join(
        len(v).to_bytes(8, "big") + v for v in (b"=a/1.jpg", b"=a", b"=00ff", b"", b"=x", b"", b"", b"=no")
    )
    unit = [
        Member(key="a/1.jpg", identity="a", bytes=3, digest="00ff"),
        Member(key="x", identity=None, bytes=0, digest=None, error="no"),
    ]
    assert unit_digest(unit) == hashlib.sha256(written).hexdigest()[:32]


BASE = Member(key="ab", identity="cd", bytes=1, digest="ef", error="gh")


@pytest.mark.parametrize(
    "other",
    [
        replace(BASE, key="ax"),
        replace(BASE, identity="cx"),
        replace(BASE, digest="ex"),
        replace(BASE, error="gx"),
        replace(BASE, identity=None),
        replace(BASE, identity=""),
        replace(BASE, digest=None),
        replace(BASE, error=None),
        replace(BASE, key="abc", identity="d"),
        replace(BASE, key="a", identity="bcd"),
        replace(BASE, identity="cde", digest="f"),
        replace(BASE, digest="efg", error="h"),
        replace(BASE, key="cd", identity="ab"),
    ],
)
def test_the_name_of_a_unit_depends_on_every_field_and_its_place(other: Member) -> None:
    assert unit_digest([other]) != unit_digest([BASE])


small = st.sampled_from(["", "=", "a", "ab", "=a", "\0", "é", "e\u0301"])
member = st.builds(
    Member, key=small, identity=small | st.none(), bytes=st.just(1), digest=small, error=small | st.none()
)


@settings(max_examples=200, deadline=None)
@given(left=st.lists(member, max_size=3), right=st.lists(member, max_size=3))
def test_two_units_have_one_name_only_if_they_have_the_same_members(left: list[Member], right: list[Member]) -> None:
    assert (unit_digest(left) == unit_digest(right)) == (left == right)
