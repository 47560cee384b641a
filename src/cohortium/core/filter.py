"""The cohort's filter: a small expression language over the study's features, checked before any data are read.

    age >= 18 and sex == 'female'      18 <= age < 65      chol is not None      chest_pain in ('typical', 'atypical')

It is never handed to a database or an interpreter: only the forms above, `or`, `not` and parentheses exist, so a
study cannot reach anything but the columns that it declares. Logic has three values (Kleene): a comparison with a
missing value is unknown, and only patients for whom the filter is true pass.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cohortium.core.errors import StudyError, nearest
from cohortium.core.features import Feature, Number
from cohortium.core.layout import Floats

Column = NDArray[Any]
"""Numbers as `(n,)` floats with NaN for missing, or labels as `(n,)` objects with None for missing."""
Filter = Callable[[Mapping[str, Column]], NDArray[np.bool_]]

_MAX_LENGTH = 2000
_ORDER: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_MIRROR: Mapping[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.Gt,
    ast.LtE: ast.GtE,
    ast.Gt: ast.Lt,
    ast.GtE: ast.LtE,
    ast.Eq: ast.Eq,
    ast.NotEq: ast.NotEq,
}

_Truth = Callable[[Mapping[str, Column]], Floats]
"""Gives each row 1 for true, 0 for false and 0.5 for unknown."""


def compile_filter(text: str, features: Mapping[str, Feature]) -> Filter:
    """Returns the function that tells which rows of the given columns pass.

    Raises:
        StudyError: the text is not such an expression, or names an unknown column or level.
    """
    if len(text) > _MAX_LENGTH:
        raise StudyError(f"cohort.where has {len(text)} characters: {_MAX_LENGTH} is the most")
    try:
        truth = _Compiler(features).truth(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        example = "age >= 18 and sex == 'female'"
        raise StudyError(f"cohort.where cannot be read: {text!r}; write for example: {example}") from None
    return lambda columns: truth(columns) == 1.0


class _Compiler:
    """Compiles one expression; each method takes a syntax node."""

    def __init__(self, features: Mapping[str, Feature]) -> None:
        self._features = features

    def truth(self, node: ast.expr) -> _Truth:
        match node:
            case ast.BoolOp(op=ast.And()):
                return _fold(np.minimum, [self.truth(value) for value in node.values])
            case ast.BoolOp(op=ast.Or()):
                return _fold(np.maximum, [self.truth(value) for value in node.values])
            case ast.UnaryOp(op=ast.Not()):
                inner = self.truth(node.operand)
                return lambda columns: 1.0 - inner(columns)
            case ast.Compare():
                terms = [node.left, *node.comparators]
                pairs = zip(terms[:-1], node.ops, terms[1:], strict=True)
                return _fold(np.minimum, [self._comparison(*pair) for pair in pairs])
        raise self._refused(node)

    def _comparison(self, left: ast.expr, relation: ast.cmpop, right: ast.expr) -> _Truth:
        if isinstance(right, ast.Name) and not isinstance(left, ast.Name) and type(relation) in _MIRROR:
            left, relation, right = right, _MIRROR[type(relation)](), left
        name = self._column(left)
        if isinstance(relation, ast.Is | ast.IsNot):
            if not (isinstance(right, ast.Constant) and right.value is None):
                raise self._refused(right)
            wanted = isinstance(relation, ast.Is)
            return lambda columns: (is_missing(columns[name]) == wanted).astype(np.float64)
        if isinstance(relation, ast.In | ast.NotIn):
            if not isinstance(right, ast.Tuple | ast.List | ast.Set):
                raise self._refused(right)
            values = [self._value(name, element) for element in right.elts]
            inside = _fold(np.maximum, [_compare(name, operator.eq, value) for value in values])
            return inside if isinstance(relation, ast.In) else lambda columns: 1.0 - inside(columns)
        value = self._value(name, right)
        if isinstance(value, str) and not isinstance(relation, ast.Eq | ast.NotEq):
            raise StudyError(f"cohort.where: '{name}' is a category: compare it with ==, != or in")
        return _compare(name, _ORDER[type(relation)], value)

    def _column(self, node: ast.expr) -> str:
        if not isinstance(node, ast.Name):
            raise self._refused(node)
        if node.id not in self._features:
            hint = nearest(node.id, self._features)
            raise StudyError(f"cohort.where names '{node.id}', which is no feature of the study{hint}")
        return node.id

    def _value(self, name: str, node: ast.expr) -> float | str:
        feature = self._features[name]
        sign = 1.0
        if isinstance(feature, Number) and isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            sign, node = -1.0, node.operand
        value = node.value if isinstance(node, ast.Constant) else None
        if isinstance(feature, Number):
            if isinstance(value, int | float) and not isinstance(value, bool):
                return sign * value
            raise StudyError(f"cohort.where: '{name}' is a number: compare it with a number")
        if isinstance(value, str) and value in feature.levels:
            return value
        hint = nearest(str(value), feature.levels)
        raise StudyError(f"cohort.where: {value!r} is no level of '{name}' ({', '.join(feature.levels)}){hint}")

    def _refused(self, node: ast.expr) -> StudyError:
        return StudyError(
            f"cohort.where: '{ast.unparse(node)}' is not offered; use features, numbers, levels, comparisons, in, "
            "is None, and, or, not"
        )


def _fold(combine: Any, parts: list[_Truth]) -> _Truth:
    def folded(columns: Mapping[str, Column]) -> Floats:
        truth = parts[0](columns)
        for part in parts[1:]:
            truth = combine(truth, part(columns))
        return truth

    if not parts:
        raise StudyError("cohort.where: 'in ()' admits nobody")
    return folded


def _compare(name: str, relation: Callable[[Any, Any], Any], value: float | str) -> _Truth:
    def compared(columns: Mapping[str, Column]) -> Floats:
        column = columns[name]
        return np.where(is_missing(column), 0.5, relation(column, value).astype(np.float64))

    return compared


def is_missing(column: Column) -> NDArray[np.bool_]:
    """Returns where a column holds no value, `(n,)`."""
    return np.isnan(column) if column.dtype.kind == "f" else np.array([value is None for value in column], dtype=bool)
