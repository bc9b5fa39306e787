"""Sizes that are integers or sympy expressions, and their exact way to text and back without `eval`."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, TypeAlias

import sympy

from zgraph.errors import ZirError

Dim: TypeAlias = int | sympy.Expr

_CALLS: Mapping[str, Callable[..., Any]] = {
    "floor": sympy.floor,
    "ceiling": sympy.ceiling,
    "Mod": sympy.Mod,
    "Max": sympy.Max,
    "Min": sympy.Min,
    "Abs": sympy.Abs,
}
_OPERATORS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: sympy.sympify(a) / b,
    ast.Pow: lambda a, b: a**b,
}
_MAX_LENGTH = 1000
_MAX_NODES = 120
_MAX_EXPONENT = 8
_MAX_SUM_EXPONENT = 3
_MAX_SUM_OPERATIONS = 8
_MAX_NUMBER = 2**63
_MAX_ARGUMENTS = 4
_MAX_COMPARISONS = 4
_MAX_MOD_OPERATIONS = 16
_HELP = "a size has integers, names, + - * / **, floor, ceiling, Mod, Max, Min and Abs"


def symbol(name: str) -> sympy.Symbol:
    """The size symbol called `name`: sizes are positive integers, and one name is one symbol everywhere."""
    return sympy.Symbol(name, integer=True, positive=True)


def simplify(value: Any) -> Dim:
    """A plain int where the expression is a number, the expression itself where it is not."""
    return int(value) if isinstance(value, int | sympy.Integer) else value


def render(dim: Dim) -> str:
    """`dim` as text that `parse_dim` reads back to the same expression."""
    return str(dim)


@lru_cache(maxsize=4096)
def parse_dim(text: str) -> Dim:
    """The size that `text` writes: integers, names, + - * / **, floor, ceiling, Mod, Max, Min, Abs.

    Sympy simplifies what it builds, and some small texts make it do so for minutes; the limits here keep every answer
    well under a second.

    Raises:
        ZirError: anything else. Nothing in the text is ever evaluated as Python.
    """
    size = _read(text)
    if size != _read(render(size)):
        raise ZirError("this size is too large, or too involved, to be written and read back", text)
    return size


def is_readable(dim: Dim) -> bool:
    """Whether `parse_dim` reads back what `render` writes for `dim`."""
    try:
        return bool(parse_dim(render(dim)) == dim)
    except ZirError:
        return False


def evaluate(dim: Dim, hints: Mapping[str, int]) -> int:
    """`dim` as a number, with `hints` for its symbols. A symbol without a hint counts as 1."""
    if isinstance(dim, int):
        return dim
    return int(dim.subs({s: hints.get(str(s), 1) for s in dim.free_symbols}))


def _read(text: str) -> Dim:
    if len(text) > _MAX_LENGTH:
        raise ZirError(f"a size of {len(text)} characters is longer than the {_MAX_LENGTH} allowed")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        nodes = list(ast.walk(tree))
        comparisons = [n for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "id", "") in ("Max", "Min")]
        if len(nodes) > _MAX_NODES or len(comparisons) > _MAX_COMPARISONS:
            raise ZirError("this size is too involved", text)
        size = simplify(_build(tree, text))
    except (SyntaxError, RecursionError, TypeError, ValueError, ZeroDivisionError, MemoryError) as error:
        if isinstance(error, ZirError):
            raise
        raise ZirError(f"not a size: {error}", text) from None
    if not isinstance(size, int) and (size.is_integer is False or size.is_number):
        raise ZirError(f"{size} is no whole number", text)
    return size


def _is_small_power(base: Any, exponent: Any) -> bool:
    if not (exponent.is_Integer and exponent > 0):
        return False
    if base.is_Symbol:
        return bool(exponent <= _MAX_EXPONENT)
    involved = base.has(sympy.Pow, sympy.Mod, sympy.Max, sympy.Min)
    return bool(exponent <= _MAX_SUM_EXPONENT and base.count_ops() <= _MAX_SUM_OPERATIONS and not involved)


def _build(node: ast.expr, text: str) -> Any:
    match node:
        case ast.Constant(value=int(number)) if not isinstance(number, bool) and number < _MAX_NUMBER:
            return sympy.Integer(number)
        case ast.Name(id=name):
            return symbol(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_build(operand, text)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            a, b = _build(left, text), _build(right, text)
            if isinstance(op, ast.Pow) and not _is_small_power(a, b):
                raise ZirError(
                    f"a power in a size is a name to an integer up to {_MAX_EXPONENT}, or a short sum to one up to "
                    f"{_MAX_SUM_EXPONENT}",
                    text,
                )
            if isinstance(op, ast.Div) and b.is_zero:
                raise ZirError("a size divided by zero", text)
            return _OPERATORS[type(op)](a, b)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _CALLS:
            if not 0 < len(args) <= _MAX_ARGUMENTS:
                raise ZirError(f"{name} takes 1 to {_MAX_ARGUMENTS} arguments", text)
            built = [_build(a, text) for a in args]
            if name == "Mod" and any(a.count_ops() > _MAX_MOD_OPERATIONS or a.has(sympy.Pow) for a in built):
                raise ZirError("the operands of Mod are too involved", text)
            return _CALLS[name](*built)
    raise ZirError(_HELP, text)
