"""Checkpoints: the same bits come back, nothing is half written, and what is wrong is told."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchopt

import funcmlo as fm
from funcmlo.train import durable, fitting
from funcmlo.train.checkpoint import Checkpoint, clear, load, newest, save
from funcmlo.train.manifest import Manifest, parse
from funcmlo.train.places import step_of
from tests.test_encoding import alike

NET = fm.Stateless(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5)))
DATA = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


def lower(y, x, batch, buffers):
    out, new = NET(y, batch, buffers=buffers)
    return ((out - x) ** 2).mean(), {"buffers": new}


def upper(x, y):
    return sum((p**2).sum() for p in y.values()) + (x**2).sum()


def program(optimizer: Any = None, response: Any = None) -> fm.Multilevel:
    response = response or fm.AID(fm.CG(2), warm_start=True)
    return fm.Multilevel(
        fm.Level("y", lower, optimizer or torchopt.adam(lambda t: 0.1 / (1 + t)), steps=2, response=response),
        fm.Level("x", upper, torchopt.sgd(0.1, momentum=0.9)),
    )


def first(of: fm.Multilevel | None = None, seed: int = 0) -> fm.State:
    return (of or program()).init({"y": NET.params(), "x": torch.zeros(4)}, buffers={"y": NET.buffers()}, seed=seed)


def run(state: fm.State, steps: int, of: fm.Multilevel | None = None) -> fm.State:
    of = of or program()
    for _ in range(steps):
        state, _ = of.step(state, {"y": DATA})
    return state


def same(a: fm.State, b: fm.State) -> bool:
    trees = ("params", "optimizer", "response", "buffers", "step", "seed")
    return all(alike(getattr(a, field), getattr(b, field)) for field in trees)


@pytest.fixture(scope="module")
def reached() -> fm.State:
    return run(first(), 2)


@pytest.fixture
def good(tmp_path: Path, reached: fm.State) -> Path:
    """A folder with checkpoints of steps 1 and 2."""
    save(tmp_path, run(first(), 1), step=1)
    save(tmp_path, reached, step=2, positions={"y": 7}, extra={"best": 0.5})
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder, the hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_state_comes_back_to_the_bit_and_goes_on_alike(tmp_path: Path, reached: fm.State) -> None:
    extra = {"best": float("inf"), "rows": [{"a": 0.1, "b": None}], "name": "ü", "on": True, "count": 3}
    path = save(tmp_path / "runs" / "a", reached, step=2, positions={"y": 7}, extra=extra)
    found = load(tmp_path / "runs" / "a", first())
    assert isinstance(found, Checkpoint)
    assert same(found.state, reached)
    assert (found.step, found.positions, found.extra, found.path) == (2, {"y": 7}, extra, path)
    assert same(run(found.state, 2), run(reached, 2))
    assert same(load(path, first()).state, reached)
    assert same(load(str(shutil.move(path, tmp_path / "best")), reached).state, reached)


def test_anybody_can_read_the_files(good: Path, reached: fm.State) -> None:
    tensors = torch.load(good / "step-00000002" / "state.pt", weights_only=True)
    assert torch.equal(tensors["params"]["y"]["0.weight"], reached.params["y"]["0.weight"])
    told = json.loads((good / "step-00000002" / "manifest.json").read_text())
    assert told["levels"]["y"]["parameters"]["['0.weight']"] == "float32 (4, 3)"
    assert told["steps"] == {"y": 4, "x": 2}
    assert told["versions"] == {"torch": torch.__version__, "funcmlo": fm.__version__}
    state = (good / "step-00000002" / "state.pt").read_bytes()
    assert (told["bytes"], told["sha256"]) == (len(state), hashlib.sha256(state).hexdigest())


def test_the_last_ones_are_kept(tmp_path: Path, reached: fm.State) -> None:
    for step in (1, 2, 3, 10, 99_999_999, 100_000_000):
        save(tmp_path, reached, step=step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-100000000", "step-99999999"]
    assert newest(tmp_path) == tmp_path / "step-100000000"
    save(tmp_path, reached, step=50, keep=1)  # never the one that was just written, and none after it
    assert sorted(map(step_of, tmp_path.iterdir())) == [50, 99_999_999, 100_000_000]
    save(tmp_path, reached, step=0, keep=None)
    save(tmp_path, reached, step=100_000_001, keep=None)
    assert len(list(tmp_path.iterdir())) == 5


def test_a_checkpoint_is_replaced_by_one_of_the_same_step(good: Path) -> None:
    other = run(first(), 3)
    save(good, other, step=2)
    assert same(load(good, first()).state, other)
    assert len(list(good.iterdir())) == 2


def test_an_estimators_state_may_begin_with_none(tmp_path: Path, reached: fm.State) -> None:
    """A warm start is there after the first step only; its classes are the library's."""
    save(tmp_path, reached, step=2)
    none = replace(first(), response=dict.fromkeys(reached.response))
    assert same(load(tmp_path, none).state, reached)


