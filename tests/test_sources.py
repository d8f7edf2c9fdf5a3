"""What `run` may be given as data: loaders, iterables, functions and batches, as streams that follow from a seed."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

import funcmlo as fm
from funcmlo.errors import BatchError
from funcmlo.train.generators import drawing, generators
from funcmlo.train.sources import Source, moved, source

CPU = torch.device("cpu")


def stream(loader: Any, level: str = "w", *, seed: int = 0, **rest: Any) -> Source:
    made = source(level, loader, seed=seed, device=CPU, **rest)
    assert isinstance(made, Source)
    return made


def take(batches: Iterator[Any], n: int) -> list[Any]:
    """The first n batches, as plain numbers."""
    return [plain(batch) for batch in islice(batches, n)]


def plain(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    return [plain(x) for x in batch] if isinstance(batch, (list, tuple)) else batch


def flat(lists: Iterable[list[Any]]) -> list[Any]:
    return [*chain.from_iterable(lists)]


def several(loader: Any, n: int, **how: Any) -> list[Any]:
    """The first n batches of a source that is closed then."""
    batches = stream(loader, **how)
    taken = take(batches, n)
    batches.close()
    return taken


class Noisy(Dataset):
    """Each example is its index and what torch, numpy and Python draw for it."""

    def __init__(self, n: int = 10) -> None:
        self.n = n

    def __len__(self) -> int:
        """Count."""
        return self.n

    def __getitem__(self, i: int) -> tuple[int, float, float, float]:
        """Look an example up."""
        return i, torch.rand(()).item(), np.random.rand(), random.random()


class Lengths(Sampler):
    """Epoch e, which `set_epoch` tells, has e + 2 indices."""

    def __init__(self) -> None:
        self.epoch, self.heard = 0, []

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.heard.append(epoch)

    def __iter__(self) -> Iterator[int]:
        """Begin."""
        return iter(torch.randint(0, 10, (self.epoch + 2,)).tolist())


class Endless(Sampler):
    def __iter__(self) -> Iterator[int]:
        """Begin."""
        while True:
            yield random.randrange(10)


class Private(Sampler):
    """Draws by generators of its own."""

    def __init__(self) -> None:
        self.by = [torch.Generator(), random.Random(0), np.random.default_rng(0), np.random.RandomState(0)]
        self.torch, self.python, self.numpy, self.older = self.by

    def __len__(self) -> int:
        """Count."""
        return 8

    def __iter__(self) -> Iterator[int]:
        """Begin."""
        for _ in range(2):
            yield torch.randint(0, 10, (), generator=self.torch).item()
            yield self.python.randrange(10)
            yield int(self.numpy.integers(10))
            yield self.older.randint(10)


class Shuffled(Sampler):
    """Shuffles the order of the epoch before, and is longer than it says."""

    def __init__(self) -> None:
        self.order = list(range(9))

    def __len__(self) -> int:
        """Count, wrongly."""
        return 7

    def __iter__(self) -> Iterator[int]:
        """Begin."""
        random.shuffle(self.order)
        return iter(self.order)


class Singleton(Noisy):
    """Holds numpy's default generator, as scikit-learn's `check_random_state` does."""

    rng: np.random.RandomState

    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.mtrand._rand


def weighted() -> WeightedRandomSampler:
    return WeightedRandomSampler(torch.arange(1.0, 11.0), 7)


LOADERS: dict[str, Callable[..., DataLoader]] = {
    "shuffled": lambda **how: DataLoader(Noisy(), 3, shuffle=True, **how),
    "in order": lambda **how: DataLoader(Noisy(), 3, **how),
    "drop_last": lambda **how: DataLoader(Noisy(), 3, shuffle=True, drop_last=True, **how),
    "weighted": lambda **how: DataLoader(Noisy(), 3, sampler=weighted(), **how),
    "subset": lambda **how: DataLoader(Noisy(), 2, sampler=SubsetRandomSampler([1, 2, 3, 5, 8]), **how),
    "batch_sampler": lambda **how: DataLoader(Noisy(), batch_sampler=BatchSampler(weighted(), 2, False), **how),
    "list of lists": lambda **how: DataLoader(Noisy(), batch_sampler=[[1, 2], [3], [4, 5, 6]], **how),
    "list of indices": lambda **how: DataLoader(Noisy(), 2, sampler=[4, 3, 2, 1, 0], **how),
    "single": lambda **how: DataLoader(Noisy(), batch_size=None, shuffle=True, **how),
    "lengths": lambda **how: DataLoader(Noisy(), 2, sampler=Lengths(), **how),
    "endless": lambda **how: DataLoader(Noisy(), 2, sampler=Endless(), **how),
    "private": lambda **how: DataLoader(Noisy(), 2, sampler=Private(), **how),
    "own generator": lambda **how: DataLoader(Noisy(), 3, shuffle=True, generator=torch.Generator(), **how),
    "with replacement": lambda **how: DataLoader(Noisy(), 3, sampler=RandomSampler(Noisy(), True, 100), **how),
    "default generators": lambda **how: DataLoader(Singleton(), 3, shuffle=True, generator=torch.default_generator, **how),
    "part of a dataset": lambda **how: DataLoader(Subset(Noisy(), [5, 6, 7]), 2, shuffle=True, **how),
}
MANY = 150
"""More batches than a sampler makes in one go."""


@pytest.mark.parametrize("name", LOADERS)
def test_batches_follow_from_the_seed_and_the_level(name: str) -> None:
    first = several(LOADERS[name](), MANY)
    torch.manual_seed(1)
    random.seed(1)
    assert several(LOADERS[name](), MANY) == first
    loader = LOADERS[name]()
    assert several(loader, 7) == several(loader, MANY)[:7] == first[:7]  # whatever ran before
    assert several(LOADERS[name](), MANY, seed=1) != first
    assert several(LOADERS[name](), MANY, level="v") != first


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("drawn", [1, 3, 4, 66, 129])
def test_a_source_goes_on_where_another_ended(name: str, drawn: int) -> None:
    batches = stream(LOADERS[name](), drawn=drawn)
    assert take(batches, 20) == several(LOADERS[name](), MANY)[drawn : drawn + 20]
    assert batches.drawn == drawn + 20


@pytest.mark.parametrize("name", ["shuffled", "batch_sampler", "single", "lengths", "private"])
def test_workers_draw_what_the_main_process_draws(name: str) -> None:
    expected = several(LOADERS[name](), 20)
    assert several(LOADERS[name](num_workers=2), 20) == expected
    assert several(LOADERS[name](num_workers=1, prefetch_factor=1), 5, drawn=15) == expected[15:]


def test_every_epoch_has_an_order_of_its_own() -> None:
    batches = stream(DataLoader(TensorDataset(torch.arange(100)), 50, shuffle=True))
    epochs = [flat(x.tolist() for (x,) in islice(batches, 2)) for _ in range(20)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 20


def test_samplers_that_keep_something_from_epoch_to_epoch_are_gone_through_again() -> None:
    expected = several(DataLoader(Noisy(), 2, sampler=Shuffled()), 20)
    for drawn in (4, 5, 7, 14):
        assert several(DataLoader(Noisy(), 2, sampler=Shuffled()), 20 - drawn, drawn=drawn) == expected[drawn:]


@pytest.mark.parametrize("name", ["endless", "with replacement"])
def test_an_order_is_another_for_each_level_and_does_not_come_again(name: str) -> None:
    order = [batch[0] for batch in several(LOADERS[name](), MANY)]
    assert order[:64] != order[64:128]
    assert [batch[0] for batch in several(LOADERS[name](), MANY, level="v")] != order


def test_batches_draw_numbers_of_their_own() -> None:
    drawn = torch.tensor([row for batch in several(DataLoader(Noisy(8), 4), 6) for row in zip(*batch, strict=True)])
    for of in (1, 2, 3):  # torch's, numpy's, Python's
        assert len(drawn[:, of].unique()) == 24


def test_a_fresh_process_draws_the_same() -> None:
    here = Path(__file__).resolve()
    program = "from tests.test_sources import *; print(several(LOADERS['shuffled'](num_workers=1), 5))"
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=here.parents[1], check=True, timeout=120
    )
    assert told.stdout.strip() == str(several(LOADERS["shuffled"](), 5))


@given(
    n=st.integers(1, 20),
    batch_size=st.integers(1, 6),
    drop_last=st.booleans(),
    drawn=st.integers(0, 30),
    size=st.integers(1, 3),
    seed=st.integers(0, 2**63 - 1),
)
def test_ranks_share_every_batch(n: int, batch_size: int, drop_last: bool, drawn: int, size: int, seed: int) -> None:
    loader = DataLoader(TensorDataset(torch.arange(n)), batch_size, shuffle=True, drop_last=drop_last)
    if len(loader) == 0:
        with pytest.raises(BatchError, match=r"without a batch \(drop_last=True"):
            next(stream(loader, seed=seed))
        return
    whole = stream(loader, seed=seed, drawn=drawn)
    parts = [stream(loader, seed=seed, drawn=drawn, rank=rank, size=size) for rank in range(size)]
    for number, (expected,) in enumerate(islice(whole, 10), drawn):
        assert len(expected) == (batch_size if number % len(loader) < n // batch_size else n % batch_size)
        if len(expected) < size:
            for mine in parts:
                with pytest.raises(
                    BatchError, match=rf"batch {number + 1} of level 'w' has \d+ examples for {size} proc.*drop_l"
                ):
                    next(mine)
            break
        came = [next(mine)[0] for mine in parts]
        assert torch.equal(torch.cat(came), expected)
        assert max(map(len, came)) - min(map(len, came)) <= 1


def test_ranks_draw_different_numbers() -> None:
    loader = DataLoader(Noisy(8), 8)
    mine, other = (next(stream(loader, rank=rank, size=2)) for rank in (0, 1))
    assert mine[0].tolist() + other[0].tolist() == list(range(8))
    assert not set(mine[1].tolist()) & set(other[1].tolist())


def test_a_list_of_indices_for_a_whole_batch_is_shared() -> None:
    class Whole(Dataset):
        def __getitem__(self, index: list[int]) -> torch.Tensor:
            """Look an example up."""
            return torch.tensor(index)

    loader = DataLoader(Whole(), batch_size=None, sampler=BatchSampler(range(7), 3, True))
    assert [next(stream(loader, rank=rank, size=2)).tolist() for rank in (0, 1)] == [[0, 1], [2]]
    single = DataLoader(Noisy(), batch_size=None)
    with pytest.raises(BatchError, match=r"batch_size=None and a sampler that gives one index .* give the DataLoader a b"):
        next(stream(single, rank=0, size=2))


def test_a_distributed_sampler_is_left_alone_but_hears_the_epoch() -> None:
    data = TensorDataset(torch.arange(8))
    sampler = DistributedSampler(data, num_replicas=2, rank=1)
    batches = stream(DataLoader(data, 2, sampler=sampler), rank=1, size=2)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        expected = list(sampler)
        assert flat(x.tolist() for (x,) in islice(batches, 2)) == expected


def test_samplers_hear_the_epoch() -> None:
    sampler = Lengths()
    take(stream(DataLoader(Noisy(), 1, sampler=sampler)), 10)  # 2 + 3 + 4 and one more
    assert sampler.heard == [0, 1, 2, 3]


def test_a_million_batches_are_passed_over_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    plainly = RandomSampler.__iter__
    monkeypatch.setattr(RandomSampler, "__iter__", lambda self: made.append(self) or plainly(self))
    batches = stream(LOADERS["shuffled"](), drawn=10**6)
    next(batches)
    assert len(made) == 1
    assert batches.drawn == 10**6 + 1


def states(*further: Any) -> list[Any]:
    """What the process's generators hold."""
    numpy = np.random.get_state()
    mine = [torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2:]]
    return mine + [str(x.bit_generator.state) if hasattr(x, "bit_generator") else repr(state_of(x)) for x in further]


