"""Messages at random: any value that the decoder lets through, its extremes above all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from hypothesis import strategies as st
from msgspec import inspect

from triptych.bus import Message

Values = st.SearchStrategy[Any]
_INT64 = 2**63


def bodies_of(messages: tuple[type[Message], ...], words: tuple[str, ...]) -> st.SearchStrategy[bytes]:
    """Encoded messages of these types; their texts are random, or among `words`."""
    alphabet = st.sampled_from(words)

    def values(kind: Any) -> Values:
        return _STRATEGIES[type(kind)](kind, values, alphabet)

    return st.one_of(*(values(inspect.type_info(message)) for message in messages)).map(msgspec.msgpack.encode)


def _integers(kind: inspect.IntType, *_: object) -> Values:
    low = -_INT64 if kind.ge is None else int(kind.ge)
    high = 2 * _INT64 - 1 if kind.le is None else int(kind.le)
    return st.integers(max(low, 0), min(high, 9)) | st.sampled_from((low, high)) | st.integers(low, high)


def _floats(kind: inspect.FloatType, *_: object) -> Values:
    return st.sampled_from((0.0, 0.5, float("inf"))) | st.floats(min_value=kind.ge, allow_nan=kind.ge is None)


def _texts(kind: inspect.StrType, _: object, words: Values) -> Values:
    return words | st.text(max_size=30) | st.just("x" * (kind.max_length or 500))


def _structs(kind: inspect.StructType, values: Callable[[Any], Values], _: object) -> Values:
    tag = [] if kind.tag is None else [st.just(kind.tag)]
    return st.tuples(*tag, *(values(field.type) for field in kind.fields))


_STRATEGIES: dict[type, Callable[[Any, Callable[[Any], Values], Values], Values]] = {
    inspect.IntType: _integers,
    inspect.FloatType: _floats,
    inspect.StrType: _texts,
    inspect.BytesType: lambda *_: st.binary(max_size=30),
    inspect.BoolType: lambda *_: st.booleans(),
    inspect.NoneType: lambda *_: st.none(),
    inspect.EnumType: lambda kind, *_: st.sampled_from([member.value for member in kind.cls]),
    inspect.LiteralType: lambda kind, *_: st.sampled_from(kind.values),
    inspect.VarTupleType: lambda kind, values, _: st.lists(values(kind.item_type), max_size=3),
    inspect.TupleType: lambda kind, values, _: st.tuples(*map(values, kind.item_types)),
    inspect.DictType: lambda kind, values, words: st.dictionaries(words, values(kind.value_type), max_size=3),
    inspect.UnionType: lambda kind, values, _: st.one_of(*map(values, kind.types)),
    inspect.StructType: _structs,
}
