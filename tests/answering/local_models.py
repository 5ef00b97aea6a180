"""A tiny LLaVA of transformers with a processor, made from configuration classes."""

from __future__ import annotations

from transformers import AutoImageProcessor, LlavaProcessor

from tests.test_systems import Oracle, make_llava

__all__ = ["Oracle", "make_llava", "with_processor"]


def with_processor(oracle: Oracle) -> Oracle:
    """Put the processor into the folder: four tokens a picture, and the class token that is dropped."""
    images = AutoImageProcessor.from_pretrained(oracle.folder, size={"shortest_edge": 28}, crop_size=28)
    LlavaProcessor(
        images,
        oracle.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(oracle.folder)
    return oracle
