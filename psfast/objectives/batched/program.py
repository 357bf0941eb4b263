"""A function of tensors, recorded once and replayed as a straight line of calls.

What the rules decide about a block (which rule, which shapes, what to overwrite) is the same
for every block of one tensor and size, and for a few trial points the deciding takes longer
than the arithmetic. A ``Program`` keeps the tensor operations alone, so its bits are those of
the function that it was recorded from.
"""

import threading
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from psfast.objectives.batched.modes import run_under
from psfast.objectives.batched.trace import Node

aten = torch.ops.aten

_VIEWS = {aten.view.default, aten._unsafe_view.default}


class Program:
    """``run(*inputs)`` is the function; reads: the numbers of the nodes whose values it reads.

    needs: what the incumbent must bring up to date before
    """

    __slots__ = ("needs", "reads", "run")

    def __init__(self, run: Callable, reads: set[int]):
        self.run = run
        self.reads = reads
        self.needs: frozenset[int] = frozenset()


class _Recording(threading.local):
    """by: this thread's recorder"""

    by: "_Recorder | None" = None


_recording = _Recording()


class Unrecordable(Exception):
    """The function reads a tensor that it was not given, or a value on the host."""


def kept(memo: dict, name: str, compute: Callable):
    """``memo[name]``, computed at its first use; a program computes it when it is gone."""
    if _recording.by is not None:
        return _recording.by.keep(memo, name, compute)
    if name not in memo:
        memo[name] = compute()
    return memo[name]


def is_over(test: Tensor) -> bool:
    """Whether no element of ``test`` is true, so that the function is to return None.

    As a program is straight, it is recorded as if some were, and returns None where none is.
    """
    if _recording.by is not None:
        _recording.by.return_unless(test)
        return False
    return True not in test.tolist()


def record(function: Callable, inputs: list[Tensor], nodes: list[Node], store=()) -> Program:
    """``function(*inputs)`` as a straight line, for other inputs of the same shapes.

    function: -> a tree of tensors that it computed from ``inputs`` and the values of ``nodes``
    store: the nodes to write the results to instead of returning them, one a result

    Raises Unrecordable.
    """
    names = {}
    for node in nodes:
        if isinstance(node.value, Tensor):
            names.setdefault(id(node.value), f"n{node.number}.value")
        for place, part in enumerate(node.value if isinstance(node.value, tuple) else ()):
            names.setdefault(id(part), f"n{node.number}.value[{place}]")
    constants = {id(t) for n in nodes for t in n.shapes.get("places", ())}
    recorder = _Recorder(names, constants, {f"n{n.number}": n for n in nodes})
    return recorder.run(function, inputs, store)