def test_tensors_come_to_the_levels_device_where_the_first_state_has_none(
    tmp_path: Path, reached: fm.State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device without numbers stands in for a GPU."""
    save(tmp_path, reached, step=2)
    monkeypatch.setattr(fitting, "_home", lambda params: torch.device("meta"))
    found = load(tmp_path, replace(first(), response=dict.fromkeys(reached.response)))
    assert found.state.response["y"].trend.device.type == "meta"
    assert found.state.params["x"].device.type == found.state.optimizer["x"][0].trace.device.type == "cpu"


# What is wrong.


@dataclass(frozen=True)
class Mine(fm.BestResponse):
    """An estimator whose state is of a class that no program has at its begin."""

    def init(self, params: Any) -> Any:
        return {"count": 0, "tree": torch.zeros(2)}

    def vjp(self, solved: Any, cotangent: Any, state: Any) -> Any:
        return {name: torch.zeros_like(x) for name, x in solved.inputs.items()}, state, fm.Stats()


def _without(state: fm.State, level: str) -> fm.State:
    fields = ("params", "optimizer", "response", "buffers", "step")
    return replace(state, **{f: {k: v for k, v in getattr(state, f).items() if k != level} for f in fields})


def _more(state: fm.State, level: str) -> fm.State:
    fields = ("params", "optimizer", "response", "buffers", "step")
    return replace(state, **{f: {**getattr(state, f), level: getattr(state, f)["x"]} for f in fields})


def _params(**of: Any) -> Callable[[], fm.State]:
    return lambda: replace(first(), params={**first().params, **of})


MISFITS = {
    "missing": (lambda: _more(first(), "z"), "lacks level 'z'.*its levels: y, x"),
    "unknown": (lambda: _without(first(), "x"), "has level 'x', which is none of this program's"),
    "shape": (_params(x=torch.zeros(5)), r"level 'x' differs in its parameters: leaf has shape \(4,\), expected \(5,\)"),
    "dtype": (_params(x=torch.zeros(4).double()), r"'x'.*parameters: leaf has dtype torch.float32, expected torch.float64"),
    "shape in a dict": (
        _params(y={**NET.params(), "0.bias": torch.zeros(5)}),
        r"'y'.*parameters: leaf \['0.bias'\] has shape \(4,\), expected \(5,\)",
    ),
    "names": (_params(y={"a": torch.zeros(1)}), "'y'.*parameters: lacks 'a' and has '0.weight', '0.bias', .* besides"),
    "kind": (_params(x=[torch.zeros(4)]), r"'x'.*parameters: is a tensor of shape \(4,\), expected list"),
    "optimizer": (lambda: first(program(torchopt.sgd(0.1))), "level 'y' differs in its optimizer state"),
    "class": (
        lambda: first(program(torchopt.rmsprop(lambda t: 0.1))),
        r"'y'.*optimizer state: \[0\] is .*Moments, expected .*RmsState",
    ),
    "buffers": (
        lambda: replace(first(), buffers={"y": {}, "x": {}}),
        "level 'y' differs in its buffers: has '1.running_mean'",
    ),
    "response": (
        lambda: first(program(response=Mine())),
        "level 'y' differs in its estimator state: is funcmlo.hypergrad.warm.Drift, expected dict",
    ),
    "no state": (
        lambda: replace(first(), optimizer={"y": None, "x": None}),
        r"'y'.*optimizer state: is tuple, expected nothing \(None\)",
    ),
    "seed": (lambda: first(seed=1), "made with seed 0, and this program's state has seed 1"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_another_program_is_told(good: Path, name: str) -> None:
    like, match = MISFITS[name]
    with pytest.raises(fm.CheckpointError, match=f"step-00000002 cannot be taken: .*{match}"):
        load(good, like())


def test_another_seed_can_be_meant(good: Path, reached: fm.State) -> None:
    assert same(load(good, first(seed=1), seed_matters=False).state, reached)


def test_none_in_the_file_is_no_estimators_state(tmp_path: Path, reached: fm.State) -> None:
    save(tmp_path, replace(reached, response=dict.fromkeys(reached.response)), step=2)
    with pytest.raises(fm.CheckpointError, match=r"level 'y'.*estimator state: is nothing \(None\), expected .*Drift"):
        load(tmp_path, first())


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _moved_on(path: Path) -> None:
    path.write_text(path.read_text().replace('"y": 7', '"y": 8'))


DAMAGE = {
    "state cut": ("state.pt", _cut, "state.pt has .* bytes instead of .* cut short"),
    "state empty": ("state.pt", lambda p: p.write_bytes(b""), "state.pt has 0 bytes"),
    "state altered": ("state.pt", _flipped, "state.pt does not have its SHA-256"),
    "state missing": ("state.pt", Path.unlink, r"state.pt cannot be read \(No such file"),
    "manifest cut": ("manifest.json", _cut, "manifest.json: it is no JSON"),
    "manifest empty": ("manifest.json", lambda p: p.write_bytes(b""), "manifest.json: it is no JSON"),
    "manifest altered": ("manifest.json", _moved_on, "manifest.json: its content does not have its checksum"),
    "manifest a list": ("manifest.json", lambda p: p.write_text("[1]"), "holds no manifest"),
    "manifest binary": ("manifest.json", lambda p: p.write_bytes(b"\xff\xfe\x00"), "it is no JSON"),
    "manifest missing": ("manifest.json", Path.unlink, r"manifest.json cannot be read \(No such file"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_told_and_the_way_out_leads_on(good: Path, name: str) -> None:
    file, damage, match = DAMAGE[name]
    damage(good / "step-00000002" / file)
    before = content(good)
    with pytest.raises(fm.CheckpointError, match=match) as told:
        load(good, first())
    assert f"The one before it, {good / 'step-00000001'}, is good: remove {good / 'step-00000002'}" in str(told.value)
    assert content(good) == before
    shutil.rmtree(good / "step-00000002")
    assert load(good, first()).step == 1


def test_only_a_good_one_is_named_as_the_one_before(good: Path) -> None:
    _flipped(good / "step-00000001" / "state.pt")
    _flipped(good / "step-00000002" / "state.pt")
    with pytest.raises(fm.CheckpointError, match="No good one is before it"):
        load(good, first())


def test_a_renamed_checkpoint_is_told(good: Path) -> None:
    (good / "step-00000002").rename(good / "step-00000009")
    with pytest.raises(fm.CheckpointError, match="is that of step 2: the folder was renamed"):
        load(good, first())


def test_a_file_in_place_of_a_checkpoint_is_told(good: Path) -> None:
    (good / "step-00000003").write_text("")
    with pytest.raises(fm.CheckpointError, match=r"damaged: manifest.json cannot be read.*step-00000002, is good"):
        load(good, first())


def _rewritten(path: Path, data: bytes, **fields: Any) -> None:
    """Put something else in place of the tensors, with a manifest that fits it."""
    told = parse((path / "manifest.json").read_bytes())
    (path / "state.pt").write_bytes(data)
    new = replace(told, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data), **fields)
    (path / "manifest.json").write_text(new.text())


class Hostile:
    """What makes a folder where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        """Say how it is made again: by a call."""
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("kind", ["pickle", "torch", "legacy"])
def test_no_code_in_a_file_is_run(good: Path, kind: str) -> None:
    mark, bad = good / "was run", good / "step-00000002"
    if kind == "pickle":
        data = pickle.dumps(Hostile(mark))
    else:
        torch.save({"params": Hostile(mark)}, good / "x", _use_new_zipfile_serialization=kind == "torch")
        data = (good / "x").read_bytes()
    _rewritten(bad, data)
    with pytest.raises(fm.CheckpointError, match=r"holds more than tensors.*nothing of it was run.*step-00000001, is good"):
        load(good, first())
    assert not mark.exists()


@pytest.mark.parametrize("tensors", [[1], {"params": {}}, {**dict.fromkeys(("params", "optimizer", "buffers"), 0)}])
def test_other_tensors_are_no_state(good: Path, tensors: Any) -> None:
    torch.save(tensors, good / "x")
    _rewritten(good / "step-00000002", (good / "x").read_bytes())
    with pytest.raises(fm.CheckpointError, match="holds no state of a program"):
        load(good, first())


def test_a_class_of_another_program_is_told(good: Path, reached: fm.State) -> None:
    path = good / "step-00000002" / "state.pt"
    plain = torch.load(path, weights_only=True)
    plain["optimizer"]["x"] = ("NamedTuple", "elsewhere.TheirState", {"a": 1})
    torch.save(plain, good / "x")
    _rewritten(path.parent, (good / "x").read_bytes())
    with pytest.raises(fm.CheckpointError, match=r"level 'x' differs in its optimizer state: .*elsewhere.TheirState"):
        load(good, first())


def test_a_newer_format_is_told(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = good / "step-00000002" / "manifest.json"
    told = parse(path.read_bytes())
    monkeypatch.setattr("funcmlo.train.manifest.FORMAT", 2)
    path.write_text(replace(told, versions={"funcmlo": "9.0"}).text())
    monkeypatch.undo()
    with pytest.raises(
        fm.CheckpointError, match=r"format 2, written by funcmlo 9.0; this version reads format 1: update"
    ) as error:
        load(good, first())
    assert "remove" not in str(error.value)


def test_a_place_without_a_checkpoint_is_told(tmp_path: Path, good: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for path, match in [
        (tmp_path / "empty", "there is no checkpoint in"),
        (tmp_path / "nowhere", "which is not there"),
        (tmp_path / "file", "which is a file"),
        (good / "step-00000002" / "state.pt", "a file of a checkpoint; pass its folder"),
    ]:
        with pytest.raises(fm.CheckpointError, match=match):
            load(path, first())
    assert newest(tmp_path / "nowhere") is None
    assert newest(tmp_path / "empty") is None
    clear(tmp_path / "nowhere")
    with pytest.raises(fm.CheckpointError, match="cannot be read"):
        newest(tmp_path / "file")
    with pytest.raises(fm.CheckpointError, match="expected a state"):
        load(good, first().params)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"step": "3"}, "step='3' came; expected an integer from 0 on"),
        ({"step": 3.0}, "step=3.0"),
        ({"step": True}, "step=True"),
        ({"step": -1}, "step=-1"),
        ({"keep": 0}, "keep=0 came; expected an integer from 1 on"),
        ({"positions": {"y": 0.5}}, r"positions\['y'\]=0.5"),
        ({"extra": {"a": (1, 2)}}, r"extra\['a'\] is tuple"),
        ({"extra": {"a": [torch.ones(1)]}}, r"extra\['a'\]\[0\] is Tensor"),
        ({"extra": {"a": {1: 2}}}, r"extra\['a'\] is dict with keys that are no strings"),
        ({"state": {"y": 1}}, "save got dict; expected the state"),
    ],
)
def test_wrong_use_of_save_is_told(tmp_path: Path, reached: fm.State, given: dict[str, Any], match: str) -> None:
    given = {"state": reached, "step": 1, **given}
    with pytest.raises(fm.CheckpointError, match=match):
        save(tmp_path / "new", given.pop("state"), **given)
    assert not (tmp_path / "new").exists()


