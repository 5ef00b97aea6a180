"""`load`: a model from a path alone, be it a checkpoint of ours, a file of LAVIS or a folder of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download

from qformer import devices, lookup
from qformer.checkpoints import folder as checkpoint
from qformer.checkpoints.fitting import refuse_unfit
from qformer.checkpoints.hugging_face import open_transformers
from qformer.checkpoints.lavis import open_lavis
from qformer.checkpoints.parts import LoadOptions, OpenCheckpoint, build_tower, check_words
from qformer.checkpoints.weights import load_tensors
from qformer.files import pretrained, releases
from qformer.llm.loading import DTYPES, language_model, quantize_held, wrap_language_model
from qformer.llm.quantize import check
from qformer.model.assembly import build_image_text, build_vision_language
from qformer.model.image_text import ImageTextModel
from qformer.model.vision_language import VisionLanguageModel
from qformer.schema import Config
from qformer.types import UsageError

if TYPE_CHECKING:
    from qformer.llm.base import LanguageModel


def with_dtype(config: Config, dtype: str | None, quantize: str | None = None) -> Config:
    """The configuration with the language model in this dtype and quantised like this, as far as that is given.

    Raises:
        UsageError: an unknown dtype or quantisation, one that is not possible here, or no language model to quantise.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype is '{dtype}'; {lookup.nearest(dtype, DTYPES)}")
    if quantize is not None:
        check(quantize)
    if config.llm is None:
        if quantize in (None, "none"):
            return config
        raise UsageError(f"this checkpoint has no language model to quantise to {quantize}; leave quantize out")
    given = {"dtype": dtype, "quantize": quantize}
    llm = config.llm.model_copy(update={key: value for key, value in given.items() if value is not None})
    return config.model_copy(update={"llm": llm})


def load(
    path_or_id: str | Path,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    trust: bool = False,
    verify: bool = True,
    **sizes: Any,
) -> ImageTextModel | VisionLanguageModel:
    """A trained model, in eval mode.

    Args:
        path_or_id: a run (its newest checkpoint) or a checkpoint; a `.pth` file of LAVIS or the name of a release; a
            folder or hub id of BLIP-2 in transformers; the hub id of what `qformer push` put there.
        device: where to; None is the GPU where there is one.
        dtype: of the language model: `fp32`, `fp16`, `bf16`; None is as its configuration says.
        quantize: the language model: `int8`, `nf4` or `none`; None is as its configuration says (docs/quantization.md).
        trust: import and run the `module:Class` that the checkpoint names, if it names any. Whoever made it can then
            do on this machine what you can.
        verify: compare the files of a checkpoint of ours with their checksums, and refuse weights that are not finite.
        sizes: what others' checkpoints leave open, see `qformer.checkpoints.parts.LoadOptions`.

    Raises:
        UsageError: no checkpoint there, one that does not fit, a tower that it names is gone, or what was asked for
            is not possible here; or (`Untrusted`) it names code without `trust`.
    """
    device = devices.choose(device)
    if checkpoint.is_foreign(path_or_id):
        path_or_id = pushed(path_or_id)
        if checkpoint.is_foreign(path_or_id):
            given = lookup.build({"sizes": LoadOptions}, "sizes", sizes, "load")
            return load_foreign(path_or_id, device, dtype, given, quantize)
    if sizes:
        raise UsageError(f"'{path_or_id}' is a checkpoint of qformer, which knows its sizes; leave {min(sizes)} out")
    saved = checkpoint.read(path_or_id, trust, verify)
    config = saved.config
    if config.stage not in ("stage1", "stage2"):
        raise UsageError(f"'{path_or_id}' is a run of stage '{config.stage}'; give one of stage1 or stage2")
    model: ImageTextModel | VisionLanguageModel
    if config.stage == "stage1":
        model, _ = build_image_text(with_dtype(config, dtype, quantize), saved.path)
    else:
        model, _ = build_vision_language(with_dtype(config, dtype, quantize), device, tokenizer_of=saved.path)
    load_tensors(model, saved.tensors, saved.path)
    return model.to(device).eval()


