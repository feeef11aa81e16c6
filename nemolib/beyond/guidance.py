"""Mitigations that change the guidance while images are made, or the noise that they start from.

A pipeline of diffusers computes  eps_0 + g (eps_c - eps_0)  from one UNet pass over both halves of a batch. One forward
hook on the UNet rewrites the half with the prompt,

    eps_c <- eps_0 + (wanted - eps_0) / g,

so that the pipeline gets any prediction that is wanted: without guidance, with negative or per-sample guidance, or from
a third pass. All are a `nemolib.mitigation.Mitigation`, as those of Table 1, and need a guidance scale above 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemolib.batching import shrinking
from nemolib.beyond.denoising import PUBLISHED_SIZE, Denoising, noise_of, norms, output_of
from nemolib.layers import OpenAttention, attention_layers, guidance_of, processors, sample_of_each
from nemolib.mitigation import AttentionScaling, Mitigation
from nemolib.pipeline import embed
from nemolib.settings import Count, Multiplier, NotNegative, Positive, Whole, validated

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@dataclass(frozen=True, slots=True, eq=False)
class Moment:
    """What a rule is given in each step.

    Attributes:
        index: Position of the step, 0 being the first.
        steps: Number of steps.
        timestep: Its timestep.
        empty: Noise for the empty prompt, [image, channel, height, width], float32.
        text: Noise for the prompt.
        guidance: The pipeline's guidance scale.
        again: Predicts the noise for the prompt once more, for a model that a context has changed.
    """

    index: int
    steps: int
    timestep: int
    empty: Tensor
    text: Tensor
    guidance: float
    again: Callable[[], Tensor]

    def guided(self, scale: float | Tensor) -> Tensor:
        """Return the prediction with a guidance scale, or one per image."""
        scale = scale.view(-1, 1, 1, 1) if isinstance(scale, Tensor) else scale
        return self.empty + scale * (self.text - self.empty)


Rule = Callable[[Moment], Tensor]
"""Returns the guided noise that is wanted, [image, channel, height, width]."""


@contextmanager
def guided(pipe: StableDiffusionPipeline, rule: Rule) -> Iterator[None]:
    """Let a rule say the guided noise in each step of the pipeline inside the context.

    Raises:
        ValueError: In a pass: the guidance scale of the call is not above 1, so that there is nothing to rewrite.
    """

    def rewrite(unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not pipe.do_classifier_free_guidance:
            raise ValueError(f"guidance scale is {pipe.guidance_scale:g}; a guidance rule needs one above 1")
        whole, timestep = args[0], args[1]
        latents, embeddings = whole.chunk(2)[1], kwargs["encoder_hidden_states"].chunk(2)[1]
        empty, text = (noise_of(pipe.scheduler, half.float(), latents, timestep) for half in output[0].chunk(2))

        def again() -> Tensor:
            # `forward` has no hooks, so that this pass is not rewritten in its turn.
            made = unet.forward(latents, timestep, embeddings, return_dict=False)[0]
            return noise_of(pipe.scheduler, made.float(), latents, timestep)

        schedule, scale = pipe.scheduler.timesteps.tolist(), pipe.guidance_scale
        moment = Moment(schedule.index(int(timestep)), len(schedule), int(timestep), empty, text, scale, again)
        rewritten = empty + (rule(moment) - empty) / scale
        half = output_of(pipe.scheduler, rewritten, latents, timestep).to(output[0].dtype)
        return (torch.cat([output[0].chunk(2)[0], half]), *output[1:])

    handle = pipe.unet.register_forward_hook(rewrite, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


# When to switch guidance on


@validated
class StaticTransition(Mitigation):
    """Another guidance scale until a timestep, the pipeline's from there on; below 0 it is opposite guidance.

    Source: Jain et al. (CVPR 2025, arXiv 2411.16738), STP: scale 0 before timestep 500; OG: scale -2 before 650;
        SonyResearch/mitigating_memorization, MIT.
    Deviates: their OG script flips the sign at every step; here the scale stays the same until the timestep.

    Attributes:
        until: The last timestep with the other scale is above this one.
        before: That scale; 0 leaves the prompt out.
    """

    until: Whole = 500
    before: Multiplier = 0.0

    @property
    def name(self) -> str:
        """What the mitigation is called in tables."""
        return f"opposite guidance {self.before:g}" if self.before < 0 else "static transition"

    def _changed(self, pipe: StableDiffusionPipeline, prompts: list[str]) -> AbstractContextManager[None]:
        return guided(pipe, lambda now: now.guided(self.before if now.timestep > self.until else now.guidance))


@validated
class DynamicTransition(Mitigation):
    """Another guidance scale until the first local minimum of what the prompt changes, the pipeline's from there on.

    The minimum, of the norm of eps_c - eps_0 along the trajectory, is seen one step late. Where there is none, guidance
    is never switched on.

    Source: Jain et al. (CVPR 2025), DTP, scale 0; SonyResearch/mitigating_memorization, MIT.
    Deviates: a norm for each image, where their code takes one over the batch. Their script takes scale 1 before the
        point, which is the prediction with the prompt alone; the paper's is 0.

    Attributes:
        before: The other scale.
    """

    name = "dynamic transition"
    before: Multiplier = 0.0

    def _changed(self, pipe: StableDiffusionPipeline, prompts: list[str]) -> AbstractContextManager[None]:
        history: list[Tensor] = []

        def rule(now: Moment) -> Tensor:
            if now.index == 0:
                history.clear()
            history.append(norms(now.text - now.empty))
            along = torch.stack(history)
            passed = ((along[1:-1] < along[:-2]) & (along[2:] > along[1:-1])).any(dim=0)
            return now.guided(torch.where(passed, now.guidance, self.before).to(now.text))

        return guided(pipe, rule)


# Attenuated attention


def attenuated(logits: Tensor, *, alpha: float, threshold: float) -> Tensor:
    """Return attention logits with those of spiking tokens multiplied by alpha.

    A token spikes in a head of a layer if its largest logit over positions is more than a threshold of standard
    deviations above the mean of all tokens but the first, which never spikes. What is multiplied may be negative: then
    the token gets more attention, not less, as in the released code.

    Source: Zhao et al. (ICML 2026), cross-attention attenuation; kairanzhao/GUARD, MIT.

    Args:
        logits: Logits [sample, head, position, token].
        alpha: What they are multiplied by.
        threshold: In standard deviations.
    """
    largest = logits.amax(dim=2, keepdim=True)
    others = largest[..., 1:]
    spikes = (largest - others.mean(dim=-1, keepdim=True)) / (others.std(dim=-1, keepdim=True) + 1e-6) > threshold
    spikes[..., 0] = False
    return torch.where(spikes, alpha * logits, logits)


@validated
class Attenuation(Mitigation):
    """Attention to spiking tokens is attenuated in the half with the prompt, in the down blocks and the middle block.

    Source: Zhao et al. (ICML 2026, arXiv 2603.00133), CA alone: alpha 0.3, threshold 0.01; kairanzhao/GUARD, MIT.
    Deviates: none known.

    Attributes:
        alpha: What the logits of spiking tokens are multiplied by.
        threshold: Standard deviations above which a token spikes.
    """

    name = "attention attenuation"
    alpha: NotNegative = 0.3
    threshold: Multiplier = 0.01

    def check(self, pipe: StableDiffusionPipeline) -> None:
        """Raise a ValueError for a UNet whose cross-attention is not that of Stable Diffusion."""
        super().check(pipe)
        AttentionScaling().check(pipe)

    def _changed(self, pipe: StableDiffusionPipeline, prompts: list[str]) -> AbstractContextManager[None]:
        halved = guidance_of(pipe)

        def change(logits: Tensor) -> Tensor:
            # With guidance the half without the prompt comes first.
            kept, text = logits.split([len(logits) // 2, len(logits) // 2] if halved() else [0, len(logits)])
            return torch.cat([kept, attenuated(text, alpha=self.alpha, threshold=self.threshold)])

        return processors(pipe.unet, _open(pipe, change))


def _open(pipe: StableDiffusionPipeline, change: Callable[[Tensor], Tensor]) -> dict[str, OpenAttention]:
    return {name: OpenAttention(change=change) for name in attention_layers(pipe.unet, ("down", "mid"))}


@validated
class Guard(Attenuation):
    """Guidance towards the prediction with attenuated attention and away from that of the prompt as it is.

    eps_0 + g (eps_attenuated - eps_0) - r cos(pi i / 2 steps) (eps_c - eps_0): three predictions in each step.

    Source: Zhao et al. (ICML 2026, arXiv 2603.00133), CA in GUARD: alpha 0.3, threshold 0.1, r 2; kairanzhao/GUARD, MIT.
    Deviates: g is the guidance scale of the call, 7.5 there.

    Attributes:
        repulsion: The scale r.
    """

    name = "GUARD"
    threshold: Multiplier = 0.1
    repulsion: Multiplier = 2.0

    def _changed(self, pipe: StableDiffusionPipeline, prompts: list[str]) -> AbstractContextManager[None]:
        chosen = _open(pipe, lambda logits: attenuated(logits, alpha=self.alpha, threshold=self.threshold))

        def rule(now: Moment) -> Tensor:
            with processors(pipe.unet, chosen):
                attracting = now.again()
            away = self.repulsion * math.cos(math.pi / 2 * now.index / now.steps)
            return now.empty + now.guidance * (attracting - now.empty) - away * (now.text - now.empty)

        return guided(pipe, rule)


# The noise that images start from


@contextmanager
def _noise_changed(pipe: StableDiffusionPipeline, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a function change the initial latents that the pipeline draws or is given."""
    draw = pipe.prepare_latents
    pipe.prepare_latents = lambda *args, **kwargs: change(draw(*args, **kwargs))
    try:
        yield
    finally:
        del pipe.prepare_latents


