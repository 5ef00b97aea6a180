"""`Retriever` finds what reading every image and every caption by brute force finds, in the same order."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from qformer.retrieval.entries import conditions
from qformer.retrieval.gallery import Gallery
from qformer.retrieval.search import Retriever
from qformer.types import BadSample, UsageError
from tests.retrieval.photos import folder, gallery, index, model_of_tiles, picture, rows_of, tiles_of

if TYPE_CHECKING:
    from qformer.model.image_text import ImageTextModel

COUNT, TEXT = 40, "a man riding a red bus at the station"
FP16 = 2e-3


@pytest.fixture(scope="module")
def model() -> ImageTextModel:
    return model_of_tiles()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("photos") / "all", COUNT, captions=True)


@pytest.fixture(scope="module")
def galleries(tmp_path_factory: pytest.TempPathFactory, photos: Path, model: ImageTextModel) -> dict[Any, Gallery]:
    """By how features are stored."""
    made = {}
    for features in (None, "fp16", "int8"):
        made[features] = gallery(tmp_path_factory.mktemp("gallery"), model, features)
        index(made[features], model, batch=8, path=photos)
    return made


@pytest.fixture
def retriever(galleries: dict[Any, Gallery], model: ImageTextModel) -> Retriever:
    return Retriever(galleries[None], model)


def brute(model: ImageTextModel, photos: Path, text: str) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Cosine and ITM's logits of a text with each photo, one at a time."""
    cosines, logits = {}, {}
    with torch.no_grad():
        query = model.embed_texts([text])[0]
        for file in photos.glob("*.png"):
            cosines[str(file)] = float((rows_of(model, file) @ query).max())
            logits[str(file)] = model.match_logits(tiles_of(model, file), [text])[0].tolist()
    return cosines, logits


def ordered(scores: dict[Any, float]) -> list[Any]:
    return sorted(scores, key=lambda name: -scores[name])


def in_order(found: list[Any], scores: dict[Any, float], near: float) -> bool:
    """Whether a list is in the order of exact scores, but for those that are nearer than what is stored can tell."""
    best = ordered(scores)[: len(found)]
    return len(set(found)) == len(found) and all(
        abs(scores[mine] - scores[theirs]) <= near for mine, theirs in zip(found, best, strict=True)
    )


@pytest.mark.parametrize(("features", "near"), [(None, 1e-4), ("fp16", 0.02), ("int8", 0.2)])
def test_text_to_image_is_brute_force(
    galleries: dict[Any, Gallery], model: ImageTextModel, photos: Path, features: str | None, near: float
) -> None:
    cosines, logits = brute(model, photos, TEXT)
    hits = Retriever(galleries[features], model).text_to_image(TEXT, k=COUNT, shortlist=COUNT, exact=True)
    assert len(hits) == COUNT
    for hit in hits:
        no, yes = logits[hit.path]
        assert abs(hit.itc - cosines[hit.path]) < (0.02 if features == "int8" else FP16)  # read from the same tokens
        assert hit.itm is not None
        assert abs(hit.itm - yes) < near
        assert abs(hit.probability - torch.tensor([no, yes]).softmax(0)[1]) < near
        assert hit.score == pytest.approx(hit.itm + hit.itc)
    scores = {name: cosines[name] + logits[name][1] for name in cosines}
    assert in_order([hit.path for hit in hits], scores, near + FP16)
    assert max(scores.values()) - min(scores.values()) > 2 * near  # the order says something


def test_the_shortlist_is_reranked_and_the_rest_stands_behind(
    retriever: Retriever, model: ImageTextModel, photos: Path
) -> None:
    cosines, logits = brute(model, photos, TEXT)
    best = ordered(cosines)
    hits = retriever.text_to_image(TEXT, k=20, shortlist=7)
    assert [hit.itm is not None for hit in hits] == [True] * 7 + [False] * 13
    assert {hit.path for hit in hits[:7]} == set(best[:7])
    assert [hit.path for hit in hits[:7]] == ordered({name: logits[name][1] + cosines[name] for name in best[:7]})
    assert in_order([hit.path for hit in hits[7:]], {name: cosines[name] for name in best[7:]}, FP16)
    plain = retriever.text_to_image(TEXT, k=5, shortlist=0)
    assert [hit.path for hit in plain] == best[:5]
    assert all(hit.itm is None and hit.probability is None and hit.score == hit.itc for hit in plain)


def test_more_hits_than_images(retriever: Retriever, tmp_path: Path, model: ImageTextModel) -> None:
    assert len(retriever.text_to_image("cat", k=1000)) == COUNT
    assert len(retriever.image_to_image(picture(0), k=1000)) == COUNT
    assert Retriever(gallery(tmp_path, model), model).text_to_image("cat") == []


