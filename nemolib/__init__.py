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

_NAMES = {
    "beyond.attack": "dori",
    "beyond.prune": "apply_patch prune restore write_patch",
    "first_step": "Evaluations FirstStep noise_differences",
    "generation": "generate",
    "holdout": "ActivationStatistics activation_statistics holdout_scores memorization_threshold",
    "layers": "collect_activations deactivate scale_neurons",
    "localization": "Localization localize",
    "mitigation": "AttentionScaling DeactivatedNeurons EmbeddingAdjustment Mitigation RandomTokens random_neurons wen_target",
    "neurons": "NeuronSet",
    "pipeline": "embed load_pipeline",
    "prompts": "load_prompts",
    "run": "Run localize_many open_run",
    "settings": "DetectionSettings GenerationSettings MitigationSettings SearchSettings SimilaritySettings "
    "Profile load_profile PAPER PROTOCOLS Protocol RELEASED load_protocol",
    "similarity": "memorization_score",
    "store": "Grid",
    "workers": "FailedPrompts",
}
"""The public names of each module."""

_PUBLIC = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Return a public name, loading its module first."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'nemolib' has no attribute {name!r}")
    return getattr(import_module(f"nemolib.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