def test_a_state_that_cannot_be_kept_is_told(good: Path, reached: fm.State) -> None:
    before = content(good)
    bad = replace(reached, response={**reached.response, "y": [object()]})
    with pytest.raises(fm.CheckpointError, match=r"level 'y': estimator state\[0\] holds an object.*NamedTuple or a frozen"):
        save(good, bad, step=3)
    assert content(good) == before


# Writing that fails.


def _fails(code: int) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize("what", ["fsync", "rename", "mkdir"])
@pytest.mark.parametrize(
    ("code", "match"),
    [
        (errno.ENOSPC, "No space left.*make room, or let fewer be kept"),
        (errno.EROFS, "Read-only.*folder that may be written to"),
    ],
)
def test_a_failing_disk_leaves_the_earlier_ones(
    good: Path, reached: fm.State, monkeypatch: pytest.MonkeyPatch, what: str, code: int, match: str
) -> None:
    before = content(good)
    monkeypatch.setattr(os, what, _fails(code))
    with pytest.raises(fm.CheckpointError, match=f"cannot be written; those before it are as they were.*{match}") as error:
        save(good, run(first(), 1), step=2)
    monkeypatch.undo()
    assert isinstance(error.value.__cause__, OSError)
    assert content(good) == before


class Limited:
    """A file that takes so many bytes, and then fails."""

    def __init__(self, file: Any, limit: int, error: BaseException) -> None:
        self.file, self.left, self.error = file, limit, error

    def write(self, data: Any) -> None:
        self.left -= len(data)
        if self.left < 0:
            raise self.error
        self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def fileno(self) -> int:
        return self.file.fileno()


