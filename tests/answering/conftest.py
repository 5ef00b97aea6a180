"""The way to this machine alone, where stand-ins of servers listen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.answering.stand_in import StandIn
from tests.local_network import no_network

__all__ = ["no_network"]


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    with StandIn() as server:
        yield server