def state_of(x: Any) -> Any:
    if isinstance(x, torch.Generator):
        return x.get_state().tolist()
    return x.getstate() if isinstance(x, random.Random) else x.get_state()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["shuffled", "private", "own generator", "lengths", "default generators"])
def test_generators_stay_as_they_were(name: str, workers: int) -> None:
    loader = LOADERS[name](num_workers=workers)
    held = generators(loader)
    assert len(held) == {"private": 4, "own generator": 1, "default generators": 2}.get(name, 0)
    np.random.randn()  # keeps a number for the next call
    random.gauss(0, 1)
    before = states(*held)
    batches = stream(loader)
    assert states(*held) == before
    for _ in range(3):
        take(batches, 5)
        assert states(*held) == before
        np.random.randn()  # gives that number, without a change of the generator's words; or keeps another
        random.random()
        before = states(*held)
    batches.close()
    assert states(*held) == before


def test_numpys_generator_may_be_another() -> None:
    expected = several(LOADERS["shuffled"](), 3)
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(3))
        state = np.random.get_state(legacy=False)
        other = several(LOADERS["shuffled"](), 3)
        assert np.random.get_state(legacy=False) == state
    finally:
        np.random.set_bit_generator(before)
    assert [(i, t, p) for i, t, _, p in other] == [(i, t, p) for i, t, _, p in expected]