def test_image_to_image_is_the_mean_of_the_best(retriever: Retriever, model: ImageTextModel, photos: Path) -> None:
    query = rows_of(model, picture(2))
    assert len(query) == 12  # three tiles
    scores = {str(file): float((query @ rows_of(model, file).T).amax(dim=1).mean()) for file in photos.glob("*.png")}
    hits = retriever.image_to_image(picture(2), k=COUNT, exact=True)
    assert hits[0].path == str(photos / "2.png")
    assert hits[0].score == pytest.approx(1, abs=FP16)
    assert in_order([hit.path for hit in hits], scores, FP16)
    assert all(abs(hit.itc - scores[hit.path]) < FP16 for hit in hits)


def test_image_and_text_weigh_the_same(retriever: Retriever, model: ImageTextModel, photos: Path) -> None:
    cosines, logits = brute(model, photos, TEXT)
    query = rows_of(model, picture(4))
    alike = {name: float((query @ rows_of(model, Path(name)).T).amax(dim=1).mean()) for name in cosines}
    hits = retriever.search(TEXT, picture(4), k=COUNT, shortlist=COUNT, exact=True)
    pairs = torch.tensor([[logits[name][1] + cosines[name], alike[name]] for name in cosines])
    both = ((pairs - pairs.mean(dim=0)) / pairs.std(dim=0, correction=0)).mean(dim=1).tolist()
    scores = dict(zip(cosines, both, strict=True))
    assert in_order([hit.path for hit in hits], scores, 0.02)
    assert all(hit.score == pytest.approx(scores[hit.path], abs=0.02) for hit in hits)
    assert all(hit.similarity == pytest.approx(alike[hit.path], abs=FP16) for hit in hits)


def test_an_image_that_is_far_from_the_text_still_counts(
    retriever: Retriever, model: ImageTextModel, photos: Path
) -> None:
    """The same picture is found with a text that fits others better, though only as many as these are re-ranked."""
    cosines, _ = brute(model, photos, TEXT)
    behind = ordered(cosines)[12]
    hits = retriever.search(TEXT, Path(behind), k=8, shortlist=8)
    assert behind in [hit.path for hit in hits]
    assert all(hit.itm is not None for hit in hits)


def test_image_to_text_is_brute_force(retriever: Retriever, model: ImageTextModel, photos: Path) -> None:
    image = picture(6)
    texts = sorted({text for one in retriever.gallery.store.known() for text in one.captions})
    assert len(texts) == COUNT
    with torch.no_grad():
        cosines = (rows_of(model, image) @ model.embed_texts(texts).T).amax(dim=0).tolist()
        pairs = torch.stack([torch.zeros(len(texts)), torch.arange(len(texts))], dim=1).long()
        yes = model.match_logits(tiles_of(model, image), texts, pairs)[:, 1].tolist()
    itc, both = dict(zip(texts, cosines, strict=True)), {t: c + y for t, c, y in zip(texts, cosines, yes, strict=True)}
    hits = retriever.image_to_text(image, k=COUNT, shortlist=COUNT)
    assert in_order([hit.caption for hit in hits], both, 3e-3)
    assert all(hit.score == pytest.approx(both[hit.caption or ""], abs=3e-3) for hit in hits)
    assert all(hit.caption in hit.captions for hit in hits)
    plain = retriever.image_to_text(image, k=5, shortlist=0)
    assert in_order([hit.caption for hit in plain], itc, FP16)
    few = retriever.image_to_text(image, k=50, shortlist=3, where=["path~/1"])
    assert {Path(hit.path).name[0] for hit in few} == {"1"}
    assert [hit.itm is None for hit in few][:4] == [False, False, False, True]


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("width>50", lambda e: e["width"] > 50),
        ("width = 40", lambda e: e["width"] == 40),
        ("height!=30", lambda e: e["height"] != 30),
        ("width<=40", lambda e: e["width"] <= 40),
        ("caption~BEACH", lambda e: any("beach" in text for text in e["captions"])),
        ("caption~100%", lambda e: False),
        ("caption~o_ ", lambda e: False),
        ("caption~'; drop table images", lambda e: False),
        ('caption~"', lambda e: False),
        ("caption~\\", lambda e: False),
        ("caption=", lambda e: not e["captions"]),
        ("caption!=", lambda e: bool(e["captions"])),
        ("path~3.png", lambda e: "3.png" in e["path"]),
        ("modified>=2000-01-01", lambda e: True),
        ("modified<2000-01-01", lambda e: False),
        ("bytes>0", lambda e: True),
        ("bytes>-5", lambda e: True),
    ],
)
def test_conditions(retriever: Retriever, where: str, kept: Any) -> None:
    everything = [vars(hit) for hit in retriever.text_to_image("cat", k=COUNT, shortlist=0)]
    found = retriever.text_to_image("cat", k=COUNT, shortlist=0, where=[where])
    assert [hit.id for hit in found] == [entry["id"] for entry in everything if kept(entry)]


