"""LAVIS's side of `benchmarks/rerank.py`, which starts it with the Python of LAVIS's own environment.

It creates a model with random weights, writes it and the pixels into the folder, and scores the gallery with LAVIS's
`compute_sim_matrix` for each line on its standard input; the scores are also written into the folder.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

VISION = {"image_size": 224, "patch_size": 14, "width": 352, "depth": 4, "heads": 4, "mlp_ratio": 4.3637}
BERT = {"hidden_size": 768, "layers": 12, "heads": 12, "intermediate_size": 3072, "max_positions": 512}
WORDS = (
    "a small brown dog runs over wet sand beside two tall people holding bright umbrellas while an old blue bus waits "
    "near the corner of some busy street under heavy grey clouds and one child points at it"
)


def texts(count: int) -> list[str]:
    """Make captions of 5 to 16 words, one token each."""
    words = WORDS.split()
    return [" ".join(words[(i * 13 + place * 5) % len(words)] for place in range(5 + i * 7 % 12)) for i in range(count)]


def main() -> None:
    folder, images, captions, k, threads = Path(sys.argv[1]), *map(int, sys.argv[2:])
    golden = Path(__file__).resolve().parent.parent / "tests" / "golden"
    sys.path.insert(0, str(golden))  # not the repository, since the wheel of LAVIS also installs a package `tests`
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # LAVIS prints its progress

    import original
    import torch
    import vocabulary

    torch.set_num_threads(threads)
    lavis = original.load()
    original.start_process_group()
    vocabulary.WORDS["race"] = WORDS
    original.set_vision(lavis, VISION)
    original.set_bert(lavis, BERT, vocabulary.bert("race"))
    model = lavis.stage1.Blip2Qformer(img_size=VISION["image_size"], vit_precision="fp32").eval()
    original.fill(model, seed=1, gain=1.3)  # with more, rounding errors grow from layer to layer
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(images, 3, VISION["image_size"], VISION["image_size"], generator=generator)
    torch.save({"model": model.state_dict()}, folder / "lavis.pth")
    torch.save(pixels, folder / "pixels.pt")
    image = torch.stack([lavis.text.BlipImageBaseProcessor().normalize(one) for one in pixels])

    class Loader(list[Any]):
        dataset = SimpleNamespace(text=texts(captions), image=list(range(images)))

    answers.write("ready\n")
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.no_grad():
            scores = lavis.base.compute_sim_matrix(model, Loader([{"image": image}]), k_test=k)
        used = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        torch.save([torch.from_numpy(matrix) for matrix in scores], folder / "scores.pt")
        answers.write(json.dumps(used) + "\n")


if __name__ == "__main__":
    main()
