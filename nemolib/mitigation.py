"""The mitigations of Table 1, and layers switched off, behind one interface; each works with any StableDiffusionPipeline.

with AttentionScaling().applied(pipe, [prompt] * 4) as inputs:
    images = pipe(**inputs).images
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from nemolib.batching import accumulated_gradient, check_prompts
from nemolib.first_step import guidance_norm, noise_mix
from nemolib.layers import (
    Guided,
    Layer,
    OpenAttention,
    attention_layers,
    check_neurons_act,
    finite,
    guidance_of,
    naming,
    processors,
    sample_of_each,
    scale_neurons,
    scale_outputs,
    submodule,
    widths,
)
from nemolib.neurons import NeuronSet
from nemolib.pipeline import embed
from nemolib.seeding import stream
from nemolib.settings import Count, Mask, RenSettings, SomepalliSettings, WenSettings, Whole, settings_of, validated

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


class Mitigation:
    """Something that keeps a model from replicating what it memorized, while images are made.

    A mitigation is a frozen dataclass that checks its values, and says in `_inputs` or `_changed` what it does. What it does to an image depends on the prompt, the model and its own settings,
    never on the batch.

    Attributes:
        name: What it is called in tables.
    """

    name: str

    def of(self, prompt: str) -> Mitigation | None:
        """Return the same mitigation for this prompt alone, None if it does nothing to it.

        Equal ones make the same images of a prompt: what has no part in them is left out or neutral.
        """
        return self

    def check(self, pipe: StableDiffusionPipeline) -> None:
        """Raise a ValueError for a pipeline that the mitigation cannot handle."""
        parts = [name for name in ("unet", "text_encoder", "tokenizer") if getattr(pipe, name, None) is None]
        if parts:
            raise ValueError(f"{type(pipe).__name__} has no {parts[0]}; {self.name} needs a StableDiffusionPipeline")
        if getattr(pipe, "text_encoder_2", None) is not None:
            raise ValueError(f"{type(pipe).__name__} has more than one text encoder, which {self.name} cannot handle")

    @contextmanager
    def applied(self, pipe: StableDiffusionPipeline, prompts: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Prepare a pipeline for one batch; it is restored whatever happens inside the context.

        Args:
            pipe: A StableDiffusionPipeline.
            prompts: The prompts of the call, with repetitions; all images of a prompt are treated alike.

        Yields:
            Arguments for a call of the pipeline: ``prompt``, or ``prompt_embeds`` [image, token, feature].

        Raises:
            ValueError: The pipeline cannot be handled, there are no prompts, or one is empty.
        """
        prompts = check_prompts(prompts)
        self.check(pipe)
        with self._changed(pipe, prompts):
            yield self._inputs(pipe, prompts)

    def _inputs(self, pipe: StableDiffusionPipeline, prompts: list[str]) -> dict[str, Any]:
        """Return the arguments for the call, for prompts and a pipeline that were checked."""
        return {"prompt": prompts}

    def _changed(self, pipe: StableDiffusionPipeline, prompts: list[str]) -> AbstractContextManager[None]:
        """Return the context in which the UNet is changed, for prompts and a pipeline that were checked."""
        return nullcontext()


# Neurons and layers


