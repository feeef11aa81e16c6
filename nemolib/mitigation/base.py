"""What all mitigations have in common: a pipeline is prepared for a batch of prompts and restored afterwards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from nemolib.batching import check_prompts

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


class Mitigation(ABC):
    """Something that keeps a model from replicating what it memorized, while images are made.

    A mitigation is a frozen dataclass. What it does to an image depends on the prompt, the model and its own settings,
    never on the batch:

        with mitigation.applied(pipe, [prompt] * 4) as inputs:
            images = pipe(**inputs).images

    Attributes:
        name: What it is called in tables.
        source: Where it comes from.
    """

    source: ClassVar[str]

    @property
    @abstractmethod
    def name(self) -> str:
        """What the mitigation is called in tables."""

    @abstractmethod
    def identity(self, prompt: str) -> list[Any]:
        """Return plain values that say, for a given model, what happens to images of a prompt.

        Args:
            prompt: The prompt.

        Returns:
            Values for `nemolib.provenance.content_hash`; an empty list if nothing happens.
        """

    def check(self, pipe: StableDiffusionPipeline) -> None:
        """Raise a ValueError for a pipeline that the mitigation cannot handle."""
        parts = [name for name in ("unet", "text_encoder", "tokenizer") if getattr(pipe, name, None) is None]
        if parts:
            raise ValueError(f"{type(pipe).__name__} has no {parts[0]}; {self.name} needs a StableDiffusionPipeline")
        if getattr(pipe, "text_encoder_2", None) is not None:
            raise ValueError(
                f"{type(pipe).__name__} has more than one text encoder, which {self.name} cannot handle; "
                "give a StableDiffusionPipeline"
            )

    @contextmanager
    def applied(self, pipe: StableDiffusionPipeline, prompts: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Prepare a pipeline for one batch; it is restored whatever happens inside the context.

        Args:
            pipe: A StableDiffusionPipeline.
            prompts: One prompt for each image of the batch, with repetitions; ``num_images_per_prompt`` stays 1.

        Yields:
            Arguments for a call of the pipeline: ``prompt``, or ``prompt_embeds`` [image, token, feature].

        Raises:
            ValueError: The pipeline cannot be handled, there are no prompts, or one is empty.
        """
        prompts = check_prompts(prompts)
        self.check(pipe)
        with self._prepared(pipe, prompts) as inputs:
            yield inputs

    @abstractmethod
    def _prepared(self, pipe: StableDiffusionPipeline, prompts: list[str]) -> AbstractContextManager[dict[str, Any]]:
        """Return the context of `applied`, for prompts and a pipeline that were checked."""
