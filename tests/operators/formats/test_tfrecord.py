"""TFRecord: files of two independent writers, and messages made by the protobuf library, read back byte for byte."""

import random
import struct
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from operators.errors import FormatError
from operators.formats import SetConfig, SourceLimits, tfrecord, tfscan
from operators.formats.listing import Bound, Entry, Listing
from operators.sources import File, LocalSource

JPEG = b"\xff\xd8\xff\xe0 an image"

# Two Examples written by the PyPI package tfrecord 1.14.6: image, label, score and name.
BY_TFRECORD = bytes.fromhex(
    "5700000000000000e6ba948c0a550a150a05696d616765120c0a0a0a08ffd8ff204a5045470a150a0573636f7265120c120a0a080000003f"
    "000000c00a150a046e616d65120d0a0b0a09616e6e2f312e6a70670a0e0a056c6162656c12051a030a0107754603be5d00000000000000"
    "615bbbb90a5b0a160a05696d616765120d0a0b0a09ffd8ff206f746865720a110a0573636f7265120812060a040000803f0a150a046e616d"
    "65120d0a0b0a0962656e2f322e6a70670a170a056c6162656c120e1a0c0a0affffffffffffffffff01b26ed4f2"
)
# The records `abc` and nothing, written by TensorFlow's own RecordWriter (in the PyPI package tfrecords 0.3.1).
BY_TENSORFLOW = bytes.fromhex("0300000000000000b099490e6162636e57f121000000000000000029039807d8ea82a2")