@validated
class DeactivatedNeurons(Mitigation):
    """Neurons whose values are scaled, each prompt's own or one set for all.

    Source: Sec. 3.3, Table 1.
    Deviates: a batch may hold several prompts; the authors' code gives all of them the neurons of the first.

    Attributes:
        neurons: One set for all prompts, or prompt -> set; a mapping is copied.
        factor: What values are multiplied by; 0 deactivates.

    Raises:
        ValueError: What is given is something else.
    """

    neurons: NeuronSet | dict[str, NeuronSet]
    factor: float = 0.0

    @property
    def name(self) -> str:
        """What the mitigation is called in tables."""
        return "deactivated neurons" if self.factor == 0 else f"neurons scaled by {self.factor:g}"

    def neurons_of(self, prompt: str) -> NeuronSet:
        """Return the neurons of a prompt; raise a ValueError if a mapping does not have it."""
        if isinstance(self.neurons, NeuronSet):
            return self.neurons
        if prompt not in self.neurons:
            raise ValueError(f"no neurons are given for the prompt {prompt!r}; give an empty NeuronSet if it has none")
        return self.neurons[prompt]

    def of(self, prompt: str) -> DeactivatedNeurons | None:
        """Return the mitigation with the prompt's neurons alone, None if it has none."""
        chosen = self.neurons_of(prompt)
        return DeactivatedNeurons(chosen, self.factor) if chosen else None

    def check(self, pipe: StableDiffusionPipeline) -> None:
        """Raise a ValueError for a pipeline without these neurons, or in which they do not act."""
        super().check(pipe)
        for chosen in [self.neurons] if isinstance(self.neurons, NeuronSet) else self.neurons.values():
            chosen.check(widths(pipe.unet))
        check_neurons_act(pipe.unet)

    def _changed(self, pipe: StableDiffusionPipeline, prompts: list[str]) -> AbstractContextManager[None]:
        sets = [self.neurons_of(prompt) for prompt in prompts]
        return scale_neurons(pipe.unet, sets, factor=self.factor, guided=guidance_of(pipe))


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
            raise ValueError(f"layer {layer}: only {len(others)} other neurons remain, {len(chosen)} are needed")
        numbers = stream(seed, "random neurons", repeat, layer, neurons.to_json())
        drawn.append(tuple(numbers.choice(others, size=len(chosen), replace=False).tolist()) if chosen else ())
    return NeuronSet(tuple(drawn))


@validated
class SwitchedOffLayers(Mitigation):
    """Layers of which all output channels, or a random share of them, are zero, with and without guidance.

    With values of zero nothing of the text passes a cross-attention; with keys of zero every token gets the same
    attention.

    Source: App. C.8, Fig. 16 to 19 (key and value layers); App. C.9, Fig. 20 (half of the channels of convolutions).

    Attributes:
        layers: Addresses of linear layers or convolutions in the UNet; kept in order, each once.
        share: Share of the output channels of each that are zero, in [0, 1].
        seed: Seed of their draw; each layer has random numbers of its own, and a larger share holds a smaller one.

    Raises:
        ValueError: The share is outside [0, 1], or a single address is given in place of a tuple.
    """

    layers: Annotated[tuple[str, ...], AfterValidator(lambda names: tuple(sorted(set(names))))]
    share: Annotated[float, Field(ge=0, le=1)] = 1.0
    seed: Whole = 0

    @property
    def name(self) -> str:
        """What the mitigation is called in tables."""
        part = "" if self.share == 1 else f"{self.share:.0%} of "
        return f"{part}{len(self.layers)} layer{'' if len(self.layers) == 1 else 's'} switched off"

    def channels(self, layer: str, width: int) -> list[int]:
        """Return the channels of a layer of that many that are zero, in order."""
        order = stream(self.seed, "channels", layer).permutation(width)
        return sorted(order[: round(self.share * width)].tolist())

    def of(self, prompt: str) -> SwitchedOffLayers | None:
        """Return the mitigation, None if nothing is switched off; the seed counts only where channels are drawn."""
        if not self.layers or not self.share:
            return None
        return replace(self, seed=0) if self.share == 1 else self

    def check(self, pipe: StableDiffusionPipeline) -> None:
        """Raise a ValueError for a pipeline without these layers."""
        super().check(pipe)
        self._scales(pipe.unet)

    def _scales(self, unet: nn.Module) -> dict[str, Tensor]:
        """Return what the outputs of each layer are multiplied by: [1, 1, channel], of a convolution [1, channel, 1, 1]."""
        scales = {}
        for name in self.layers:
            module = submodule(unet, name)
            convolution = hasattr(module, "out_channels")
            width = getattr(module, "out_channels" if convolution else "out_features", None)
            if width is None:
                raise ValueError(f"{name!r} is no linear layer or convolution of {type(unet).__name__}")
            scale = torch.ones(width, dtype=torch.float32, device="cpu")
            scale[self.channels(name, width)] = 0
            scales[name] = scale.view(1, -1, 1, 1) if convolution else scale.view(1, 1, -1)
        return scales

    def _changed(self, pipe: StableDiffusionPipeline, prompts: list[str]) -> AbstractContextManager[None]:
        return scale_outputs(pipe.unet, self._scales(pipe.unet))


