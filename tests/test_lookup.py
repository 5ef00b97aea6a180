"""Names: found, refused with the nearest one, and options checked and coerced by their declared types."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from pydantic import Field

from qformer import lookup
from qformer.files import pretrained
from qformer.types import UsageError


@dataclass(frozen=True)
class Thing:
    size: int = 1
    rate: float = 0.5
    pair: tuple[int, int] = (1, 2)
    label: str | None = None
    limit: Annotated[float, Field(allow_inf_nan=True)] = 1.0
    either: bool | int = 0

    def __post_init__(self) -> None:
        if self.size < 0:
            raise UsageError(f"size is {self.size}; give a positive number")


TABLE: dict[str, Any] = {"thing": Thing, "ordered": "collections:OrderedDict", "gone": "no_such_module:X"}


@pytest.fixture
def outsider(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of a user's own."""
    own = types.ModuleType("outsider")
    own.Mine = Thing  # type: ignore[attr-defined]
    own.function = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "outsider", own)


def test_find_takes_objects_strings_and_outsiders(outsider: None) -> None:
    import collections

    assert lookup.find(TABLE, "thing") is Thing
    assert lookup.find(TABLE, "ordered") is collections.OrderedDict
    assert lookup.find(TABLE, "outsider:Mine", own=True) is Thing


def test_a_name_is_a_class_of_ones_own_only_where_that_is_meant(outsider: None) -> None:
    """Presets, GPUs, options of a visitor of the page and shipped towers are looked up, too: `mini:outsider:Mine`."""
    with pytest.raises(UsageError, match="unknown kind 'outsider:Mine'"):
        lookup.find(TABLE, "outsider:Mine", "kind")
    with pytest.raises(UsageError, match="unknown shipped tower 'outsider:Mine'"):
        pretrained.tower("mini:outsider:Mine")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("thinf", "unknown kind 'thinf': did you mean 'thing'?"),
        ("zzzz", "unknown kind 'zzzz': known are gone, ordered, thing"),
        ("gone", "kind 'gone' cannot be imported"),
        ("collections:Nothing", "cannot be imported"),
        ("no.such.module:X", "cannot be imported"),
        (":", "package.module:Class"),
        (":Thing", "package.module:Class"),
        (".relative:Thing", "package.module:Class"),
        ("os:", "package.module:Class"),
    ],
)
def test_find_refuses_in_one_sentence(given: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        lookup.find(TABLE, given, "kind", own=True)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_build_coerces_what_yaml_gives() -> None:
    made = lookup.build(TABLE, "thing", {"rate": "1e-4", "pair": [3, 4], "size": "7"}, "kind")
    assert made == Thing(size=7, rate=1e-4, pair=(3, 4))
    assert type(made.rate) is float
    assert type(made.pair) is tuple


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sise": 3}, "kind.sise is not an option of 'thing': did you mean 'size'?"),
        ({"size": "big"}, "kind.size"),
        ({"size": 1.5}, "got 1.5"),
        ({"pair": [1]}, "kind.pair"),
        ({"pair": [1, 2, 3]}, "kind.pair"),
        ({"rate": None}, "kind.rate"),
        ({"size": -1}, "size is -1; give a positive number"),
        ({"size": True}, "kind.size: input should be a number, not true or false, but got True"),
        ({"rate": False}, "kind.rate: input should be a number, not true or false"),
        ({"pair": [1, True]}, "kind.pair: input should be a number, not true or false, but got [1, True]"),
        ({"rate": "nan"}, "kind.rate: input should be a finite number, but got 'nan'"),
        ({"rate": float("inf")}, "kind.rate: input should be a finite number, but got inf"),
    ],
)
def test_build_names_the_option_and_the_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        lookup.build(TABLE, "thing", options, "kind")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fields_that_mean_it_take_infinity_and_truth() -> None:
    made = lookup.build(TABLE, "thing", {"limit": "inf", "either": True}, "kind")
    assert (made.limit, made.either) == (float("inf"), True)


def test_check_makes_nothing_of_the_options() -> None:
    assert lookup.check(TABLE, "thing", {"size": -1}, "kind") is Thing
    with pytest.raises(UsageError, match=r"kind\.size: "):
        lookup.check(TABLE, "thing", {"size": "big"}, "kind")


def test_build_outsiders_must_be_dataclasses(outsider: None) -> None:
    assert lookup.build({}, "outsider:Mine", {"size": 2}, "kind") == Thing(size=2)
    with pytest.raises(UsageError, match="dataclass"):
        lookup.build({}, "outsider:function", {}, "kind")


def test_nearest() -> None:
    assert lookup.nearest("hiden_size", ["heads", "hidden_size"]) == "did you mean 'hidden_size'?"
    assert lookup.nearest("q", ["b", "a"]) == "known are a, b"


def test_shipped_towers_by_name(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(pretrained, "TOWERS", tmp_path)
    assert pretrained.tower("mini:vit") == str(tmp_path / "vit")
    for other in ("facebook/opt-125m", "runs/vit/tower", "mini", "C:/models/vit"):
        assert pretrained.tower(other) == other
    with pytest.raises(UsageError, match="unknown shipped tower 'vat'"):
        pretrained.tower("mini:vat")
    with pytest.raises(UsageError, match="unknown shipped tower 'empty'"):
        pretrained.tower("mini:empty")
