"""The configuration: one strict schema whose defaults are the paper's, YAML files that hold differences only.

A key that does not exist, a value of the wrong type or an impossible combination is a `UsageError` before anything
is loaded. Defaults live here and nowhere else. Sections that name something to build (`vision`, `resolution`, a data
source) carry the options of what they name, which are checked against its own dataclass by `stages.checking` before a
command opens anything, and by `qformer.lookup.build` when it is built.
"""

from __future__ import annotations

import difflib
import os
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from qformer import lookup
from qformer.schema import (
    BackboneConfig,
    Choice,
    Count,
    Epsilon,
    FeaturesConfig,
    Fraction,
    LoraConfig,
    LossConfig,
    Named,
    Positive,
    QuestionConfig,
    Section,
    Share,
    TextConfig,
)
from qformer.types import UsageError

LARGEST = 100_000  # values in a configuration


class QFormerConfig(Section):
    """Sizes of the Q-Former; the defaults are BERT-base with 32 queries over ViT-g (BLIP-2, section 3.1).

    Attributes:
        cross_attention_every: cross-attention stands in layers 0, n, 2n, ...
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


class LLMConfig(Section):
    """The frozen language model of stage two.

    Attributes:
        path: folder or hub id of a causal (OPT, Llama, Qwen, ...) or encoder-decoder (T5, Flan-T5) model.
        prompt: put in front of every caption; a causal model is not trained on it.
        max_tokens: texts are cut here.
        dtype, quantize: how its weights are stored: `auto` is as in its files; docs/quantization.md.
        erf_gelu: a T5's gated GELU is computed with erf, as in the original; false is as its configuration says.
        dropout: leave the LLM's own dropout active in training, as the original does by accident.
        visual_scale: by how much larger than PyTorch's the projection starts. Visual tokens should be about as large as
            words, and those of a T5 are large.
        lora: train low-rank adapters of its layers, too; without them it stays as it is.
    """

    path: Named
    prompt: str = ""
    max_tokens: Positive = 32
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    quantize: Literal["none", "int8", "nf4"] = "none"
    erf_gelu: bool = True
    dropout: bool = False
    visual_scale: Annotated[float, Field(gt=0)] = 1.0
    lora: LoraConfig | None = None


class DataConfig(Section):
    """Where samples come from and what is done to them.

    Attributes:
        train, validation: sources (`jsonl`, `webdataset`, `datasets`, `coco`, `mix`, ...: docs/data.md); validation is
            optional.
        features: folder of a store of image tokens, or `path`, `crops` and `dtype` of one; training reads images itself
            by default.
        batch: B, samples of one step of one process (before accumulation).
        workers: processes that decode images; 0 decodes in the training process.
        crop: area range of the random resized crop; `[1, 1]` with `flip: 0` shows the whole image as it is.
        flip: probability of a mirrored image. Captions that say left or right want 0.
        max_bad: more than this share of the last 1,000 samples unusable stops the run.
        validation_size: at most so many validation samples are used during training.
    """

    train: Choice
    validation: Choice | None = None
    features: FeaturesConfig | None = None
    batch: Positive = 64
    workers: Count = 0
    crop: tuple[Fraction, Fraction] = (0.5, 1.0)
    flip: Fraction = 0.5
    max_bad: Fraction = 0.2
    validation_size: Positive = 500

    @model_validator(mode="after")
    def _crop_range(self) -> Self:
        if not 0 < self.crop[0] <= self.crop[1]:
            raise ValueError(
                f"data.crop is {list(self.crop)}; give [smallest, largest] share of the area, such as [0.5, 1]"
            )
        if self.features is not None and self.features.crops > 1 and self.crop == (1, 1) and not self.flip:
            raise ValueError(
                f"data.features.crops is {self.features.crops}, but data.crop and data.flip leave images as they are: "
                "all would be the same; leave crops out"
            )
        return self


class TrainConfig(Section):
    """Optimisation; the defaults are the paper's (section 3.4 and appendix).

    Attributes:
        steps: optimizer steps in all.
        accumulate: batches per optimizer step.
        chunk: of stage one: pairs that pass the model at a time, with the losses and gradients of the whole batch in
            the memory of so many; 0 is the whole batch at once.
        fsdp: of several processes each keeps only its share of the frozen layers (FSDP2), which takes time on the way.
        gradient_checkpointing: layers compute their activations again on the way back instead of keeping them.
        lr, min_lr, warmup_lr: peak, floor of the cosine, start of the warm-up; learning rates per step.
        warmup: steps of linear warm-up from `warmup_lr` to `lr`.
        layer_decay: each block of a trained image encoder learns this much slower than the one behind it.
        clip: largest gradient norm, 0 for none (the original does not clip).
        precision: of autocast; weights that are trained stay fp32.
        validate_every, save_every: steps; 0 is only at the end.
        keep_last: newest checkpoints to keep. keep_every: those of every so many steps stay, too; 0 is none.
        rerank: validation of stage one re-ranks this many ITC candidates with ITM.
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
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    clip: Annotated[float, Field(ge=0)] = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
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