def switched_off(layer: Layer) -> SwitchedOffLayers:
    """Return the paper's intervention on a layer: values or keys of zero, or half of the channels of a convolution."""
    return SwitchedOffLayers((layer.name,), share=0.5 if layer.part == "convolution" else 1.0)


# Prompt embedding adjustment


class Adjustment(NamedTuple):
    """The adjusted embedding of a prompt.

    Attributes:
        embedding: Embedding [token, feature].
        norms: Mean norm before each step; the last is the first that is not above the target, if the target was
            reached.
    """

    embedding: Tensor
    norms: tuple[float, ...]


@validated
class EmbeddingAdjustment(Mitigation):
    """The prompt embedding is adjusted before the image is made, by gradient descent on the first denoising step.

    What is minimized is the norm of eps(x_T, prompt) - eps(x_T, empty prompt), averaged over a few initial latents: the
    score that tells memorized prompts from others. The embedding of the begin token stays, and an embedding whose norm
    is not above the target stays altogether.

    Source: Wen et al. (ICLR 2024); their code, local_sd_pipeline.py, function aug_prompt.
    Deviates: latents of a seed of its own, not those of the images that follow, so that the embedding depends on the
        prompt alone; the norm is averaged over latents, where the code takes one norm over all of them (larger by the
        square root of their number); AdamW's weight decay, as in the code, but not for the begin token, which the code
        lets shrink by 0.05 % per step.

    Attributes:
        settings: Target and course of the descent.

    Raises:
        ValueError: The settings have no target.
    """

    name = "prompt embedding adjustment"
    settings: WenSettings = WenSettings()

    def __post_init__(self) -> None:
        """Reject settings without a target."""
        if self.settings.target is None:
            raise ValueError("WenSettings.target is None; give one, such as that of nemolib.wen_target")

    def of(self, prompt: str) -> EmbeddingAdjustment:
        """Return the adjustment without the multiplier of the rule, which has no part in an embedding."""
        return EmbeddingAdjustment(replace(self.settings, multiplier=0.0))

    def check(self, pipe: StableDiffusionPipeline) -> None:
        """Raise a ValueError for a model that predicts something unknown, or that has no gradients."""
        super().check(pipe)
        noise_mix(pipe.scheduler, 0)
        if any(parameter.is_inference() for parameter in pipe.unet.parameters()):
            raise ValueError("the UNet was loaded in torch.inference_mode and has no gradients; load it outside")

    @torch.inference_mode(False)
    @torch.enable_grad()
    def adjust(self, pipe: StableDiffusionPipeline, prompt: str) -> Adjustment:
        """Return the adjusted embedding of a prompt; works inside ``torch.no_grad`` and ``torch.inference_mode`` too.

        The model is not changed, and its parameters get no gradients.

        Raises:
            ValueError: The pipeline cannot be handled.
            NotFiniteError: A prediction, or the adjusted embedding, is not finite.
        """
        self.check(pipe)
        embedding = embed(pipe, [prompt])[0]
        begin, free = embedding[:1].float(), embedding[1:].float().clone().requires_grad_()
        optimizer = torch.optim.AdamW([free], lr=self.settings.learning_rate)
        norms: list[float] = []
        with naming(prompt):
            norm_of, seeds = guidance_norm(pipe, self.settings), range(self.settings.latents)
            common = {"owner": pipe.unet, "use": self.name, "weight": 1 / len(seeds)}
            for _ in range(self.settings.iterations):
                found, free.grad = accumulated_gradient(
                    lambda part: norm_of(torch.cat([begin, free])[None], part), seeds, free, **common
                )
                norms.append(torch.cat(found).mean().item())
                if norms[-1] <= self.settings.target:
                    break
                optimizer.step()
            adjusted = finite(torch.cat([begin, free]).detach().to(embedding.dtype), "adjusted embedding")
        return Adjustment(adjusted, tuple(norms))

    def _inputs(self, pipe: StableDiffusionPipeline, prompts: list[str]) -> dict[str, Any]:
        adjusted = {prompt: self.adjust(pipe, prompt).embedding for prompt in dict.fromkeys(prompts)}
        return {"prompt_embeds": torch.stack([adjusted[prompt] for prompt in prompts])}


