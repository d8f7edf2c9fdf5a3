"""The benchmark runner's data sets by name: the table of names, and the digits with their split."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from paper_repro.data import DATASETS, DataError, load
from paper_repro.data.idx import FILES
from paper_repro.data.mnist import ARCHIVES


def test_digits_are_the_1797_of_scikit_learn_each_once():
    from sklearn.datasets import load_digits

    digits = load("digits")
    assert (digits.name, digits.classes, digits.shape) == ("digits", 10, (8, 8))
    assert digits.x.shape == (1297, 64)
    assert digits.x_test.shape == (500, 64)
    assert digits.x.dtype == digits.x_test.dtype == torch.float32
    assert digits.y.dtype == digits.y_test.dtype == torch.int64
    assert "1,797 real" in digits.source
    pixels_, labels = load_digits(return_X_y=True)
    official = sorted((*row, label) for row, label in zip(pixels_.tolist(), labels.tolist(), strict=True))
    x, y = torch.cat([digits.x, digits.x_test]) * 16, torch.cat([digits.y, digits.y_test])
    assert sorted((*row, label) for row, label in zip(x.tolist(), y.tolist(), strict=True)) == official


def test_the_split_of_digits_never_changes():
    """Another split would change every number in the tables, so its first labels are pinned."""
    torch.manual_seed(1)
    first = load("digits")
    torch.manual_seed(2)
    second = load("digits")
    assert torch.equal(first.x, second.x)
    assert torch.equal(first.y_test, second.y_test)
    assert first.y_test[:12].tolist() == [6, 5, 5, 7, 9, 9, 8, 4, 6, 8, 6, 0]
    assert first.y[:12].tolist() == [9, 8, 9, 1, 9, 4, 1, 3, 4, 0, 9, 7]


def test_digits_leave_the_global_random_state_alone():
    before = torch.get_rng_state()
    load("digits")
    assert torch.equal(torch.get_rng_state(), before)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"scikit-learn, which cannot be imported.*pip install 'funcmlo\[paper\]'"):
        load("digits")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        DataError, match=r"'mnits' is no data set; did you mean 'mnist'\? .*: digits, mnist, fashion-mnist\.$"
    ):
        load("mnits")
    with pytest.raises(DataError, match=r"'qqq' is no data set\. Pass one of: digits, mnist, fashion-mnist\.$"):
        load("qqq")
    assert list(DATASETS) == ["digits", "mnist", "fashion-mnist"]


def test_a_dataset_is_final():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load("digits").classes = 3


def test_the_pinned_digests_are_the_published_ones():
    """Each was seen in public projects that have nothing to do with the packages that bring the files here."""
    assert all(tuple(archive.sha256) == FILES for archive in ARCHIVES.values())
    starts = {name: [digest[:8] for digest in archive.sha256.values()] for name, archive in ARCHIVES.items()}
    assert starts == {
        "mnist": ["ba891046", "65a50cbb", "0fa7898d", "ff7bcfd4"],
        "fashion-mnist": ["c59f468a", "bad3541b", "5b4141f0", "0402a96d"],
    }
    assert all(len(bytes.fromhex(digest)) == 32 for archive in ARCHIVES.values() for digest in archive.sha256.values())


def test_the_debian_package_is_looked_for_where_it_puts_its_files():
    assert ARCHIVES["fashion-mnist"].installed == Path("/usr/share/datasets/fashion-mnist")