class _Recorder(TorchDispatchMode):
    """Writes down every operation below autograd.

    lines: (text, the names it assigns, the names it reads, whether it may be left out)
    viewed: id of a view -> what it is a view of
    """

    def __init__(self, names: dict[int, str], constants: set[int], scope: dict):
        super().__init__()
        self.outer_names = names
        self.names = dict(names)
        self.constants = constants
        self.scope = dict(scope)
        self.lines: list[tuple[str, list[str], list[str], bool]] = []
        self.viewed: dict[int, Tensor] = {}
        self.alive: list = []  # while we record, an id must stand for one tensor
        self.reads: list[str] = []
        self.all_reads: set[int] = set()

    def run(self, function: Callable, inputs: list[Tensor], store) -> Program:
        outer = _recording.by
        arguments = [f"x{i}" for i in range(len(inputs))]
        self.names.update({id(x): name for x, name in zip(inputs, arguments, strict=True)})
        try:
            _recording.by = self
            out = run_under(self, function, *inputs)
        finally:
            _recording.by = outer
        self.reads = []
        if store:
            ends = [
                f"n{node.number}.value = {self._text(value)}"
                for node, value in zip(store, out, strict=True)
            ]
        else:
            ends = [f"return {self._text(out)}"]
        return Program(self._compiled(arguments, ends, self.reads), self.all_reads)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        if _recording.by is not self:
            return out
        if op is aten._local_scalar_dense.default:
            raise Unrecordable(f"{op} reads a value on the host")
        self.reads = []
        if op in _VIEWS:
            args = self._of_the_first(args)
            if args[0].shape == out.shape and id(args[0]) in self.names:
                self.alive.append(out)
                self.names[id(out)] = self.names[id(args[0])]
                return out
            self.viewed[id(out)] = args[0]
        call = [self._text(a) for a in args]
        call += [f"{name}={self._text(a)}" for name, a in kwargs.items()]
        text = f"{self._constant(_binding(op, args, kwargs))}({', '.join(call)})"
        outs = out if isinstance(out, (tuple, list)) else [out]
        mutable = op._schema.is_mutable
        if mutable and any(id(o) in self.names for o in outs):
            self.lines.append((text, [], self.reads, False))
            return out
        assigned = [self._new(o) for o in outs]
        left = ", ".join(assigned) + ("," if isinstance(out, (tuple, list)) else "")
        self.lines.append((f"{left} = {text}", assigned, self.reads, not mutable))
        return out

    def _of_the_first(self, args: tuple) -> tuple:
        """A view of views, as one of what they view: their number costs more than their work."""
        source = args[0]
        while source.is_contiguous() and id(source) in self.viewed:
            source = self.viewed[id(source)]
        return (source, *args[1:]) if source.is_contiguous() else args

    def keep(self, memo: dict, name: str, compute: Callable):
        inner = _Recorder(self.outer_names, self.constants, self.scope)
        value = None

        def run():
            nonlocal value
            value = compute()
            return value

        program = inner.run(run, [], ())
        memo[name] = value
        self.alive.append((memo, value))
        self.all_reads |= program.reads
        new = self._new(value)
        store, program = self._constant(memo), self._constant(program.run)
        self.lines.append((f"{new} = kept({store}, {name!r}, {program})", [new], [], True))
        return value

    def return_unless(self, test: Tensor) -> None:
        self.reads = []
        line = f"if True not in {self._text(test)}.tolist(): return None"
        self.lines.append((line, [], self.reads, False))

    def _new(self, value) -> str:
        name = f"t{len(self.alive)}"
        self.alive.append(value)
        if isinstance(value, tuple):
            self.names.update({id(v): f"{name}[{i}]" for i, v in enumerate(value)})
        elif value is not None:
            self.names[id(value)] = name
        return name

    def _constant(self, value) -> str:
        name = f"c{id(value)}"
        self.scope[name] = value
        return name

    def _text(self, value) -> str:
        """The value as an expression of the program."""
        if isinstance(value, Tensor):
            if id(value) in self.names:
                name = self.names[id(value)]
                variable = name.partition("[")[0]
                self.reads.append(variable)
                if variable[0] == "n":
                    self.all_reads.add(int(variable[1:].partition(".")[0]))
                return name
            if id(value) in self.constants:
                return self._constant(value)
            raise Unrecordable(f"a tensor of shape {tuple(value.shape)} comes from elsewhere")
        if isinstance(value, (list, tuple)):
            inner = "".join(f"{self._text(v)}, " for v in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner})"
        if value is None or isinstance(value, (bool, int, str)):
            return repr(value)
        return self._constant(value)

    def _compiled(self, arguments: list[str], ends: list[str], needed: list[str]) -> Callable:
        """The program as Python code, without what nobody reads; values end at their last use."""
        body = [f"    {end}" for end in ends]
        live = set(needed)
        for text, assigned, reads, may_go in reversed(self.lines):
            if may_go and live.isdisjoint(assigned):
                continue
            over = [r for r in dict.fromkeys([*assigned, *reads]) if r[0] == "t" and r not in live]
            if over:
                body.append(f"    {' = '.join(over)} = None")
            body.append(f"    {text}")
            live.update(reads)
        header = f"def program({', '.join(arguments)}):"
        source = "\n".join([header, *reversed(body)])
        scope = {**self.scope, "kept": kept}
        exec(compile(source, "<program of a block>", "exec"), scope)  # our own text alone
        return scope["program"]


class _Seen(Exception):
    """Ends a call before it does anything."""


class _Spy(TorchDispatchMode):
    """Notes the first operation that a call comes down to, and stops it there."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen = op, args, kwargs or {}
        raise _Seen


_bindings: dict[tuple, Callable] = {}  # by the operation and the kinds of its arguments


def _binding(op, args: tuple, kwargs: dict) -> Callable:
    """The same operation as torch's own Python function, which takes half the time of ``op``.

    That is one that comes down to this very call; ``op`` itself where there is none.
    """
    key = (op, tuple(map(_kind, args)), tuple(kwargs))
    if key not in _bindings:
        name = op._schema.name.partition("::")[2]
        candidates = [getattr(p, name, None) for p in (torch._C._VariableFunctions, Tensor)]
        found = [c for c in candidates if c is not None and _comes_down_to(c, op, args, kwargs)]
        _bindings[key] = found[0] if found else op
    return _bindings[key]


def _kind(value) -> tuple:
    """Its type and its items': torch's functions take other lists than its operations do."""
    inner = frozenset(map(type, value)) if isinstance(value, (list, tuple)) else None
    return type(value), inner


def _comes_down_to(function: Callable, op, args: tuple, kwargs: dict) -> bool:
    outer, spy = _recording.by, _Spy()
    try:
        _recording.by = None
        run_under(spy, partial(function, *args, **kwargs))
    except _Seen:
        got, spec = pytree.tree_flatten(spy.seen)
        expected, expected_spec = pytree.tree_flatten((op, args, kwargs))
        return spec == expected_spec and all(
            a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else a == b
            for a, b in zip(got, expected, strict=True)
        )
    except (TypeError, RuntimeError):  # takes other arguments
        return False
    finally:
        _recording.by = outer
    return False
