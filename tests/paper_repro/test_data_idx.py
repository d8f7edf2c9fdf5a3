"""The IDX format, and every kind of damage to it."""

from __future__ import annotations

import gzip
import hashlib

import pytest
import torch

from paper_repro.data import DataError
from paper_repro.data.idx import FILES, holds, read_folder, read_idx

HEADER = bytes([0, 0, 8, 3, 0, 0, 1, 44, 0, 0, 0, 2, 0, 0, 0, 3])  # 300 × 2 × 3: a size that needs two bytes
DATA = bytes(i * 7 % 251 for i in range(1800))
LABELS = bytes([0, 0, 8, 1, 0, 0, 0, 4, 9, 0, 255, 1])
IMAGES = bytes([0, 0, 8, 3, 0, 0, 0, 4, 0, 0, 0, 1, 0, 0, 0, 2, *range(8)])


def fill(folder, **other):
    """Write the four files, four examples in each part, or what the test puts in a file's place."""
    whole = {name: IMAGES if "images" in name else LABELS for name in FILES}
    for name, content in (whole | other).items():
        if content is not None:
            (folder / name).write_bytes(content)
    return {name: hashlib.sha256(content).hexdigest() for name, content in whole.items()}


@pytest.mark.parametrize("name", ["a-ubyte", "a-ubyte.gz"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_reads_back_what_was_written_raw_or_gzipped_by_content(name, pack, tmp_path):
    path = tmp_path / name
    path.write_bytes(pack(HEADER + DATA))
    array = read_idx(path)
    assert array.dtype == torch.uint8
    assert torch.equal(array, torch.tensor(list(DATA), dtype=torch.uint8).reshape(300, 2, 3))
    path.write_bytes(pack(LABELS))
    assert read_idx(path).tolist() == [9, 0, 255, 1]


def test_an_array_without_elements_keeps_its_shape(tmp_path):
    path = tmp_path / "empty"
    path.write_bytes(bytes([0, 0, 8, 2, 0, 0, 0, 0, 0, 0, 0, 5]))
    assert read_idx(path).shape == (0, 5)
    assert read_idx(path).dtype == torch.uint8


DAMAGE = {
    "no bytes": (b"", r"is truncated: 0 bytes came, expected a magic number of 4"),
    "half a magic number": (b"\0\0\x08", r"is truncated: 3 bytes came, expected a magic number of 4"),
    "first byte": (b"\x01" + LABELS[1:], r"is no IDX file: its magic number is 0x01000801, expected 0x00000801 for labels"),
    "second byte": (b"\0\x01" + LABELS[2:], r"is no IDX file: its magic number is 0x00010801"),
    "unknown type": (b"\0\0\x07" + LABELS[3:], r"is no IDX file: its magic number is 0x00000701"),
    "no dimension": (b"\0\0\x08\0" + b"\x05", r"is no IDX file: its magic number is 0x00000800"),
    "a page": (b"<html>not found</html>", r"is no IDX file: its magic number is 0x3c68746d"),
    "floats": (b"\0\0\x0d" + LABELS[3:], r"stores the type 0x0d \(float\), expected 0x08 \(unsigned byte\)"),
    "half a header": (HEADER[:10], r"is truncated: 10 bytes came, expected a header of 16"),
    "header alone": (HEADER, r"is truncated: 0 bytes of data came, expected 1800 for the shape \(300, 2, 3\)"),
    "one byte short": (HEADER + DATA[:-1], r"is truncated: 1799 bytes of data came, expected 1800"),
    "one byte more": (HEADER + DATA + b"\0", r"has trailing bytes: 1801 bytes of data came, expected 1800"),
    "huge sizes": (
        b"\0\0\x08\x03" + b"\xff" * 12,
        r"is truncated: 0 bytes of data came, expected 79228162458924105385300197375",
    ),
    "gzip cut": (gzip.compress(HEADER + DATA)[:-9], r"is a corrupt gzip file \(Compressed file ended"),
    "gzip header cut": (b"\x1f\x8b\x08", r"is a corrupt gzip file"),
    "gzip checksum": (
        gzip.compress(LABELS)[:-8] + bytes(4) + gzip.compress(LABELS)[-4:],
        r"is a corrupt gzip file \(CRC check",
    ),
    "gzip body": (gzip.compress(LABELS)[:10] + b"\xff" * 30, r"is a corrupt gzip file \(Error -3"),
    "gzip trailing": (gzip.compress(LABELS) + b"more", r"is a corrupt gzip file \(Not a gzipped file"),
    "damage within gzip": (gzip.compress(HEADER + DATA[:-1]), r"is truncated: 1799 bytes of data came"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(kind, tmp_path):
    content, problem = DAMAGE[kind]
    path = tmp_path / "some-file"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"^{path} {problem}.*; fetch the official file again\.$"):
        read_idx(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=rf"^{tmp_path / 'absent'} cannot be read \(.*No such file.*check the path"):
        read_idx(tmp_path / "absent")
    with pytest.raises(DataError, match=rf"^{tmp_path} cannot be read \(.*Is a directory"):
        read_idx(tmp_path)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_the_digest_is_of_the_decompressed_content(pack, tmp_path):
    path = tmp_path / "labels"
    path.write_bytes(pack(LABELS))
    right, wrong = hashlib.sha256(LABELS).hexdigest(), hashlib.sha256(b"other").hexdigest()
    assert read_idx(path, right).tolist() == [9, 0, 255, 1]
    with pytest.raises(
        DataError, match=rf"^{path} has the SHA-256 {right} \(decompressed\), expected {wrong}: it is damaged"
    ):
        read_idx(path, wrong)


@pytest.mark.parametrize("name", FILES)
def test_each_of_the_four_files_is_verified_by_default(name, tmp_path):
    right = fill(tmp_path)
    assert read_folder(tmp_path, right).labels.tolist() == [9, 0, 255, 1]
    wrong = right | {name: "0" * 64}
    with pytest.raises(DataError, match=rf"^{tmp_path / name} has the SHA-256 {right[name]} .*, expected {'0' * 64}"):
        read_folder(tmp_path, wrong)
    assert read_folder(tmp_path, wrong, verify=False).images.shape == (4, 1, 2)


def test_the_four_files_come_in_their_places(tmp_path):
    train_images, train_labels, test_images, test_labels = FILES
    contents = {
        train_images: IMAGES,
        train_labels: LABELS,
        test_images: bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 1, 50, 60]),
        test_labels: bytes([0, 0, 8, 1, 0, 0, 0, 1, 6]),
    }
    fill(tmp_path, **contents)
    arrays = read_folder(tmp_path, {}, verify=False)
    assert arrays.images.tolist() == [[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]]]
    assert arrays.labels.tolist() == [9, 0, 255, 1]
    assert arrays.test_images.tolist() == [[[50], [60]]]
    assert arrays.test_labels.tolist() == [6]


