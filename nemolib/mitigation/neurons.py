"""Deactivated neurons: those that were found (NeMo), those of the initial selection alone, or random ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from nemolib.hooks import scale_neurons
from nemolib.mitigation.base import Mitigation
from nemolib.neurons import NeuronSet
from nemolib.seeding import stream
from nemolib.value_layers import widths as layer_widths

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@dataclass(frozen=True)
class DeactivatedNeurons(Mitigation):
    """Neurons whose values are scaled, each prompt's own or one set for all.

    Source: Sec. 3.3, Table 1.
    Deviates: a batch may hold several prompts; the authors' code gives all of them the neurons of the first.

    Attributes:
        neurons: One set for all prompts, or prompt -> set.
        factor: What values are multiplied by; 0 deactivates.
    """

    source: ClassVar[str] = "Hintersdorf et al. (NeurIPS 2024)"

    neurons: NeuronSet | Mapping[str, NeuronSet]
    factor: float = 0.0

    def __post_init__(self) -> None:
        """Keep a mapping as it is now."""
        if isinstance(self.neurons, Mapping):
            object.__setattr__(self, "neurons", dict(self.neurons))
        elif not isinstance(self.neurons, NeuronSet):
            raise TypeError(f"expected a NeuronSet or prompt -> NeuronSet, got {type(self.neurons).__name__}")
        object.__setattr__(self, "factor", float(self.factor))

    @property
    def name(self) -> str:
        """What the mitigation is called in tables."""
        return "deactivated neurons" if self.factor == 0 else f"neurons scaled by {self.factor:g}"

    def neurons_of(self, prompt: str) -> NeuronSet:
        """Return the neurons of a prompt.

        Raises:
            ValueError: The mapping does not have the prompt.
        """
        if isinstance(self.neurons, NeuronSet):
            return self.neurons
        if prompt not in self.neurons:
            raise ValueError(f"no neurons are given for the prompt {prompt!r}; give an empty NeuronSet if it has none")
        return self.neurons[prompt]

    def identity(self, prompt: str) -> list[Any]:
        """Return neurons and factor; nothing if the prompt has no neurons."""
        chosen = self.neurons_of(prompt)
        return ["neurons", chosen.layers, self.factor] if len(chosen) else []

    def check(self, pipe: StableDiffusionPipeline) -> None:
        """Raise a ValueError for a pipeline without these neurons."""
        super().check(pipe)
        widths = layer_widths(pipe.unet)
        for chosen in [self.neurons] if isinstance(self.neurons, NeuronSet) else self.neurons.values():
            chosen.check(widths)

    @contextmanager
    def _prepared(self, pipe: StableDiffusionPipeline, prompts: list[str]) -> Iterator[dict[str, Any]]:
        with scale_neurons(pipe.unet, [self.neurons_of(prompt) for prompt in prompts], factor=self.factor):
            yield {"prompt": prompts}


def random_neurons(neurons: NeuronSet, widths: Sequence[int], *, seed: int, repeat: int = 0) -> NeuronSet:
    """Return as many random neurons in the same layers, none of which is one of the given.

    Each repeat, layer and set has random numbers of its own.

    Source: Sec. 4, Table 1 (random neurons).
    Deviates: the authors' code draws from all neurons, found ones among them, without a seed, and where it sets one it
        sets it anew in each layer, so that layers of one width get the same indices.

    Args:
        neurons: The neurons that were found.
        widths: Number of neurons of each layer of the model.
        seed: Seed.
        repeat: Which of several draws.

    Raises:
        ValueError: A neuron does not exist, or a layer does not have as many others.
    """
    neurons.check(widths)
    drawn = []
    for layer, (chosen, width) in enumerate(zip(neurons.layers, widths, strict=True)):
        others = sorted(set(range(width)) - set(chosen))
        if len(others) < len(chosen):
            raise ValueError(
                f"layer {layer} has {width} neurons; without the {len(chosen)} given ones only {len(others)} remain, "
                f"{len(chosen)} are needed"
            )
        numbers = stream(seed, "random neurons", repeat, layer, neurons.to_json())
        drawn.append(tuple(numbers.choice(others, size=len(chosen), replace=False).tolist()) if chosen else ())
    return NeuronSet(tuple(drawn))
