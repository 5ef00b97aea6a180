"""The warm start of stage two: the projection that is solved, the words it is solved for, and runs that use it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from qformer import load, stages
from qformer.llm.base import CausalLM
from qformer.llm.rows import word_spread
from qformer.model.connectors import QFormerConnector
from qformer.model.vision_language import VisionLanguageModel
from qformer.stages.warm_projection import solve_projection, word_blends
from qformer.types import UsageError
from tests.tiny import tiny_llm
from tests.workspace import config, make_workspace

if TYPE_CHECKING:
    from pathlib import Path

IDLE = {"steps": 1, "warmup": 0, "lr": 1e-9, "min_lr": 0}


def test_projection_is_the_map_that_made_the_words() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(200, 6, generator=generator) + 3
    true, offset = torch.randn(6, 10, generator=generator), torch.randn(10, generator=generator)
    words = 0.01 * queries @ true + offset
    weight, bias = solve_projection(queries, words, loud=0.5)
    made = queries @ weight.T + bias
    assert (made - made.mean(dim=0)).square().mean().sqrt() == pytest.approx(0.5, rel=1e-4)
    torch.testing.assert_close(made.mean(dim=0), words.mean(dim=0), atol=1e-4, rtol=0)
    agreement = torch.corrcoef(torch.stack([(made - made.mean(0)).flatten(), (words - words.mean(0)).flatten()]))
    assert agreement[0, 1] > 0.99


def test_words_in_every_caption_do_not_count() -> None:
    llm = CausalLM(*tiny_llm("opt"))
    embed = llm.model.get_input_embeddings().weight
    common, both = (llm.tokenizer(f" {text}", add_special_tokens=False)["input_ids"] for text in ("a", "a dog"))
    assert both[: len(common)] == common
    own = [token for token in both if token not in common]
    made = word_blends(llm, [["a dog", "a"], ["a"]])
    torch.testing.assert_close(made[0], embed[own].mean(dim=0), atol=1e-4, rtol=0)
    torch.testing.assert_close(made[1], embed[common].mean(dim=0), atol=1e-4, rtol=0)


def test_stage_two_begins_at_the_words_and_resumes_from_what_it_learned(tmp_path: Path) -> None:
    root = make_workspace(tmp_path)
    store = {"features": str(root / "store"), "crop": [1, 1], "flip": 0}
    stages.train(config(root, "stage1", data=store, train=IDLE))

    def run(name: str, **changes: Any) -> VisionLanguageModel:
        given = config(root, "stage2", run=str(root / name), data=store, train=IDLE, **changes)
        model = load(stages.train(given), "cpu")
        assert isinstance(model, VisionLanguageModel)
        assert isinstance(model.connector, QFormerConnector)
        return model

    warm, cold = run("warm", start="warm", llm={"visual_scale": "auto"}), run("cold")
    photos = [str(root / "images" / f"{number}.png") for number in (0, 1, 3, 4, 6, 7, 9, 10)]
    words = word_spread(warm.llm.model, len(warm.llm.tokenizer))

    def difference(model: VisionLanguageModel) -> float:
        with torch.no_grad():
            prefix = model.prefix(model.frontend.tiles(photos)).embeds.mean(dim=1)  # (8, L)
        return float((prefix - prefix.mean(dim=0)).square().mean().sqrt())

    assert difference(warm) == pytest.approx(words, rel=0.02), "photos differ by as much as words do"
    assert abs(difference(cold) - words) > 0.1 * words
    learned = warm.connector.state_dict()
    again = run("warm", start="warm", llm={"visual_scale": "auto"}).connector.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in learned.items())
    with pytest.raises(UsageError, match="would replace the projection that init"):
        run("third", start="warm", init=str(root / "warm"))