def target_norms(pipe: StableDiffusionPipeline, *, settings: WenSettings) -> Callable[[Sequence[str]], list[float]]:
    """Return what gives the mean norm that the adjustment lowers, for each prompt of a batch: a task, for `target_of`."""
    norm_of = torch.no_grad()(guidance_norm(pipe, settings))
    return lambda batch: [norm_of(embed(pipe, [prompt])).cpu().double().mean().item() for prompt in batch]


def target_of(norms: Sequence[float], settings: WenSettings) -> float:
    """Return the target of the adjustment by rule, from the norms of unmemorized prompts; see `wen_target`."""
    if len(norms) < 2:
        raise ValueError("one prompt was given; a standard deviation needs at least 2")
    values = np.asarray(norms)
    return max(0.0, round(float(values.mean() + settings.multiplier * values.std(ddof=1)), 3))


def wen_target(pipe: StableDiffusionPipeline, prompts: Sequence[str], *, settings: WenSettings | None = None) -> float:
    """Return the target of the adjustment by rule: mean + multiplier standard deviations over unmemorized prompts.

    This is the paper's rule for the memorization threshold, applied to Wen's score: a prompt is adjusted if the text
    forces the image more than for unmemorized prompts, and until it does not. The authors chose their targets by the
    trade-off between similarity and alignment that they saw.

    Args:
        pipe: A StableDiffusionPipeline.
        prompts: Unmemorized prompts, at least 2; none of those that are reported on.
        settings: Latents, denoising step and multiplier; None means those of the pipeline's profile, else the paper's.

    Returns:
        The target, at least 0, in the unit of the noise prediction's norm, to three decimals: rounding errors of
        another machine hardly ever give another target.

    Raises:
        ValueError: There are fewer than two prompts, or one is empty.
    """
    settings = settings or settings_of(pipe).mitigation.wen
    return target_of(target_norms(pipe, settings=settings)(check_prompts(prompts)), settings)


# Attention scaling

_PLAIN = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")
"""Processors of diffusers that compute the attention of Stable Diffusion and nothing else."""

_EXTRAS = ("group_norm", "spatial_norm", "norm_cross", "norm_q", "norm_k", "added_kv_proj_dim")
"""Parts of an attention layer that Stable Diffusion does not have."""


@validated
class AttentionScaling(Mitigation):
    """Attention logits of the begin token are scaled, and tokens after the prompt are masked, in cross-attention.

    With classifier-free guidance this is done for the text-conditional half of the batch alone.

    Source: Ren et al. (ECCV 2024); their code, refactored_classes/refactored_attention_processor.py, with
        ``--c1 1.25 --cross_attn_mask --miti_mem``. There the end token keeps its attention; ``--mask_length_minis1``
        masks it too (here: mask ``summary``).
    Deviates: their code masks the unconditional half as well, at the length of the prompt; here that half stays as it
        is. It scales every other sample of a batch, which is right for a single image only.

    Attributes:
        settings: Scale and mask.
    """

    name = "attention scaling"
    settings: RenSettings = RenSettings()

    def check(self, pipe: StableDiffusionPipeline) -> None:
        """Raise a ValueError for a UNet whose cross-attention is not that of Stable Diffusion."""
        super().check(pipe)
        for name in attention_layers(pipe.unet):
            layer = pipe.unet.get_submodule(name)
            kind = type(layer.processor)
            if kind.__name__ not in _PLAIN or not kind.__module__.startswith("diffusers."):
                remedy = f"known: {', '.join(_PLAIN)}; see pipe.unet.set_default_attn_processor()"
                raise ValueError(f"{name} has the attention processor {kind.__name__}, which is not known; {remedy}")
            extra = next((part for part in _EXTRAS if getattr(layer, part, None) is not None), None)
            if extra or layer.residual_connection or layer.rescale_output_factor != 1:
                raise ValueError(f"{name} is no attention layer of Stable Diffusion ({extra or 'it has a residual'})")

    def _changed(self, pipe: StableDiffusionPipeline, prompts: list[str]) -> AbstractContextManager[None]:
        allowed = attended_tokens(pipe.tokenizer, prompts, mask=self.settings.mask)
        change = partial(scaled, c1=self.settings.c1, allowed=allowed, guided=guidance_of(pipe))
        return processors(pipe.unet, dict.fromkeys(attention_layers(pipe.unet), OpenAttention(change=change)))