def test_the_old_one_of_a_step_stays_if_the_new_one_cannot_have_its_name(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rename = content(good), os.rename

    def renamed(old: Path, new: Path) -> None:
        if old.name.endswith("writing"):
            _fails(errno.EIO)()
        rename(old, new)

    monkeypatch.setattr(os, "rename", renamed)
    with pytest.raises(fm.CheckpointError, match=r"Input/output error.*see to the disk"):
        save(good, run(first(), 1), step=2)
    assert content(good) == before


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("which", ["state.pt", "manifest.json"])
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_full_disk_or_an_interrupt_while_a_file_is_written(
    good: Path, reached: fm.State, monkeypatch: pytest.MonkeyPatch, part: float, which: str, interrupted: bool
) -> None:
    """Torch hides the error behind one of its own, which says nothing."""
    before = content(good)
    error = KeyboardInterrupt() if interrupted else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    limit = int(part * len(before[f"step-00000002/{which}"]))

    @contextmanager
    def limited(path: Path, *args: Any) -> Generator[Any]:
        with open(path, *args) as file:
            yield Limited(file, limit, error) if path.name == which else file

    monkeypatch.setattr(durable, "open", limited, raising=False)
    with pytest.raises(KeyboardInterrupt if interrupted else fm.CheckpointError) as told:
        save(good, reached, step=3, positions={"y": 7}, extra={"best": 0.5})
    assert error in (told.value, told.value.__cause__)
    assert interrupted or "No space left on device): make room" in str(told.value)
    assert content(good) == before
    assert not any(p.name.startswith(".") for p in good.iterdir())


def test_a_file_in_place_of_the_folder_is_told(tmp_path: Path, reached: fm.State) -> None:
    (tmp_path / "file").write_text("kept")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(fm.CheckpointError, match=r"cannot be written.*a file is where a folder should be"):
            save(folder, reached, step=1)
    assert (tmp_path / "file").read_text() == "kept"


def test_an_old_one_that_cannot_be_removed_is_told(good: Path, reached: fm.State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "remove", _fails(errno.EACCES))
    with pytest.raises(fm.CheckpointError, match="step-00000003 is written, but an earlier one cannot be removed"):
        save(good, reached, step=3, keep=1)
    monkeypatch.undo()
    assert load(good, first()).step == 3


# Processes that are killed.


def forked(work: Callable[[], None]) -> int:
    """Run something in a child, which ends with 0, or with 1 on an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's threads, which the child does not use
        child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.__stderr__, flush=True)
    os._exit(1)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@needs_fork
@pytest.mark.parametrize("limit", [1_000, 8_000])
def test_a_file_that_may_not_grow(good: Path, reached: fm.State, limit: int) -> None:
    """The system's own limit stands in for a full disk."""
    before = content(good)

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(fm.CheckpointError, match=r"File too large.*make room"):
            save(good, reached, step=3)

    assert os.waitpid(forked(work), 0)[1] == 0
    assert content(good) == before


def small(step: int) -> fm.State:
    """A state whose numbers all are its step."""
    params = {"y": {"a": torch.full((200, 200), float(step)), "b": torch.tensor(step)}}
    return fm.State(params, {"y": ()}, {"y": None}, {"y": {}}, {"y": step}, 0)


def whole(folder: Path) -> int:
    """The step of the newest checkpoint, which must hold what it says; 0 for none."""
    found = newest(folder)
    if found is None:
        return 0
    loaded = load(found, small(0))
    assert same(loaded.state, small(loaded.step))
    assert loaded.step == step_of(found)
    return loaded.step


@needs_fork
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """50 runs of one folder, each going on where the one before was killed."""
    assert torch.get_num_threads() == 1
    draw, last, left = random.Random(0), 0, 0
    for _ in range(50):
        reading, writing = os.pipe()

        def work(writing: int = writing, last: int = last) -> None:
            clear(tmp_path)
            for step in range(last + 1, last + 10_000):
                save(tmp_path, small(step), step=step)
                os.write(writing, step.to_bytes(4, "little"))

        child = forked(work)
        os.close(writing)
        time.sleep(draw.uniform(0, 0.08))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        with os.fdopen(reading, "rb") as pipe:
            done = pipe.read()
        reported = int.from_bytes(done[-4:], "little") if done else last
        found = whole(tmp_path)
        assert reported <= found <= reported + 1
        left += any(p.name.startswith(".") for p in tmp_path.iterdir())
        clear(tmp_path)
        assert not any(p.name.startswith(".") for p in tmp_path.iterdir())
        assert whole(tmp_path) == found
        last = found
    assert left > 5  # many were killed while they wrote
    assert last > 50


CALLS = ("open", "mkdir", "fsync", "rename", "unlink", "rmdir")


@needs_fork
@pytest.mark.parametrize("again", [False, True])
def test_killed_at_every_call_of_the_system(tmp_path: Path, again: bool) -> None:
    """Before the first call, before the second, …: the newest is the old one up to some call, and then the new one."""
    seen, call = [], 0
    while not seen or seen[-1] != "ended":
        call += 1
        folder = tmp_path / str(call)
        for step in (1, 2, 3):
            save(folder, small(step), step=step)

        def work(folder: Path = folder, call: int = call) -> None:
            left = [call]

            def dying(function: Callable[..., Any]) -> Callable[..., Any]:
                def called(*args: Any, **kwargs: Any) -> Any:
                    left[0] -= 1
                    if left[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*args, **kwargs)

                return called

            for name in CALLS:
                setattr(os, name, dying(getattr(os, name)))
            durable.open = dying(open)  # type: ignore[attr-defined]
            state = replace(small(3), seed=1) if again else small(4)
            save(folder, state, step=3 if again else 4)

        ended = os.waitpid(forked(work), 0)[1]
        assert ended in (0, signal.SIGKILL)
        loaded = load(folder, small(0), seed_matters=False)
        assert same(replace(loaded.state, seed=0), small(loaded.step))
        news = loaded.state.seed == 1 if again else loaded.step == 4
        for path in folder.glob("step-*"):  # the earlier ones are whole or gone
            load(path, small(0), seed_matters=False)
        clear(folder)
        assert all(step_of(p) and not p.name.startswith(".") for p in folder.iterdir())
        after = load(folder, small(0), seed_matters=False)
        assert (after.step, after.state.seed) == (loaded.step, loaded.state.seed)
        assert len(list(folder.iterdir())) >= 3
        seen.append("ended" if ended == 0 else news)
    before, killed = seen.index(True), seen[:-1]
    assert killed == [False] * before + [True] * (len(killed) - before)
    assert before >= 7  # two files and two folders are synced, a folder is made, two files are opened
    assert len(killed) > before + 3  # and the old one is removed after that


def test_what_is_saved_after_a_kill_in_between_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, small(1), step=1)
    (tmp_path / "step-00000001").rename(tmp_path / ".step-00000001.previous")
    assert whole_hidden(tmp_path) == 1
    save(tmp_path, small(1), step=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def whole_hidden(folder: Path) -> int:
    found = newest(folder)
    assert found is not None
    assert found.name == ".step-00000001.previous"
    return whole(folder)


def test_clear_leaves_what_is_not_its_own(good: Path) -> None:
    for name in (".step-00000003.1-a.writing", ".step-00000001.1-a.removed"):
        (good / name).mkdir()
        (good / name / "state.pt").write_text("half")
    for name in (".gitignore", "history.jsonl", ".step-notes", "step-1"):
        (good / name).write_text("kept")
    clear(good)
    names = [".gitignore", ".step-notes", "history.jsonl", "step-00000001", "step-00000002", "step-1"]
    assert sorted(p.name for p in good.iterdir()) == names


def test_the_manifest_says_everything_it_was_given() -> None:
    told = Manifest(1, {"y": 2}, {"a": [float("-inf"), 0.1]}, 3, {"y": 4}, "00", 5, {}, {})
    assert parse(told.text().encode()) == told
