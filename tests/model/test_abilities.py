"""What a language model can do is found when it is loaded, and what it cannot do is worked around or refused there."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import DynamicCache

from qformer.llm.abilities import examine, require_training
from qformer.llm.base import Abilities, CausalLM, LanguageModel
from qformer.llm.loading import load_language_model
from qformer.llm.steps import CACHE_NAMES, arguments, cache_name
from qformer.types import UsageError
from tests.tiny_families import CAUSAL, SEQ2SEQ, tiny_family

if TYPE_CHECKING:
    from collections.abc import Callable

DOCS = Path(__file__).parents[2] / "docs" / "language.md"
PROMPTS = ["a photo of", "", "Question: what is on the old bus? Answer:"]
VALID = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0], [1, 0, 1, 0]]).bool()
#: Families that are not like all others: no cache that texts can share, and padding that changes an answer.
UNCACHED = {"mamba", "minimax", "recurrent_gemma", "rwkv"}
UNBATCHED = {"recurrent_gemma", "rwkv"}


def visual(llm: LanguageModel) -> torch.Tensor:
    return torch.randn(3, 4, llm.width, generator=torch.Generator().manual_seed(7))


def texts(llm: LanguageModel, rows: slice = slice(0, 3), **options: Any) -> list[list[int]]:
    """New ids of each row up to its end."""
    given = visual(llm)[rows], VALID[rows]
    options |= {"draws": options["draws"][rows]} if "draws" in options else {}
    if rows.stop - rows.start == 1:
        given = given[0][:, VALID[rows.start]], given[1][:, VALID[rows.start]]
    ids = llm.generate(*given, PROMPTS[rows], max_new_tokens=6, **options)
    return [row[: row.index(llm.end) + 1] if llm.end in row else row for row in ids.tolist()]


def change(llm: LanguageModel, alter: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Let the model's `forward` get other arguments than it is given."""
    forward = llm.model.forward

    @functools.wraps(forward)
    def altered(*args: Any, **given: Any) -> Any:
        return forward(*args, **alter(given))

    llm.model.forward = altered


@pytest.mark.parametrize("kind", ["opt", "qwen2", "t5", "bart"])
def test_a_usual_model_is_left_as_it_was(kind: str) -> None:
    llm = tiny_family(kind)
    state = torch.random.get_rng_state()
    assert examine(llm, kind) == llm.abilities == Abilities()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(weight.grad is not None or weight.requires_grad for weight in llm.parameters())
    require_training(llm)


def ignore_mask(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"attention_mask": torch.ones_like(given["attention_mask"]), "position_ids": None}