def test_a_seeded_block_may_hold_another() -> None:
    with drawing(1):
        expected = [np.random.randn(), np.random.randn(), np.random.rand(), torch.rand(()), random.random()]
    np.random.randn()
    before = states()
    with drawing(1):
        came = [np.random.randn(), np.random.randn()]
        with drawing(2):
            np.random.randn(), torch.rand(()), random.random()
        came += [np.random.rand(), torch.rand(()), random.random()]
        with pytest.raises(ValueError, match="mine"), drawing(3):
            raise ValueError("mine")
    assert came == expected
    assert states() == before


def test_generators_that_a_dataset_holds_are_seeded_too() -> None:
    class Own(Dataset):
        def __init__(self) -> None:
            self.rng, self.dice = np.random.default_rng(0), random.Random(0)

        def __len__(self) -> int:
            """Count."""
            return 4

        def __getitem__(self, i: int) -> tuple[int, float, float]:
            """Look an example up."""
            return i, self.rng.random(), self.dice.random()

    expected = several(DataLoader(Own(), 2, shuffle=True), 8)
    assert len({x for batch in expected for x in batch[1]}) == 16
    assert several(DataLoader(Own(), 2, shuffle=True, num_workers=2), 5, drawn=3) == expected[3:]


class Pair(NamedTuple):
    x: Any
    y: Any


