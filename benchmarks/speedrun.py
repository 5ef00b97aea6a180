"""The photos of the speedrun (docs/speedrun.md), drawn from the official lists of Flickr8k and checked by a digest.

python benchmarks/speedrun.py FLICKR8K_TEXT IMAGES -o photos.jsonl    # from the folders of texts and of JPEGs
python benchmarks/speedrun.py photos.jsonl                            # is this the split?
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from pathlib import Path

TRAIN, MEASURED = 3000, 500  # photos to train on; the first of the sorted dev split that are measured
#: SHA-256 of the sorted names of each part, without .jpg, one a line.
DIGESTS = {
    "train": "0027e948de9dacbdc133418111d5770abfedb8ae2fb4c7417591a637c7feada2",
    "dev": "6579c61cd7f8d8f35734ccb98e8fba87b87a3a8a9b0a0a66d590615665ba306f",
}


def draw(train: list[str], dev: list[str]) -> dict[str, list[str]]:
    """The split, from the names of the official lists in any order."""
    drawn = sorted(train)
    random.Random(0).shuffle(drawn)
    return {"train": sorted(drawn[:TRAIN]), "dev": sorted(dev)}


def digest(names: list[str]) -> str:
    """SHA-256 of names, one a line."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def check(parts: dict[str, list[str]]) -> list[str]:
    """Sentences about parts that are not those of the speedrun; only the measured photos of `dev` count."""
    used = {"train": sorted(parts["train"]), "dev": parts["dev"][:MEASURED]}
    return [
        f"the {len(names):,} photos of '{part}' are not those of the speedrun (digest {digest(names)[:12]} instead of "
        f"{DIGESTS[part][:12]})"
        for part, names in used.items()
        if digest(names) != DIGESTS[part]
    ]


def read_lists(folder: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The split and all captions of each photo, from the text files of Flickr8k."""
    train, dev = (
        [Path(line).stem for line in (folder / f"Flickr_8k.{part}Images.txt").read_text().split()]
        for part in ("train", "dev")
    )
    captions: dict[str, list[str]] = {}
    for line in (folder / "Flickr8k.token.txt").read_text(encoding="utf-8").splitlines():
        name, _, caption = line.partition("\t")
        captions.setdefault(Path(name.partition("#")[0]).stem, []).append(caption)
    return draw(train, dev), captions


def main() -> None:
    """Write the split, or check it; what is not right is said, with exit code 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of Flickr8k's text files, or a file to check")
    parser.add_argument("images", type=Path, nargs="?", help="folder of its JPEGs")
    parser.add_argument("-o", "--output", type=Path, help="file to write")
    given = parser.parse_args()
    if given.source.is_file():
        parts: dict[str, list[str]] = {"train": [], "dev": []}
        for line in given.source.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record["split"] in parts:
                parts[record["split"]].append(Path(record["image"]).stem)
    elif given.images is None or given.output is None:
        parser.error("to write the split, give the folder of the JPEGs and -o FILE")
    else:
        parts, captions = read_lists(given.source)
        with given.output.open("w", encoding="utf-8") as file:
            for part, names in parts.items():
                for name in names:
                    image = str((given.images / f"{name}.jpg").resolve())
                    record = {"image": image, "split": part, "captions": captions[name]}
                    file.write(json.dumps(record) + "\n")
    faults = check(parts)
    print("\n".join(faults) or f"{len(parts['train']):,} photos to train on, the first {MEASURED} of 'dev' to measure")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