def test_a_mask_that_is_ignored_lets_rows_be_written_one_by_one() -> None:
    llm = tiny_family("llama")
    change(
        llm, lambda given: given | {"attention_mask": torch.ones_like(given["attention_mask"]), "position_ids": None}
    )
    alone = [texts(llm, slice(row, row + 1), num_beams=1)[0] for row in range(3)]
    assert texts(llm, num_beams=1) != alone
    with pytest.warns(
        UserWarning, match="'here' gives other scores for padded rows, so it generates one row at a time"
    ):
        llm.abilities = examine(llm, "here")
    assert llm.abilities == Abilities(batches=False)
    assert texts(llm, num_beams=1) == alone


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_a_cache_that_is_not_reordered_is_not_used(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_family(kind)
    right = texts(llm, num_beams=3)
    expand = DynamicCache.reorder_cache

    def lose(cache: Any, rows: torch.Tensor) -> None:
        if len(rows) != len(rows.unique()):  # repeats rows, but never lets them change places
            expand(cache, rows.sort().values)

    monkeypatch.setattr(DynamicCache, "reorder_cache", lose)
    with pytest.warns(UserWarning, match="no cache that beams can share"):
        llm.abilities = examine(llm, kind)
    assert llm.abilities == Abilities(caches=False)
    assert texts(llm, num_beams=3) == right


def test_a_cache_argument_of_another_name_costs_time_and_no_text() -> None:
    llm = tiny_family("opt")
    right = texts(llm, num_beams=3)
    forward = llm.model.forward

    def renamed(
        input_ids: Any = None, inputs_embeds: Any = None, attention_mask: Any = None, memory: Any = None
    ) -> Any:
        assert memory is None
        return forward(input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask)

    llm.model.forward = renamed
    assert cache_name(llm.model) is None
    with pytest.warns(UserWarning, match="no cache"):
        llm.abilities = examine(llm, "opt")
    assert texts(llm, num_beams=3) == right


def test_a_model_that_reads_no_embeddings_is_refused_when_it_is_loaded() -> None:
    llm = tiny_family("gpt2")

    def only_words(given: dict[str, Any]) -> dict[str, Any]:
        if given.get("inputs_embeds") is not None:
            raise NotImplementedError("words only.\nSecond line")
        return given

    change(llm, only_words)
    expected = "the gpt2 model in 'here' cannot write after image tokens (NotImplementedError: words only); use another"
    with pytest.raises(UsageError, match=re.escape(expected)):
        examine(llm, "here")


def test_a_model_through_which_nothing_can_be_learned_is_refused_in_training() -> None:
    llm = tiny_family("gpt2")
    change(
        llm,
        lambda given: (
            given if given.get("inputs_embeds") is None else given | {"inputs_embeds": given["inputs_embeds"].detach()}
        ),
    )
    assert examine(llm, "here") == Abilities()
    with pytest.raises(UsageError, match=r"with this gpt2 model \(\w+: .*\); use another language model$"):
        require_training(llm)


@pytest.mark.parametrize(
    ("value", "expected"), [(torch.nan, "its loss is not a finite number"), (None, "RuntimeError")]
)
def test_a_loss_that_fails_only_in_short_rows_is_told(value: float | None, expected: str) -> None:
    llm = tiny_family("gpt2")
    real = llm.loss

    def loss(prefix: torch.Tensor, *given: Any) -> Any:
        total, count = real(prefix, *given)
        if prefix.shape[1] == 1 and value is None:
            raise RuntimeError("too short")
        return (total * value if prefix.shape[1] == 1 and value is not None else total), count

    llm.loss = loss  # type: ignore[method-assign]
    with pytest.raises(UsageError, match=expected):
        require_training(llm)


def test_a_word_that_is_never_said_hides_nothing() -> None:
    """Scores of -inf, as of banned words, are left out of the comparison."""
    llm = tiny_family("llama")
    change(
        llm, lambda given: given | {"attention_mask": torch.ones_like(given["attention_mask"]), "position_ids": None}
    )
    llm.model.get_output_embeddings().register_forward_hook(
        lambda _module, _given, logits: logits.index_fill(-1, torch.tensor([3]), -torch.inf)
    )
    with pytest.warns(UserWarning, match="other scores for padded rows"):
        assert not examine(llm, "here").batches


def test_a_model_of_few_positions_is_refused_with_them(tmp_path: Path) -> None:
    llm = tiny_family("llama")
    llm.model.config.max_position_embeddings = 4
    with pytest.raises(UsageError, match=r"cannot write after image tokens \(.* exceed the 4 positions"):
        examine(llm, "here")


def test_a_configuration_that_asks_for_tuples_is_read_all_the_same() -> None:
    model = tiny_family("opt").model
    model.config.return_dict = False
    assert examine(CausalLM(model, tiny_family("opt").tokenizer), "here") == Abilities()


def test_on_the_meta_device_nothing_is_tried() -> None:
    llm = tiny_family("opt")
    llm.model = llm.model.to("meta")
    assert examine(llm, "opt") == Abilities()


def test_loading_finds_out(tmp_path: Path) -> None:
    """RWKV has neither a mask nor a cache of the usual kind: with beams, in a batch, it answers as alone."""
    llm = tiny_family("rwkv")
    llm.model.save_pretrained(tmp_path)
    llm.tokenizer.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no cache|one row at a time") as told:
        loaded = load_language_model(tmp_path)
    assert loaded.abilities == Abilities(caches=False, batches=False)
    assert len([one for one in told if str(tmp_path) in str(one.message)]) == 2
    for options in ({"num_beams": 3}, {"num_beams": 1}):
        assert texts(loaded, **options) == [texts(loaded, slice(row, row + 1), **options)[0] for row in range(3)]


def test_the_step_asks_the_signature() -> None:
    assert cache_name(tiny_family("opt").model) in CACHE_NAMES[:2]
    assert "position_ids" in arguments(tiny_family("opt").model)
    assert "position_ids" not in arguments(tiny_family("t5").model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted([*CAUSAL, *SEQ2SEQ]))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_family_writes_in_a_batch_what_it_writes_alone(kind: str) -> None:
    llm = tiny_family(kind)
    llm.abilities = examine(llm, kind)
    assert llm.abilities == Abilities(caches=kind not in UNCACHED, batches=kind not in UNBATCHED)
    require_training(llm)
    ways: list[dict[str, Any]] = [{"num_beams": 3}, {"num_beams": 1}]
    for options in ways:
        together = texts(llm, **options)
        assert together == [texts(llm, slice(row, row + 1), **options)[0] for row in range(3)]
        usual, llm.abilities = llm.abilities, Abilities(caches=False, batches=False)
        assert texts(llm, **options) == together
        llm.abilities = usual
    # Of near-equal tokens rounding decides which a number draws; the likeliest is what the lowest numbers draw.
    lowest = {"do_sample": True, "draws": [[0.0] * 6] * 3}
    assert texts(llm, **lowest) == texts(llm, num_beams=1)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "quantize"), [("deepseek_v3", "int8"), ("mamba", "int8"), ("mamba", "nf4")])
def test_what_bitsandbytes_cannot_quantise_is_refused_when_it_is_loaded(
    kind: str, quantize: str, tmp_path: Path
) -> None:
    llm = tiny_family(kind)
    llm.model.save_pretrained(tmp_path)
    llm.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=f"the {kind} model in .* cannot write after image tokens"):
        load_language_model(tmp_path, quantize=quantize)


def test_the_list_of_families_is_in_the_documents() -> None:
    rows = re.findall(r"^\| (usual|no cache|row by row) \| ([^|]*) \|", DOCS.read_text(), flags=re.MULTILINE)
    shown = {name: set(re.findall(r"`(\w+)`", kinds)) for name, kinds in rows}
    known = {*CAUSAL, *SEQ2SEQ}
    assert shown == {"usual": known - UNCACHED, "no cache": UNCACHED - UNBATCHED, "row by row": UNBATCHED}
