"""Versions that an installation gets: the pins, the lowest ones that are declared, and what is here.

    python .ci/pins.py direct      # the direct dependencies that CI installs, as pyproject.toml asks for them
    python .ci/pins.py lowest      # constraints at the floors of pyproject.toml, torch at its pin
    python .ci/pins.py versions    # the direct dependencies of this environment
    python .ci/pins.py renew       # write constraints.txt anew, at the newest versions that pip resolves

See docs/dependencies.md.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PINS = ROOT / "constraints.txt"
APART = ("real",)  # extras that no test needs, so that CI does not install them; they are pinned all the same
KEPT = ("torch",)  # not at its floor in the lowest environment: the wheel of that age is a CUDA build of gigabytes
#: Without a pin: what comes with torch where there is a GPU (torch pins it itself), what installs, and the certificates
#: of the web, which must not grow old.
FREE = re.compile(r"nvidia-.*|cuda-.*|triton|pip|setuptools|wheel|certifi")
HEADER = """\
# Versions with which every test is green, of everything that is installed: for `pip install -c constraints.txt`.
# Written by `python .ci/pins.py renew`; docs/dependencies.md says when and how.
"""


def requirements(project: dict, without: tuple[str, ...] = ()) -> list[Requirement]:
    """The direct dependencies of a parsed pyproject.toml, also of extras but those `without`, and not the project."""
    table = project["project"]
    extras = [lines for name, lines in table["optional-dependencies"].items() if name not in without]
    lines = [*table["dependencies"], *(line for extra in extras for line in extra)]
    found = {canonicalize_name(made.name): made for made in map(Requirement, lines)}
    found.pop(canonicalize_name(table["name"]), None)
    return [found[name] for name in sorted(found)]


def lowest(project: dict, pins: str) -> str:
    """Constraints at the floors of a parsed pyproject.toml; what is in `KEPT` stands at its line of `pins`.

    Raises:
        ValueError: a dependency has no floor, or no pin where it needs one.
    """
    pinned = dict(line.split("==") for line in pins.splitlines() if "==" in line)
    lines = []
    for made in requirements(project):
        name = canonicalize_name(made.name)
        floors = [one.version for one in made.specifier if one.operator == ">="]
        if len(floors) != 1:
            raise ValueError(f"'{made}' must name the lowest version that works, as in '{made.name}>=1.0'")
        if name in KEPT and name not in pinned:
            raise ValueError(f"constraints.txt must pin {name}")
        lines.append(f"{name}=={pinned[name] if name in KEPT else floors[0]}\n")
    return "".join(lines)


def pinned(freeze: str) -> str:
    """What `pip freeze` prints as the text of constraints.txt: no local versions, addresses, paths or CUDA libraries.

    Raises:
        ValueError: a package stands there without a version.
    """
    found: dict[str, str] = {}
    for line in freeze.splitlines():
        if not line.strip() or line.startswith(("#", "-e ")):
            continue
        name, equal, version = line.partition("==")
        if not equal:  # `name @ address` of a file, which is where some machines have their torch
            name, _, address = line.partition(" @ ")
            file = re.search(rf"/{re.escape(name)}-([^-]+)-", address.replace("%2B", "+"), re.IGNORECASE)
            if file is None:
                raise ValueError(f"'{line}' has no version; install it from a package index")
            version = file[1]
        name = canonicalize_name(name)
        if not FREE.fullmatch(name):
            found[name] = version.partition("+")[0]
    return HEADER + "".join(f"{name}=={version}\n" for name, version in sorted(found.items()))


def versions(project: dict) -> str:
    """A line for each direct dependency that is installed here."""
    names = [canonicalize_name(made.name) for made in requirements(project)]
    here = {canonicalize_name(one.name): one.version for one in metadata.distributions()}
    return ", ".join(f"{name} {here[name]}" for name in names if name in here)


def renew(project: dict) -> None:
    """Write constraints.txt from a fresh environment with everything at its newest.

    torch keeps its pin unless that line is taken out of constraints.txt first: whether a newer one comes as a CUDA
    build of gigabytes depends on the machine.
    """
    kept = "".join(line + "\n" for line in PINS.read_text().splitlines() if line.partition("==")[0] in KEPT)
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder, "venv", "bin", "python")
        Path(folder, "kept.txt").write_text(kept)
        subprocess.run([sys.executable, "-m", "venv", python.parent.parent], check=True)
        pip = [python, "-m", "pip"]
        subprocess.run([*pip, "install", "--quiet", "-c", Path(folder, "kept.txt"), "-e", f"{ROOT}[all]"], check=True)
        freeze = subprocess.run([*pip, "freeze", "--exclude-editable"], check=True, capture_output=True, text=True)
    PINS.write_text(pinned(freeze.stdout))


if __name__ == "__main__":
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())
    match sys.argv[1:]:
        case ["direct"]:
            print(*requirements(declared, APART), sep="\n")
        case ["lowest"]:
            print(lowest(declared, PINS.read_text()), end="")
        case ["versions"]:
            print(versions(declared))
        case ["renew"]:
            renew(declared)
        case _:
            sys.exit(__doc__)
