"""How far our numbers are from the original's, test by test, as the table of docs/fidelity.md.

python -m tests.golden.differences
"""

from __future__ import annotations

import os

import pytest
from torch import Tensor

from tests.golden import golden

LARGEST: dict[str, float] = {}
close = golden.close


def recording(ours: Tensor, theirs: Tensor, atol: float = golden.VALUES) -> None:
    close(ours, theirs, atol)
    test = os.environ["PYTEST_CURRENT_TEST"].partition("::")[2].partition("[")[0].partition(" ")[0]
    name = test.removeprefix("test_").replace("_", " ") + (": gradients" if atol == golden.GRADIENTS else "")
    LARGEST[name] = max(LARGEST.get(name, 0.0), (ours.detach() - theirs).abs().max().item())


if __name__ == "__main__":
    golden.close = recording
    names = ("stage1", "stage2", "plain")
    code = pytest.main(["-q", "-p", "no:cacheprovider", *(f"tests/test_against_lavis_{name}.py" for name in names)])
    print("| compared | largest difference |\n|---|---|")
    print("\n".join(f"| {name} | {difference:.1e} |" for name, difference in LARGEST.items()))
    raise SystemExit(code)
