"""Candidates for memorization neurons: out-of-distribution activations and the initial selection (Alg. 2 and 3)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from nemolib.neurons import NeuronSet
from nemolib.settings import Protocol, SearchSettings, load_protocol

Score = Callable[[NeuronSet], float]
"""What a search asks of a neuron set: how similar the noise differences stay when the set is deactivated."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """What Alg. 2 selects, by layer.

    Attributes:
        out_of_distribution: Neurons whose z-score is beyond the threshold, in order.
        top: The neurons with the largest activations, the largest first. May repeat those above.
    """

    out_of_distribution: tuple[tuple[int, ...], ...]
    top: tuple[tuple[int, ...], ...]

    @property
    def neurons(self) -> NeuronSet:
        """The candidates as a set."""
        return NeuronSet(self.entries(double=True))

    def entries(self, *, double: bool) -> tuple[tuple[int, ...], ...]:
        """Return the candidates of each layer in the order in which refinement tests them.

        ``double``: whether a neuron that was selected twice has two entries, as in the authors' code.
        """
        entries = map(operator.add, self.out_of_distribution, self.top)
        return tuple(entry if double else tuple(dict.fromkeys(entry)) for entry in entries)


@dataclass(frozen=True, slots=True)
class SelectionStep:
    """One step of the initial selection.

    Attributes:
        theta: Threshold of the z-score.
        k: Neurons of each layer taken for their activation alone.
        neurons: What both select.
        score: Its score. Where the search stops a step as soon as it fails (`initial_selection` with ``quick``), the
            similarity at which it stopped; that of the last step is always the score.
    """

    theta: float
    k: int
    neurons: NeuronSet
    score: float


@dataclass(frozen=True, slots=True)
class InitialSelection:
    """Result of the initial selection.

    Attributes:
        candidates: What the last step selected.
        score: Its score.
        reached: Whether the score fell to the threshold. Often it does not.
        steps: All steps that were tried, the last one included.
    """

    candidates: Candidates
    score: float
    reached: bool
    steps: tuple[SelectionStep, ...]

    @property
    def neurons(self) -> NeuronSet:
        """The selected neurons."""
        return self.candidates.neurons


def out_of_distribution(
    z: Sequence[Tensor], activations: Sequence[Tensor], *, theta: float, top_k: int = 0
) -> Candidates:
    """Return the neurons with unusual activations for a prompt (Alg. 2).

    Source: Sec. 3.2 (abs(z) > theta), Alg. 2; authors' code, utils/activation_detection.py.

    Args:
        z: For each layer the z-scores [neuron].
        activations: For each layer the activations [neuron], at least 0.
        theta: Threshold of the absolute z-score, exclusive.
        top_k: How many neurons of each layer are taken for their activation alone; at most its width.

    Returns:
        The candidates.

    Raises:
        ValueError: Shapes do not fit, or ``top_k`` is negative.
    """
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (z, activations)]
    if shapes[0] != shapes[1] or any(len(shape) != 1 for shape in shapes[0]):
        raise ValueError(f"z-scores of shapes {shapes[0]}, activations of {shapes[1]}; expected [neuron] of each layer")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}; it must be at least 0")
    outliers = tuple(tuple((layer.abs() > theta).nonzero().flatten().tolist()) for layer in z)
    top = tuple(tuple(layer.topk(min(top_k, len(layer))).indices.tolist()) for layer in activations)
    return Candidates(outliers, top)


def schedule(search: SearchSettings, *, evaluate_limits: bool) -> list[tuple[float, int]]:
    """Return the pairs (theta, k) that the initial selection tries, in order.

    Source: Alg. 3; authors' code, 3_detect_memorized_neurons.py.
    Deviates: the code compares theta with 1 exactly, so that other settings can run past it; here the smallest theta
        of the settings ends the search.

    Args:
        search: Start, step and limit of both.
        evaluate_limits: Whether the limits themselves are tried; the code stops on reaching either.

    Returns:
        At least one pair.
    """
    pairs = [(search.theta_start, search.k_start)]
    # Rounding, so that steps such as 0.1 end at the limit and not a hair above it.
    while True:
        theta = round(search.theta_start - len(pairs) * search.theta_step, 9)
        k = search.k_start + len(pairs) * search.k_step
        beyond = theta < search.theta_min or k > search.k_max
        at_limit = theta == search.theta_min or k == search.k_max
        if beyond or (at_limit and not evaluate_limits):
            return pairs
        pairs.append((theta, k))


def initial_selection(
    z: Sequence[Tensor],
    activations: Sequence[Tensor],
    score: Score,
    *,
    threshold: float,
    quick: Score | None = None,
    search: SearchSettings | None = None,
    protocol: str | Protocol = "released",
) -> InitialSelection:
    """Return the first selection of neurons whose deactivation brings the score to the threshold (Alg. 3).

    Source: Sec. 3.3, Alg. 3.
    Deviates: a step that selects the same neurons as the one before is not evaluated again.

    Args:
        z: For each layer the z-scores [neuron].
        activations: For each layer the activations [neuron].
        score: Returns the score of a neuron set that is deactivated.
        threshold: Score to reach, inclusive.
        quick: A score that costs less: the same where the threshold is reached, any value above the threshold where it
            is not. It changes no result. None asks the score itself.
        search: Thresholds to go through; None means those of the paper.
        protocol: Whether the limits are tried.

    Returns:
        The selection; where the threshold was not reached, that of the last step.
    """
    pairs = schedule(search or SearchSettings(), evaluate_limits=load_protocol(protocol).evaluate_limits)
    steps: list[SelectionStep] = []
    for theta, k in pairs:
        candidates = out_of_distribution(z, activations, theta=theta, top_k=k)
        neurons = candidates.neurons
        same = bool(steps) and steps[-1].neurons == neurons
        steps.append(SelectionStep(theta, k, neurons, steps[-1].score if same else (quick or score)(neurons)))
        reached = steps[-1].score <= threshold
        if reached:
            break
    if not reached and quick is not None:
        steps[-1] = replace(steps[-1], score=score(steps[-1].neurons))
    return InitialSelection(candidates, steps[-1].score, reached, tuple(steps))
