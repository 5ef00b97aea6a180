"""Section `llm` of the configuration: the language model of stage two."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator

from qformer.fields import Fraction, Named, Positive, Section
from qformer.template import AUTO, NONE, check_template


class LoraConfig(Section):
    """Low-rank adapters of a frozen language model (Hu et al., arXiv 2106.09685); they need the package peft.

    Attributes:
        rank: rank of the update of a weight.
        alpha: the update is scaled by alpha / rank.
        dropout: dropout of the adapter's input, in training.
        targets: name suffixes of the Linear layers to adapt; by default peft's choice for the model, usually the query
            and value projections of the attention.
    """

    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16
    dropout: Fraction = 0.0
    targets: list[str] | None = None


class LLMConfig(Section):
    """The frozen language model of stage two.

    Attributes:
        path: folder or hub id of a causal (OPT, Llama, Qwen, ...) or encoder-decoder (T5, Flan-T5) model.
        prompt: text in front of every caption; a causal model is not trained on it. With a template, it is what the
            user says about the image.
        template: what the model reads around image, prompt and answer: `none`, `auto` (the chat template of its
            tokenizer, if there is one), or a text with the places {image}, {text} and perhaps {answer}. A run saves
            the text that `auto` found (docs/language.md).
        max_tokens: maximum length of a text; the rest is cut.
        dtype, quantize: storage of the weights; `auto` is as in the files (docs/quantization.md).
        erf_gelu: compute a T5's gated GELU with erf, as the original does; false follows the model's configuration.
        dropout: leave the LLM's own dropout active in training, as the original does by accident.
        clip_ids: of a Qwen2-VL, where its ids of time, row and column go on behind a clip: as in the `paper` and the
            released code, or as in `transformers` 5 (docs/video.md).
        visual_scale: factor on PyTorch's initialization of the projection. Visual tokens should be about as large as
            word embeddings, and those of a T5 are large; `auto` measures both when training begins, and a run saves
            the factor.
        lora: also train low-rank adapters of its layers; without them, its weights do not change.
    """

    path: Named
    prompt: str = ""
    template: Annotated[str, AfterValidator(check_template)] = NONE
    max_tokens: Positive = 32
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    quantize: Literal["none", "int8", "nf4"] = "none"
    erf_gelu: bool = True
    dropout: bool = False
    clip_ids: Literal["paper", "transformers"] = "paper"
    visual_scale: Annotated[float, Field(gt=0)] | Literal["auto"] = 1.0
    lora: LoraConfig | None = None

    @field_validator("visual_scale", mode="before")
    @classmethod
    def _number_or_auto(cls, given: Any) -> Any:
        if isinstance(given, str) and given != AUTO and not given.replace(".", "", 1).isdecimal():
            raise ValueError(f"llm.visual_scale is '{given}'; give a number above 0, or {AUTO}")
        return given
