"""Published systems in folders of transformers, without a Q-Former: what each is put together from here, in one table.

Transformers itself reads a folder, whatever spelling its version gave to names, and the tensors of its model are moved
to our names by the rows below. A folder that computes anything in another way than the system published is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from transformers import (
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaOnevisionForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
)

from qformer.checkpoints import internvl, onevision, processors, qwen2vl
from qformer.resolution.qwen2vl import AFTER, BEFORE
from qformer.template import AUTO
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from qformer.checkpoints.parts import OpenCheckpoint
    from qformer.schema import Config

    Values = Callable[[Any], dict[str, Any]]


@dataclass(frozen=True)
class System:
    """A published system.

    Attributes:
        title: its name, for messages.
        model: its class in transformers.
        sections: names in the sections `vision`, `connector` and `resolution` of what it is made of here.
        tower: begins the names of its image encoder in transformers.
        connector: names of the connector's tensors here and in transformers.
        unused: tensors of the connector here that the system has no use for, by the key of their width.
        language: beginnings of the names of the language model's tensors in transformers and here.
        towers: types of the image encoders that it may have.
        computed: keys of its configuration, dotted ones of its sections, that must have a value, which no tensor tells.
        values: makes the sections' options of its configuration.
        theirs: makes its configuration of the configurations of its towers and of ours.
        template: turns of its chat; `{bos}` stands for the token that begins texts, where there is one. `auto`: those
            that the folder's tokenizer has.
        words: tokens that stand for a visual token, by the key of the configuration that has their number.
        markers: further words that its tokenizer must have.
        shows: the folder's own chat template goes before `template`, where there is one; it is shown pictures.
        read_processor: reads further options of `resolution` of the files of a folder's processor.
        write_processor: writes these files.
    """

    title: str
    model: Any
    sections: tuple[str, str, str]
    tower: str
    connector: tuple[tuple[str, str], ...]
    unused: tuple[str, ...]
    language: tuple[tuple[str, str], ...]
    towers: tuple[str, ...]
    computed: tuple[tuple[str, Any], ...]
    values: Values
    theirs: Callable[[Config, Any, Any], Any]
    template: str
    words: tuple[tuple[str, str], ...]
    write_processor: Callable[[OpenCheckpoint, Path], None]
    markers: tuple[str, ...] = ()
    shows: bool = False
    read_processor: Callable[[Path], dict[str, Any]] = lambda _folder: {}

    @property
    def is_whole(self) -> bool:
        """True where the class of the language model here is that of the whole system, without its image encoder."""
        return all(theirs == ours for theirs, ours in self.language)


def _rows(*pairs: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    """Weight and bias of modules of a connector: (name here, name in transformers)."""
    return tuple(
        (f"connector.{ours}.{kind}", f"model.{theirs}.{kind}") for ours, theirs in pairs for kind in ("weight", "bias")
    )


PROJECTOR = _rows(("mlp.0", "multi_modal_projector.linear_1"), ("mlp.2", "multi_modal_projector.linear_2"))
INNER = (("model.language_model.", "model."), ("lm_head.", "lm_head."))
NEWLINE = "connector.image_newline"


def _llava(theirs: Any) -> dict[str, Any]:
    size, patch = theirs.vision_config.image_size, theirs.vision_config.patch_size
    return {
        "vision": {"layer": theirs.vision_feature_layer},
        "connector": {"hidden": theirs.text_config.hidden_size, "patch": patch},
        "resolution": {"size": size, "patch": patch},
    }


def _to_llava(config: Config, tower: Any, llm: Any) -> Any:
    return LlavaConfig(
        vision_config=tower.to_dict(),
        text_config=llm.to_dict(),
        vision_feature_layer=config.vision.options.get("layer", -1),
        tie_word_embeddings=llm.tie_word_embeddings,
    )


def _write_llava(opened: OpenCheckpoint, folder: Path) -> None:
    """Write the processor's files: pictures are padded to a square, as in the released code, and not cropped."""
    assert opened.seen is not None, "a system of transformers sees with a tower of its own"
    eye, size = opened.seen, dict.fromkeys(("height", "width"), opened.seen.config.image_size)
    pixels: dict[str, Any] = {"image_mean": list(eye.mean), "image_std": list(eye.std)}
    LlavaImageProcessorPil(size=size, crop_size=size, do_pad=True, **pixels).save_pretrained(folder)
    own = {"patch_size": eye.config.patch_size, "num_additional_image_tokens": 1}  # the class token, which is dropped
    own |= {"processor_class": "LlavaProcessor", "vision_feature_select_strategy": "default"}
    processors.write(folder, own)


