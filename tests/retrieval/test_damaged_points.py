"""Points of a Qdrant server whose payload is none of ours: one sentence that names the collection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from qdrant_client import QdrantClient

from qformer.retrieval import qdrant
from qformer.retrieval.entries import Entry, Place
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [
    pytest.mark.filterwarnings("ignore:Payload indexes have no effect"),
    pytest.mark.filterwarnings("ignore:Local mode performs exact"),
]


@pytest.mark.parametrize(
    "payload",
    [{"places": "[["}, {"places": 5}, {"places": None}, {"places": "[[0]]"}, {"caption": 7}, {"id": None}],
    ids=str,
)
def test_a_damaged_point_is_named(monkeypatch: pytest.MonkeyPatch, payload: dict[str, Any]) -> None:
    client = QdrantClient(":memory:")
    monkeypatch.setattr(qdrant, "connect", lambda _: client)
    store = qdrant.QdrantStore("qdrant://here:1", "pictures", 4, new=True)
    rows = np.eye(4, dtype=np.float16)
    store.commit([Entry("a" * 32, [Place(0, "/x.png", -1, 5, 6)], 5, 9, 9, rows, ["a cat"], rows[:1], seq=0)], [], [])
    (point,) = client.scroll("pictures")[0]
    key, value = next(iter(payload.items()))
    if value is None:
        client.delete_payload("pictures", [key], [point.id])
    else:
        client.set_payload("pictures", payload, [point.id])
    ways: list[Callable[[], Any]] = [lambda: list(store.known())]
    ways.append(lambda: store.get(["a" * 32]) if key != "id" else store.nearest(torch.ones(1, 4), 1))
    for way in ways:
        with pytest.raises(UsageError, match="the collection 'pictures' at 'qdrant://here:1' is damaged or gone"):
            way()
