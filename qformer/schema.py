"""The strict schema of the configuration, section by section. Its defaults are those of the paper.

Sections that name a class to build (`vision`, `resolution`, a data source) also carry the options of that class.
`qformer.stages.checking` checks them against the class before a command opens anything, and `lookup.build` checks them
again when it builds the class.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    model_validator,
)

from qformer.data_schema import DataConfig, LimitsConfig
from qformer.fields import Choice, Count, Epsilon, Fraction, Named, Positive, Section, Share
from qformer.language_schema import LLMConfig


class QuestionConfig(Section):
    """Options of a Q-Former of stage two that also reads the question (BLIP-2, section 4.3 and appendix).

    It is the option `question` of the connector `qformer`: `connector: {name: qformer, question: {max_tokens: 48}}`.
    Written by itself, as a section of the configuration, it means the same, and so it is saved.

    Attributes:
        init: run or checkpoint of stage one to take the text path from (word and position embeddings, text
            feed-forward) if the `init` of the run has none, since stage two keeps only the query path. By default BERT.
        max_tokens: maximum length of a question for the Q-Former, including `[CLS]` and `[SEP]`; the rest is cut.
    """

    init: Named | None = None
    max_tokens: Positive = 32


EYES = ("vit", "rope", "clip")  # towers that read pictures
POSITIONS = {"bert": 128, "opt": 512}  # positions of towers from scratch; those of a T5 are relative


class BackboneConfig(Section):
    """Sizes of a small tower that `stage: vision` or `stage: language` trains from scratch.

    Attributes:
        kind: architecture of the tower, which is saved as an ordinary transformers folder; `rope`, a tower of
            Qwen2-VL's form without a table of positions, as a folder of such a model that holds the tower alone.
        heads: attention heads.
        intermediate: width inside the feed-forward layers; 4 x `width` by default.
        decoder_layers: decoder layers of a T5, whose encoder has `layers`; `layers` by default, which is also the
            maximum (for generation, transformers allocates a cache of `layers` layers).
        image_size, patch_size: sizes of a ViT, in pixels.
        text: BERT folder or hub id against which a ViT or `rope` is trained contrastively; it is discarded afterwards.
        mask: in place of `text`, the share of the patches that are hidden from a ViT, which learns to fill them in.
        freeze_text: freeze that BERT and train only a projection on top of it.
        vocab_size: size of the WordPiece (BERT), byte-level BPE (OPT, CLIP) or word BPE (T5) tokenizer trained on the
            captions.
        positions: positions of an OPT, 512 by default; those of a T5 are relative.
        start: tower to go on from instead of random weights, a folder or a name: an OPT or T5 of the same sizes, which
            can have other words and fewer positions; for the source `views`, a ViT of the same sizes.
    """

    kind: Literal["vit", "rope", "clip", "bert", "opt", "t5"]
    width: Positive = 192
    layers: Positive = 6
    heads: Positive = 3
    intermediate: Positive | None = None
    decoder_layers: Positive | None = None
    image_size: Positive = 112
    patch_size: Positive = 16
    text: Named | None = None
    mask: Annotated[float, Field(gt=0, lt=1)] | None = None
    freeze_text: bool = False
    vocab_size: Positive = 4096
    max_tokens: Positive = 48
    positions: Positive | None = None
    start: Named | None = None

    @model_validator(mode="after")
    def _has_no_use(self) -> Self:
        for key, kinds in (("positions", ("opt",)), ("start", ("vit", "rope", "opt", "t5"))):
            if getattr(self, key) is not None and self.kind not in kinds:
                raise ValueError(
                    f"backbone.{key} is an option of backbone.kind {', '.join(kinds)}, not of {self.kind}; leave it out"
                )
        return self

    @property
    def learns_from_text(self) -> bool:
        """True if a text tower of its own, `text`, trains the tower; a CLIP has one inside."""
        return self.kind in ("vit", "rope") and self.mask is None

    @model_validator(mode="after")
    def _text_or_mask(self) -> Self:
        if self.mask is not None and (self.kind != "vit" or self.text is not None):
            raise ValueError("backbone.mask is for a vit without backbone.text; leave one of them out")
        if self.kind == "clip" and self.text is not None:
            raise ValueError("a clip trains a text tower of its own; leave backbone.text out")
        return self

    @model_validator(mode="after")
    def _width_divides(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"backbone.width {self.width} does not divide into {self.heads} heads; change one of them")
        if self.decoder_layers is not None and self.decoder_layers > self.layers:
            raise ValueError(
                f"backbone.decoder_layers {self.decoder_layers} is more than backbone.layers {self.layers}; lower it"
            )
        if self.kind in EYES and (self.width % 4 or self.image_size % self.patch_size):
            raise ValueError(
                f"a {self.kind} of backbone.width {self.width}, image_size {self.image_size} and patch_size "
                f"{self.patch_size} cannot be built; give a width that 4 divides and an image_size that patch_size "
                "divides"
            )
        return self


class TextConfig(Section):
    """The BERT that initializes the Q-Former and whose tokenizer it uses.

    Attributes:
        bert: folder or hub id. The sizes of the Q-Former are read from it unless given.
        fold_token_types: add BERT's token-type row 0 to its word embeddings, so that the text path equals BERT
            exactly; the original drops it.
        pooling: what of a text ITC compares: the row of `[CLS]`, as in the paper, or the `mean` of all its rows, as
            sentence encoders (MiniLM) are trained.
        max_tokens: maximum length of a caption, including `[CLS]` and `[SEP]`; the rest is cut.
    """

    bert: Named = "bert-base-uncased"
    fold_token_types: bool = False
    pooling: Literal["class", "mean"] = "class"
    max_tokens: Positive = 32


class LossConfig(Section):
    """Losses of stage one (BLIP-2, section 3.2).

    Attributes:
        embed_width: P, the width of the ITC embedding.
        temperature: initial value of the learned ITC temperature.
        smoothing: label smoothing of ITC and ITG.
        itm, itg: weights of these losses beside ITC, whose weight is 1; a loss of weight 0 is not computed.
        gather_grad: `anchor` lets gradients of ITC flow only through the rows, as the original does; `full` is the
            true gradient of the loss.
    """

    embed_width: Positive = 256
    temperature: Annotated[float, Field(gt=0)] = 0.07
    smoothing: Fraction = 0.1
    itm: Annotated[float, Field(ge=0)] = 1.0
    itg: Annotated[float, Field(ge=0)] = 1.0
    gather_grad: Literal["anchor", "full"] = "anchor"


class QFormerConfig(Section):
    """Sizes of the Q-Former; the defaults are BERT-base with 32 queries over ViT-g (BLIP-2, section 3.1).

    Attributes:
        cross_attention_every: n, for cross-attention in layers 0, n, 2n, ...
        encoder_width: D, width of the image tokens.
        vocab_size: BERT's 30,522 words and `[DEC]`.
    """

    hidden_size: Positive = 768
    layers: Positive = 12
    heads: Positive = 12
    intermediate_size: Positive = 3072
    queries: Positive = 32
    cross_attention_every: Positive = 2
    encoder_width: Positive = 1408
    vocab_size: Positive = 30523
    max_positions: Positive = 512
    dropout: Fraction = 0.1
    layer_norm_eps: Epsilon = 1e-12

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.heads:
            raise ValueError(
                f"qformer.hidden_size {self.hidden_size} does not divide into {self.heads} heads; change one of them"
            )
        return self


class TrainConfig(Section):
    """Optimization; the defaults are the paper's (section 3.4 and appendix).

    Attributes:
        steps: total number of optimizer steps.
        accumulate: batches per optimizer step.
        chunk: pairs that pass through the model of stage one at a time. Losses and gradients are those of the whole
            batch, memory is that of a chunk; 0 is the whole batch at once.
        fsdp: shard the frozen layers over processes (FSDP2), which saves memory and costs time.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        lr, min_lr, warmup_lr: learning rates at the peak, at the end of the cosine, and at the start of the warm-up.
        warmup: steps of linear warm-up from `warmup_lr` to `lr`.
        bert_rate: learning rate of what the Q-Former has from BERT alone (embeddings, self-attention, text
            feed-forward), relative to `lr`; at 0 it stays as it is, and texts cost no backward pass.
        layer_decay: learning rate of each block of a trained image encoder, relative to that of the next block.
        clip: largest gradient norm; 0 does not clip, as in the original.
        precision: dtype of autocast; trained weights stay fp32. `auto` is the fastest that the device computes in.
        validate_every, save_every: interval in steps; 0 is only at the end.
        keep_last: number of newest checkpoints to keep.
        keep_every: also keep the checkpoints at multiples of this step; 0 is none.
        rerank: number of ITC candidates that validation of stage one re-ranks with ITM.
    """

    steps: Positive
    accumulate: Positive = 1
    chunk: Count = 0
    fsdp: bool = False
    gradient_checkpointing: bool = False
    lr: Annotated[float, Field(gt=0)] = 1e-4
    min_lr: Annotated[float, Field(ge=0)] = 1e-5
    warmup_lr: Annotated[float, Field(ge=0)] = 1e-6
    warmup: Count = 2000
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    betas: tuple[Share, Share] = (0.9, 0.98)
    bert_rate: Fraction = 1.0
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    clip: Annotated[float, Field(ge=0)] = 0.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    log_every: Positive = 10
    validate_every: Count = 1000
    save_every: Count = 1000
    keep_last: Positive = 2
    keep_every: Count = 0
    rerank: Count = 16

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.warmup >= self.steps:
            raise ValueError(
                f"train.warmup {self.warmup} is not below train.steps {self.steps}; lower the one or raise the other"
            )
        return self


QFORMER = "qformer"  # the connector of BLIP-2 and of stage one
LINKS = ("none", "joint", "per_slice")


class Config(Section):
    """Configuration of a run. The sections describe their own keys.

    Attributes:
        stage: part to train: a tower from scratch (`vision`, `language`) or the bridge (`stage1`, `stage2`).
        run: folder for everything that the run writes.
        init: run or checkpoint to start from; stage two takes its Q-Former from stage one.
        start: `paper` draws what is new at random. `warm` solves it on `data.features`: stage one begins at the linear
            maps between the frozen towers, stage two's projection at the words of the captions (docs/real.md).
        vision_norm_eps: epsilon of the LayerNorm after the encoder; BLIP-2 in transformers has 1e-6.
        connector: in stage two, turns image tokens into embeddings of the language model. Others than `qformer` have
            options of their own and leave `qformer`, `text` and `vision_norm_eps` unread.
            For `qformer`, see also `links`.
        question: option of the connector `qformer`: let the Q-Former read the question too; by default only the
            language model does.
    """

    stage: Literal["vision", "language", "stage1", "stage2"]
    run: Named
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    init: Named | None = None
    start: Literal["paper", "warm"] = "paper"
    vision: Choice = Choice(name="eva")
    freeze_vision: bool = True
    vision_norm_eps: Epsilon = 1e-5
    resolution: Choice = Choice(name="fixed")
    limits: LimitsConfig = LimitsConfig()
    text: TextConfig = TextConfig()
    qformer: QFormerConfig = QFormerConfig()
    connector: Choice = Choice(name=QFORMER)
    question: QuestionConfig | None = None
    loss: LossConfig = LossConfig()
    llm: LLMConfig | None = None
    backbone: BackboneConfig | None = None
    data: DataConfig
    train: TrainConfig

    @property
    def has_qformer(self) -> bool:
        """True if the connector is BLIP-2's, as in stage one."""
        return self.connector.name == QFORMER

    @property
    def links(self) -> Literal["none", "joint", "per_slice"]:
        """Option of the connector `qformer`: how its queries read the tiles of a picture.

        Each tile by itself (`none`), all by one set of queries (`joint`), or all by a set for each tile (`per_slice`).
        In stage one the images of ITM and ITG get the places of tiles with either of the last two.
        """
        return self.connector.options.get("links", "none") if self.has_qformer else "none"

    @model_validator(mode="before")
    @classmethod
    def _question_by_itself(cls, given: Any) -> Any:
        """Take `question` out of the options of the connector `qformer`."""
        connector = given.get("connector") if isinstance(given, dict) else None
        if not isinstance(connector, dict) or connector.get("name") != QFORMER or "question" not in connector:
            return given
        if given.get("question") is not None:
            raise ValueError("question is given twice, by itself and as connector.question; leave one of them out")
        connector = dict(connector)
        return {**given, "question": connector.pop("question"), "connector": connector}

    @model_validator(mode="after")
    def _connector_fits(self) -> Self:
        name = self.connector.name
        if self.has_qformer:
            for key, given in self.connector.options.items():
                if key != "links":
                    raise ValueError(f"connector.{key} is not an option of 'qformer': known are links, question")
                if given not in LINKS:
                    raise ValueError(f"connector.links is {given!r}; give one of {', '.join(LINKS)}")
            if self.links != "none" and self.stage not in ("stage1", "stage2"):
                raise ValueError(f"connector.links is for stage1 and stage2, not for '{self.stage}'; leave it out")
            return self
        if self.stage != "stage2":
            why = "trains a Q-Former" if self.stage == "stage1" else "has no connector"
            raise ValueError(
                f"connector.name is '{name}', but '{self.stage}' {why}; give it to stage2, or leave it out"
            )
        if self.question is not None:
            raise ValueError(f"question is an option of the connector 'qformer', and this is '{name}'; leave it out")
        if self.llm is not None and self.llm.visual_scale != 1:
            raise ValueError(
                f"llm.visual_scale is for the projection of the connector 'qformer', and this is '{name}'; leave it out"
            )
        return self

    def _cold(self) -> str:
        """Say why a warm start is impossible; empty if it is not."""
        if self.stage not in ("stage1", "stage2"):
            return "trains no bridge"
        if self.data.features is None:
            return "stores no tokens: give data.features a folder"
        if self.stage == "stage1":
            return "" if self.init is None else "has an init to start from"
        if self.connector.name != QFORMER:
            return f"has the connector '{self.connector.name}', and it is the projection of '{QFORMER}' that is solved"
        return "has no Q-Former yet: give init a run of stage1" if self.init is None else ""

    @model_validator(mode="after")
    def _sections_fit_the_stage(self) -> Self:
        if self.train.chunk and self.stage != "stage1":
            raise ValueError(
                f"train.chunk {self.train.chunk} is for the contrastive loss of stage1; lower data.batch and raise "
                "train.accumulate instead"
            )
        if self.data.features is not None and (not self.freeze_vision or self.stage in ("vision", "language")):
            why = "trains the image encoder" if self.stage == "vision" or not self.freeze_vision else "reads no images"
            raise ValueError(f"data.features holds tokens of a frozen image encoder, but this run {why}; leave it out")
        if self.start == "warm" and (why := self._cold()):
            raise ValueError(f"start: warm is solved on stored tokens of photos, but this run {why}; or leave it out")
        if self.question is not None and self.stage != "stage2":
            raise ValueError(
                f"question is for stage2, whose Q-Former reads it for a language model, not for '{self.stage}'; "
                "leave it out"
            )
        if self.stage == "stage2" and self.llm is None:
            raise ValueError("stage2 needs a language model; add llm.path, a folder or hub id")
        if self.stage in ("vision", "language"):
            if self.backbone is None:
                raise ValueError(f"stage '{self.stage}' needs a backbone section; add backbone.kind")
            if (self.backbone.kind in EYES) != (self.stage == "vision"):
                raise ValueError(
                    f"stage '{self.stage}' cannot train backbone.kind '{self.backbone.kind}'; change one of them"
                )
            views = self.data.train.name == "views"
            if self.backbone.start is not None and self.stage == "vision" and (not views or self.backbone.mask):
                raise ValueError("backbone.start of an image encoder is for the source views without backbone.mask")
            if self.backbone.text is None and self.backbone.learns_from_text and not views:
                raise ValueError(
                    "stage 'vision' trains against a text tower; add backbone.text, a BERT folder or hub id"
                )
        return self
