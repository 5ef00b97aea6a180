"""Our tokens and caption scores compared with `pycocoevalcap` and its Java tokenizer, on your own captions.

    python benchmarks/captions.py captions.jsonl       # lines with `captions`; the first is scored against the others

Needs java and `pip install -e '.[metrics]'`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from qformer.evaluation.caption import score_captions
from qformer.metrics.ptb import tokenize


def main() -> None:
    records = [json.loads(line) for file in sys.argv[1:] for line in Path(file).read_text("utf-8").splitlines()]
    captions = [record["captions"] for record in records if len(record.get("captions") or []) > 1]
    said, known = [own[0] for own in captions], [own[1:] for own in captions]
    start = time.perf_counter()
    ours = score_captions(said, known).total
    print(f"scored {len(said)} captions in {time.perf_counter() - start:.1f} s")

    java = PTBTokenizer()
    theirs_known = java.tokenize({n: [{"caption": text} for text in texts] for n, texts in enumerate(known)})
    theirs_said = java.tokenize({n: [{"caption": text}] for n, text in enumerate(said)})
    pairs = list(zip(tokenize(said), (texts[0] for texts in theirs_said.values()), strict=True))
    flat = [text for texts in theirs_known.values() for text in texts]
    pairs += zip(tokenize(text for texts in known for text in texts), flat, strict=True)
    print(f"tokens of {len(pairs)} captions; those of {sum(a != b for a, b in pairs)} differ")
    bleu, _ = Bleu(4).compute_score(theirs_known, theirs_said, verbose=0)
    theirs = {f"BLEU-{n}": value for n, value in enumerate(bleu, 1)}
    for name, scorer in (("ROUGE-L", Rouge()), ("CIDEr", Cider()), ("METEOR", Meteor())):
        theirs[name], _ = scorer.compute_score(theirs_known, theirs_said)
    for name, value in theirs.items():
        print(f"{name:8} ours {ours[name]:.9f}  theirs {value:.9f}  difference {abs(ours[name] - value):.1e}")


if __name__ == "__main__":
    main()
