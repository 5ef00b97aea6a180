"""Connectors: their table, the contract, and each of them; that of the Q-Former is made here (`bridge.py`)."""

from __future__ import annotations

from qformer.connectors.base import Connector, Prefix
from qformer.connectors.compressor import Compressor
from qformer.connectors.mlp import MLP
from qformer.connectors.pooling import AvgPool, CAbstractor
from qformer.connectors.resampler import Resampler, SpatialResampler
from qformer.connectors.shuffle import PatchMerger, PixelShuffleMLP, pixel_shuffle
from qformer.connectors.table import CONNECTORS, build, check, chosen
from qformer.connectors.token_packer import TokenPacker
from qformer.model.connectors.bridge import QFormerConnector

__all__ = [
    "CONNECTORS",
    "MLP",
    "AvgPool",
    "CAbstractor",
    "Compressor",
    "Connector",
    "PatchMerger",
    "PixelShuffleMLP",
    "Prefix",
    "QFormerConnector",
    "Resampler",
    "SpatialResampler",
    "TokenPacker",
    "build",
    "check",
    "chosen",
    "pixel_shuffle",
]
