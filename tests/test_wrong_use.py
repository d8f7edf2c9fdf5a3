"""The table of wrong uses: what was done, the error's class, and what its message must say.

Every message says what came, what was expected and what to do. Later pieces add their rows here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torchopt
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import funcmlo as fm
from tests.oracles import bits

SGD = torchopt.sgd(0.1)


def lower(y, x, batch):
    return ((y - x - batch) ** 2).sum()


def upper(x, y):
    return (y**2).sum()


def program(low: Callable = lower, up: Callable = upper, lower_optimizer: object = SGD, **fields) -> fm.Multilevel:
    fields.setdefault("response", fm.AID(fm.CG(3)))
    return fm.Multilevel(fm.Level("y", low, lower_optimizer, steps=2, **fields), fm.Level("x", up, SGD))


ZERO = torch.zeros(2)
ARGMIN = fm.argmin(lambda y, x: ((y - x) ** 2).sum(), SGD, steps=1, response=fm.AID(fm.CG(3)))
PARAMS = {"y": torch.zeros(2), "x": torch.ones(2)}
BATCH = {"y": torch.zeros(2)}


def step(batches: object = BATCH, params: object = PARAMS, **fields) -> object:
    p = program(**fields)
    return p.step(p.init(params), batches)


def hypergradient(batches: object = BATCH, of: str = "x", solve: bool = True, **fields) -> object:
    p = program(**fields)
    return p.hypergradient(p.init(PARAMS), batches, of=of, solve=solve)


class Answer(fm.BestResponse):
    """An estimator whose answer is whatever the test says."""

    def __init__(self, answer: object) -> None:
        object.__setattr__(self, "answer", answer)

    def vjp(self, solved, cotangent, state):
        return self.answer


class Uncopied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = (i for i in range(3))


def level(**fields) -> fm.Level:
    settings = {"name": "y", "loss": lower, "optimizer": SGD, **fields}
    return fm.Level(settings.pop("name"), settings.pop("loss"), settings.pop("optimizer"), **settings)


def infinite(y, x):
    return (y * x * torch.inf).sum()


def overwriting(y, x):
    with torch.no_grad():
        y.clamp_(-1.0, 1.0)
    return ((y - x) ** 2).sum()


def root(y, x):
    return torch.sqrt(y - x).sum()


D, P, B, L, N, E = (
    fm.DefinitionError,
    fm.ParameterError,
    fm.BatchError,
    fm.LossError,
    fm.NonFiniteError,
    fm.EstimatorError,
)

WRONG: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    # levels
    "a name that is no identifier": (lambda: level(name="my level"), D, r"identifier is expected; 'my level' came"),
    "a reserved name": (lambda: level(name="batch"), D, r"'batch' is reserved"),
    "a reserved ending": (lambda: level(name="net_buffers"), D, r"'net_buffers' is reserved"),
    "a loss that is no function": (lambda: level(loss=3.0), D, r"loss must be a function, but float came"),
    "a loss without arguments": (lambda: level(loss=lambda: 0.0), D, r"no positional argument.*own parameters"),
    "a loss without a signature": (lambda: level(loss=iter), D, r"no signature.*wrap it in a function"),
    "*args undeclared": (lambda: level(loss=lambda *args: 0.0), D, r"takes \*args.*declare it with reads="),
    "reads= of no argument": (
        lambda: level(reads={"w": "x"}),
        D,
        r"no argument 'w' that reads= names; its arguments: x, batch",
    ),
    "a maker that is not called": (
        lambda: level(optimizer=fm.optim.sgd),
        D,
        r"optimizer='sgd' is not called; expected a functional optimizer such as torchopt.sgd\(0.1\)",
    ),
    "reads= that is no dict": (lambda: level(reads=["x"]), D, r"reads must be a dict.*\['x'\] came"),
    "a level that reads itself": (
        lambda: level(loss=lambda p, y: 0.0),
        D,
        r"its loss reads 'y', the level itself.*first argument",
    ),
    "an init that takes a batch": (
        lambda: level(init=lambda batch: batch),
        D,
        r"its init reads a batch; only a loss or a solver can",
    ),
    "an init that is no function": (lambda: level(init=torch.zeros(2)), D, r"init must be a function, but Tensor came"),
    "a project that is no function": (lambda: level(project=1.0), D, r"project must be a function, but float came"),
    "reads= of a number": (lambda: level(reads={"x": 3}), D, r"reads must be a dict.*\{'x': 3\} came"),
    "defaults that *args would fill": (
        lambda: level(loss=lambda y, x, /, scale=2.0, *rest: 0.0, reads={"a": "batch"}),
        D,
        r"has defaults before \*rest \(scale\).*keyword-only, or bind them with functools.partial",
    ),
    "maximize that is no truth value": (lambda: level(maximize="no"), D, r"maximize='no'; expected True or False"),
    "replay that is no truth value": (lambda: level(replay="no"), D, r"replay='no'; expected True or False"),
    "an optimizer that is not called": (lambda: level(optimizer=torchopt.sgd), D, r"optimizer='sgd' is not called"),
    "torch.optim's class": (
        lambda: level(optimizer=torch.optim.SGD),
        D,
        r"optimizer='SGD' is not called; expected a functional",
    ),
    "torchopt's class": (
        lambda: level(optimizer=torchopt.Adam),
        D,
        r"optimizer='Adam' is not called; expected a functional",
    ),
    "negative steps": (lambda: level(steps=-1), D, r"steps=-1; expected an integer of at least 0"),
    "steps that are no integer": (lambda: level(steps=2.5), D, r"steps=2.5; expected an integer"),
    "steps that are a truth value": (lambda: level(steps=True), D, r"steps=True; expected an integer"),
    "a response that is a class": (lambda: level(response=fm.ITD), D, r"no best response \(call it: ITD\(\)\)"),
    "a response that is a solver": (lambda: level(response=fm.CG(3)), D, r"CG\(.*no best response; expected ITD\(\)"),
    "torch.optim": (
        lambda: level(optimizer=torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)),
        D,
        r"SGD keeps its state inside itself; expected a functional optimizer, such as torchopt.sgd\(lr\)",
    ),
    "torchopt's stateful optimizer": (
        lambda: level(optimizer=torchopt.Adam([torch.zeros(1, requires_grad=True)], 0.1)),
        D,
        r"Adam keeps its state inside itself.*torchopt.adam\(lr\)",
    ),
    "an optimizer that is a number": (lambda: level(optimizer=0.1), D, r"optimizer must be a functional.*float came"),
    "an optimizer function that makes none": (
        lambda: step(lower_optimizer=lambda x: 0.1, response=fm.ITD()),
        D,
        r"its optimizer function returned float; expected a functional optimizer",
    ),
    # estimators and solvers
    "AID without a solver": (lambda: fm.AID(20), D, r"AID\(solver=20\): expected a linear solver such as CG\(20\)"),
    "AID of a solver class": (lambda: fm.AID(fm.CG), D, r"expected a linear solver"),
    "CG without iterations": (lambda: fm.CG(0), D, r"CG\(iterations=0\): expected an integer of at least 1"),
    "CG with half an iteration": (lambda: fm.CG(1.5), D, r"CG\(iterations=1.5\)"),
    "CG with a tolerance that is no number": (lambda: fm.CG(3, tol=float("nan")), D, r"tol=nan"),
    "CG with a preconditioner that is no function": (
        lambda: fm.CG(3, preconditioner=3),
        D,
        r"preconditioner=3\): expected a function from a tree to a tree",
    ),
    "Neumann with an infinite scale": (lambda: fm.Neumann(3, scale=float("inf")), D, r"scale=inf"),
    "an infinite finite difference": (lambda: fm.FiniteDifference(scale=float("inf")), D, r"scale=inf"),
    "a dense solve of nothing": (lambda: fm.Direct(max_size=-1), D, r"max_size=-1\): expected an integer of at least 1"),
    "CG with negative damping": (lambda: fm.CG(3, damping=-1.0), D, r"damping=-1.0.*not negative"),
    "Neumann without a scale": (
        lambda: fm.Neumann(3, scale=0.0),
        D,
        r"scale=0.0\): expected a positive number below 2/λ_max",
    ),
    "Neumann without iterations": (lambda: fm.Neumann(0, scale=0.1), D, r"Neumann\(iterations=0\)"),
    "Neumann with a negative tolerance": (lambda: fm.Neumann(1, scale=0.1, tol=-1.0), D, r"tol=-1.0"),
    "a finite difference without a step": (lambda: fm.FiniteDifference(scale=0.0), D, r"scale=0.0\): expected a positive"),
    "a dense solve of a network": (
        lambda: hypergradient(response=fm.AID(fm.Direct(max_size=1))),
        D,
        r"Direct\(\) would lay out a 2 × 2 matrix; it takes at most 1. Use CG",
    ),
    "ITD without inner steps": (lambda: hypergradient(response=fm.ITD(), solve=False), E, r"none were made.*use AID"),
    "an estimator without a triple": (lambda: step(response=Answer({})), E, r"returned dict; expected a triple"),
    "an estimator that forgets an input": (
        lambda: step(response=Answer(({}, None, fm.Stats()))),
        E,
        r"returned cotangents for none; expected one for every input: x",
    ),
    "an estimator with a wrong shape": (
        lambda: step(response=Answer(({"x": torch.zeros(3)}, None, fm.Stats()))),
        E,
        r"cotangent of input 'x' and that input differ: leaf has shape \(3,\), expected \(2,\)",
    ),
    "an estimator without stats": (
        lambda: step(response=Answer(({"x": torch.zeros(2)}, None, 3))),
        E,
        r"stats of type int; expected fm.Stats",
    ),
    # programs
    "no level": (fm.Multilevel, D, r"takes Level objects, lowest first; none came"),
    "a list of levels": (lambda: fm.Multilevel([level()]), D, r"takes Level objects, lowest first; list came"),
    "an unknown composition": (
        lambda: fm.Multilevel(level(loss=lambda p: 0.0), composition="exact"),
        D,
        r"composition='exact'; expected 'paths' or 'nested'",
    ),
    "an argmin without its inputs": (
        lambda: ARGMIN(ZERO),
        P,
        r"argmin: the inputs 'x' did not come; expected solve\(init, x\)",
    ),
    "an argmin with too many inputs": (lambda: ARGMIN(ZERO, ZERO, ZERO), P, r"argmin: 2 inputs came, but 1 are taken \(x\)"),
    "an argmin with an unknown input": (lambda: ARGMIN(ZERO, xs=ZERO), P, r"no input is called 'xs'; did you mean 'x'\?"),
    "an argmin with an input twice": (lambda: ARGMIN(ZERO, ZERO, x=ZERO), P, r"input 'x' came twice"),
    "an argmin from an integer": (lambda: ARGMIN(3, ZERO), P, r"argmin: init is int; expected a tree of floating-point"),
    "an argmin from integers": (lambda: ARGMIN({"w": ZERO.int()}, ZERO), P, r"init\['w'\] is a tensor of dtype torch.int32"),
    "an argmin with a batch that none takes": (
        lambda: ARGMIN(ZERO, ZERO, batch=ZERO),
        fm.BatchError,
        r"has no argument batch, but one came",
    ),
    "an argmin without its batch": (
        lambda: fm.argmin(lower, SGD, steps=1, response=fm.ITD())(ZERO, ZERO),
        fm.BatchError,
        r"takes a batch, but none came",
    ),
    "an argmin with a traced batch": (
        lambda: fm.argmin(lower, SGD, steps=1, response=fm.ITD())(ZERO, ZERO, batch=ZERO.clone().requires_grad_()),
        fm.BatchError,
        r"the batch holds a tensor that is being differentiated, .* hand it in as an input instead",
    ),
    "an argmin with a mixed input": (
        lambda: ARGMIN(ZERO, [ZERO.clone().requires_grad_(), 3]),
        P,
        r"input 'x' holds something that is differentiated beside .* as two inputs",
    ),
    "an argmin with several responses": (
        lambda: fm.argmin(lower, SGD, steps=1, response={"x": fm.ITD()}),
        D,
        r"argmin takes one response",
    ),
    "an argmin of any number of inputs": (
        lambda: fm.argmin(lambda y, *xs: 0.0, SGD, steps=1, response=fm.ITD()),
        D,
        r"its loss takes \*xs, which does not say what it reads",
    ),
    "an argmin of a closed form that is not wrapped": (
        lambda: fm.argmin(lambda y, x: (y * x).sum(), lambda x: x, steps=1, response=fm.AID(fm.CG(3)))(ZERO, ZERO),
        D,
        r"its optimizer function returned Tensor; .* wrap an outside solver in fm.Solver",
    ),
    "an outside solver that changes the shape": (
        lambda: fm.argmin(lambda y, x: (y * x).sum(), fm.Solver(lambda y, x: x[:1]), steps=1, response=fm.AID(fm.CG(3)))(
            ZERO, ZERO
        ),
        P,
        r"what its solver returned and its parameters differ: leaf has shape",
    ),
    "a fixed point of a map that changes the shape": (
        lambda: fm.fixed_point(lambda y, x: x[:1], steps=1, response=fm.ITD())(ZERO, ZERO),
        P,
        r"fixed_point: what the map returned and its first argument differ",
    ),
    "a fixed point with conjugate gradient": (
        lambda: fm.fixed_point(lambda y, x: x, steps=1, response=fm.AID(fm.CG(3))),
        E,
        r"CG solves symmetric systems, and I − ∂Φ is not symmetric; use AID\(Neumann",
    ),
    "a fixed point by finite differences": (
        lambda: fm.fixed_point(lambda y, x: x, steps=1, response=fm.FiniteDifference()),
        E,
        r"FiniteDifference needs a loss, and a fixed point has none",
    ),
    "a fixed point of negative steps": (
        lambda: fm.fixed_point(lambda y: y, steps=-1, response=fm.ITD()),
        D,
        r"steps=-1; expected an integer",
    ),
    "a fixed point without a response": (lambda: fm.fixed_point(lambda y: y, steps=1, response="cg"), D, r"'cg' is no best"),
    "a fixed point without iterations": (
        lambda: fm.fixed_point(lambda y: y, steps=0, response=fm.ITD()),
        E,
        r"ITD follows iterations, but steps=0 makes none",
    ),
    "a fixed point with a batch that none takes": (
        lambda: fm.fixed_point(lambda y: y, steps=1, response=fm.ITD())(ZERO, batch=ZERO),
        P,
        r"has no argument batch, but one came",
    ),
    "a fixed point with a batch for each step": (
        lambda: fm.fixed_point(lambda y, batch: y, steps=1, response=fm.ITD())(ZERO, batch=lambda t: ZERO),
        P,
        r"the batch is a function, but all iterations take one batch",
    ),
    "a fixed point without its batch": (
        lambda: fm.fixed_point(lambda y, batch: y, steps=1, response=fm.ITD())(ZERO),
        P,
        r"the map takes batch, but none came",
    ),
    "starts that read one another": (
        lambda: fm.Multilevel(
            fm.Level("a", lambda a, b: 0.0, SGD, init=lambda b: b, response=fm.ITD()),
            fm.Level("b", lambda b, a, c: 0.0, SGD, init=lambda a: a, response=fm.ITD()),
            fm.Level("c", lambda c, b: 0.0, SGD),
            composition="nested",
        ).init({"c": ZERO}),
        P,
        r"no parameters for 'b', 'a', whose init= read one another; pass one of them",
    ),
    "two levels of one name": (lambda: fm.Multilevel(level(), level()), D, r"two levels are called 'y'; names must differ"),
    "an unknown level in a signature": (
        lambda: program(low=lambda y, xs, batch: 0.0),
        D,
        r"level 'y' reads 'xs', which is no level; did you mean 'x'\? Levels: y, x",
    ),
    "arguments in another order": (
        lambda: program(up=lambda y, x: 0.0),
        D,
        r"its loss reads 'x', the level itself.*write them there: def loss\(x, …\)",
    ),
    "another level's name in front": (
        lambda: program(up=lambda y: 0.0),
        D,
        r"first argument is 'y', another level, but the first argument is the level's own parameters",
    ),
    "a top level without updates": (
        lambda: fm.Multilevel(level(loss=lambda y: 0.0, steps=0)),
        D,
        r"level 'y' is a top level: .* how many updates it makes for each call of step \(at least 1\)",
    ),
    "a start of the top level": (
        lambda: fm.Multilevel(level(loss=lambda y: 0.0, init=lambda: torch.zeros(2))),
        D,
        r"leave them out \(pass its parameters to program.init\)",
    ),
    "a warm-up of the top level": (lambda: fm.Multilevel(level(loss=lambda y: 0.0, warmup=3)), D, r"warmup= and roll_back="),
    "a roll-back of the top level": (
        lambda: fm.Multilevel(level(loss=lambda y: 0.0, roll_back=True)),
        D,
        r"warmup= and roll_back= have no meaning",
    ),
    "a warm-up where every loop begins afresh": (
        lambda: level(warmup=3, init=lambda x: x),
        D,
        r"with init= every inner loop begins afresh, so warmup= and roll_back= have no meaning",
    ),
    "a roll-back without inner steps": (lambda: level(steps=0, roll_back=True), D, r"no inner loop to return from"),
    "a negative warm-up": (lambda: level(warmup=-1), D, r"warmup=-1; expected an integer of at least 0"),
    "a roll-back that is no bool": (lambda: level(roll_back=1), D, r"roll_back=1; expected True or False"),
    "a dict of things that are no responses": (lambda: level(response={"x": "cg"}), D, r"response='cg' is no best response"),
    "a response for a level that is none": (
        lambda: program(response={"xs": fm.ITD()}),
        D,
        r"level 'y': its response= names 'xs', which is no level; did you mean 'x'\?",
    ),
    "a response for a level that does not ask": (
        lambda: program(response={"x": fm.ITD(), "y": fm.ITD()}),
        D,
        r"no hypergradient of 'y' runs through 'y'; those of x do",
    ),
    "a response for too few levels": (lambda: program(response={}), D, r"its response= says nothing for 'x'"),
    "an outside solver that is none": (lambda: fm.Solver(3), D, r"Solver\(function=3\): expected a function"),
    "an outside solver with a response that follows steps": (
        lambda: level(optimizer=fm.Solver(lambda y: y), response=fm.ITD()),
        D,
        r"ITD follows inner steps, but an outside solver makes none; use AID",
    ),
    # parameters
    "parameters that are no dict": (lambda: program().init([torch.zeros(2)]), P, r"takes a dict.*list came"),
    "missing parameters": (lambda: program().init({"y": torch.zeros(2)}), P, r"no parameters for level 'x'; levels: y, x"),
    "unknown parameters": (
        lambda: program().init({**PARAMS, "z": 1}),
        P,
        r"parameters for 'z', which is no level. Levels: y, x",
    ),
    "integer parameters": (
        lambda: program().init({**PARAMS, "x": {"w": [torch.zeros(2, dtype=torch.int64)]}}),
        P,
        r"level 'x': parameter \['w'\]\[0\] has dtype torch.int64; expected a real floating-point dtype",
    ),
    "complex parameters": (
        lambda: program().init({**PARAMS, "x": torch.zeros(2, dtype=torch.complex64)}),
        P,
        r"dtype torch.complex64",
    ),
    "a number for a tensor": (lambda: program().init({**PARAMS, "x": 1.5}), P, r"is float; expected.*torch.tensor\(1.5\)"),
    "a module for parameters": (
        lambda: program().init({**PARAMS, "x": nn.Linear(1, 1)}),
        P,
        r"is Linear; expected.*net = fm.Stateless\(module\), and pass net.params\(\)",
    ),
    "an object for parameters": (lambda: program().init({**PARAMS, "x": object()}), P, r"is object; expected.*optree knows"),
    "a seed that is no integer": (lambda: program().init(PARAMS, seed=0.5), P, r"seed=0.5; expected an integer"),
    "a start unlike the parameters": (
        lambda: step(init=lambda x: x[:1]),
        P,
        r"what init= returns and its parameters differ: leaf has shape \(1,\), expected \(2,\)",
    ),
    "a projection to another tree": (
        lambda: step(project=lambda y: {"y": y}, response=fm.ITD()),
        P,
        r"what project= returns and its parameters differ: structure \{'y': \*\}, expected \*",
    ),
    "a projection to another dtype": (
        lambda: step(project=torch.Tensor.double, response=fm.ITD()),
        P,
        r"project= returns.*dtype torch.float64, expected torch.float32",
    ),
    "a state of another program": (
        lambda: program().step(fm.Multilevel(level(loss=lambda y: (y**2).sum())).init({"y": torch.zeros(2)}), BATCH),
        P,
        r"belongs to another program: it has levels y; expected y, x",
    ),
    "parameters for a state": (
        lambda: program().step(PARAMS, BATCH),
        P,
        r"expected the State that program.init returns; dict",
    ),
    "an unknown level": (lambda: hypergradient(of="z"), D, r"no level is called 'z'. Levels: y, x"),
    "a level misspelt": (
        lambda: fm.Multilevel(level(name="weights", loss=lambda w: 0.0)).graph.paths("weight"),
        D,
        r"no level is called 'weight'; did you mean 'weights'\?",
    ),
    # batches
    "batches that are no dict": (lambda: step([BATCH]), B, r"batches came as list; expected a dict"),
    "a batch for no level": (lambda: step({**BATCH, "z": 1}), B, r"batches names 'z', which is no level. Levels: y, x"),
    "a missing batch": (lambda: step({}), B, r"level 'y' takes a batch, but none came: pass batches=\{'y': …\}"),
    "an exhausted iterator": (
        lambda: step({"y": iter([torch.zeros(2)])}),
        B,
        r"iterator of level 'y' ended after 1 batches, but step 2 of this call needs another.*itertools.cycle",
    ),
    "a DataLoader": (
        lambda: step({"y": DataLoader(TensorDataset(torch.zeros(2)))}),
        B,
        r"is a DataLoader, which is no iterator: pass iter\(loader\)",
    ),
    "a Dataset": (lambda: step({"y": TensorDataset(torch.zeros(2))}), B, r"is a Dataset \(TensorDataset\)"),
    "a batch for a loss that gives it a default": (
        lambda: step(low=lambda y, x, batch=None: ((y - x) ** 2).sum()),
        B,
        r"batches\['y'\] came, but the loss of level 'y' gives its batch a default.*take the default away",
    ),
    "an iterator for a pure call": (
        lambda: hypergradient({"y": itertools.repeat(torch.zeros(2))}),
        B,
        r"is an iterator, but hypergradient is pure.*fixed batch or a function",
    ),
    # costs
    "a cost that is no tensor": (
        lambda: step(low=lambda y, x: 3.0),
        L,
        r"its loss returned float; expected a scalar tensor",
    ),
    "a cost that is no scalar": (
        lambda: step(low=lambda y, x: (y - x) ** 2),
        L,
        r"returned a tensor of shape \(2,\); expected a scalar: reduce it with .mean\(\) or .sum\(\)",
    ),
    "a cost that is an integer": (lambda: step(low=lambda y, x: (y > x).sum()), L, r"dtype torch.int64; expected a real"),
    "metrics that are no dict": (
        lambda: step(low=lambda y, x: (y.sum(), [x])),
        L,
        r"returned list beside the cost; expected a dict",
    ),
    "an upper cost that is no scalar": (
        lambda: step(up=lambda x, y: y),
        L,
        r"level 'x': its loss returned a tensor of shape",
    ),
    "a loss that writes to its parameters": (
        lambda: step(low=overwriting),
        L,
        r"parameters of level 'y' were changed in place.*x.clamp\(0, 1\) in place of",
    ),
    "an infinite lower cost": (
        lambda: step(low=infinite),
        N,
        r"level 'y': its cost is nan at inner step 1 of 2.*still good",
    ),
    "an infinite upper cost": (
        lambda: step(up=lambda x, y: (y / 0.0).abs().sum()),
        N,
        r"level 'x': its cost is inf; look at its batch",
    ),
    "an infinite lower gradient": (
        lambda: step(low=root, params={"y": torch.ones(2), "x": torch.ones(2)}),
        N,
        r"level 'y': its cost is nan at inner step 2 of 2",
    ),
    "an infinite hypergradient": (
        lambda: step(low=lambda y, x: (y**2).sum() + torch.sqrt(x - 1).sum() * y.sum()),
        N,
        r"level 'x': its hypergradient is not finite although its cost is",
    ),
    # networks
    "a function for a module": (lambda: fm.Stateless(torch.relu), D, r"takes an nn.Module, but builtin.* came"),
    "a module that cannot be copied": (lambda: fm.Stateless(Uncopied()), D, r"Uncopied cannot be copied"),
    "the input before the parameters": (
        lambda: fm.Stateless(nn.Linear(2, 2))(torch.zeros(2)),
        P,
        r"takes a dict of parameters first, but Tensor came; call net\(params, x\)",
    ),
    "a parameter that is missing": (
        lambda: fm.Stateless(nn.Linear(2, 2))({"weight": torch.zeros(2, 2)}, torch.zeros(2)),
        P,
        r"parameter 'bias' is missing; weight came",
    ),
    "a parameter of another shape": (
        lambda: fm.Stateless(nn.Linear(4, 2))({"weight": torch.zeros(7, 4), "bias": torch.zeros(1)}, torch.zeros(4)),
        P,
        r"parameter 'weight' has shape \(7, 4\), expected \(2, 4\)",
    ),
    "a parameter that is unknown": (
        lambda: fm.Stateless(nn.Linear(2, 2, bias=False))(
            {"weight": torch.zeros(2, 2), "bia": torch.zeros(2)}, torch.zeros(2)
        ),
        P,
        r"has no parameter 'bia'. It has weight",
    ),
    "inference mode": (
        lambda: torch.inference_mode()(lambda: hypergradient())(),
        E,
        r"torch.inference_mode forbids; use torch.no_grad",
    ),
    "a derivative of a program": (
        lambda: torch.func.grad(lambda y: step(params={**PARAMS, "y": y})[1]["x"]["cost"])(torch.zeros(2)),
        E,
        r"step and hypergradient cannot be differentiated",
    ),
}


@pytest.mark.parametrize("use", WRONG)
def test_wrong_use_is_answered_by_name(use: str) -> None:
    wrong, error, message = WRONG[use]
    assert issubclass(error, fm.FuncmloError)
    with pytest.raises(error, match=message):
        wrong()


@pytest.mark.parametrize("batches", [{"y": iter([torch.zeros(2)])}, {}, {"y": torch.full((2,), torch.nan)}], ids=repr)
def test_an_error_leaves_the_state_as_it_was(batches: dict[str, object]) -> None:
    p = program()
    state, _ = p.step(p.init(PARAMS), BATCH)
    before = bits(state)
    with pytest.raises(fm.FuncmloError):
        p.step(state, batches)
    assert bits(state) == before
    p.step(state, BATCH)


def test_a_cost_that_ignores_the_level_below_warns_and_gives_its_direct_gradient() -> None:
    p = program(up=lambda x, y: (x**2).sum())
    state = p.init(PARAMS)
    with pytest.warns(fm.FuncmloWarning, match="its cost does not depend on it"):
        answer = p.hypergradient(state, BATCH, of="x")
    assert torch.equal(answer, 2 * PARAMS["x"])
    with pytest.warns(fm.FuncmloWarning, match="its cost does not depend on it"):
        after, _ = p.step(state, BATCH)
    assert torch.allclose(after.params["x"], 0.8 * PARAMS["x"])


def test_a_cost_that_depends_on_nothing_warns_and_gives_zero() -> None:
    p = program(up=lambda x, y: torch.tensor(1.0))
    with pytest.warns(fm.FuncmloWarning, match="its cost does not depend on it"):
        answer = p.hypergradient(p.init(PARAMS), BATCH, of="x")
    assert torch.equal(answer, torch.zeros(2))


@pytest.mark.parametrize(
    ("low", "up"),
    [(lower, lambda x: (x**2).sum()), (lambda y: (y**2).sum(), upper)],
    ids=["the upper cost reads nothing", "the lower cost reads nothing"],
)
def test_a_program_without_a_path_says_so(low: Callable, up: Callable) -> None:
    with pytest.warns(fm.FuncmloWarning, match="no path leads from level 'x'"):
        p = program(low=low, up=up)
    state = p.init(PARAMS)
    answer = p.hypergradient(state, BATCH if low is lower else {}, of="x")
    assert torch.equal(answer, 2 * PARAMS["x"] if low is lower else torch.zeros(2))


def test_a_lower_cost_that_ignores_its_own_parameters_warns() -> None:
    p = program(low=lambda y, x: (x**2).sum())
    with (
        pytest.warns(fm.FuncmloWarning, match="level 'y' reads 'x', but the gradient of its cost"),
        pytest.warns(fm.FuncmloWarning, match="does not depend on its own parameters"),
    ):
        p.step(p.init(PARAMS), {})


def test_a_response_that_is_zero_because_the_lower_cost_ignores_the_upper_level() -> None:
    for response in (fm.ITD(), fm.AID(fm.CG(3)), fm.FiniteDifference()):
        p = program(low=lambda y, x: (y**2).sum(), response=response)
        state = replace(p.init(PARAMS), seed=4)
        with pytest.warns(
            fm.FuncmloWarning, match="level 'y' reads 'x', but the gradient of its cost does not depend on it"
        ):
            assert torch.equal(p.hypergradient(state, {}, of="x"), torch.zeros(2))


@pytest.mark.parametrize(
    ("fields", "unseen"),
    [
        ({"lower_optimizer": lambda x: torchopt.sgd(x[0])}, True),
        ({"init": lambda x: x, "low": lambda y: (y**2).sum()}, True),
        ({"init": lambda x: x}, False),  # the loss reads x too: a start beside a proximal term
    ],
    ids=["optimizer", "init alone", "init and loss"],
)
def test_what_a_solution_cannot_show_is_said(fields: dict[str, object], unseen: bool) -> None:
    for response in (fm.FiniteDifference(), fm.AID(fm.CG(3))):
        if unseen:
            with pytest.warns(fm.FuncmloWarning, match=r"does not look at what its init.*reads of x, so .* use ITD\(\)"):
                program(response=response, **fields)
        else:
            program(response=response, **fields)
    program(response=fm.ITD(), **fields)
