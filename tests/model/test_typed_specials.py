"""Special tokens typed in captions, questions and queries are words: they end, pad and mask nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from qformer.data.texts import cleaned
from qformer.llm.loading import load_language_model
from qformer.model.assembly import build_image_text, build_vision_language
from qformer.model.bert import read_tokenizer
from qformer.model.connectors import QFormerConnector
from qformer.model.qformer import QFormer
from tests.tiny import save_tiny_llm
from tests.workspace import config, make_workspace, save_tiny_bert

if TYPE_CHECKING:
    from pathlib import Path

TYPED = "was <s>red</s> <pad> <|im_end|> <|endoftext|> <image> <extra_id_0> [SEP] [MASK] [PAD]"


@pytest.mark.parametrize("kind", ["opt", "flan-t5", "llama", "gpt2", "qwen2"])
def test_a_language_model_reads_them_as_words(tmp_path: Path, kind: str) -> None:
    llm = load_language_model(save_tiny_llm(tmp_path, kind))
    special = {*llm.tokenizer.all_special_ids}
    whole, (caption,) = llm.ended([TYPED])[0], cleaned([TYPED])
    targets = llm._targets([caption], [""], 500, torch.device("cpu"))[1][0].tolist()
    for row in (whole, targets):
        assert row[-1] == llm.end
        assert not special & {*row[len(llm.start) : -1]}
        assert llm.end not in row[len(llm.start) : -1]
    assert llm.count_tokens(f"Question: {TYPED}") > 60
    assert llm.decode([whole]) == [TYPED]
    assert llm.decode([llm.ended(["a red bus"])[0]]) == ["a red bus"]


def test_special_tokens_of_the_configured_prompt_are_meant(tmp_path: Path) -> None:
    """Such as those of a chat; the same words behind them are not."""
    root = make_workspace(tmp_path)
    save_tiny_llm(root / "qwen2", "qwen2")
    prompt = "<|endoftext|>user: a photo of<|im_end|>"
    vision, sizes = {"name": "hf", "path": str(root / "vit")}, {"hidden_size": 8, "heads": 2, "layers": 1}
    options = {"vision": vision, "qformer": sizes, "llm": {"path": str(root / "qwen2"), "prompt": prompt}}
    llm = build_vision_language(config(root, "stage2", init=None, **options))[0].llm
    first, last = llm.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    typed = " a bus <|im_end|> <|endoftext|>"
    for text, times in ((prompt + typed, 1), (typed, 0)):
        row = llm.ended([text])[0][:-1]
        assert (row.count(first), row.count(last)) == (times, times)
    row, targets = llm._targets([typed], [prompt], 90, torch.device("cpu"))
    assert (row.ids[0].eq(first).sum(), targets.eq(first).sum(), targets.eq(last).sum()) == (1, 0, 1)
    assert llm.decode([llm.ended(["a red bus"])[0]]) == ["a red bus"]


def test_a_newline_ends_no_text_of_opt_within(tmp_path: Path) -> None:
    llm = load_language_model(save_tiny_llm(tmp_path, "opt"))
    cpu = torch.device("cpu")
    one, other = (llm._targets([text], ["a photo of"], 50, cpu)[1].tolist() for text in ("a\nbus", "a bus"))
    assert one == other
    assert one[0].count(llm.end) == 1


def test_the_q_former_reads_them_as_words(tmp_path: Path) -> None:
    root = make_workspace(tmp_path)
    model, settings = build_image_text(config(root, "stage1", text={"bert": str(root / "bert"), "max_tokens": 40}))
    connector = QFormerConnector(
        QFormer(settings.qformer), 8, tokenizer=read_tokenizer(str(root / "bert")), max_tokens=40
    )
    bert = model.tokenizer
    special = {bert.cls_token_id, bert.sep_token_id, bert.pad_token_id, bert.mask_token_id, bert.bos_token_id}
    for text in ("a [SEP] cat [MASK] dog [PAD]", "a [CLS] [DEC] dog"):
        for row in (model.tokenize([text]).ids[0].tolist(), connector.tokenize([text]).ids[0].tolist()):
            assert (row[0], row[-1]) == (bert.cls_token_id, bert.sep_token_id)
            assert not special & {*row[1:-1]}
    saved = save_tiny_bert(tmp_path / "again")
    bert.save_pretrained(saved)
    assert bert.sep_token_id not in read_tokenizer(saved)("a [SEP] cat")["input_ids"][1:-1]
