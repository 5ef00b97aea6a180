"""Outputs of a converted tower for a stored input, compared with stored numbers before anybody uses it.

Pixels are a fixed wave of 224 x 224, the text is `SENTENCE`; everything is computed in fp32 on the CPU. Other machines,
libraries and numbers of threads differ by less than 1e-3 (onnxruntime by 2e-5), a wrong layer by 0.1 and more, and so
`TOLERANCE` lies between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from qformer.files import pretrained
from qformer.files.soundness import digest_weights
from qformer.files.tensors import read_tensors
from qformer.types import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from qformer.files.real_towers import RealTower

SENTENCE = "Two dogs run along the beach, and a child in a red coat throws a ball."
SIDE = 224
TOLERANCE = 0.01
COUNT = 4  # numbers taken of one token


def check(folder: Path, tower: RealTower) -> None:
    """Compare the tensors, the tokenizer and the outputs of a converted tower with what is stored in the table.

    Raises:
        UsageError: any of them differs; the message says which.
    """
    advice = "; use the versions of constraints.txt"
    found = digest_weights(read_tensors(folder))
    if found != tower.digest:
        raise UsageError(f"the converted tensors have the digest {found} instead of {tower.digest}{advice}")
    ids = pretrained.read(AutoTokenizer, folder)(SENTENCE)["input_ids"] if tower.tokens else []
    if tuple(ids) != tower.tokens:
        raise UsageError(f"the tokenizer gives the ids {ids} instead of {list(tower.tokens)}{advice}")
    numbers = compute(folder, tower.key, ids)
    if len(numbers) != len(tower.numbers) or not np.allclose(numbers, tower.numbers, rtol=0, atol=TOLERANCE):
        raise UsageError(f"the outputs are {[round(n, 3) for n in numbers]} instead of {list(tower.numbers)}{advice}")


@torch.inference_mode()
def compute(folder: Path, key: str, ids: list[int]) -> list[float]:
    """Eight numbers of a tower's output: of its first and last token, or the log-probabilities of the first words.

    Args:
        key: option of a configuration that takes the tower.
        ids: the text, for towers that read one.
    """
    if key == "llm.path":
        model = _load(AutoModelForCausalLM, folder)
        scores: Tensor = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return [float(scores[place, word]) for place, word in enumerate(ids[1 : 2 * COUNT + 1])]
    model = _load(AutoModel, folder)
    given = {"pixel_values": wave()} if key == "vision.path" else {"input_ids": torch.tensor([ids])}
    tokens: Tensor = model(**given).last_hidden_state[0]
    last = -1 if key == "vision.path" else -2  # before [SEP]
    return [*tokens[0, :COUNT].tolist(), *tokens[last, :COUNT].tolist()]


def wave() -> Tensor:
    """Pixels float[1, 3, SIDE, SIDE] that differ everywhere, the same on every machine."""
    count = np.arange(3 * SIDE * SIDE, dtype=np.float64)
    pixels = np.sin(count * 0.0137) + np.cos(count * count * 1e-7)
    return torch.from_numpy(pixels.astype(np.float32).reshape(1, 3, SIDE, SIDE))


def _load(kind: Any, folder: Path) -> Any:
    """Load the model in fp32; weights that are missing would be random numbers.

    Raises:
        UsageError: it cannot be read, or lacks weights.
    """
    model, report = pretrained.read(kind, folder, dtype=torch.float32, output_loading_info=True)
    if lacking := [name for name in report["missing_keys"] if "pooler" not in name]:
        raise UsageError(f"the converted tower lacks {lacking[0]}; use the versions of constraints.txt")
    return model.eval()
