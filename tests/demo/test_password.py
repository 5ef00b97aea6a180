"""One name and password, and how often wrong ones may be tried."""

from __future__ import annotations

import pytest

from qformer.demo import password
from qformer.demo.password import ALL, EACH, Password, Tries


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tries(clock: Clock) -> Tries:
    return Tries(clock)


def test_both_must_be_right(monkeypatch: pytest.MonkeyPatch) -> None:
    lets_in = Password("ann", "s\xe9cret:1")
    assert lets_in(" ann ", "s\xe9cret:1")
    compared = []
    real = password.hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return real(one, other)

    monkeypatch.setattr(password.hmac, "compare_digest", compare)
    wrong = (("ann", "secret"), ("bob", "s\xe9cret:1"), ("", ""), ("ann", ""), ("bob", "x" * 999), ("ann", "\ud800"))
    for user, word in wrong:
        assert not lets_in(user, word)
    assert compared == [(32, 32)] * 12  # name and password each time, whatever their lengths


def test_a_client_has_a_few_tries_and_then_one_at_a_time(tries: Tries, clock: Clock) -> None:
    size, period = EACH
    assert [tries.take("a") for _ in range(size)] == [0] * size
    assert tries.take("a") == period
    clock.now += period - 1
    assert tries.take("a") == 1
    clock.now += 1
    assert tries.take("a") == 0
    assert tries.take("a") == period  # a refused one costs nothing more
    assert tries.take("b") == 0


def test_one_client_does_not_shut_out_the_others(tries: Tries, clock: Clock) -> None:
    for _ in range(900):  # it tries for a quarter of an hour, ten times a second
        for _ in range(10):
            tries.take("address of one who guesses")
        clock.now += 1
    assert tries.take("address of another") == 0


def test_many_clients_are_slowed_together_but_for_those_who_have_been_in(tries: Tries, clock: Clock) -> None:
    size, period = ALL
    known = tries.client("192.0.2.1", tries.cookie())
    assert [tries.take(f"address {number}") for number in range(size)] == [0] * size
    assert tries.take("address new") == period
    assert tries.take(known) == 0
    clock.now += period
    assert tries.take("address new") == 0
    clock.now += size * period
    tries.take("address new")
    assert len(tries._paid) <= 3  # what is paid is forgotten


def test_a_right_password_gives_the_tries_back(tries: Tries) -> None:
    for _ in range(ALL[0] * 3):
        assert tries.take("address a") == 0
        tries.give_back("address a")


def test_who_a_client_is(tries: Tries) -> None:
    cookie = tries.cookie()
    assert tries.client("192.0.2.1", cookie) == tries.client("192.0.2.2", cookie)
    assert tries.client("192.0.2.1", tries.cookie()) != tries.client("192.0.2.1", cookie)
    for made_up in (None, "", "a.b", ".", cookie[:-1], "x" + cookie, Tries().cookie(), "\xe9.\xe9"):
        assert tries.client("192.0.2.1", made_up) == "address 192.0.2.1"
    assert tries.client("2001:db8::1", None) == tries.client("2001:db8::ffff:1", None)
    assert tries.client("2001:db8::1", None) != tries.client("2001:db8:0:1::1", None)
    assert tries.client("", None) == "address "