def masked_crc(data: bytes) -> bytes:
    """RFC 3720, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def framed(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + masked_crc(length) + data + masked_crc(data)


@cache
def example_class() -> Any:
    """tf.train.Example from its published definition (example.proto, feature.proto), through the protobuf library."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="example_test.proto", package="tf_test", syntax="proto3")
    kinds = {"BytesList": 12, "FloatList": 2, "Int64List": 3}
    for name, kind in kinds.items():
        file.message_type.add(name=name).field.add(name="value", number=1, label=3, type=kind)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for n, (field, name) in enumerate(zip(("bytes_list", "float_list", "int64_list"), kinds, strict=True), 1):
        feature.field.add(name=field, number=n, label=1, type=11, type_name=f".tf_test.{name}", oneof_index=0)
    features = file.message_type.add(name="Features")
    features.field.add(name="feature", number=1, label=3, type=11, type_name=".tf_test.Features.FeatureEntry")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=1, type=9)
    entry.field.add(name="value", number=2, label=1, type=11, type_name=".tf_test.Feature")
    file.message_type.add(name="Example").field.add(
        name="features", number=1, label=1, type=11, type_name=".tf_test.Features"
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tf_test.Example"))


def example(**features: Any) -> bytes:
    """The message with these features; `__` in a name stands for `/`."""
    made = example_class()()
    for name, value in features.items():
        values = value if isinstance(value, list) else [value]
        one = made.features.feature[name.replace("__", "/")]
        kind = {bytes: one.bytes_list, float: one.float_list, int: one.int64_list}[type(values[0])]
        kind.value.extend(values)
    return bytes(made.SerializeToString())


def put(path: Path, *messages: bytes) -> list[int]:
    """A file of these records; their offsets."""
    offsets, whole = [], b""
    for message in messages:
        offsets.append(len(whole))
        whole += framed(message)
    path.write_bytes(whole)
    return offsets


def listed(uri: Path, **options: Any) -> Listing:
    return tfrecord.listing(LocalSource(str(uri)), SetConfig(uri=str(uri), **options))


def read(uri: Path, entries: "list[Entry] | Any") -> dict[str, bytes]:
    found = {}
    with tfrecord.TfRecordReader(LocalSource(str(uri))) as opened:
        for entry in entries:
            if entry.error is None:
                with opened.open(entry.place) as file:
                    found[entry.key] = file.read()
                assert len(found[entry.key]) == entry.bytes
    return found


def faults(listing: Listing) -> dict[str, str]:
    return {entry.key: entry.error for entry in listing.entries if entry.error is not None}


def test_files_of_an_independent_writer_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.tfrecord").write_bytes(BY_TFRECORD)
    found = listed(tmp_path, attributes=["score", "label"])
    assert read(tmp_path, found.entries) == {"ann/1.jpg": b"\xff\xd8\xff JPEG", "ben/2.jpg": b"\xff\xd8\xff other"}
    assert [(e.identity, e.attributes) for e in found.entries] == [
        ("7", {"label": "7"}),  # two scores are no attribute
        ("-1", {"score": "1", "label": "-1"}),
    ]
    assert [e.identity for e in listed(tmp_path, identity="parent").entries] == ["ann", "ben"]


def test_the_framing_of_these_tests_is_tensorflows() -> None:
    assert framed(b"abc") + framed(b"") == BY_TENSORFLOW


@pytest.mark.parametrize(
    ("features", "identity", "key"),
    [
        ({"image__encoded": JPEG, "image__class__label": 3, "image__filename": b"n/1.jpg"}, "3", "n/1.jpg"),
        ({"image_raw": JPEG, "label": 3}, "3", "3/a-00000000"),
        ({"jpg": JPEG, "label": b"ann", "key": b"000"}, "ann", "ann/000"),
        ({"image": JPEG, "label": struct.pack("<i", 300)}, "300", "300/a-00000000"),
        ({"image": JPEG, "label": 5.0}, "5", "5/a-00000000"),
        ({"image": JPEG}, None, "a-00000000"),
        ({"whatever": JPEG, "text": b"x", "identity": b"Zo\xc3\xab", "label": 1}, "Zoë", "Zoë/a-00000000"),
    ],
)
def test_images_labels_and_names_are_known_by_their_usual_features(
    tmp_path: Path, features: dict[str, Any], identity: str | None, key: str
) -> None:
    put(tmp_path / "a.tfrecords", example(**features))
    found = listed(tmp_path)
    assert [(e.key, e.identity) for e in found.entries] == [(key, identity)]
    assert read(tmp_path, found.entries) == {key: JPEG}


def test_the_column_chooses_the_image(tmp_path: Path) -> None:
    put(tmp_path / "a.tfrecord", example(image=JPEG, crop=b"\xff\xd8\xff crop"), example(image=JPEG))
    found = listed(tmp_path, column="crop")
    assert list(read(tmp_path, found.entries).values()) == [b"\xff\xd8\xff crop"]
    assert "feature 'crop' is missing" in faults(found)["a-00000001"]


@pytest.mark.parametrize("told", ["shape", "sides"])
def test_pixels_become_a_ppm(tmp_path: Path, told: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    if told == "shape":  # NVIDIA's FFHQ files: channels first
        message = example(data=np.moveaxis(pixels, 2, 0).tobytes(), shape=[3, 5, 4])
    else:
        message = example(image_raw=pixels.tobytes(), height=5, width=4, depth=3)
    put(tmp_path / "ffhq-r02.tfrecords", message)
    assert list(read(tmp_path, listed(tmp_path).entries).values()) == [b"P6\n4 5\n255\n" + pixels.tobytes()]


def test_tface_index_files_name_and_label_the_records(tmp_path: Path) -> None:
    messages = [example(image=JPEG + bytes([n])) for n in range(3)]
    first = put(tmp_path / "Syn-00000.tfrecord", *messages[:2])
    put(tmp_path / "Syn-00001.tfrecord", messages[2])
    rows = [("0001/a.jpg", 0, first[0]), ("0001/b.jpg", 0, first[1]), ("0002/a.jpg", 1, 0)]
    (tmp_path / "Syn.index").write_text("".join(f"../../data/images/{p}\t{s}\t{o}\n" for p, s, o in rows))
    found = listed(tmp_path)
    assert [(e.key, e.identity, e.error) for e in found.entries] == [(p, p[:4], None) for p, _, _ in rows]
    assert read(tmp_path, found.entries)["0002/a.jpg"] == JPEG + b"\2"
    (tmp_path / "Syn.index").write_text("".join(f"Syn\t{s}\t{o}\t{9 - s}\n" for _, s, o in rows))
    assert [e.identity for e in listed(tmp_path).entries] == ["9", "9", "8"]
    assert found.unlisted == {}


def test_names_that_come_twice_give_way_to_numbers(tmp_path: Path) -> None:
    """Many sets name their images within each file only: none may be lost for that."""
    for shard in "ab":
        put(tmp_path / f"{shard}.tfrecord", *(example(image=JPEG, filename=b"%d.jpg" % n) for n in range(2)))
    assert [e.key for e in listed(tmp_path).entries] == ["a-00000000", "a-00000001", "b-00000000", "b-00000001"]


def test_names_that_lead_out_are_rejected_rows(tmp_path: Path) -> None:
    put(tmp_path / "a.tfrecord", example(image=JPEG, filename=b"x/../../../y.jpg"), example(image=JPEG, filename=b"z"))
    assert [e.error is None for e in listed(tmp_path).entries] == [False, True]


def test_missing_shards_are_said(tmp_path: Path) -> None:
    put(tmp_path / "train-00001-of-00003", example(image=JPEG))
    assert listed(tmp_path).notes == ["1 of 3 files are there, by their names; get the others or name them in `uri`"]
    source = LocalSource(str(tmp_path))
    assert tfrecord.recognises(source, list(source.files()))


@pytest.mark.parametrize("where", ["before", "image", "behind", "sum"])
def test_a_wrong_checksum_is_an_error_of_its_record_only(tmp_path: Path, where: str) -> None:
    message = example(aaa=b"first", image=JPEG, zzz=b"last")
    start = put(tmp_path / "a.tfrecord", message, message)[1]
    data = bytearray((tmp_path / "a.tfrecord").read_bytes())
    spots = {"before": b"first", "image": b" an image", "behind": b"last"}
    at = len(data) - 1 if where == "sum" else data.index(spots[where], start)
    data[at] ^= 1
    (tmp_path / "a.tfrecord").write_bytes(data)
    good, bad = listed(tmp_path).entries
    assert list(read(tmp_path, [good]).values()) == [JPEG]
    with pytest.raises(OSError, match=r"checksum does not fit.*get it again"):
        read(tmp_path, [bad])


@pytest.mark.parametrize("left", [1, 7, 11, 12, 40])
def test_a_truncated_file_ends_in_a_rejected_row(tmp_path: Path, left: int) -> None:
    offsets = put(tmp_path / "a.tfrecord", *(example(image=JPEG * 3, label=n) for n in range(3)))
    data = (tmp_path / "a.tfrecord").read_bytes()
    (tmp_path / "a.tfrecord").write_bytes(data[: offsets[2] + left])
    found = listed(tmp_path)
    assert len(read(tmp_path, found.entries)) == 2
    assert list(faults(found)) == ["a-00000002"]
    assert f"truncated; the {left} bytes from here on are lost: get the file again" in faults(found)["a-00000002"]


def test_a_damaged_frame_ends_its_file_and_no_other(tmp_path: Path) -> None:
    for name in "ab":
        put(tmp_path / f"{name}.tfrecord", *(example(image=JPEG, label=n) for n in range(2)))
    data = bytearray((tmp_path / "a.tfrecord").read_bytes())
    data[0] ^= 1
    (tmp_path / "a.tfrecord").write_bytes(data)
    found = listed(tmp_path)
    assert [e.key for e in found.entries if e.error is None] == ["0/b-00000000", "1/b-00000001"]
    assert "checksum of its length does not fit; the 124 bytes" in faults(found)["a-00000000"]


def test_a_set_without_images_is_refused_with_what_it_has(tmp_path: Path) -> None:
    put(tmp_path / "a.tfrecord", example(vector=[0.5, 1.5], name=b"x"))
    with pytest.raises(FormatError, match=r"\(name, vector\).*`column`"):
        listed(tmp_path)


def test_a_compressed_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tfrecord.gz").write_bytes(b"\x1f\x8b\x08\0" + bytes(40))
    with pytest.raises(FormatError, match=r"a\.tfrecord\.gz is compressed.*gunzip"):
        listed(tmp_path)


def test_limits_hold_for_sizes_and_fields(tmp_path: Path) -> None:
    fields = b"\x08\x01" * 70000
    put(tmp_path / "a.tfrecord", example(image=JPEG * 9), fields, b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
    found = faults(listed(tmp_path, limits=SourceLimits(max_member_bytes=50)))
    assert "limits.max_member_bytes" in found["a-00000000"]
    assert "more than 65,536 fields" in found["a-00000001"]
    assert "a number does not end" in found["a-00000002"]


def test_a_file_of_nothing_is_not_looked_through_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 MB of empty records, of which one in sixteen bytes is; faults are kept up to the limit and not beyond."""
    empty, image = framed(b""), framed(example(image=JPEG))
    (tmp_path / "a.tfrecord").write_bytes(image * 3 + empty * 200_000)
    found = tfscan.Found(None, False, Bound("set", 500))
    with pytest.raises(FormatError, match=r"^set: more than 500 records; raise limits\.max_records"):
        tfscan.scan(LocalSource(str(tmp_path)), File("a.tfrecord", 3_200_000), found, {})
    assert (found.images, len(found.faults)) == (3, 498)
    with pytest.raises(FormatError, match="more than 500 records"):
        listed(tmp_path, limits=SourceLimits(max_records=500))
    monkeypatch.setattr("operators.formats.listing.MOST_FAULTS", 1000)
    found = tfscan.Found(None, False, Bound("set", 10**8))
    with pytest.raises(FormatError, match=r"set: 1,004 records cannot be read and 3 can \(no feature of this record"):
        tfscan.scan(LocalSource(str(tmp_path)), File("a.tfrecord", 3_200_000), found, {})
    assert len(found.faults) == 1004
    (tmp_path / "a.tfrecord").write_bytes(image * 1500 + empty * 2000)
    listing = listed(tmp_path, limits=SourceLimits(max_records=3500))
    assert (len(listing.entries), len(faults(listing))) == (3500, 2000)
    with pytest.raises(FormatError, match="more than 3,499 records"):
        listed(tmp_path, limits=SourceLimits(max_records=3499))


def test_many_records_of_several_layouts_are_those_that_protobuf_wrote(tmp_path: Path) -> None:
    rng = random.Random(0)
    messages, truth = [], {}
    for at in range(400):
        image = b"\xff\xd8\xff" + rng.randbytes(rng.choice((0, 9, 90, 300, 20_000)))
        label = rng.choice((at, -at, 2**40 + at, 127, 128))
        kinds: list[dict[str, Any]] = [
            {"image__encoded": image, "image__class__label": label},
            {"image__encoded": image, "image__class__label": label, "scores": [1.5, 2.5], "note": "é".encode()},
            {"image": image, "label": float(label)},
            {"jpg": image, "label": str(label).encode(), "image__height": 112, "more": [1, 2, 3] * 9},
            {"other": image, "a": b"x", "label": label},
        ]
        chosen = at * 5 // 400 if at % 7 else rng.randrange(5)
        messages.append(example(**kinds[chosen]))
        text = f"{int(struct.unpack('<f', struct.pack('<f', label))[0])}" if chosen == 2 else str(label)
        truth[f"{text}/a-{at:08d}"] = image
    put(tmp_path / "a.tfrecord", *messages)
    found = listed(tmp_path)
    assert read(tmp_path, found.entries) == truth
    assert {e.identity for e in found.entries} == {key.split("/")[0] for key in truth}
    slow = listed(tmp_path, attributes=["note"])  # attributes have every record looked at by itself
    assert {e.key: (e.place, e.identity) for e in slow.entries} == {e.key: (e.place, e.identity) for e in found.entries}


def test_recognised_by_content(tmp_path: Path) -> None:
    def recognised(uri: Path) -> bool:
        source = LocalSource(str(uri))
        return tfrecord.recognises(source, list(source.files()))

    for name, data in (("a.tfrecord", b""), ("b.tfrecord", b"\xff" * 99), ("c", framed(example(image=JPEG)))):
        (tmp_path / name).write_bytes(data)
    assert not recognised(tmp_path)
    assert recognised(tmp_path / "c")
    (tmp_path / "d.tfrecord").write_bytes(BY_TFRECORD)
    assert recognised(tmp_path)


def test_damaged_files_never_crash_or_hang(
    tmp_path: Path, mutants: Callable[[bytes, int, int], Iterator[bytes]], survives: Callable[..., object]
) -> None:
    for data in mutants(BY_TFRECORD, 1, 100):
        (tmp_path / "a.tfrecord").write_bytes(data)
        survives("tfrecord", tmp_path, 5)
    pixels = example(image_raw=bytes(60), height=5, width=4, depth=3, label=b"ab")
    for data in mutants(pixels, 2, 150):  # damaged messages in whole frames
        (tmp_path / "a.tfrecord").write_bytes(framed(data))
        survives("tfrecord", tmp_path, 5)