def test_conditions_are_all_met(retriever: Retriever) -> None:
    found = retriever.text_to_image("cat", k=COUNT, where=["width=40", "path~/2", "caption~cat"])
    assert {Path(hit.path).name for hit in found} == {"20.png"}
    assert retriever.image_to_image(picture(0), where=["width=40", "width=50"]) == []


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("size>3", "is not a condition; write a column (id, path, caption"),
        ("width", "is not a condition"),
        ("", "is not a condition"),
        ("width ? 3", "is not a condition"),
        ("caption>a", "orders a text column; use =, != or ~"),
        ("width=wide", "and a whole number after width"),
        ("width~3", "and a whole number after width"),
        ("width>1.5", "and a whole number after width"),
        ("modified>2024-13-01", "and a whole number after modified"),
        (f"width<{2**63}", "and a whole number after width"),
    ],
)
def test_what_is_no_condition(retriever: Retriever, where: str, expected: str) -> None:
    with pytest.raises(UsageError) as error:
        retriever.text_to_image("cat", where=[where])
    assert expected in str(error.value)
    assert repr(where)[1:-1] in str(error.value)


def test_a_date_is_its_midnight() -> None:
    assert conditions(["modified>=1970-01-02"])[0].value == 86400


def test_images_that_went_away(tmp_path: Path, model: ImageTextModel) -> None:
    photos = folder(tmp_path / "photos", 12)
    opened = gallery(tmp_path / "gallery", model)
    index(opened, model, path=photos)
    retriever = Retriever(opened, model)
    before = retriever.text_to_image(TEXT, k=12)
    gone = {hit.path for hit in before[:2]}
    for path in gone:
        Path(path).unlink()
    hits = retriever.text_to_image(TEXT, k=12)
    assert set(retriever.unread) == gone == {hit.path for hit in hits[-2:]}
    assert [hit.itm is None for hit in hits] == [False] * 10 + [True] * 2
    with pytest.raises(BadSample, match="missing"):
        retriever.open_image(hits[-1])
    assert retriever.open_image(hits[0]).shape[0] == 3
    retriever.text_to_image(TEXT, k=12, shortlist=0)
    assert retriever.unread == []


@pytest.mark.parametrize("text", ["", "   ", "?!...", "\n"])
def test_a_text_without_words(retriever: Retriever, text: str) -> None:
    with pytest.raises(UsageError, match="no letter or digit"):
        retriever.text_to_image(text)


def test_a_long_text_and_nothing(retriever: Retriever) -> None:
    assert len(retriever.text_to_image("cat " * 10_000)) == 10
    with pytest.raises(UsageError, match="nothing to search for"):
        retriever.search(None, None)
    with pytest.raises(BadSample, match="undecodable"):
        retriever.image_to_image(b"no picture")


def test_another_model_is_refused(galleries: dict[Any, Gallery], model: ImageTextModel) -> None:
    other = model_of_tiles()
    with torch.no_grad():
        other.text_proj.weight[0, 0] += 0.5
    with pytest.raises(UsageError, match=r"embedded by another model \('tiny'\) than 'theirs'"):
        Retriever(galleries[None].folder, other, "theirs")


def test_a_gallery_that_was_moved(tmp_path: Path, model: ImageTextModel) -> None:
    index(gallery(tmp_path / "a", model), model, path=folder(tmp_path / "photos", 3))
    (tmp_path / "a").rename(tmp_path / "b")
    assert len(Retriever(tmp_path / "b", model).text_to_image("cat")) == 3
    with pytest.raises(UsageError, match="no gallery at"):
        Retriever(tmp_path / "a", model)
    (tmp_path / "b" / "gallery.json").write_text("{")
    with pytest.raises(UsageError, match="is damaged"):
        Retriever(tmp_path / "b", model)


@pytest.mark.parametrize("wrong", [{"k": 0}, {"k": -1}, {"k": True}, {"k": 2.5}, {"k": None}, {"shortlist": -1}])
def test_numbers_of_hits_that_are_none(retriever: Retriever, photos: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(wrong))} is .*; give a whole number of at least [01]"):
        retriever.text_to_image("cat", **wrong)
    with pytest.raises(UsageError, match="give a whole number"):
        retriever.image_to_text(photos / "0.png", **wrong)


def test_texts_that_are_none(retriever: Retriever) -> None:
    for text in ("a cat\udcff", b"a cat", 7):
        with pytest.raises(UsageError, match="UTF-8 text"):
            retriever.text_to_image(text)  # type: ignore[arg-type]
    for where in ("path=\udcff", b"width>1", None):
        with pytest.raises(UsageError, match="UTF-8 text"):
            retriever.text_to_image("a cat", where=[where])  # type: ignore[list-item]


@pytest.mark.parametrize("key", ["queries", "width"])
def test_a_gallery_that_tells_of_other_sizes(tmp_path: Path, model: ImageTextModel, key: str) -> None:
    made = gallery(tmp_path / "g", model)
    made.about[key] += 1
    made.save()
    with pytest.raises(UsageError, match=rf"gallery.json' is damaged \({key} is"):
        Retriever(tmp_path / "g", model)
