"""The score that the search asks of neuron sets, and how it costs little.

The score of a neuron set is the largest similarity over the kept seeds, so that one seed above the threshold says that
the set fails. Which seed is the most similar hardly changes from set to set.

A refinement tests sets that differ in one value layer at a time, from the last layer to the first. All blocks of the UNet
before that layer give what they gave in the pass before, bit by bit, and are not computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from nemolib.first_step import Evaluations, FirstStep
from nemolib.layers import value_layers
from nemolib.neurons import NeuronSet
from nemolib.settings import Protocol, SimilaritySettings
from nemolib.similarity import similarity

_PORTIONS = (1, 2)
"""How many seeds are evaluated at first, and next, where one above a limit answers for all; then all others are."""

_CHUNKS = 3
"""Groups of seeds for which the first blocks of the UNet are kept: the leading seeds, the newest of them, the others."""

_GROUP_MARGIN = 0.01
"""How far a seed must be above a threshold to answer for all, where its similarity depends a little on the others."""


class BlockedScore:
    """How similar the noise differences of a prompt stay when a neuron set is deactivated.

    Each set is evaluated once for each seed; the empty set without the UNet. What the blocks before the first changed
    value layer give is kept from one set to the next.

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
        self._kept_blocks = lru_cache(maxsize=_CHUNKS)(lambda places: BlockReuse(step.unet))
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
        missing = tuple(place for place in places if place not in values)
        if not missing:
            return
        if not neurons:
            values.update(enumerate(self._compare(self._unblocked, self._unblocked)))
            return
        maps = self._maps.setdefault(neurons, {})
        maps.update(zip(missing, self._blocked(neurons, missing), strict=True))
        if len(maps) < len(self._seeds):
            values.update(zip(missing, self._partial(maps, missing), strict=True))
            return
        self._others = torch.stack([maps[place] for place in range(len(self._seeds))])
        values.update(enumerate(self._compare(self._unblocked, self._others)))
        del self._maps[neurons]

    def _blocked(self, neurons: NeuronSet, places: tuple[int, ...]) -> Tensor:
        """Return the noise differences of some seeds with a set deactivated, [place, channel, height, width]."""
        self._evaluations.add(self._step.cost * len(places))
        with self._kept_blocks(places).passing(neurons):
            return self._step(self._embedding, neurons=neurons, seeds=[self._seeds[place] for place in places])

    def _partial(self, maps: dict[int, Tensor], places: Sequence[int]) -> list[float]:
        """Return the similarity of some seeds."""
        if not self._grouped:
            chosen = list(places)
            return self._compare(self._unblocked[chosen], torch.stack([maps[place] for place in chosen]))
        group = torch.stack([maps.get(place, self._others[place]) for place in range(len(self._seeds))])
        values = self._compare(self._unblocked, group)
        return [values[place] for place in places]

    def _compare(self, unblocked: Tensor, blocked: Tensor) -> list[float]:
        return similarity(unblocked, blocked, settings=self._similarity, protocol=self._protocol).tolist()


class BlockReuse:
    """What the down blocks and the middle block of a UNet gave in the last pass, used again where it must be the same.

    The owner promises that all passes have the same latents, timestep and embeddings, and that nothing but the
    deactivated neurons differs.

    Args:
        unet: A conditional UNet of diffusers.
    """

    def __init__(self, unet: nn.Module) -> None:
        self._blocks = _blocks(unet)
        self._kept: list[tuple[Hashable, Any] | None] = [None] * len(self._blocks)

    @contextmanager
    def passing(self, neurons: NeuronSet) -> Iterator[None]:
        """Reuse blocks in the UNet pass inside the context, in which these neurons are deactivated.

        A pass that is split, because memory ran out, reuses nothing. The model is left as it was, whatever happens
        inside.

        Args:
            neurons: The neurons that are deactivated in this pass.
        """
        with ExitStack() as replaced:
            for place, (block, layers) in enumerate(self._blocks):
                replaced.enter_context(_forward(block, self._reusing(place, block.forward, neurons.layers[:layers])))
            yield

    def _reusing(self, place: int, forward: Callable[..., Any], key: Hashable) -> Callable[..., Any]:
        """Return a forward function that computes only if what it depends on has changed."""
        calls = 0

        def reuse(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                self._kept[place] = None
                return forward(*args, **kwargs)
            sized = (key, _samples(args, kwargs))
            kept = self._kept[place]
            if kept is None or kept[0] != sized:
                kept = self._kept[place] = (sized, forward(*args, **kwargs))
            return kept[1]

        return reuse


def _samples(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the number of samples that a block is called with."""
    return len(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])


def _blocks(unet: nn.Module) -> list[tuple[nn.Module, int]]:
    """Return the down blocks and the middle block, each with the number of value layers up to its end."""
    names = [layer.name for layer in value_layers(unet)]
    blocks = [(f"down_blocks.{place}.", block) for place, block in enumerate(unet.down_blocks)]
    if getattr(unet, "mid_block", None) is not None:
        blocks.append(("mid_block.", unet.mid_block))
    counted, found = 0, []
    for prefix, block in blocks:
        counted += sum(name.startswith(prefix) for name in names)
        found.append((block, counted))
    return found


@contextmanager
def _forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward function of one module inside the context."""
    before = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
