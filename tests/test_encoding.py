"""Trees come back from plain containers with the same bits, classes and layout, and nothing else is rebuilt."""

from __future__ import annotations

import io
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
import torchopt
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import funcmlo as fm
from funcmlo import _tree
from funcmlo.train.encoding import children, classes, decode, encode
from funcmlo.train.state_classes import LIBRARY


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass(frozen=True)
class Frozen:
    inside: Any
    made: str = field(default="by its own", init=False)

    def __post_init__(self) -> None:
        """Refuse to be made twice: what was refused when it was made is not asked again."""
        if isinstance(self.inside, str) and self.inside == "spoilt":
            raise ValueError("spoilt")


@dataclass
class Registered:
    tree: Any
    label: str


@dataclass
class Mutable:
    tree: Any


_tree.register(Registered, ("tree",), ("label",))
KNOWN = classes([Pair(0, 0), Frozen(0), Registered(0, "")])


def through_file(tree: Any) -> Any:
    """What a file gives back, opened without running code."""
    file = io.BytesIO()
    torch.save(encode(tree), file)
    file.seek(0)
    return decode(torch.load(file, weights_only=True), KNOWN)


def bits(x: Tensor) -> bytes:
    """The numbers' bytes in the order of the axes."""
    return x.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b""


def alike(a: Any, b: Any) -> bool:
    """Whether two trees are the same to the bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return (a.shape, a.dtype, bits(a)) == (b.shape, b.dtype, bits(b)) and not b.requires_grad
    mine, theirs = children(a), children(b)
    if mine is None or theirs is None:
        return repr(a) == repr(b)  # NaNs are alike, and zeros of two signs are not
    return list(mine) == list(theirs) and all(alike(x, y) for x, y in zip(mine.values(), theirs.values(), strict=True))


FLOATS = torch.tensor([float("nan"), -0.0, 0.0, float("inf"), -1.5e-42, 3.0])
PAYLOAD = torch.tensor([0x7FC00123, -0x400000], dtype=torch.int32).view(torch.float32)  # NaNs that carry numbers
BIG = torch.arange(12.0).reshape(3, 4)
TENSORS = {
    "special": FLOATS,
    "payload": PAYLOAD,
    "bfloat16": FLOATS.to(torch.bfloat16),
    "float16": FLOATS.to(torch.float16),
    "float64": torch.tensor(0.1, dtype=torch.float64),
    "complex": torch.complex(FLOATS, -FLOATS),
    "conjugate": torch.complex(BIG, BIG).conj(),
    "negative": torch.complex(BIG, BIG).conj().imag,
    "int64": torch.tensor([2**62, -1]),
    "uint8": torch.arange(5, dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
    "0-d": torch.tensor(3.0),
    "empty": torch.zeros(0, 3),
    "none of many": BIG[:0],
    "transposed": BIG.T,
    "row": BIG[1],
    "column": BIG[:, 1],
    "block": BIG[1:, 1:3],
    "expanded": torch.tensor(2.0).expand(5, 2),
    "partly expanded": BIG[:, :1].expand(3, 4),
    "windows": torch.arange(6.0).unfold(0, 3, 1),
    "channels last": torch.arange(48.0).reshape(2, 2, 3, 4).to(memory_format=torch.channels_last),
    "with gradient": torch.ones(2, requires_grad=True),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "buffer": torch.nn.Buffer(torch.ones(2)),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_comes_back_to_the_bit(name: str) -> None:
    x = TENSORS[name]
    back = through_file({"x": x})["x"]
    assert alike(x.detach(), back)
    if name != "windows":  # whose places overlap
        assert back.stride() == x.stride()


def test_what_is_computed_from_a_view_is_the_same_to_the_bit() -> None:
    """Sums are taken in the order of the layout."""
    whole = torch.rand(1000, 1000, generator=torch.Generator().manual_seed(0))
    x = whole[:, ::3].T
    back = through_file(x)
    assert torch.equal(back.sum(), x.sum())
    assert torch.equal(back @ back.T, x @ x.T)


@pytest.mark.parametrize("view", [lambda x: x[3], lambda x: x[:, 3], lambda x: x[:0], lambda x: x[3, :1].expand(10**6)])
def test_a_view_does_not_drag_its_storage(view: Any) -> None:
    file = io.BytesIO()
    torch.save(encode({"x": view(torch.zeros(1000, 1000))}), file)
    assert file.tell() < 10_000  # the matrix has four million bytes


def test_a_tensor_that_fills_its_storage_is_not_copied() -> None:
    for x in (torch.ones(3, 4), torch.ones(3, 4).T, torch.ones(2)):
        assert encode(x).data_ptr() == x.data_ptr()


def test_tied_tensors_come_back() -> None:
    x = torch.rand(3)
    back = through_file({"a": x, "b": x})
    assert torch.equal(back["a"], x)
    assert torch.equal(back["b"], x)


ATOMS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.sampled_from([torch.float32, torch.device("cpu")])
)
LEAVES = st.one_of(ATOMS, st.sampled_from(list(TENSORS.values())).map(lambda x: x.detach()))
KEYS = st.one_of(st.text(max_size=3), st.integers())


def wider(inner: st.SearchStrategy) -> st.SearchStrategy:
    several = st.lists(inner, max_size=3)
    dicts = st.dictionaries(KEYS, inner, max_size=3)
    return st.one_of(
        several,
        several.map(tuple),
        dicts,
        dicts.map(OrderedDict),
        st.builds(Pair, inner, inner),
        inner.filter(lambda x: x != "spoilt" if isinstance(x, str) else True).map(Frozen),
        st.builds(Registered, inner, st.text(max_size=3)),
    )


@given(st.recursive(LEAVES, wider, max_leaves=12))
def test_any_tree_comes_back_to_the_bit(tree: Any) -> None:
    assert alike(tree, through_file(tree))


def test_no_gradient_is_asked_of_what_a_file_holds() -> None:
    back = decode(
        {"x": torch.nn.Parameter(torch.ones(2)), "y": ("strided", torch.ones(1, requires_grad=True), [2], [0])}, {}
    )
    assert type(back["x"]) is torch.Tensor
    assert not back["x"].requires_grad
    assert not back["y"].requires_grad


def test_the_order_of_a_dict_stays() -> None:
    assert list(through_file({"b": 0, 1: 0, "a": 0})) == ["b", 1, "a"]


def test_a_class_is_not_made_again_but_put_back() -> None:
    """No constructor runs, so what it would refuse or change comes back as it was."""
    odd = Frozen(0)
    object.__setattr__(odd, "inside", "spoilt")
    object.__setattr__(odd, "made", "by another")
    back = through_file(odd)
    assert (back.inside, back.made) == ("spoilt", "by another")


class Opaque:
    pass


class OwnTensor(Tensor):
    pass


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (Opaque(), r"level 'x': parameters\['a'\]\[0\] holds a .*test_encoding.Opaque.*NamedTuple or a frozen dataclass"),
        (Mutable(1), "Mutable"),
        (defaultdict(int), "collections.defaultdict"),
        ({1, 2}, "holds a set"),
        (1j, "complex"),
        (b"", "bytes"),
        (torch.Size([1]), "torch.Size"),
        (torch.ones(2).max(0), "torch.return_types.max"),
        (torch.tensor([1.0]).numpy()[0], r"numpy.float32.*float\(…\)"),
        ({(1, 2): 0}, r"the key \(1, 2\) \(tuple\)"),
        ({True: 0}, "the key True"),
        (OwnTensor(), "OwnTensor, a class of tensors of its own"),
        (torch.ones(2).to_sparse(), "layout torch.sparse_coo"),
        (torch.ones(2, device="meta"), "device 'meta'"),
    ],
)
def test_what_cannot_be_kept_is_told(bad: Any, match: str) -> None:
    with pytest.raises(fm.CheckpointError, match=match):
        encode({"a": [bad]}, "level 'x': parameters")


@pytest.mark.parametrize(
    ("plain", "match"),
    [
        (
            ("NamedTuple", "os.stat_result", {"st_mode": 1}),
            "os.stat_result, a class that this program's state does not have",
        ),
        (("NamedTuple", "tests.test_encoding.Pear", {}), "did you mean"),
        (("NamedTuple", f"{__name__}.Pair", {"first": 1}), r"of \(first\) in the file and of \(first, second\)"),
        (("dataclass", f"{__name__}.Pair", {"first": 1, "second": 2}), "is a dataclass of"),
        (("dtype", "load"), "a tuple that stands for nothing"),
        (("function", "os.system"), "stands for nothing"),
        ((), "stands for nothing"),
        ([OrderedDict()], "collections.OrderedDict that stands for nothing"),
        (("strided", torch.ones(2), [3], [1]), "do not fit"),
        (("strided", torch.ones(2), [2], [-1]), "do not fit"),
        (("strided", torch.ones(2), [2, 2], [1]), "do not fit"),
    ],
)
def test_what_was_not_encoded_is_told(plain: Any, match: str) -> None:
    with pytest.raises(fm.CheckpointError, match=match):
        decode(plain, KNOWN)


@pytest.mark.parametrize("source", [torchopt, fm.optim])
@pytest.mark.parametrize("rule", ["adadelta", "adagrad", "adam", "adamax", "adamw", "radam", "rmsprop", "sgd"])
def test_every_state_of_the_optimizers_is_known(source: Any, rule: str) -> None:
    """An estimator can carry one where the first state has none."""
    more = {"momentum": 0.9} if rule == "sgd" else {}
    state = getattr(source, rule)(lambda count: 0.1 / (1 + count), **more).init({"w": torch.ones(2)})
    assert classes(state).items() <= LIBRARY.items()
    assert alike(state, decode(encode(state), LIBRARY))


def test_tensors_come_to_the_devices_of_their_places() -> None:
    """A device without numbers stands in for a GPU, where a place on it would be seen by its numbers being lost."""
    there = {"a": torch.ones(2), "b": [torch.ones(2, device="meta")]}
    back = decode(encode({"a": torch.ones(2), "b": [torch.ones(2)], "c": torch.ones(2)}), {}, there, torch.device("meta"))
    assert [back["a"].device.type, back["c"].device.type] == ["cpu", "meta"]