@validated
class AdjustedNoise(Mitigation):
    """The initial latents are moved to where the prompt changes less in the neighbourhood; guidance is switched on late.

    Each round:  x_T <- x_T - gamma (D(x_T + radius D / ||D||) - D),  D = eps_c - eps_0 at x_T.

    Source: Han et al. (NeurIPS 2025, arXiv 2510.08625), batch-wise: 2 rounds, radius 50, gamma 0.7, no guidance before
        timesteps 900 to 840; hygnhan/init_noise_diffusion_memorization, no licence; written from the formula.
    Deviates: the radius is that of Stable Diffusion's latents, and scaled with the root of their size for others.

    Attributes:
        rounds: How often latents are moved.
        radius: How far away the neighbour is looked at.
        gamma: Step size.
        until: Guidance is switched on at the first timestep that is not above this one.
    """

    name = "adjusted noise"
    rounds: Count = 2
    radius: Positive = 50.0
    gamma: Positive = 0.7
    until: Whole = 860

    @contextmanager
    def _changed(self, pipe: StableDiffusionPipeline, prompts: list[str]) -> Iterator[None]:
        text = embed(pipe, prompts)

        @torch.no_grad()
        def adjust(latents: Tensor) -> Tensor:
            model, timestep = Denoising(pipe), int(pipe.scheduler.timesteps[0])
            each = text[sample_of_each(len(latents), len(prompts))]
            radius = self.radius * math.sqrt(latents[0].numel() / PUBLISHED_SIZE)
            moved = latents.float()
            for _ in range(self.rounds):
                here = model.difference(moved, timestep, each)
                away = radius * here / norms(here).view(-1, 1, 1, 1)
                moved = moved - self.gamma * (model.difference(moved + away, timestep, each) - here)
            return moved.to(latents.dtype)

        with _noise_changed(pipe, adjust), StaticTransition(until=self.until)._changed(pipe, prompts):
            yield


