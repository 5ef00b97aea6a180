"""Check that the tensors of another checkpoint form can be those of the model that their names stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qformer.files import soundness
from qformer.model.qformer import QFormer
from qformer.types import UsageError

if TYPE_CHECKING:
    from qformer.checkpoints.parts import Parts


def refuse_unfit(parts: Parts, source: str) -> None:
    """Let no tensor through that is of another shape than its place, no number of its own, NaN or infinite.

    Of the image encoder and the language model the shapes are compared where they are built.

    Raises:
        UsageError: naming the tensor.
    """
    front = "connector." if parts.stage == "stage2" else ""
    with torch.device("meta"):
        places = {f"{front}qformer.{name}": place.shape for name, place in QFormer(parts.sizes).named_parameters()}
    hidden, seen = parts.sizes.hidden_size, parts.sizes.encoder_width
    for name, rows in (("connector.projection", None), ("vision_proj", None), ("text_proj", None), ("itm_head", 2)):
        if f"{name}.weight" in parts.bridge:
            rows = rows or len(parts.bridge[f"{name}.bias"])
            places |= {f"{name}.weight": torch.Size([rows, hidden]), f"{name}.bias": torch.Size([rows])}
    places |= {f"frontend.norm{of}.{kind}": torch.Size([seen]) for of in ("", "_second") for kind in ("weight", "bias")}
    for name, tensor in parts.bridge.items():
        if tensor.shape != places.get(name, tensor.shape):
            raise UsageError(
                f"'{source}' does not fit BLIP-2: {name} is {list(tensor.shape)} instead of {list(places[name])}; give "
                "it as it was saved"
            )
    for name, tensor in (parts.bridge | parts.vision).items():
        if tensor.dtype not in soundness.FLOATS:
            raise UsageError(
                f"'{source}' holds {name} as {str(tensor.dtype).removeprefix('torch.')}, whose scales are not known; "
                "give it as fp32, fp16 or bf16"
            )
    if soundness.checks() and (bad := soundness.not_finite(parts.bridge | parts.vision | parts.llm)):
        raise UsageError(f"the weight '{bad}' in '{source}' holds NaN or infinity; give an earlier checkpoint")
