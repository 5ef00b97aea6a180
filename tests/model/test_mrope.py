"""M-RoPE: ids derived by hand, transformers' Qwen2-VL, and a decoder that trains and writes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding

from qformer.connectors.base import Prefix
from qformer.connectors.interleave import interleave
from qformer.llm import mrope
from qformer.llm.base import CausalLM
from qformer.llm.loading import load_language_model, without_tower
from qformer.losses import IGNORE
from qformer.model.mrope import parts, position_ids, rotary
from qformer.types import Plan, Tile, UsageError
from tests.tiny import save_tiny_llm, tiny_llm

ROWS: list[list[Any]] = [[2, (1, 2, 3), 1], [4], [1, (3, 2, 2), 1, (1, 1, 2), 2]]
PROMPTS = ["a photo of", "", "Question: what is on the old bus? Answer:"]


def planned(size: tuple[int, int], fine: tuple[int, int], steps: int = 1, front: str = "[", back: str = "]") -> Plan:
    box = (0, 0, *size)
    frames = range(steps)
    tiles = tuple(
        Tile(size, size, (0, 0), box, before=front * (step == 0), after=back * (step == steps - 1)) for step in frames
    )
    return Plan(size, tiles, (1, 1), 0, steps * fine[0] * fine[1], fine=fine)


def test_ids_by_hand() -> None:
    """What follows a picture has the largest of its ids + 1; a clip of 3 steps of 2 x 2 ends at 3 and not at 2."""
    ids, delta = position_ids([[1, (1, 2, 3), 2], [2, (3, 2, 2), 1], [1]])
    assert ids.shape == (3, 3, 15)
    picture = [
        [0, 1, 1, 1, 1, 1, 1, 4, 5],
        [0, 1, 1, 1, 2, 2, 2, 4, 5],
        [0, 1, 2, 3, 1, 2, 3, 4, 5],
    ]
    clip = [
        [0, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5],
        [0, 1, 2, 2, 3, 3, 2, 2, 3, 3, 2, 2, 3, 3, 5],
        [0, 1, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 5],
    ]
    assert ids[:, 0].tolist() == [[1] * 6 + axis for axis in picture]
    assert ids[:, 1].tolist() == clip
    assert ids[:, 2].tolist() == [[1] * 14 + [0]] * 3
    assert delta.tolist() == [6 - 9, 6 - 15, 0]
    right, same = position_ids([[1, (1, 2, 3), 2], [2, (3, 2, 2), 1], [1]], side="right")
    assert right[:, 0].tolist() == [axis + [1] * 6 for axis in picture]
    assert right[:, 2].tolist() == [[0] + [1] * 14] * 3
    assert same.tolist() == delta.tolist()
    touching, behind = position_ids([[(1, 1, 1), (1, 1, 2), (2, 1, 1)]])  # pictures without text between them
    assert touching[:, 0].tolist() == [[0, 1, 1, 3, 4], [0, 1, 1, 3, 3], [0, 1, 2, 3, 3]]
    assert behind.tolist() == [0]
    assert position_ids([])[0].shape == (3, 0, 0)
    assert position_ids([[], [0, 2]])[0][:, 0].tolist() == [[1, 1]] * 3


def test_refusals() -> None:
    for rows, side, said in (
        ([[1]], "middle", "side is 'middle'"),
        ([[-1]], "left", "a part of a row is -1"),
        ([[(1, 0, 2)]], "left", r"a grid is \(1, 0, 2\)"),
    ):
        with pytest.raises(UsageError, match=said):
            position_ids(rows, side)  # type: ignore[arg-type]
    for sections in ((4, 4), (4, 4, 4)):
        with pytest.raises(UsageError, match="sections is"):
            rotary(torch.zeros(3, 1, 2).long(), 16, sections)


@pytest.mark.parametrize("side", ["left", "right"])
def test_images_are_numbered_as_in_transformers(side: Any) -> None:
    """Rows of text and pictures; a clip, which transformers 5 numbers otherwise, ends as the paper says."""
    model = tiny_llm("qwen2_vl")[0].model
    rows: list[list[Any]] = [[3, (1, 2, 3), 2, (1, 4, 1), 1], [5], [(1, 1, 1), 1, (1, 3, 3)]]
    ids, delta = position_ids(rows, side)
    length = ids.shape[2]
    kinds, mask = torch.zeros(len(rows), length).int(), torch.zeros(len(rows), length).long()
    grids = []
    for row, own in enumerate(rows):
        flat = [kind for part in own for kind in ([0] * part if isinstance(part, int) else [1] * (part[1] * part[2]))]
        kept = slice(length - len(flat), None) if side == "left" else slice(len(flat))
        kinds[row, kept], mask[row, kept] = torch.tensor(flat).int(), 1
        grids += [(part[0], 2 * part[1], 2 * part[2]) for part in own if not isinstance(part, int)]
    theirs, ahead = model.get_rope_index(torch.ones_like(mask), kinds, torch.tensor(grids), None, mask)
    assert torch.equal(ids.permute(1, 2, 0)[mask.bool()], theirs.permute(1, 2, 0)[mask.bool()])
    assert delta.tolist() == ahead[:, 0].tolist()
    after_clip = position_ids([[1, (3, 2, 2), 1]])[0][:, 0, -1]
    assert after_clip.tolist() == [1 + 3] * 3  # transformers 5.24 says 1 + max(2, 2) = 3, which the last frame has too


def test_clips_are_numbered_as_in_transformers_if_that_is_asked() -> None:
    """Behind a clip of 4 steps of 1 x 2 tokens at 2, text begins at 4; what is generated follows 5, the largest id."""
    ids, delta = position_ids([[2, (4, 1, 2), 1], [1, (2, 3, 1), 2]], rule="transformers")
    assert ids[:, 0].tolist() == [
        [0, 1, 2, 2, 3, 3, 4, 4, 5, 5, 4],
        [0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 4],
        [0, 1, 2, 3, 2, 3, 2, 3, 2, 3, 4],
    ]
    assert delta.tolist() == [6 - 11, 6 - 9]
    kinds = torch.tensor([[0] * 2 + [2] * 8 + [0], [0] * 3 + [2] * 6 + [0] * 2])
    mask = torch.tensor([[1] * 11, [0] * 2 + [1] * 9])
    grids = torch.tensor([(4, 2, 4), (2, 6, 2)])
    theirs, ahead = tiny_llm("qwen2_vl")[0].model.get_rope_index(torch.ones_like(mask), kinds, None, grids, mask)
    assert torch.equal(ids.permute(1, 2, 0)[mask.bool()], theirs.permute(1, 2, 0)[mask.bool()])
    assert delta.tolist() == ahead[:, 0].tolist()
    with pytest.raises(UsageError, match=r"numbered by 'newest' \(llm.clip_ids\); give paper or"):
        position_ids([[1]], rule="newest")  # type: ignore[arg-type]


def test_what_a_plan_puts_into_a_row() -> None:
    picture, clip = planned((224, 224), (8, 8)), planned((112, 56), (2, 4), steps=3)
    assert parts(picture) == [1, (1, 8, 8), 1]
    assert parts(clip) == [1, (3, 2, 4), 1]
    assert parts(Plan.join([picture, clip])) == [1, (1, 8, 8), 1, 1, (3, 2, 4), 1]
    bare = planned((224, 224), (8, 8), front="", back="")
    assert parts(bare) == [(1, 8, 8)]
    queries = Plan((224, 224), bare.tiles, (1, 1), 0, tokens=32)
    assert parts(queries) == [32]
    newlines = Plan((224, 224), picture.tiles, (1, 1), 0, tokens=72, fine=(8, 8), newline="row")
    assert parts(newlines) == [74]
    apart = planned((224, 224), (8, 8), steps=2)
    marked = Plan((224, 224), (*picture.tiles, *picture.tiles), (1, 1), None, apart.tokens, fine=(8, 8))
    assert parts(marked) == [132]  # text between its tiles: no one grid


def test_turning_is_transformers() -> None:
    config = tiny_llm("qwen2_vl")[0].config.text_config
    ids, _ = position_ids(ROWS)
    theirs = Qwen2VLRotaryEmbedding(config)(torch.zeros(1), ids)
    ours = rotary(ids, 8, (1, 1, 2), 1000.0)
    for made, known in zip(ours, theirs, strict=True):
        assert made.shape == (3, ids.shape[2], 8)
        assert torch.equal(made, known)
    config.head_dim, config.rope_parameters = 128, {"rope_type": "default", "rope_theta": 1e6}  # the published sizes
    for made, known in zip(rotary(ids, 128), Qwen2VLRotaryEmbedding(config)(torch.zeros(1), ids), strict=True):
        assert torch.equal(made, known)


def decoder(cached: bool = True) -> CausalLM:
    model, tokenizer = tiny_llm("qwen2_vl")
    llm = CausalLM(without_tower(model), tokenizer)
    llm.abilities = type(llm.abilities)(caches=cached)
    return llm


def seen(llm: CausalLM) -> Prefix:
    """Vectors of the lengths of `ROWS`, of which the second shows nothing."""
    placed = [mrope.places(row) for row in ROWS]
    longest = max(map(len, placed))
    places = torch.stack([torch.cat([own, torch.full((longest - len(own), 3), -1)]) for own in placed])
    mask = torch.tensor([[True] * len(own) + [False] * (longest - len(own)) for own in placed])
    embeds = torch.randn(3, longest, llm.width, generator=torch.Generator().manual_seed(1))
    return Prefix(embeds, mask, places)


def test_logits_are_those_of_transformers_given_these_ids() -> None:
    """The whole model of transformers, fed by hand without padding, with ids of `position_ids`."""
    llm = decoder()
    prefix = seen(llm)
    texts = ["a cat", "two people", "dogs"]
    logits, targets = llm.predict(*prefix, texts, PROMPTS, places=prefix.places)
    embed = llm.model.get_input_embeddings()
    for row, own in enumerate(ROWS):
        words = llm.tokenizer(f"{PROMPTS[row]} {texts[row]}".strip(), add_special_tokens=False)["input_ids"]
        visual = prefix.embeds[row, prefix.mask[row]]
        ids, _ = position_ids([[*own, len(words)]])
        whole = torch.cat([visual, embed(torch.tensor(words))])[None]
        theirs = llm.model(inputs_embeds=whole, position_ids=ids).logits[0]
        ours = logits[row, targets[row].ne(IGNORE)]  # the last of which predicts the end
        torch.testing.assert_close(ours, theirs[-len(ours) :], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 3}])
def test_writing_with_a_cache_or_without_alone_or_in_a_batch(options: dict[str, Any]) -> None:
    """Rows of text, a picture, a clip and a picture, padded on the left: the same words each way."""
    cached, slow = decoder(), decoder(cached=False)
    prefix = seen(cached)
    options = options | {"max_new_tokens": 6, "min_new_tokens": 6}
    together = cached.generate(*prefix, PROMPTS, places=prefix.places, **options)
    assert torch.equal(together, slow.generate(*prefix, PROMPTS, places=prefix.places, **options))
    for row in range(3):
        own = prefix.select([row])
        (alone,) = cached.generate(own.embeds[:, own.mask[0]], own.mask[:, own.mask[0]], PROMPTS[row : row + 1],
                                   places=own.places[:, own.mask[0]], **options)  # type: ignore[index]  # fmt: skip
        assert alone.tolist() == together[row].tolist()
    if options["num_beams"] == 1:
        own = prefix.select([2])
        assert list(cached.stream(*own, PROMPTS[2], places=own.places, **options)) == together[2].tolist()


def test_each_generated_token_has_the_next_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: a row of n tokens goes on at n + delta, on all three axes, with and without a cache."""
    for llm in (decoder(), decoder(cached=False)):
        prefix, given = seen(llm), list[Tensor]()
        forward = llm.model.model.forward
        monkeypatch.setattr(
            llm.model.model,
            "forward",
            lambda *args, f=forward, to=given, **all: to.append(all["position_ids"]) or f(*args, **all),
        )
        llm.generate(*prefix, [""] * 3, places=prefix.places, num_beams=1, max_new_tokens=3, min_new_tokens=3)
        _, delta = position_ids(ROWS)
        lengths = prefix.mask.sum(dim=1)
        for step, ids in enumerate(given[1:]):
            assert ids[:, :, -1].tolist() == [(lengths + delta + step).tolist()] * 3


