"""Reading and scaling value activations while a model runs.

Both context managers remove exactly the hooks that they added, whatever happens inside: an exception or an
interrupted notebook cell leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nemolib.neurons import NeuronSet
from nemolib.value_layers import ValueLayer, value_layers


@contextmanager
def collect_activations(unet: nn.Module) -> Iterator[tuple[list[Tensor], ...]]:
    """Collect the outputs of the value layers of every UNet pass inside the context.

    Args:
        unet: A conditional UNet of diffusers.

    Yields:
        For each layer a list that grows by one tensor [batch, token, neuron] per pass. With classifier-free guidance
        the batch holds the unconditional half first.

    Raises:
        ValueError: The model has no value layers.
    """
    layers = value_layers(unet)
    collected: tuple[list[Tensor], ...] = tuple([] for _ in layers)
    with ExitStack() as hooks:
        for layer, outputs in zip(layers, collected, strict=True):
            hooks.enter_context(_hook(layer.module, _collector(outputs)))
        yield collected


@contextmanager
def scale_neurons(
    unet: nn.Module,
    neurons: NeuronSet | Sequence[NeuronSet],
    *,
    factor: float | Sequence[float] = 0.0,
) -> Iterator[None]:
    """Multiply the values of neurons by a factor in every UNet pass inside the context; 0 deactivates them.

    With a list of neuron sets, sample ``i`` of a batch gets set ``i``. A batch that is a multiple of the list repeats
    it, so that the unconditional and the conditional half of classifier-free guidance are treated alike.

    Source: Sec. 3.3; authors' code, hooks/block_indices.py.
    Deviates: makes a new tensor where the code changes the layer's output in place.

    Args:
        unet: A conditional UNet of diffusers.
        neurons: One neuron set for all samples, or one per sample.
        factor: One factor for all, or one per sample.

    Raises:
        ValueError: A set does not fit the model, lists of different lengths or none are given, or (in a pass) the
            batch is no multiple of the list.
    """
    layers = value_layers(unet)
    sets, factors = _per_sample(neurons, factor)
    for neuron_set in dict.fromkeys(sets):
        neuron_set.check([layer.width for layer in layers])
    with ExitStack() as hooks:
        for layer in layers:
            if any(neuron_set.layers[layer.index] for neuron_set in sets):
                hooks.enter_context(_hook(layer.module, _scaler(_scales(layer, sets, factors))))
        yield


@contextmanager
def deactivate(pipe: Any, neurons: NeuronSet, *, factor: float = 0.0) -> Iterator[Any]:
    """Deactivate neurons of a pipeline inside the context.

    Source: Sec. 3.3.

    Args:
        pipe: A StableDiffusionPipeline.
        neurons: The neurons.
        factor: What their values are multiplied by; 0 deactivates, 1 changes nothing.

    Yields:
        The pipeline.

    Raises:
        ValueError: The set does not fit the model.
    """
    with scale_neurons(pipe.unet, neurons, factor=factor):
        yield pipe


@contextmanager
def _hook(module: nn.Module, function: Any) -> Iterator[None]:
    handle = module.register_forward_hook(function)
    try:
        yield
    finally:
        handle.remove()


def _collector(outputs: list[Tensor]) -> Any:
    def collect(module: nn.Module, args: Any, output: Tensor) -> None:
        outputs.append(output.detach().clone())

    return collect


def _scaler(scales: Tensor) -> Any:
    def scale(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        batch, samples = output.shape[0], scales.shape[0]
        if batch % samples:
            raise ValueError(f"{samples} neuron sets were given for a batch of {batch}; give one, or one per sample")
        return output * scales.to(output).repeat(batch // samples, 1, 1)

    return scale


def _scales(layer: ValueLayer, sets: Sequence[NeuronSet], factors: Sequence[float]) -> Tensor:
    """Return the factors of a layer, [sample, 1, neuron]."""
    scales = torch.ones(len(sets), 1, layer.width)
    for row, neuron_set, factor in zip(scales, sets, factors, strict=True):
        row[0, list(neuron_set.layers[layer.index])] = factor
    return scales.to(layer.module.weight.device)


def _per_sample(
    neurons: NeuronSet | Sequence[NeuronSet], factor: float | Sequence[float]
) -> tuple[list[NeuronSet], list[float]]:
    """Return neuron sets and factors as two lists of one length."""
    sets = [neurons] if isinstance(neurons, NeuronSet) else list(neurons)
    factors = list(factor) if isinstance(factor, Sequence) else [factor] * len(sets)
    if not sets:
        raise ValueError("no neuron set was given; give one, or one per sample")
    if not all(isinstance(item, NeuronSet) for item in sets):
        raise TypeError(f"expected a NeuronSet or a list of them, got {type(neurons).__name__} {neurons!r}")
    if len(sets) == 1:
        sets = sets * len(factors)
    if len(sets) != len(factors) or not factors:
        raise ValueError(f"{len(sets)} neuron sets but {len(factors)} factors were given; give one per sample of each")
    return sets, [float(value) for value in factors]
