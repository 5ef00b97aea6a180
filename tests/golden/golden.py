"""Golden files read back, and our models made from them: what `tests/test_against_lavis*.py` share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from qformer import vision
from qformer.checkpoints.lavis import from_lavis
from qformer.checkpoints.names import Stage, bridge_rows
from qformer.checkpoints.parts import Parts
from qformer.config import LossConfig
from qformer.llm.base import CausalLM, LanguageModel, Seq2SeqLM
from qformer.model.connectors import QFormerConnector
from qformer.model.image_text import ImageTextModel
from qformer.model.qformer import QFormer
from qformer.model.vision_language import VisionLanguageModel
from qformer.schema import QFormerConfig
from qformer.types import Tiles
from qformer.vision.base import VisionEncoder
from qformer.vision.eva import eva_rows
from tests.golden import vocabulary

HERE = Path(__file__).parent
VALUES, GRADIENTS = 1e-5, 1e-4
Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Golden:
    """A golden file: sizes and texts, LAVIS's state dict, its inputs, its outputs and its gradients."""

    about: dict[str, Any]
    weight: dict[str, Tensor]
    given: dict[str, Tensor]
    out: dict[str, Tensor]
    grad: dict[str, Tensor]


def read(name: str) -> Golden:
    found: dict[str, dict[str, Tensor]] = {"weight": {}, "in": {}, "out": {}, "grad": {}}
    with safe_open(HERE / f"{name}.safetensors", "pt") as file:
        about = json.loads(file.metadata()["json"])
        for key in file.keys():  # noqa: SIM118  # not a dict
            part, _, rest = key.partition("/")
            found[part][rest] = file.get_tensor(key)
    return Golden(about, found["weight"], found["in"], found["out"], found["grad"])


def image_text(golden: Golden) -> ImageTextModel:
    """Stage one's model with the weights of the file, in eval mode; the encoder is frozen, as in the file."""
    about = golden.about
    tokenizer = bert_tokenizer(about["variant"])
    qformer = QFormer(_sizes(about, cross_attention_every=about["cross_attention_every"], vocab_size=len(tokenizer)))
    loss = LossConfig(embed_width=about["embed_width"])
    model = ImageTextModel(_encoder(about), qformer, tokenizer, loss, about["max_tokens"])
    return _filled(model, golden)


def vision_language(golden: Golden) -> VisionLanguageModel:
    """Stage two's model with the weights of the file, in eval mode."""
    about = golden.about
    llm: LanguageModel
    if "word_embed_proj_dim" in about["llm"]:
        llm = CausalLM(OPTForCausalLM(OPTConfig(**about["llm"])), opt_tokenizer(about["variant"]))
    else:
        t5 = T5ForConditionalGeneration(T5Config(feed_forward_proj="gated-gelu", **about["llm"]))
        t5.lm_head.weight = nn.Parameter(torch.empty_like(t5.lm_head.weight))  # transformers 5 makes every T5 tied
        llm = Seq2SeqLM(t5, t5_tokenizer(about["variant"]))
    connector = QFormerConnector(QFormer(_sizes(about)).drop_text(), llm.width)
    model = VisionLanguageModel(_encoder(about), connector, llm, about["prompt"], about["max_tokens"])
    return _filled(model, golden)


def _encoder(about: dict[str, Any]) -> VisionEncoder:
    sizes = dict(about["vision"])
    hidden = int(sizes["width"] * sizes.pop("mlp_ratio"))
    return vision.build("eva", precision="fp32", mlp_hidden=hidden, **sizes).freeze()


def _sizes(about: dict[str, Any], **more: Any) -> QFormerConfig:
    return QFormerConfig(**about["qformer"], queries=about["queries"], encoder_width=about["vision"]["width"], **more)


def parts(golden: Golden) -> Parts:
    """The weights of the file, taken apart."""
    return from_lavis(golden.weight, golden.about["qformer"]["heads"])


def _filled(model: Model, golden: Golden) -> Model:
    taken = parts(golden)
    state = dict(taken.bridge)
    state |= {f"frontend.encoder.{name}": tensor for name, tensor in taken.vision.items()}
    state |= {f"llm.model.{name}": tensor for name, tensor in taken.llm.items()}
    model.load_state_dict(state, strict=True)
    return model.eval()


def gradients(golden: Golden) -> dict[str, Tensor]:
    """The gradients of the file under our names."""
    taken = parts(golden)
    names = our_names(taken.sizes, taken.stage, taken.family, golden.about["vision"]["depth"])
    return {names[name]: gradient for name, gradient in golden.grad.items()}


def our_names(sizes: QFormerConfig, stage: Stage, family: str | None, depth: int) -> dict[str, str]:
    """By LAVIS's names those of our models, but for the language model and for what LAVIS says twice."""
    names = {lavis: ours for ours, lavis, _ in bridge_rows(sizes, stage, family) if lavis}
    return names | {f"visual_encoder.{name}": f"frontend.encoder.{name}" for name, _ in eva_rows(depth)}


def tiles(golden: Golden, name: str = "pixels") -> Tiles:
    return Tiles.from_pixels(golden.given[name])


def close(ours: Tensor, theirs: Tensor, atol: float = VALUES) -> None:
    """Equal within `atol`, where the values are of the order of one; beyond that relative to them."""
    torch.testing.assert_close(ours.detach(), theirs, atol=atol, rtol=atol)


def same_ids(ours: Tensor, theirs: Tensor, end: int) -> None:
    """Equal rows of ids up to the one that ends a text; behind it stands padding, which differs."""

    def cut(ids: Tensor) -> list[list[int]]:
        return [row[: row.index(end)] if end in row else row for row in ids.tolist()]

    assert cut(ours) == cut(theirs)


def bert_tokenizer(variant: str) -> PreTrainedTokenizerFast:
    tokens = {token: index for index, token in enumerate(vocabulary.bert(variant))}
    made = Tokenizer(models.WordPiece(tokens, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = [("[CLS]", tokens["[CLS]"]), ("[SEP]", tokens["[SEP]"])]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="[DEC]", **names)


def opt_tokenizer(variant: str) -> PreTrainedTokenizerFast:
    tokens, merges = vocabulary.byte_level(variant)
    made = Tokenizer(models.BPE(tokens, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", tokens["</s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>"
    )


def t5_tokenizer(variant: str) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.Unigram(vocabulary.unigram(variant), unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