def test_text_alone_is_the_plain_rotary_model() -> None:
    """The same weights as a Qwen2, which has one position per token: the same logits, also of a prefix of text."""
    llm, plain = decoder(), tiny_llm("qwen2")[0]
    tensors = {name.replace("model.language_model.", "model."): t for name, t in llm.model.state_dict().items()}
    plain.config.rope_parameters = {"rope_type": "default", "rope_theta": 1000.0}
    plain.config.rms_norm_eps = llm.model.config.text_config.rms_norm_eps
    plain = type(plain)(plain.config).eval()
    plain.load_state_dict(tensors)
    other = CausalLM(plain, llm.tokenizer)
    prefix = seen(llm)

    def read(model: CausalLM, places: Tensor | None = None) -> list[Tensor]:
        logits, targets = model.predict(*prefix, ["a cat"] * 3, PROMPTS, places=places)
        return [row[known] for row, known in zip(logits, targets.ne(IGNORE), strict=True)]

    ours = read(llm)
    for one, same, text in zip(ours, read(other), read(llm, torch.full((*prefix.mask.shape, 3), -1)), strict=True):
        torch.testing.assert_close(one, same)
        torch.testing.assert_close(one, text)
    placed = read(llm, prefix.places)
    torch.testing.assert_close(ours[1], placed[1])  # a row without a picture
    assert float((ours[0] - placed[0]).abs().max()) > 1e-3
    without_sections = read(other, prefix.places)  # which has no use for places
    assert all(torch.equal(*both) for both in zip(without_sections, read(other), strict=True))


