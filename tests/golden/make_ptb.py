"""Write `ptb.json` anew: what the Java tokeniser that `pycocoevalcap` brings makes of the sentences in it.

    python tests/golden/make_ptb.py [sentences.txt]      # needs java and pycocoevalcap; a file adds its lines

The sentences are invented. Tokens are kept as Java prints them, punctuation included.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import NamedTemporaryFile

GOLDEN = Path(__file__).parent / "ptb.json"
JAR = "tokenizer/stanford-corenlp-3.4.1.jar"


def java_lines(sentences: list[str]) -> list[str]:
    """The tokens of each sentence, all read as one text, joined by spaces."""
    spec = find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pycocoevalcap is not installed; run: pip install -e '.[metrics]'")
    jar = Path(next(iter(spec.submodule_search_locations))) / JAR
    with NamedTemporaryFile("w", encoding="utf-8", newline="") as file:
        file.write("\n".join(sentences))
        file.flush()
        command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
        command += ["-preserveLines", "-lowerCase", file.name]
        printed = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    lines = printed.removesuffix("\n").split("\n")
    if len(lines) != len(sentences):
        raise SystemExit(f"{len(lines)} lines of tokens for {len(sentences)} sentences; is there a line break in one?")
    return lines


def main() -> None:
    sentences = [sentence for sentence, _ in json.loads(GOLDEN.read_text("utf-8"))] if GOLDEN.exists() else []
    for file in sys.argv[1:]:
        sentences += Path(file).read_text("utf-8").splitlines()
    pairs = zip(sentences, java_lines(sentences), strict=True)
    rows = ",\n".join(json.dumps(pair, ensure_ascii=False) for pair in pairs)
    GOLDEN.write_text(f"[\n{rows}\n]\n", "utf-8")


if __name__ == "__main__":
    main()
