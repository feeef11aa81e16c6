"""A set of neurons of the value layers: one type everywhere.

Layers count from 0 in the order of `nemolib.layers`. The paper counts them from 1: its layer 1 is layer 0 here.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any


@dataclass(frozen=True, slots=True)
class NeuronSet:
    """Neurons by layer: hashable, printable, each neuron at most once.

    ``a | b``, ``a & b`` and ``a - b`` are set operations, ``len(a)`` counts neurons, and iteration gives (layer, neuron)
    pairs in order, so that ``(layer, neuron) in a`` asks for a neuron. An empty set is false.

    Attributes:
        layers: Indices of the neurons of each layer. Any iterables of integers are accepted, and kept as sorted tuples.

    Raises:
        ValueError: A neuron is not an integer, or negative.
    """

    layers: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        """Sort, and drop repetitions."""
        object.__setattr__(self, "layers", tuple(_canonical(neurons, i) for i, neurons in enumerate(self.layers)))

    @classmethod
    def empty(cls, layers: int) -> NeuronSet:
        """Return the set without neurons of a model with that many value layers."""
        return cls(((),) * layers)

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, int]], *, layers: int) -> NeuronSet:
        """Return the set of (layer, neuron) pairs in a model with that many value layers.

        Raises:
            ValueError: A layer is not one of the model's.
        """
        found: list[list[int]] = [[] for _ in range(layers)]
        for layer, neuron in pairs:
            if not 0 <= layer < layers:
                raise ValueError(f"layer {layer} of neuron {neuron} does not exist; layers are 0 to {layers - 1}")
            found[layer].append(neuron)
        return cls(tuple(map(tuple, found)))

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of neurons of each layer."""
        return tuple(map(len, self.layers))

    def __len__(self) -> int:
        return sum(self.counts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((layer, neuron) for layer, neurons in enumerate(self.layers) for neuron in neurons)

    def __or__(self, other: NeuronSet) -> NeuronSet:
        return self._combine(other, operator.or_)

    def __and__(self, other: NeuronSet) -> NeuronSet:
        return self._combine(other, operator.and_)

    def __sub__(self, other: NeuronSet) -> NeuronSet:
        return self._combine(other, operator.sub)

    def __str__(self) -> str:
        used = [f"layer {i}: {', '.join(map(str, neurons))}" for i, neurons in enumerate(self.layers) if neurons]
        noun = "neuron" if len(self) == 1 else "neurons"
        return f"{len(self)} {noun}" + (f" ({'; '.join(used)})" if used else "")

    def without_layer(self, layer: int) -> NeuronSet:
        """Return the set without the neurons of one layer.

        Raises:
            IndexError: The layer does not exist.
        """
        if not 0 <= layer < len(self.layers):
            raise IndexError(f"layer {layer} does not exist; layers are 0 to {len(self.layers) - 1}")
        return NeuronSet((*self.layers[:layer], (), *self.layers[layer + 1 :]))

    def check(self, widths: Sequence[int]) -> None:
        """Check that every neuron exists in a model.

        Args:
            widths: Width of each value layer of the model.

        Raises:
            ValueError: The number of layers differs, or a neuron is out of range.
        """
        if len(self.layers) != len(widths):
            raise ValueError(
                f"the neuron set has {len(self.layers)} layers, the model has {len(widths)} value layers; "
                "was the set found in another model?"
            )
        for layer, (neurons, width) in enumerate(zip(self.layers, widths, strict=True)):
            if neurons and neurons[-1] >= width:
                raise ValueError(
                    f"neuron {neurons[-1]} of layer {layer} does not exist; allowed are 0 to {width - 1}; "
                    "was the set found in another model?"
                )

    def to_json(self) -> str:
        """Return the set as JSON text, the inverse of `from_json`."""
        return json.dumps({"layers": self.layers})

    @classmethod
    def from_json(cls, text: str) -> NeuronSet:
        """Return the set that `to_json` wrote.

        Raises:
            ValueError: The text is not a neuron set.
        """
        try:
            return cls(json.loads(text)["layers"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'not a neuron set: {text[:80]!r}; expected {{"layers": [[...], ...]}}') from error

    def _combine(self, other: Any, operation: Any) -> NeuronSet:
        if not isinstance(other, NeuronSet):
            return NotImplemented
        if len(self.layers) != len(other.layers):
            raise ValueError(f"neuron sets of {len(self.layers)} and {len(other.layers)} layers cannot be combined")
        return NeuronSet.of(operation(set(self), set(other)), layers=len(self.layers))


def _canonical(neurons: Iterable[int], layer: int) -> tuple[int, ...]:
    values = set(neurons)
    for neuron in values:
        if not isinstance(neuron, Integral) or isinstance(neuron, bool) or neuron < 0:
            raise ValueError(f"neuron {neuron!r} of layer {layer} is no integer from 0 on")
    return tuple(sorted(map(int, values)))