def load_vision_language(
    path: str | Path, device: str | torch.device | None = None, quantize: str | None = None, trust: bool = False
) -> VisionLanguageModel:
    """`load` for what needs a language model: a checkpoint of stage one is a UsageError."""
    model = load(path, device, quantize=quantize, trust=trust)
    if not isinstance(model, VisionLanguageModel):
        raise UsageError(f"'{path}' is a checkpoint of stage one, which has no language model; give one of stage two")
    return model


def open_foreign(path_or_id: str | Path, given: LoadOptions) -> OpenCheckpoint:
    """A file of LAVIS, the name of a release, or a folder or hub id of transformers' BLIP-2.

    Raises:
        UsageError: none of them, damaged, something else than a BLIP-2, or weights that are NaN or infinite.
    """
    if str(path_or_id) in releases.RELEASES:
        path_or_id = releases.fetch(str(path_or_id))
    is_file = Path(path_or_id).is_file()
    opened = open_lavis(Path(path_or_id), given) if is_file else open_transformers(str(path_or_id), given)
    refuse_unfit(opened.parts, opened.source)
    return opened


def pushed(path_or_id: str | Path) -> str | Path:
    """The folder that holds a checkpoint of ours which is on the hub; anything else as it is.

    Raises:
        UsageError: it cannot be downloaded.
    """
    if str(path_or_id) in releases.RELEASES or Path(path_or_id).exists():
        return path_or_id
    try:
        hf_hub_download(str(path_or_id), checkpoint.CONFIG)
    except (OSError, ValueError):  # there is none, or no such repository, or no network: transformers' folders lack it
        return path_or_id
    return pretrained.local_folder(str(path_or_id))


def load_foreign(
    path_or_id: str | Path,
    device: torch.device | str,
    dtype: str | None,
    given: LoadOptions,
    quantize: str | None = None,
) -> ImageTextModel | VisionLanguageModel:
    """The model in such a checkpoint, in eval mode.

    Args:
        dtype: of the language model: `fp32`, `fp16`, `bf16`; None or `auto` is fp32 on a CPU, as stored elsewhere.
        quantize: the language model: `int8`, `nf4`; None is `none`.

    Raises:
        UsageError: see `open_foreign`; or a tower that it leaves out cannot be had.
    """
    opened = open_foreign(path_or_id, given)
    parts, config = opened.parts, with_dtype(opened.config, dtype, quantize)
    encoder = None
    if parts.vision:
        encoder = build_tower(config, parts.vision, opened.source).freeze()
    model: ImageTextModel | VisionLanguageModel
    if parts.stage == "stage1":
        model, _ = build_image_text(config, opened.tokenizer, encoder)
        check_words(opened, model.tokenizer)
    else:
        llm = _held_language_model(opened, config, device, dtype) if parts.llm else None
        if llm is not None:
            check_words(opened, llm.tokenizer)
        model, _ = build_vision_language(config, device, encoder, llm)
    load_tensors(model, parts.bridge, opened.source)
    return model.to(device).eval()


def _held_language_model(
    opened: OpenCheckpoint, config: Config, device: torch.device | str, dtype: str | None
) -> LanguageModel:
    assert config.llm is not None, "stage two has a language model"
    model: Any = language_model(opened.llm, opened.parts.llm, opened.source)
    usual = torch.float32 if torch.device(device).type == "cpu" else None
    kept = usual if dtype in (None, "auto") else DTYPES[dtype]
    if config.llm.quantize == "none":
        model = model.to(device=device, dtype=kept)
    else:
        stored = model.get_input_embeddings().weight.dtype
        model = quantize_held(model, device, kept or stored, config.llm.quantize, opened.source)
    return wrap_language_model(model, opened.tokenizer, erf_gelu=config.llm.erf_gelu)
