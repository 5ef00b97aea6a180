"""No test reaches the network: the hub client is told so before it is imported, and internet sockets raise."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put files with the long quickstart first where pytest-xdist divides the work, with `--dist loadfile`."""
    if hasattr(config, "workerinput"):  # set by pytest-xdist in its processes
        long = {item.path for item in items if "whole_quickstart" in getattr(item, "fixturenames", ())}
        items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets between processes of this machine stay open to data workers; all others raise."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def guard(real: Any) -> Any:
        def checked(self: socket.socket, address: Any) -> Any:
            if self.family != socket.AF_UNIX:
                raise RuntimeError(f"a test tried to reach the network: {address}")
            return real(self, address)

        return checked

    def lookup(host: Any, *_args: Any, **_options: Any) -> Any:
        raise RuntimeError(f"a test tried to reach the network: {host}")

    monkeypatch.setattr(socket.socket, "connect", guard(connect))
    monkeypatch.setattr(socket.socket, "connect_ex", guard(connect_ex))
    monkeypatch.setattr(socket, "getaddrinfo", lookup)


@pytest.fixture(autouse=True, scope="session")
def all_signals() -> None:
    """Shells start what runs in the background with some signals ignored, and so would all that tests start."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture
def by_pillow(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What Pillow reads of JPEGs from here on in this process: `head`, `pixels`, and `pixels in TIFF`."""
    from PIL import Image, JpegImagePlugin

    seen: list[str] = []
    opened, decoder, libtiff = (
        JpegImagePlugin.JpegImageFile._open,
        Image.core.jpeg_decoder,
        Image.core.libtiff_decoder,
    )

    def read_head(self: Any) -> None:
        seen.append("head")
        opened(self)

    def decode(*given: Any) -> Any:  # of JPEG and of every format that holds some
        seen.append("pixels")
        return decoder(*given)

    def decode_tiff(mode: str, raw: str, compression: str, *given: Any) -> Any:
        seen.extend(["pixels in TIFF"] * ("jpeg" in compression))
        return libtiff(mode, raw, compression, *given)

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "_open", read_head)
    monkeypatch.setattr(Image.core, "jpeg_decoder", decode)
    monkeypatch.setattr(Image.core, "libtiff_decoder", decode_tiff)
    return seen


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """`run("train", "x.yaml")` in an empty folder -> exit code, standard output, standard error."""
    from qformer import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qformer", *arguments])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="session")
def whole_quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one `qformer quickstart`, five minutes, which all processes of pytest-xdist share."""
    from qformer.stages.quickstart import run as quickstart

    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "whole-quickstart"
    folder.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "report.html").is_file():
            quickstart.run(folder, [])
    return folder
