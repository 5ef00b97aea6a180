"""A trained checkpoint and its model for all tests of the page, and the way to this machine alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from qformer import stages
from qformer.checkpoints.loading import load_vision_language
from qformer.commands.searching import index
from qformer.config import load_config
from qformer.demo import app, backend, server
from qformer.scenes.scenes import Scenes
from tests.demo.visitor import Visitor
from tests.local_network import no_network

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qformer.model.vision_language import VisionLanguageModel

__all__ = ["no_network"]  # in place of the one for all tests

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the shipped ViT and OPT and an almost untrained bridge: real answers, if foolish ones."""
    folder = tmp_path_factory.mktemp("run")
    few = ["train.steps=2", "train.warmup=1", "data.batch=4"]
    configs = ROOT / "configs/quickstart"
    stages.train(load_config(configs / "stage1.yaml", [f"run={folder / 'stage1'}", *few, "data.validation_size=4"]))
    stages.train(load_config(configs / "stage2.yaml", [f"run={folder / 'opt'}", f"init={folder / 'stage1'}", *few]))
    return folder / "opt"


@pytest.fixture(scope="session")
def model(trained: Path) -> VisionLanguageModel:
    return load_vision_language(trained, "cpu")


@pytest.fixture(scope="session")
def models(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> backend.Models:
    """All that a page may have: both stages, and a gallery of six scenes."""
    folder = tmp_path_factory.mktemp("gallery") / "index"
    index(str(trained.parent / "stage1"), ["name=scenes", "count=6", "size=64"], folder, batch=6, device="cpu")
    return backend.load_models(str(trained), index=folder, device="cpu")


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("scene") / "scene.png"
    Image.fromarray(Scenes("test", size=200, seed=3)[1].image).save(file)
    return file


@pytest.fixture(scope="module")
def gate(model: VisionLanguageModel) -> server.Gate:
    made = server.Gate()
    made.watch(model, "test")
    return made


@pytest.fixture(scope="module")
def served(model: VisionLanguageModel, gate: server.Gate) -> Iterator[str]:
    """The address of the page, served."""
    with server.workplace() as folder:
        page = app.build(backend.Models("test", model), gate, [])
        _, url, _ = server.launch(page, folder=folder, gate=gate, block=False, theme=app.THEME)
        yield url
        server.close(page, gate)


@pytest.fixture
def visitor(served: str) -> Visitor:
    return Visitor(served)