def test_it_trains() -> None:
    """The prefix learns through the frozen model: the loss of mixed rows falls, and equals that of rows alone."""
    llm = decoder()
    prefix, texts = seen(llm), ["a cat", "dogs", "two people riding a red bus"]
    total, count = llm.loss(*prefix, texts, PROMPTS, places=prefix.places)
    alone = [
        llm.loss(*own, texts[row : row + 1], PROMPTS[row : row + 1], places=own.places)[0]
        for row, own in ((row, prefix.select([row])) for row in range(3))
    ]
    torch.testing.assert_close(total, torch.stack(alone).sum())
    embeds = prefix.embeds.clone().requires_grad_()
    optimizer = torch.optim.Adam([embeds], lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        loss = llm.loss(embeds, prefix.mask, texts, PROMPTS, places=prefix.places)[0] / count
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.8 * float(total.detach() / count)


def test_the_language_model_of_a_folder(tmp_path: Path) -> None:
    """Of a Qwen2-VL's folder the tower is not kept; a template's head stands in front of the places as text."""
    llm = load_language_model(save_tiny_llm(tmp_path, "qwen2_vl"))
    assert llm.has_places
    assert not [name for name in llm.model.state_dict() if "visual" in name]
    prefix = seen(decoder())
    made = llm.generate(*prefix, PROMPTS, places=prefix.places, num_beams=1, max_new_tokens=4)
    assert torch.equal(made, decoder().generate(*prefix, PROMPTS, places=prefix.places, num_beams=1, max_new_tokens=4))
    plain = llm.predict(*prefix, ["a cat"] * 3, PROMPTS, places=prefix.places)[0]
    llm.use_template("<|im_end|>{image}{text}{answer}<|im_end|>")
    headed = llm.predict(*prefix, ["a cat"] * 3, PROMPTS, places=prefix.places)[0]
    assert not torch.equal(headed[..., : plain.shape[1], :], plain)


def test_examples_keep_their_places() -> None:
    """A picture, its text, and another picture: the places of both, and -1 at the words between."""
    llm = decoder()
    prefix = seen(llm)
    woven = interleave(llm, *prefix, [[0, "a cat", 2]], prefix.places)
    words = len(llm.examples([("", "a cat")])[0])
    assert woven.places is not None
    assert woven.places[0].tolist() == [
        *prefix.places[0][prefix.mask[0]].tolist(),  # type: ignore[index]
        *[[-1] * 3] * words,
        *prefix.places[2][prefix.mask[2]].tolist(),  # type: ignore[index]
    ]


def test_the_example_of_the_docs() -> None:
    text = (Path(__file__).parents[2] / "docs/video.md").read_text(encoding="utf-8")
    example = text.split("```python\n")[-1].split("```")[0]
    assert "position_ids" in example
    exec(compile(example, "docs/video.md", "exec"), {})
