"""The mitigations of Table 1 behind one interface; each can be used alone with any StableDiffusionPipeline.

Example:
    with AttentionScaling().applied(pipe, [prompt] * 4) as inputs:
        images = pipe(**inputs).images
"""

from nemolib.mitigation.attention import AttentionScaling
from nemolib.mitigation.base import Mitigation
from nemolib.mitigation.embedding import Adjustment, EmbeddingAdjustment, embedding_norms, wen_target
from nemolib.mitigation.neurons import DeactivatedNeurons, random_neurons
from nemolib.mitigation.tokens import RandomTokens

__all__ = [
    "Adjustment",
    "AttentionScaling",
    "DeactivatedNeurons",
    "EmbeddingAdjustment",
    "Mitigation",
    "RandomTokens",
    "embedding_norms",
    "random_neurons",
    "wen_target",
]
