"""Find and deactivate memorization neurons in text-to-image diffusion models.

A companion to "Finding NeMo: Localizing Neurons Responsible For Memorization in Diffusion Models" (NeurIPS 2024).

    pipe = nemolib.load_pipeline("tiny")
    stats = nemolib.activation_statistics(pipe, holdout_prompts)
    found = nemolib.localize(pipe, prompt, stats, threshold=tau)
    with nemolib.deactivate(pipe, found.neurons):
        image = pipe(prompt).images[0]

Names are loaded when they are first used, so that ``import nemolib`` is quick.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "ActivationStatistics": "holdout",
    "AttentionScaling": "mitigation",
    "DeactivatedNeurons": "mitigation",
    "DetectionSettings": "settings",
    "EmbeddingAdjustment": "mitigation",
    "Evaluations": "evaluations",
    "FailedPrompts": "workers",
    "FirstStep": "first_step",
    "GenerationSettings": "settings",
    "Localization": "localization",
    "Mitigation": "mitigation",
    "MitigationSettings": "settings",
    "NeuronSet": "neurons",
    "PAPER": "protocols",
    "PROTOCOLS": "protocols",
    "Profile": "profiles",
    "Protocol": "protocols",
    "RELEASED": "protocols",
    "RandomTokens": "mitigation",
    "SearchSettings": "settings",
    "SimilaritySettings": "settings",
    "Store": "store",
    "activation_statistics": "holdout",
    "collect_activations": "hooks",
    "deactivate": "hooks",
    "embed": "pipeline",
    "generate": "generation",
    "holdout_scores": "holdout",
    "load_pipeline": "pipeline",
    "load_profile": "profiles",
    "load_prompts": "prompts",
    "load_protocol": "protocols",
    "localize": "localization",
    "localize_many": "localization",
    "memorization_score": "similarity",
    "memorization_threshold": "holdout",
    "noise_differences": "first_step",
    "random_neurons": "mitigation",
    "scale_neurons": "hooks",
    "wen_target": "mitigation",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Return a public name, loading its module first."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'nemolib' has no attribute {name!r}")
    return getattr(import_module(f"nemolib.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