def scaled(logits: Tensor, *, c1: float, allowed: Tensor, guided: Guided) -> Tensor:
    """Return attention logits with that of the begin token scaled and tokens masked, but in the unconditional half.

    Args:
        logits: Logits [sample, head, position, token].
        c1: What the logit of the first token is multiplied by.
        allowed: For each prompt the tokens that get attention, [prompt, token], bool.
        guided: Tells whether the first half of a batch is unconditional.

    Raises:
        ValueError: The batch does not belong to the prompts.
    """
    prompts, tokens = allowed.shape
    if logits.shape[-1] != tokens:
        raise ValueError(f"attention scaling was set up for {tokens} tokens, but the text has {logits.shape[-1]}")
    rows = sample_of_each(len(logits), prompts, guided)
    conditional = slice(len(rows) // 2 if guided() else 0, None)
    scale = torch.ones_like(logits[:, :1, :1])
    blocked = torch.zeros_like(scale, dtype=torch.bool)
    scale[conditional, ..., 0] = c1
    blocked[conditional, 0, 0] = ~allowed.to(logits.device)[rows[conditional].to(logits.device)]
    return (logits * scale).masked_fill(blocked, -torch.inf)


def attended_tokens(tokenizer: Any, prompts: list[str], *, mask: Mask) -> Tensor:
    """Return which tokens of prompts get attention, [prompt, token], bool, as long as the tokenizer pads prompts."""
    length = tokenizer.model_max_length
    if mask == "none":
        return torch.ones(len(prompts), length, dtype=torch.bool, device="cpu")
    used = [len(ids) for ids in tokenizer(prompts, truncation=True, max_length=length).input_ids]
    ends = torch.tensor(used, device="cpu") - int(mask == "summary")
    return torch.arange(length, device="cpu") < ends[:, None]


# Random tokens


@validated
class RandomTokens(Mitigation):
    """Random tokens as words at random places of the prompt.

    Tokens and places belong to the prompt. More tokens begin with the same ones as fewer. What exceeds the length of
    the text encoder is cut off at the end of the prompt, as always.

    Source: Somepalli et al. (NeurIPS 2023), style rand_word_add; function prompt_augmentation in the code of Wen et al.,
        optim_utils.py, who took it from theirs.
    Deviates: drawn per prompt from a seed, not from one running generator; special tokens are never drawn (there: ids
        of 49,400 and above); a token that is no text by itself (part of a character, white space) is drawn anew, since
        it would not add a word.

    Attributes:
        number: How many tokens.
        seed: Seed.
    """

    number: Count = 4
    seed: Whole = SomepalliSettings().seed

    @property
    def name(self) -> str:
        """What the mitigation is called in tables."""
        return f"{self.number} random token{'s' if self.number > 1 else ''}"

    def extend(self, tokenizer: Any, prompt: str) -> str:
        """Return the prompt with the tokens; raise a ValueError if no token of the vocabulary is a word."""
        numbers = stream(self.seed, "random tokens", prompt)
        ids = np.array(sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)))
        words = prompt.split(" ")
        for _ in range(self.number):
            word = _word(tokenizer, numbers.permutation(ids))
            words.insert(int(numbers.integers(len(words) + 1)), word)
        return " ".join(words)

    def _inputs(self, pipe: StableDiffusionPipeline, prompts: list[str]) -> dict[str, Any]:
        # As embeddings: the pipeline would warn of each prompt that the tokens make too long.
        return {"prompt_embeds": embed(pipe, [self.extend(pipe.tokenizer, prompt) for prompt in prompts])}


def _word(tokenizer: Any, ids: np.ndarray) -> str:
    """Return the first token that is a word."""
    for token in ids.tolist():
        word = tokenizer.decode([token], clean_up_tokenization_spaces=False).strip()
        if word and word.isprintable() and "\ufffd" not in word and len(word.split()) == 1:
            return word
    raise ValueError(f"none of the {len(ids)} tokens of {type(tokenizer).__name__} is a word")
