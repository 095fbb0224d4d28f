"""What a key has used of its limits."""

import pytest

from vllm_jd.serve.tenants.keys import Key
from vllm_jd.serve.tenants.meter import Meter, ratelimit_headers


@pytest.fixture
def now():
    return [0.0]


@pytest.fixture
def meter(now):
    return Meter(lambda: now[0])


def key(number=0, **limits):
    return Key(name=f"k{number}", sha256=f"{number:064x}", limits=limits)


def test_tokens_come_back_evenly(meter, now):
    its = key(tokens_per_minute=600)
    assert meter.tokens_left(its) == 600
    meter.charge(its, 600)
    assert meter.tokens_left(its) == 0
    assert meter.seconds_to_tokens(its) == pytest.approx(0.1)
    now[0] = 6
    assert meter.tokens_left(its) == 60
    meter.charge(its, 1260)  # what runs is not cut off
    assert meter.tokens_left(its) == 0
    assert meter.seconds_to_tokens(its) == pytest.approx(120.1)
    now[0] = 6 + 120.2
    assert meter.tokens_left(its) == 2
    now[0] = 10_000
    assert meter.tokens_left(its) == 600, "and no more than a minute's"


def test_keys_are_told_apart_and_may_have_no_limit(meter):
    its, free = key(tokens_per_minute=10, requests=2), key(1)
    meter.charge(its, 10)
    meter.charge(free, 10**9)
    assert meter.tokens_left(its) == 0 and meter.tokens_left(free) is None
    with meter.request(its), meter.request(free):
        assert meter.requests_left(its) == 1 and meter.requests_left(free) is None
        with pytest.raises(OSError), meter.request(its):
            assert meter.requests_left(its) == 0
            raise OSError
        assert meter.requests_left(its) == 1
    assert meter.requests_left(its) == 2


def test_other_limits_of_a_key_count_what_it_has_used(meter):
    meter.charge(key(tokens_per_minute=100), 80)
    assert meter.tokens_left(key(tokens_per_minute=90)) == 10


def test_headers_are_openais(meter):
    its = key(tokens_per_minute=600, requests=2)
    meter.charge(its, 100)
    with meter.request(its):
        assert ratelimit_headers(meter, its) == {
            "x-ratelimit-limit-requests": "2",
            "x-ratelimit-remaining-requests": "1",
            "x-ratelimit-limit-tokens": "600",
            "x-ratelimit-remaining-tokens": "500",
            "x-ratelimit-reset-tokens": "10.000s",
        }
    assert ratelimit_headers(meter, key(1)) == {}


def test_what_is_gone_is_forgotten_once_it_asks_for_nothing(meter):
    its, gone = key(tokens_per_minute=9), key(1, tokens_per_minute=9)
    meter.charge(its, 5)
    with meter.request(gone):
        meter.forget({its.sha256})
        assert len(meter._used) == 2
    meter.forget({its.sha256})
    assert len(meter._used) == 1 and meter.tokens_left(its) == 4