class Config(Section):
    """A whole run. See the sections for what each key means.

    Attributes:
        stage: what is trained: a tower from scratch (`vision`, `language`) or the bridge (`stage1`, `stage2`).
        run: folder for everything that the run writes.
        init: run or checkpoint to start from; stage two takes its Q-Former from stage one.
        vision_norm_eps: of the LayerNorm behind the encoder; BLIP-2 of transformers has 1e-6.
        question: of stage two: the Q-Former reads the question, too; by default the language model alone does.
    """

    stage: Literal["vision", "language", "stage1", "stage2"]
    run: Named
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    init: Named | None = None
    vision: Choice = Choice(name="eva")
    freeze_vision: bool = True
    vision_norm_eps: Epsilon = 1e-5
    resolution: Choice = Choice(name="fixed")
    text: TextConfig = TextConfig()
    qformer: QFormerConfig = QFormerConfig()
    question: QuestionConfig | None = None
    loss: LossConfig = LossConfig()
    llm: LLMConfig | None = None
    backbone: BackboneConfig | None = None
    data: DataConfig
    train: TrainConfig

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
            if (self.backbone.kind == "vit") != (self.stage == "vision"):
                raise ValueError(
                    f"stage '{self.stage}' cannot train backbone.kind '{self.backbone.kind}'; change one of them"
                )
            if self.stage == "vision" and self.backbone.text is None:
                raise ValueError(
                    "stage 'vision' trains against a text tower; add backbone.text, a BERT folder or hub id"
                )
        return self


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply `key.sub=value` overrides, check everything.

    Args:
        path: a file, or else the name of a shipped one in the configs folder, such as `quickstart/stage1.yaml`, which
            works from every folder.

    Raises:
        UsageError: no such file, not YAML, an override that is not `key=value`, or a configuration that is refused.
    """
    path = _find(Path(path))
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # the latter two: 2024-99-99, 1,000 brackets
        raise UsageError(f"'{path}' is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(
            f"'{path}' holds {type(values).__name__}, not the keys of a configuration; see the configs folder"
        )
    if _holds_more(values, LARGEST):
        raise UsageError(f"'{path}' holds more than {LARGEST:,} values once its aliases are written out; take them out")
    for override in overrides or []:
        _apply(values, override)
    return parse_config(_at_home(values))


def _at_home(values: Any) -> Any:
    """Plain data in which `~/photos` is the folder of that name at the user's home, as a shell would have it."""
    if isinstance(values, dict):
        return {key: _at_home(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_at_home(value) for value in values]
    return os.path.expanduser(values) if isinstance(values, str) and values.startswith("~/") else values


def _holds_more(values: Any, limit: int) -> bool:
    """Whether plain data are more than so many values; of YAML a few aliases of aliases can be billions."""
    left, count = [values], 0
    while left and count <= limit:
        value = left.pop()
        count += 1
        left += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return count > limit


def shipped() -> dict[str, Path]:
    """The configurations of the configs folder, wherever it is installed, by name, such as `quickstart/stage1.yaml`."""
    folder = Path(str(resources.files("qformer.configs")))
    return {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*.yaml"))}


def _find(path: Path) -> Path:
    """The file at `path`, or else the shipped configuration of that name, with or without `configs/` in front."""
    if path.is_file():
        return path
    if address := lookup.address(path):
        raise UsageError(f"'{address}'{lookup.NOT_FETCHED} and give the file")
    known = shipped()
    name = path.as_posix().removeprefix("configs/")
    if name in known:
        return known[name]
    same = [other for other in known if Path(other).stem == path.stem]
    near = list(dict.fromkeys([*same, *difflib.get_close_matches(name, known, n=3, cutoff=0.7)]))[:3]
    advice = (
        f"did you mean {' or '.join(repr(other) for other in near)}?"
        if near
        else "give a YAML file, or the name of one in the configs folder, such as quickstart/stage1.yaml"
    )
    raise UsageError(f"no configuration at '{path}', and none of that name is shipped; {advice}")


def parse_config(values: dict[str, Any]) -> Config:
    """Check plain data (from YAML or a checkpoint) against the schema.

    Raises:
        UsageError: with the path of the first key that is wrong.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        unknown = [fault["loc"] for fault in error.errors() if fault["type"] == "extra_forbidden"]
        if unknown:  # told first: a misspelt key is also missing
            *parents, key = [str(part) for part in unknown[0]]
            known = lookup.nearest(key, _section(parents).model_fields)
            raise UsageError(f"unknown configuration key '{'.'.join([*parents, key])}': {known}") from error
        raise UsageError(lookup.explain(error, values)) from error


def _section(parents: list[str]) -> type[BaseModel]:
    """The schema class that holds the keys below `parents`."""
    section: type[BaseModel] = Config
    for name in parents:
        kinds = getattr(section.model_fields[name].annotation, "__args__", (section.model_fields[name].annotation,))
        section = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    return section


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one `key.sub=value`; the value is read as YAML, so `[0.5, 1]` is a list and `null` is None."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"'{override}' is not an override; write key=value, such as train.steps=1000")
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(values.get(parent), dict):
            values[parent] = {}
        values = values[parent]
    if not text.strip():
        raise UsageError(f"'{override}' has no value; write one, or {key}=null for none")
    try:
        values[last] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"the value of '{override}' is not YAML; quote it, as in '{key}=\"{text}\"'") from error


def by_prefix(overrides: list[str], names: tuple[str, ...]) -> dict[str, list[str]]:
    """Overrides of several configurations by their prefix: `vit.train.steps=10` -> `{"vit": ["train.steps=10"], ...}`.

    Raises:
        UsageError: an override with none of the names in front.
    """
    found: dict[str, list[str]] = {name: [] for name in names}
    for override in overrides:
        name, _, rest = override.partition(".")
        if name not in found or not rest:
            raise UsageError(f"'{override}' names none of the configurations; write {'|'.join(names)}.key=value")
        found[name].append(rest)
    return found


def dump_config(config: Config) -> str:
    """The whole resolved configuration as YAML, defaults included."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False)


def anchor(config: Config) -> Config:
    """Tower folders and `init` become absolute where they exist, so that a checkpoint finds them from anywhere."""

    def absolute(path: str | None) -> str | None:
        return str(Path(path).resolve()) if path is not None and Path(path).exists() else path

    towers = {key: absolute(value) for key, value in config.vision.options.items() if key in ("path", "weights")}
    changes: dict[str, Any] = {
        "init": absolute(config.init),
        "vision": config.vision.model_copy(update=towers),
        "text": config.text.model_copy(update={"bert": absolute(config.text.bert)}),
    }
    if config.llm is not None:
        changes["llm"] = config.llm.model_copy(update={"path": absolute(config.llm.path)})
    if config.question is not None:
        changes["question"] = config.question.model_copy(update={"init": absolute(config.question.init)})
    return config.model_copy(update={key: value for key, value in changes.items() if value != getattr(config, key)})
