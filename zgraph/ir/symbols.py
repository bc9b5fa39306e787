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
    "floor": sympy.floor, "ceiling": sympy.ceiling, "Mod": sympy.Mod, "Max": sympy.Max, "Min": sympy.Min,
    "Abs": sympy.Abs,
}  # fmt: skip
_OPERATORS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b, ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: sympy.sympify(a) / b, ast.Pow: lambda a, b: a**b,
}  # fmt: skip
_MAX_LENGTH = 2000
_MAX_EXPONENT = 8
_MAX_BASE = 2**32


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

    Raises:
        ZirError: anything else. Nothing in the text is ever evaluated as Python.
    """
    if len(text) > _MAX_LENGTH:
        raise ZirError(f"a size of {len(text)} characters is longer than the {_MAX_LENGTH} allowed")
    try:
        return simplify(_build(ast.parse(text.strip(), mode="eval").body, text))
    except (SyntaxError, RecursionError, TypeError, ValueError, ZeroDivisionError, MemoryError) as error:
        if isinstance(error, ZirError):
            raise
        raise ZirError(f"not a size: {error}", text) from None


def evaluate(dim: Dim, hints: Mapping[str, int]) -> int:
    """`dim` as a number, with `hints` for its symbols. A symbol without a hint counts as 1."""
    if isinstance(dim, int):
        return dim
    return int(dim.subs({s: hints.get(str(s), 1) for s in dim.free_symbols}))


def _build(node: ast.expr, text: str) -> Any:
    match node:
        case ast.Constant(value=int(number)) if not isinstance(number, bool) and abs(number) < 2**63:
            return sympy.Integer(number)
        case ast.Name(id=name):
            return symbol(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_build(operand, text)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            a, b = _build(left, text), _build(right, text)
            if isinstance(op, ast.Pow) and not (b.is_Integer and abs(b) <= _MAX_EXPONENT):
                raise ZirError(f"an exponent in a size must be an integer up to {_MAX_EXPONENT}", text)
            if isinstance(op, ast.Pow) and a.is_Number and abs(a) > _MAX_BASE:
                raise ZirError(f"a number raised to a power in a size must be at most {_MAX_BASE}", text)
            return _OPERATORS[type(op)](a, b)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _CALLS:
            return _CALLS[name](*(_build(a, text) for a in args))
    raise ZirError("a size has integers, names, + - * / **, floor, ceiling, Mod, Max, Min and Abs", text)
