"""Page faults and CPU time of `qformer features`, with freed memory kept as our commands do, and without.

    python benchmarks/memory.py CONFIG [KEY=VALUE]... [--pairs 3]

Both fill a store of their own in turn, so that what else the machine does meets both. The stores must be equal.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

#: An option of malloc that the user has set, here to its default, leaves the others as they are.
AS_GIVEN = {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}


def fill(arguments: list[str], store: Path, environment: dict[str, str]) -> tuple[int, float, float]:
    """Fill a store in a process of its own: page faults, seconds of CPU time, and of these in the system."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "qformer", "features", *arguments, f"data.features.path={store}"]
    subprocess.run(command, env=os.environ | environment, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    system = after.ru_stime - before.ru_stime
    return after.ru_minflt - before.ru_minflt, after.ru_utime - before.ru_utime + system, system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="+")
    parser.add_argument("--pairs", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(given.pairs):
            stores = []
            for name, environment in (("given back", AS_GIVEN), ("kept", {})):
                stores.append(Path(folder) / f"{pair} {name}")
                faults, cpu, system = fill(given.arguments, stores[-1], environment)
                print(f"{name:10}  {faults:9,} page faults  {cpu:6.1f} s of CPU time, {system:4.1f} in the system")
            files = sorted(file.name for file in stores[0].glob("*.safetensors"))
            assert files
            assert not any(filecmp.cmpfiles(*stores, files, shallow=False)[1:]), "the stores differ"


if __name__ == "__main__":
    main()
