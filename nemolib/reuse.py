"""Computing once what a neuron set does not change: the part of the UNet before its first changed value layer.

A refinement tests sets that differ in one value layer at a time, from the last layer to the first. All blocks before
that layer give what they gave in the pass before, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from nemolib.neurons import NeuronSet
from nemolib.value_layers import value_layers


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
