"""`load`: a model from a path alone. `open_checkpoint` reads what is there, `build` makes the model of it.

ours          a run or one of its checkpoints, or the hub id of what `qformer push` put there    `ours.py`
LAVIS         a `.pth` file, or the name of a release                                            `lavis.py`
transformers  a folder or hub id of BLIP-2                                                       `hugging_face.py`
              or of another published system, such as LLaVA-1.5                                  `whole.py`
"""

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
from qformer.checkpoints.ours import open_ours
from qformer.checkpoints.parts import LoadOptions, OpenCheckpoint, build_tower, check_words
from qformer.checkpoints.weights import load_tensors
from qformer.files import pretrained, releases
from qformer.llm.loading import DTYPES, language_model, quantize_held, wrap_language_model
from qformer.llm.quantize import check
from qformer.model.assembly import assemble
from qformer.model.image_text import ImageTextModel
from qformer.model.vision_language import VisionLanguageModel
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qformer.llm.base import LanguageModel
    from qformer.model.assembly import Bridge
    from qformer.schema import Config


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
            folder or hub id of BLIP-2, LLaVA-1.5 or Qwen2-VL in transformers; the hub id of what `qformer push` put
            there.
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
    return build(open_checkpoint(path_or_id, sizes, trust, verify), device, dtype, quantize)


def load_vision_language(
    path: str | Path, device: str | torch.device | None = None, quantize: str | None = None, trust: bool = False
) -> VisionLanguageModel:
    """`load` for what needs a language model: a checkpoint of stage one is a UsageError."""
    model = load(path, device, quantize=quantize, trust=trust)
    if not isinstance(model, VisionLanguageModel):
        raise UsageError(f"'{path}' is a checkpoint of stage one, which has no language model; give one of stage two")
    return model


def open_checkpoint(
    path_or_id: str | Path, sizes: Mapping[str, Any], trust: bool = False, verify: bool = True
) -> OpenCheckpoint:
    """A checkpoint of any form, read but not built; for the arguments see `load`.

    Raises:
        UsageError: no checkpoint there, a damaged one, or something else than a BLIP-2; weights that are NaN or
            infinite; sizes for one of ours, which leaves nothing open; or (`Untrusted`) it names code without `trust`.
    """
    path = _local(path_or_id)
    if not checkpoint.is_foreign(path):
        if sizes:
            raise UsageError(
                f"'{path_or_id}' is a checkpoint of qformer, which knows its sizes; leave {min(sizes)} out"
            )
        return open_ours(path, trust, verify)
    given = lookup.build({"sizes": LoadOptions}, "sizes", dict(sizes), "load")
    opened = open_lavis(Path(path), given) if Path(path).is_file() else open_transformers(str(path), given)
    refuse_unfit(opened.parts, opened.source)
    return opened


def _local(path_or_id: str | Path) -> str | Path:
    """The path of a checkpoint, once a release, or one of ours that is on the hub, is downloaded; others as they are.

    Raises:
        UsageError: it cannot be downloaded.
    """
    name = str(path_or_id)
    if not checkpoint.is_foreign(path_or_id):
        return path_or_id
    if name in releases.RELEASES:
        return releases.fetch(name)
    if Path(path_or_id).exists():
        return path_or_id
    try:
        hf_hub_download(name, checkpoint.CONFIG)
    except (OSError, ValueError):  # there is none, or no such repository, or no network: transformers' folders lack it
        return path_or_id
    return pretrained.local_folder(name)


def build(
    opened: OpenCheckpoint, device: torch.device | str, dtype: str | None = None, quantize: str | None = None
) -> Bridge:
    """The model of an open checkpoint, in eval mode; for the arguments see `load`.

    Of a language model that the checkpoint itself holds, `dtype` None or `auto` is fp32 on a CPU, as stored elsewhere.

    Raises:
        UsageError: its tensors do not fit, a tower that it leaves out cannot be had, or what was asked for is not
            possible here.
    """
    parts, config = opened.parts, _with_dtype(opened.config, dtype, quantize)
    encoder = build_tower(config, parts.vision, opened.source, opened.seen).freeze() if parts.vision else None
    llm = _held_language_model(opened, config, device, dtype) if parts.llm else None
    model, _ = assemble(config, device, encoder, llm, opened.folder or opened.tokenizer)
    check_words(opened, model.tokenizer if isinstance(model, ImageTextModel) else model.llm.tokenizer)
    load_tensors(model, parts.bridge, opened.folder or opened.source)
    return model.to(device).eval()


def _with_dtype(config: Config, dtype: str | None, quantize: str | None) -> Config:
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