def test_batches_move_to_the_device() -> None:
    meta = torch.device("meta")

    def collate(rows: list[Any]) -> dict[str, Any]:
        x = torch.stack([x for (x,) in rows])
        return {"pair": Pair(x, [x, None]), "shared": fm.Shared((x, "name")), 3: (x, 1.5)}

    loader = DataLoader(TensorDataset(torch.arange(6.0)), 2, collate_fn=collate)
    batch = next(source("w", loader, seed=0, device=meta))
    assert (
        batch["pair"].x.device == batch["pair"].y[0].device == batch["shared"].batch[0].device == batch[3][0].device == meta
    )
    assert isinstance(batch["pair"], Pair)
    assert isinstance(batch["shared"], fm.Shared)
    assert (batch["pair"].y[1], batch["shared"].batch[1], batch[3][1]) == (None, "name", 1.5)
    fixed = source("w", {"x": torch.ones(2), "parts": fm.Microbatches([torch.ones(1)])}, seed=0, device=meta)
    assert fixed["x"].device == fixed["parts"][0].device == meta
    assert source("w", lambda t: torch.ones(t), seed=0, device=meta)(3).shape == (3,)
    assert source("w", lambda t: torch.ones(t), seed=0, device=meta)(3).device == meta
    assert next(source("w", iter([torch.ones(2)]), seed=0, device=meta)).device == meta


