"""Models assembled from a configuration: encoder, Q-Former or connector, language model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qformer import resolution, vision
from qformer.llm import lora
from qformer.llm.loading import DTYPES, equip, load_language_model
from qformer.model import connectors
from qformer.model.bert import read_tokenizer
from qformer.model.connectors import QFormerConnector
from qformer.model.frontend import FrontEnd
from qformer.model.image_text import ImageTextModel
from qformer.model.qformer import QFormer
from qformer.model.vision_language import VisionLanguageModel
from qformer.schema import Config, QFormerConfig
from qformer.types import UsageError

if TYPE_CHECKING:
    from qformer.llm.base import LanguageModel
    from qformer.model.connectors import Connector
    from qformer.vision.base import VisionEncoder


Bridge = ImageTextModel | VisionLanguageModel


def build_encoder(config: Config) -> VisionEncoder:
    """The image encoder of a configuration, frozen unless it is to be trained: then every weight is kept in fp32.

    Raises:
        UsageError: options that do not fit, or a missing folder.
    """
    encoder = vision.options_of(config.vision).build()
    return encoder.freeze() if config.freeze_vision else encoder.float()


def assemble(
    config: Config,
    device: torch.device | str = "cpu",
    encoder: VisionEncoder | None = None,
    llm: LanguageModel | None = None,
    tokenizer_of: Any = None,
) -> tuple[Bridge, Config]:
    """The model of the stage of a configuration, one or two; see the two functions below."""
    if config.stage == "stage1":
        return build_image_text(config, tokenizer_of, encoder)
    return build_vision_language(config, device, encoder, llm, tokenizer_of)


def build_image_text(
    config: Config, tokenizer_of: Path | str | None = None, encoder: VisionEncoder | None = None
) -> tuple[ImageTextModel, Config]:
    """Stage one's model and the configuration with every size filled in.

    Args:
        tokenizer_of: where the tokenizer is, or the tokenizer itself, for a model whose tensors will be put in: BERT's
            weights are not needed.
        encoder: in place of the one that the configuration names.
    """
    strategy = resolution.chosen(config.resolution, config.limits)  # refused before anything is read
    encoder = encoder or build_encoder(config)
    sizes = with_encoder_width(config.qformer, encoder.width)
    if tokenizer_of is None:
        tokenizer = read_tokenizer(config.text.bert)
        qformer = QFormer.from_bert(config.text.bert, sizes, config.text.fold_token_types)
    else:
        tokenizer, qformer = read_tokenizer(tokenizer_of), QFormer(sizes)
    if not config.loss.itg:
        qformer.lm_head = None  # it would stay untrained
    if config.links != "none":
        qformer.link(each=False)
    frontend = FrontEnd.for_qformer(encoder, strategy, config.vision_norm_eps)
    model = ImageTextModel(frontend, qformer, tokenizer, config.loss, config.text.max_tokens, config.text.pooling)
    model.reader_learns = config.train.bert_rate > 0
    return model, config.model_copy(update={"qformer": qformer.config})


def build_vision_language(
    config: Config,
    device: torch.device | str = "cpu",
    encoder: VisionEncoder | None = None,
    llm: LanguageModel | None = None,
    tokenizer_of: Any = None,
) -> tuple[VisionLanguageModel, Config]:
    """Stage two's model and the configuration with every size filled in.

    Args:
        encoder, llm: in place of those that the configuration names.
        tokenizer_of: of a Q-Former that reads questions: where their tokenizer is, or the tokenizer itself, for a model
            whose text path will be put in. By default both are BERT's.

    Raises:
        UsageError: options that do not fit, a missing folder, or a connector for other patches than the image
            encoder's.
    """
    assert config.llm is not None, "the schema asks for an LLM in stage two"
    strategy = resolution.chosen(config.resolution, config.limits)
    if encoder is None:
        vision.options_of(config.vision)  # refused before gigabytes are read
    llm = llm or load_language_model(
        config.llm.path,
        device=device,
        dtype=DTYPES[config.llm.dtype],
        dropout=config.llm.dropout,
        erf_gelu=config.llm.erf_gelu,
        quantize=config.llm.quantize,
    )
    config = config.model_copy(update={"llm": (section := equip(llm, config.llm))})
    if section.lora is not None:
        lora.add(llm, section.lora)
    encoder = encoder or build_encoder(config)
    connector, sized = _build_connector(config, encoder, llm, tokenizer_of)
    if connector.normalized:
        frontend = FrontEnd.for_qformer(encoder, strategy, config.vision_norm_eps)
    else:
        frontend = FrontEnd(encoder, strategy)
    return VisionLanguageModel(frontend, connector, llm, section.prompt, section.max_tokens), sized


def _build_connector(
    config: Config, encoder: VisionEncoder, llm: LanguageModel, tokenizer_of: Any
) -> tuple[Connector, Config]:
    """The connector that a configuration names, and the configuration with the sizes of its Q-Former filled in.

    Raises:
        UsageError: see `build_vision_language`.
    """
    if config.has_qformer:
        bridge = _build_bridge(config, encoder.width, llm.width, tokenizer_of)
        return bridge, config.model_copy(update={"qformer": bridge.qformer.config})
    connector = connectors.chosen(config.connector, encoder.width, llm.width)
    if connector.patch not in (None, encoder.patch_size):
        raise UsageError(
            f"the connector '{config.connector.name}' is for patches of {connector.patch} pixels, but this image "
            f"encoder has patches of {encoder.patch_size}; set its patch to that, or use another encoder"
        )
    if connector.per_patch not in (None, encoder.per_patch):
        raise UsageError(
            f"the connector '{config.connector.name}' reads {connector.per_patch} tokens of a patch, but this image "
            f"encoder makes {encoder.per_patch}; use the connector 'mlp' with adapters {encoder.per_patch}"
        )
    return connector, config


def _build_bridge(config: Config, width: int, llm_width: int, tokenizer_of: Any) -> QFormerConnector:
    """The Q-Former of stage two and its projection; one that reads questions starts from BERT unless it will be put in.

    Args:
        width: of the image tokens. llm_width: of the language model.
    """
    assert config.llm is not None
    sizes, factor = with_encoder_width(config.qformer, width), config.llm.visual_scale
    scale = 1.0 if isinstance(factor, str) else factor  # `auto` is measured when training begins
    if config.question is None:
        return QFormerConnector(QFormer(sizes).drop_text(), llm_width, scale, links=config.links)
    if tokenizer_of is None:
        given = sizes.model_dump(include=sizes.model_fields_set - {"vocab_size", "max_positions"})  # which are BERT's
        tokenizer = read_tokenizer(config.text.bert)
        qformer = QFormer.from_bert(config.text.bert, QFormerConfig(**given), config.text.fold_token_types)
    else:
        tokenizer, qformer = read_tokenizer(tokenizer_of), QFormer(sizes)
    length = config.question.max_tokens
    return QFormerConnector(qformer.drop_captioning(), llm_width, scale, tokenizer, length, config.links)


def with_encoder_width(sizes: QFormerConfig, width: int) -> QFormerConfig:
    """The sizes with image tokens of this width.

    Raises:
        UsageError: another width was asked for.
    """
    if "encoder_width" in sizes.model_fields_set and sizes.encoder_width != width:
        raise UsageError(
            f"qformer.encoder_width is {sizes.encoder_width}, but the tokens of this image encoder are {width} wide; "
            "leave the key out"
        )
    return QFormerConfig(**(sizes.model_dump(include=sizes.model_fields_set) | {"encoder_width": width}))