def test_gzipped_names_are_found_and_raw_ones_win(tmp_path):
    right = fill(tmp_path)
    for name in FILES:
        (tmp_path / name).rename(tmp_path / f"{name}.gz")
    assert read_folder(tmp_path, right).labels.tolist() == [9, 0, 255, 1]
    (tmp_path / FILES[1]).write_bytes(LABELS[:-1] + b"\x02")
    assert read_folder(tmp_path, right, verify=False).labels.tolist() == [9, 0, 255, 2]


def test_missing_files_are_listed(tmp_path):
    assert not holds(tmp_path)
    assert not holds(tmp_path / "absent")
    right = fill(tmp_path, **{FILES[0]: None, FILES[3]: None})
    assert holds(tmp_path)
    with pytest.raises(DataError, match=rf"^{tmp_path} lacks {FILES[0]}, {FILES[3]}; expected four files, .*: add what is"):
        read_folder(tmp_path, right)


PAIRS = {
    "fewer labels": (
        FILES[1],
        LABELS[:7] + b"\x03" + LABELS[8:11],
        r"train images of shape \(4, 1, 2\) and labels .* \(3,\)",
    ),
    "flat images": (FILES[2], LABELS, r"t10k images of shape \(4,\) and labels"),
    "images as labels": (FILES[3], IMAGES, r"t10k images of shape \(4, 1, 2\) and labels of shape \(4, 1, 2\)"),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_images_and_labels_must_pair_up(kind, tmp_path):
    name, content, problem = PAIRS[kind]
    fill(tmp_path, **{name: content})
    with pytest.raises(DataError, match=rf"^{tmp_path} has {problem}.*, expected \(n, rows, columns\) and \(n,\)"):
        read_folder(tmp_path, {}, verify=False)
