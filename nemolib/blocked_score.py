"""The score that the search asks of neuron sets, and how it costs little.

The score of a neuron set is the largest similarity over the kept seeds, so that one seed above the threshold says that
the set fails. Which seed is the most similar hardly changes from set to set.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nemolib.first_step import Evaluations, FirstStep
from nemolib.neurons import NeuronSet
from nemolib.settings import Protocol, SimilaritySettings
from nemolib.similarity import similarity

_PORTIONS = (1, 2)
"""How many seeds are evaluated at first, and next, where one above a limit answers for all; then all others are."""

_GROUP_MARGIN = 0.01
"""How far a seed must be above a threshold to answer for all, where its similarity depends a little on the others."""


class BlockedScore:
    """How similar the noise differences of a prompt stay when a neuron set is deactivated.

    Each set is evaluated once for each seed; the empty set without the UNet.

    Source: authors' code, utils/activation_detection.py: the largest similarity, over the kept seeds, of the noise
        differences of the *same* seed without and with deactivated neurons.

    Args:
        step: The first denoising step.
        embedding: Embedding of the prompt, [1, token, feature].
        seeds: Indices of the kept seeds.
        unblocked: Their noise differences with all neurons active, [seed, channel, height, width].
        similarity: Window and exponents of the similarity.
        protocol: The protocol.
        evaluations: Counts the UNet sample-evaluations.
    """

    def __init__(
        self,
        step: FirstStep,
        embedding: Tensor,
        *,
        seeds: Sequence[int],
        unblocked: Tensor,
        similarity: SimilaritySettings,
        protocol: Protocol,
        evaluations: Evaluations | None = None,
    ) -> None:
        self._step, self._embedding, self._seeds, self._unblocked = step, embedding, list(seeds), unblocked
        self._similarity, self._protocol, self._evaluations = similarity, protocol, evaluations or Evaluations()
        self._maps: dict[NeuronSet, dict[int, Tensor]] = {}
        self._values: dict[NeuronSet, dict[int, float]] = {}
        self._grouped = protocol.similarity == "ms_ssim"
        self._others = unblocked
        self._order = list(range(len(self._seeds)))

    def __call__(self, neurons: NeuronSet) -> float:
        """Return the score of a neuron set."""
        self._evaluate(neurons, range(len(self._seeds)))
        return max(self._values[neurons].values())

    def screen(self, neurons: NeuronSet, *, limit: float) -> float:
        """Return the score of a neuron set, or only a similarity that shows that it is above a limit.

        Seeds that were the most similar the last time are evaluated first: one, then two more, then all others. As soon
        as one is above the limit, so is the score, and the rest is not evaluated.

        Args:
            neurons: The set.
            limit: Any value above it will do.
        """
        limit += _GROUP_MARGIN if self._grouped else 0.0
        for number in (*_PORTIONS, len(self._seeds)):
            known = self._values.get(neurons, {})
            if len(known) == len(self._seeds) or max(known.values(), default=limit) > limit:
                break
            self._evaluate(neurons, [place for place in self._order if place not in known][:number])
        ranked = self.ranking(neurons)
        leading = ranked if len(ranked) == len(self._seeds) else ranked[:1]
        self._order = [*leading, *(place for place in self._order if place not in leading)]
        return self._values[neurons][ranked[0]]

    def of_seeds(self, neurons: NeuronSet, places: Sequence[int], *, limit: float = 1.0) -> float:
        """Return the largest similarity of some of the kept seeds, or only one that is above a limit.

        Args:
            neurons: The set.
            places: Positions among the kept seeds; they are evaluated one after the other.
            limit: Any value above it will do: the seeds after it are not evaluated.

        Returns:
            The similarity. With a multi-scale similarity, which depends a little on all seeds of a call (see
            `nemolib.similarity`), seeds that are not evaluated stand in with what they gave for another set.
        """
        values = self._values.get(neurons, {})
        known = [values[place] for place in places if place in values]
        for place in places:
            if known and max(known) > limit:
                break
            self._evaluate(neurons, [place])
            known.append(self._values[neurons][place])
        return max(known)

    def ranking(self, neurons: NeuronSet) -> list[int]:
        """Return the positions of the kept seeds for which a set was evaluated, the most similar first."""
        values = self._values.get(neurons, {})
        return sorted(values, key=lambda place: (-values[place], place))

    def _evaluate(self, neurons: NeuronSet, places: Sequence[int]) -> None:
        """Evaluate a set for seeds for which it was not; once all seeds were, their maps are let go."""
        values = self._values.setdefault(neurons, {})
        missing = [place for place in places if place not in values]
        if not missing:
            return
        if not neurons:
            values.update(enumerate(self._compare(self._unblocked, self._unblocked)))
            return
        maps, seeds = self._maps.setdefault(neurons, {}), [self._seeds[place] for place in missing]
        self._evaluations.add(self._step.cost * len(seeds))
        maps.update(zip(missing, self._step(self._embedding, neurons=neurons, seeds=seeds), strict=True))
        if len(maps) < len(self._seeds):
            values.update(zip(missing, self._partial(maps, missing), strict=True))
            return
        self._others = torch.stack([maps[place] for place in range(len(self._seeds))])
        values.update(enumerate(self._compare(self._unblocked, self._others)))
        del self._maps[neurons]

    def _partial(self, maps: dict[int, Tensor], places: list[int]) -> list[float]:
        """Return the similarity of some seeds."""
        if not self._grouped:
            return self._compare(self._unblocked[places], torch.stack([maps[place] for place in places]))
        group = torch.stack([maps.get(place, self._others[place]) for place in range(len(self._seeds))])
        values = self._compare(self._unblocked, group)
        return [values[place] for place in places]

    def _compare(self, unblocked: Tensor, blocked: Tensor) -> list[float]:
        return similarity(unblocked, blocked, settings=self._similarity, protocol=self._protocol).tolist()