@validated
class SearchedNoise(Mitigation):
    """The initial latents are moved until the guidance norm at them is small; each image by itself.

    Source: Han et al. (NeurIPS 2025, arXiv 2510.08625), per sample: AdamW, learning rate 0.01, until the norm is 0.9, at
        most 1,000 iterations; hygnhan/init_noise_diffusion_memorization, no licence; written from the formula.
    Deviates: a norm for each image, where their code takes one over the batch.

    Attributes:
        target: Norm at which the search ends; that of another model should come from its unmemorized prompts.
        learning_rate: Step size of AdamW.
        iterations: Largest number of steps.
    """

    name = "searched noise"
    target: Positive = 0.9
    learning_rate: Positive = 0.01
    iterations: Whole = 1000

    def _changed(self, pipe: StableDiffusionPipeline, prompts: list[str]) -> AbstractContextManager[None]:
        text = embed(pipe, prompts)

        def search(latents: Tensor) -> Tensor:
            pairs = [*zip(latents, text[sample_of_each(len(latents), len(prompts))], strict=True)]
            parts = shrinking(partial(self._searched, pipe), pairs, size=len(pairs), owner=pipe.unet, use=self.name)
            return torch.cat([found for _, found in parts]).to(latents.dtype)

        return _noise_changed(pipe, search)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _searched(self, pipe: StableDiffusionPipeline, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        model, timestep = Denoising(pipe), int(pipe.scheduler.timesteps[0])
        # Copies, since what was made in inference mode has no gradients.
        latents, text = (torch.stack(part).clone() for part in zip(*pairs, strict=True))
        free = latents.float().requires_grad_()
        optimizer = torch.optim.AdamW([free], lr=self.learning_rate)
        for _ in range(self.iterations):
            norm = norms(model.difference(free, timestep, text, derivative=True))
            if norm.max() <= self.target:
                break
            # AdamW does not see the scale, and gradients of a norm are small for float16.
            (free.grad,), before = torch.autograd.grad(1024 * norm.sum(), free), free.detach().clone()
            optimizer.step()
            free.data = torch.where(norm.view(-1, 1, 1, 1) > self.target, free.data, before)
        return free.detach()
