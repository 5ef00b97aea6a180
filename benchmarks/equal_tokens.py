"""Options at which systems have as many visual tokens on drawn canvases, as `equal_tokens` chooses them.

    python benchmarks/equal_tokens.py [--tokens 36 100] [--rows 40] [-o chosen.json]

The seven systems of `configs/system_*.yaml`, and each connector of the table behind one padded square, on canvases of
120 to 480 pixels a side.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qformer.config import load_config
from qformer.connectors.table import CONNECTORS
from qformer.data import sources
from qformer.schema import Config
from qformer.stages.compare.budgets import equal_tokens, mean_tokens
from qformer.stages.compare.systems import Refused

SYSTEMS = ("blip2", "llava15", "llava_uhd", "internvl15", "anyres", "oryx", "qwen2vl")
PATCHED = {"mlp", "pixel_shuffle_mlp", "resampler", "spatial_resampler", "compressor", "merger"}
WITH_QUERIES = {"resampler", "spatial_resampler", "avg_pool", "c_abstractor"}
SQUARE = "llava15"  # the preset that pads a picture to a square


def systems() -> dict[str, Config]:
    """Presets, and connectors behind a padded square, by name."""
    found = {name: load_config(f"configs/system_{name}.yaml") for name in SYSTEMS}
    for connector in CONNECTORS:
        options = [f"name: {connector}", *["patch: 20"] * (connector in PATCHED)]
        options += ["queries: 16"] * (connector in WITH_QUERIES) + ["hidden: 64"] * (connector == "c_abstractor")
        words = [f"connector={{{', '.join(options)}}}"]
        if connector == "qformer":
            words += ["qformer={hidden_size: 128, heads: 4, intermediate_size: 512, layers: 2, queries: 8}"]
        found[f"{connector}, {SQUARE}"] = load_config(f"configs/system_{SQUARE}.yaml", words)
    return found


def changed_options(before: Config, after: Config) -> dict[str, Any]:
    """Options of `after` that differ from `before`, by their keys, such as `{"connector.queries": 9}`."""
    found: dict[str, Any] = {}
    for section in ("qformer", "connector", "resolution", "train"):
        old, new = (getattr(one, section).model_dump() for one in (before, after))
        found |= {f"{section}.{key}": value for key, value in new.items() if old.get(key) != value}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, nargs="+", default=[36, 100])
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    source = sources.build("canvases", split="val", count=given.rows)
    configs, records = systems(), []
    for name, config in configs.items():
        record = {"system": name, "as it is": round(mean_tokens(config, source), 1)}
        for tokens in given.tokens:
            one = equal_tokens({name: config}, source, tokens)[name]
            if isinstance(one, Refused):
                record[f"{tokens:g}"] = f"refused: {one.reason}"
                continue
            changes = " ".join(f"{key}={value}" for key, value in changed_options(config, one).items())
            record[f"{tokens:g}"] = f"{mean_tokens(one, source):.1f}: {changes or 'as it is'}"
        records.append(record)
        print(json.dumps(record), flush=True)
    table = Table(*records[0])
    for record in records:
        table.add_row(*map(str, record.values()))
    Console(width=200).print(table)
    if given.output is not None:
        given.output.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
