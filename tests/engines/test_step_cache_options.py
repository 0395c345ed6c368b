from __future__ import annotations

import pytest

from triptych.engines.step_cache_options import KINDS, StepCacheError, parse_step_cache


def test_a_cache_is_a_kind_with_parameters() -> None:
    parsed = parse_step_cache("first_block:0.1")
    assert parsed is not None
    assert (parsed.kind, parsed.values) == ("first_block", {"threshold": 0.1})
    parsed = parse_step_cache("taylorseer:4, order=2,lite=true")
    assert parsed is not None
    assert parsed.values == {"interval": 4, "warmup": 3, "order": 2, "lite": True}
    parsed = parse_step_cache("magcache:ratios=1.0 1.2 0.9")
    assert parsed is not None
    assert parsed.values["ratios"] == (1.0, 1.2, 0.9)
    assert parse_step_cache("") is None


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_defaults(kind: str) -> None:
    parsed = parse_step_cache(kind)
    assert parsed is not None
    assert parsed.values == {parameter.name: parameter.default for parameter in KINDS[kind]}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("teacache", "is not a step cache: the kinds are first_block, magcache, taylorseer, pab, faster"),
        ("first_block:", "has threshold=, which must be a number from 0 to 10"),
        ("first_block:-1", "has threshold=-1, which must be a number from 0 to 10"),
        ("first_block:nan", "has threshold=nan, which must be a number from 0 to 10"),
        ("first_block:limit=1", "has no parameter 'limit': those of first_block are threshold"),
        ("first_block:0.1,threshold=0.2", "has threshold twice"),
        ("taylorseer:2.5", "has interval=2.5, which must be a whole number"),
        ("taylorseer:4,5", "has '5' where NAME=VALUE is needed"),
        ("taylorseer:lite=yes", "has lite=yes, which must be true or false"),
        ("magcache:ratios=1", "has ratios=1, which must be at least two numbers with blanks between"),
        ("pab:from_t=800,to_t=100", "has a from_t that is not less than its to_t"),
    ],
)
def test_a_wrong_cache_is_refused_in_words(text: str, problem: str) -> None:
    with pytest.raises(StepCacheError) as raised:
        parse_step_cache(text)
    assert str(raised.value) == problem