#: By the type in the configuration of transformers.
SYSTEMS: dict[str, System] = {
    "llava": System(
        title="LLaVA-1.5",
        model=LlavaForConditionalGeneration,
        sections=("hf", "mlp", "pad_square"),
        tower="model.vision_tower.",
        connector=PROJECTOR,
        unused=(NEWLINE,),
        language=INNER,
        towers=("clip_vision_model",),
        computed=(
            ("projector_hidden_act", "gelu"),
            ("vision_feature_select_strategy", "default"),
            ("multimodal_projector_bias", True),
        ),
        values=_llava,
        theirs=_to_llava,
        template="{bos}USER: {image}\n{text} ASSISTANT:{answer}{eos}",
        words=(("image_token_id", "<image>"),),
        write_processor=_write_llava,
    ),
    "llava_onevision": System(
        title=onevision.TITLE,
        model=LlavaOnevisionForConditionalGeneration,
        sections=("hf", "mlp", "anyres"),
        tower="model.vision_tower.",
        connector=(*PROJECTOR, (NEWLINE, "model.image_newline")),
        unused=(),
        language=INNER,
        towers=(onevision.TOWER,),
        computed=onevision.COMPUTED,
        values=onevision.values,
        theirs=onevision.to_theirs,
        template=onevision.TEMPLATE,
        words=(("image_token_id", "<image>"), ("video_token_id", "<video>")),
        shows=True,
        read_processor=onevision.read_processor,
        write_processor=onevision.write_processor,
    ),
    "internvl": System(
        title=internvl.TITLE,
        model=InternVLForConditionalGeneration,
        sections=("hf", "pixel_shuffle_mlp", "internvl"),
        tower="model.vision_tower.",
        connector=_rows(
            ("mlp.0", "multi_modal_projector.layer_norm"),
            ("mlp.1", "multi_modal_projector.linear_1"),
            ("mlp.3", "multi_modal_projector.linear_2"),
        ),
        unused=(),
        language=INNER,
        towers=(internvl.TOWER,),
        computed=(
            ("projector_hidden_act", "gelu"),
            ("downsample_ratio", 0.5),
            ("vision_feature_select_strategy", "default"),
        ),
        values=internvl.values,
        theirs=internvl.to_theirs,
        template=internvl.TEMPLATE,
        words=(("image_token_id", internvl.IMAGE),),
        markers=(internvl.BEFORE, internvl.AFTER),
        shows=True,
        read_processor=internvl.read_processor,
        write_processor=internvl.write_processor,
    ),
    "qwen2_vl": System(
        title="Qwen2-VL",
        model=Qwen2VLForConditionalGeneration,
        sections=("qwen2vl", "merger", "qwen2vl"),
        tower="model.visual.",
        connector=_rows(*((part, f"visual.merger.{part}") for part in ("ln_q", "mlp.0", "mlp.2"))),
        unused=(),
        language=(("model.language_model.", "model.language_model."), ("lm_head.", "lm_head.")),
        towers=("qwen2_vl_vision",),
        computed=qwen2vl.COMPUTED,
        values=qwen2vl.values,
        theirs=qwen2vl.to_theirs,
        template=AUTO,
        words=(
            ("image_token_id", "<|image_pad|>"),
            ("video_token_id", "<|video_pad|>"),
            ("vision_start_token_id", BEFORE),
            ("vision_end_token_id", AFTER),
        ),
        markers=(BEFORE, AFTER),
        read_processor=qwen2vl.read_processor,
        write_processor=qwen2vl.write_processor,
    ),
}


def system_of(config: Config) -> System | None:
    """The published system that a configuration is made of; None where transformers has none."""
    mine = (config.vision.name, config.connector.name, config.resolution.name)
    return next((system for system in SYSTEMS.values() if system.sections == mine), None)


def check(system: System, theirs: Any, source: str) -> None:
    """Refuse a folder whose model computes anything in another way than its system here.

    Raises:
        UsageError: saying what differs.
    """
    if (found := theirs.vision_config.model_type) not in system.towers:
        raise UsageError(
            f"'{source}' sees with a {found}, and {system.title} here with {' or '.join(system.towers)}; give one of "
            "its published folders"
        )
    for key, value in system.computed:
        if (found := attrgetter(key)(theirs)) != value:
            raise UsageError(f"'{source}' is no {system.title}: {key} is {found}, not {value}; set it if it is wrong")
    if not isinstance(layer := getattr(theirs, "vision_feature_layer", -1), int):
        raise UsageError(
            f"'{source}' reads the layers {list(layer)} of its image encoder together, and {system.title} reads one; "
            "give one of its published folders"
        )