def test_a_tensor_that_is_there_is_the_same_object() -> None:
    x = torch.ones(2)
    batch = moved({"a": [x, (x, fm.Shared(x))], "b": fm.Microbatches([x])}, CPU, non_blocking=True)
    assert all(y is x for y in (batch["a"][0], batch["a"][1][0], batch["a"][1][1].batch, batch["b"][0]))


@pytest.mark.parametrize(
    "fixed",
    [
        torch.arange(3),
        [torch.ones(2), torch.zeros(2)],
        (torch.ones(2),),
        {"x": torch.ones(2)},
        Pair(torch.ones(1), 2),
        fm.Shared(torch.ones(1)),
        fm.Microbatches([torch.ones(1)]),
        np.arange(3),
        "name",
        5,
        None,
        [],
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_batch_is_fixed(fixed: Any) -> None:
    came = source("w", fixed, seed=0, device=CPU)
    assert type(came) is type(fixed)
    assert not isinstance(came, Source)


class Stream(IterableDataset):
    """Six numbers in an order that torch draws; workers share them."""

    def __iter__(self) -> Iterator[int]:
        """Begin."""
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        yield from (torch.randperm(6).tolist() if info is None else range(6))[first::step]


@pytest.mark.parametrize("how", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}], ids=str)
def test_a_loader_over_a_stream_is_begun_again(how: dict[str, Any]) -> None:
    loader = DataLoader(Stream(), 2, **how)
    before = states()
    if "persistent_workers" in how:
        batches = stream(loader)
        workers = [multiprocessing.active_children() for _ in islice(batches, 9)]
        assert {x.pid for x in workers[0]} == {x.pid for x in workers[-1]}
        batches.close()
    expected = several(loader, 10)
    assert states() == before
    assert several(loader, 10) == expected
    assert several(loader, 6, drawn=4) == expected[4:]
    length = 4 if how else 3  # two workers have three numbers each
    epochs = [flat(expected[i : i + length]) for i in (0, length)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert how or epochs[0] != epochs[1]


class Noise(IterableDataset):
    def __iter__(self) -> Iterator[float]:
        """Begin."""
        yield from (torch.rand(()).item() + np.random.rand() + random.random() for _ in range(4))


def test_what_a_stream_draws_follows_from_the_seed() -> None:
    for how in ({}, {"num_workers": 1}):
        expected = several(DataLoader(Noise(), 2, **how), 8)
        assert several(DataLoader(Noise(), 2, **how), 3, drawn=5) == expected[5:]
        assert several(DataLoader(Noise(), 2, **how), 8, seed=1) != expected
        assert len({x for batch in expected for x in batch}) == 16


class Again:
    """An iterable that can be begun again."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Begin."""
        return (torch.rand(2) for _ in range(3))


def test_an_iterable_is_begun_again() -> None:
    before = states()
    given = Again()
    expected = several(given, 7)
    assert states() == before
    assert given.epochs == [0, 1, 2]
    assert len({tuple(x) for x in expected}) == 7
    assert several(Again(), 3, drawn=4) == expected[4:]
    assert take(stream(range(2)), 5) == [0, 1, 0, 1, 0]


def test_an_iterator_goes_on_from_where_it_stands() -> None:
    batches = stream(iter(range(100)), drawn=3)
    assert take(batches, 3) == [3, 4, 5]
    assert batches.drawn == 6
    batches.close()
    assert take(batches, 2) == [6, 7]
    assert take(stream(count()), 3) == [0, 1, 2]


def test_a_loader_of_a_class_with_a_way_of_its_own_is_an_iterable() -> None:
    class Doubled(DataLoader):
        def __iter__(self) -> Any:
            """Begin."""
            return (2 * x for (x,) in super().__iter__())

    loader = Doubled(TensorDataset(torch.arange(4)), 2, shuffle=True)
    before = states()
    expected = several(loader, 4)
    assert states() == before
    assert sorted(flat(expected[:2])) == sorted(flat(expected[2:])) == [0, 2, 4, 6]
    assert several(loader, 2, drawn=2) == expected[2:]


def test_iterables_that_end_are_told() -> None:
    spent = stream(x for x in range(3))
    assert take(spent, 3) == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(
            BatchError, match=r"data\['w'\] \(generator\) is an iterator and has ended, after 3 batches: pass"
        ):
            next(spent)
    half = [1]

    class Once:
        def __iter__(self) -> Iterator[int]:
            """Begin."""
            return iter([half.pop()] if half else [])

    once = stream(Once())
    next(once)
    with pytest.raises(BatchError, match="gives nothing when it is begun again, after 1 batches"):
        next(once)
    for empty in (iter(()), range(0), DataLoader(Empty())):
        with pytest.raises(BatchError, match="gives no batch: expected at least one"):
            next(stream(empty, drawn=3))
    with pytest.raises(BatchError, match=r"data\['w'\] is a DataLoader without a batch: expected"):
        next(stream(DataLoader(TensorDataset(torch.ones(0))), drawn=3))
    lists = stream(DataLoader(Noisy(), batch_sampler=iter([[1, 2], [3]])))
    take(lists, 2)
    with pytest.raises(BatchError, match=r"the sampler of data\['w'\] \(list_iterator\) gives nothing in epoch 2"):
        next(lists)


class Empty(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        """Begin."""
        return iter(())


@pytest.mark.parametrize("data", [TensorDataset(torch.ones(3)), Stream()], ids=lambda x: type(x).__name__)
def test_a_dataset_is_told_to_be_wrapped(data: Dataset) -> None:
    with pytest.raises(BatchError, match=r"is a Dataset \(\w+\), which has no batches: wrap it in a DataLoader"):
        source("w", data, seed=0, device=CPU)


class Broken(Dataset):
    """Fails, in a way of the caller's choice, from its sixth example on."""

    def __init__(self, fail: Callable[[], Any]) -> None:
        self.fail = fail

    def __len__(self) -> int:
        """Count."""
        return 8

    def __getitem__(self, i: int) -> int:
        """Look an example up."""
        return self.fail() if i >= 5 else i


def fail() -> None:
    raise KeyError("a name\nin two lines")


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_dataset_raises_is_told(workers: int) -> None:
    batches = stream(DataLoader(Broken(fail), 2, num_workers=workers))
    assert take(batches, 2) == [[0, 1], [2, 3]]
    for _ in range(2):  # the same batch again
        with pytest.raises(
            BatchError, match=r"^batch 3 of level 'w' cannot be drawn from its data: KeyError: .*a name.*\.$"
        ) as told:
            next(batches)
        assert isinstance(told.value.__cause__, KeyError)
        assert batches.drawn == 2


def stop() -> None:
    raise StopIteration


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stop_of_the_datasets_is_not_the_end(workers: int) -> None:
    batches = stream(DataLoader(Broken(stop), 5, num_workers=workers))
    next(batches)
    with pytest.raises(BatchError, match=r"batch 2 .* RuntimeError: StopIteration came out of the dataset"):
        next(batches)


def test_a_worker_that_dies_is_told() -> None:
    deadly = DataLoader(Broken(lambda: os._exit(3)), 5, num_workers=1)
    with pytest.raises(
        BatchError, match=r"^batch 2 of level 'w' cannot be drawn from its data: RuntimeError: DataLoader worker"
    ):
        next(stream(deadly, drawn=1))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_sampler_raises_is_told_in_its_turn(workers: int) -> None:
    class Failing(Sampler):
        def __iter__(self) -> Iterator[int]:
            """Begin."""
            yield from range(7)
            raise OSError("no more")

    batches = stream(DataLoader(Noisy(), 2, sampler=Failing(), num_workers=workers))
    assert len(take(batches, 3)) == 3
    with pytest.raises(BatchError, match=r"batch 4 of level 'w' cannot be drawn from its data: OSError: no more\.$"):
        next(batches)


def test_what_an_iterable_and_collate_raise_is_told() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise ValueError

    batches = stream(failing())
    next(batches)
    with pytest.raises(BatchError, match=r"batch 2 of level 'w' cannot be drawn from its data: ValueError\.$"):
        next(batches)
    ragged = DataLoader([torch.ones(1), torch.ones(2)], 2)
    with pytest.raises(BatchError, match=r"batch 1 of level 'w' .* RuntimeError: stack expects each tensor to be equal"):
        next(stream(ragged))


def test_an_interrupt_passes_and_the_batch_comes_again() -> None:
    interrupt = [True]

    def interrupted() -> int:
        if interrupt:
            interrupt.pop()
            raise KeyboardInterrupt
        return 7

    batches = stream(DataLoader(Broken(interrupted), 5))
    next(batches)
    with pytest.raises(KeyboardInterrupt):
        next(batches)
    assert batches.drawn == 1
    assert plain(next(batches)) == [7, 7, 7]


class Told(Dataset):
    """Tells what its worker was told."""

    mark = "unmarked"

    def __len__(self) -> int:
        """Count."""
        return 4

    def __getitems__(self, index: list[int]) -> list[Any]:
        """Look several up."""
        assert type(index) is list
        info = get_worker_info()
        return [(self.mark, info.dataset is self, info.num_workers, i) for i in index]


def mark(worker: int) -> None:
    get_worker_info().dataset.mark = f"worker {worker}"


def collate(rows: list[Any]) -> list[Any]:
    return ["mine", *rows]


def test_a_loaders_settings_are_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    how = {"num_workers": 2, "prefetch_factor": 3, "timeout": 60, "pin_memory": True, "multiprocessing_context": "fork"}
    loader = DataLoader(Told(), 2, worker_init_fn=mark, collate_fn=collate, in_order=False, **how)
    made = []
    init = DataLoader.__init__
    monkeypatch.setattr(DataLoader, "__init__", lambda self, *a, **k: made.append(self) or init(self, *a, **k))
    batches = stream(loader)
    assert take(batches, 2) == [
        ["mine", *([f"worker {worker}", True, 2, i] for i in (2 * worker, 2 * worker + 1))] for worker in (0, 1)
    ]
    (again,) = made
    for name in ("num_workers", "prefetch_factor", "timeout", "multiprocessing_context"):
        assert getattr(again, name) == getattr(loader, name)
    assert again.in_order  # what comes must not depend on which worker is faster
    batches.close()


class BrokenStream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        """Begin."""
        yield from range(4)
        fail()


@pytest.mark.parametrize("end", ["close", "del", "error"])
@pytest.mark.parametrize("data", [Broken(fail), BrokenStream()], ids=["indices", "stream"])
def test_workers_end(end: str, data: Dataset) -> None:
    batches = stream(DataLoader(data, 2, num_workers=2, persistent_workers=end == "close"))
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    kept = None
    if end == "close":
        batches.close()
    elif end == "error":
        with pytest.raises(BatchError) as kept:
            take(batches, 5)
    else:
        del batches
        gc.collect()
    assert not multiprocessing.active_children()
    del kept
