"""A ViT that learns from pictures alone, without labels or texts: it fills in hidden patches (MAE, He et al. 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from qformer.stages.towers.build import build_vit, sine_positions
from qformer.stages.towers.encoders import save_vit

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from qformer.config import BackboneConfig

DECODER = 2  # layers of the decoder, which is as wide as the encoder and is discarded


class MaskedViT(nn.Module):
    """A masked autoencoder; the targets are pixels, normalized within each hidden patch (He et al. 2022, section 4.1).

    The encoder sees the patches that are not hidden, with positions that stay as they are: sines.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        hidden = config.intermediate or 4 * config.width
        sizes = ViTMAEConfig(
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=hidden,
            image_size=config.image_size,
            patch_size=config.patch_size,
            decoder_hidden_size=config.width,
            decoder_num_hidden_layers=DECODER,
            decoder_num_attention_heads=config.heads,
            decoder_intermediate_size=hidden,
            mask_ratio=cast("float", config.mask),
            norm_pix_loss=True,
        )
        self.config = config
        self.model = ViTMAEForPreTraining(sizes)
        places = 0.5 * sine_positions(config.image_size // config.patch_size, config.width)
        with torch.no_grad():  # transformers 5.24 leaves both tables at zero
            self.model.vit.embeddings.position_embeddings[0, 1:] = places
            self.model.decoder.decoder_pos_embed[0, 1:] = places

    def forward(self, pictures: Sequence[Tensor], noise: Tensor | None = None) -> Tensor:
        """Compute the mean squared error of the hidden patches of pictures uint8[3, h, w] of one size.

        Args:
            noise: float[B, patches]; of each picture those with the largest numbers are hidden. By default random.
        """
        return self.model(pixel_values=self._normalized(pictures), noise=noise).loss

    def vit(self) -> Any:
        """Make a ViT that sees all patches, with the weights of the encoder as they are now."""
        with torch.random.fork_rng([]):
            vit: Any = build_vit(self.config)
        vit.load_state_dict(self.model.vit.state_dict())
        return vit.to(self.model.device).eval()

    @torch.no_grad()
    def patches(self, pictures: Sequence[Tensor]) -> list[Tensor]:
        """Encode pictures uint8[3, h, w] of one size; the tokens of each, float[patches, width], without CLS."""
        return list(self.vit()(pixel_values=self._normalized(pictures)).last_hidden_state[:, 1:])

    def save(self, folder: Path) -> None:
        save_vit(self.vit(), self.config.image_size, folder)

    def _normalized(self, pictures: Sequence[Tensor]) -> Tensor:
        """float[B, 3, h, w] in [-1, 1]."""
        return torch.stack(list(pictures)).to(self.model.device).float() / 127.5 - 1
