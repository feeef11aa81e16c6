"""Telling memorized from unmemorized prompts: scores of the first denoising step, and how well a score separates.

Scores of many kinds need the same two predictions of the UNet, with the prompt and with the empty prompt. `Detector`
computes each of them once: without deactivated neurons the empty prompt's does not depend on the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from nemolib.batching import fitting_size, shrinking
from nemolib.defaults import default_protocol, default_settings
from nemolib.evaluations import Evaluations
from nemolib.first_step import FirstStep, first_step, normalize
from nemolib.pipeline import embed
from nemolib.protocols import Protocol
from nemolib.settings import DetectionSettings, SimilaritySettings
from nemolib.similarity import pair_similarities

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


class Detector:
    """The first denoising step of a model, looked at with any guidance and protocol for the price of one.

    Args:
        pipe: A StableDiffusionPipeline.
        settings: Seed, samples, steps and guidance; None means those of the pipeline's profile, else the paper's.
        similarity: Window and exponents; None as above.
        protocol: `released` or `paper`, or a protocol of your own; None as above.
    """

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        *,
        settings: DetectionSettings | None = None,
        similarity: SimilaritySettings | None = None,
        protocol: str | Protocol | None = None,
    ) -> None:
        self.settings = settings or default_settings(pipe).detection
        self.similarity = similarity or default_settings(pipe).similarity
        self.protocol = default_protocol(pipe, protocol)
        self._pipe = pipe
        self._steps: dict[int, FirstStep] = {}
        self._empty: dict[int, Tensor] = {}

    def observe(self, prompt: str, *, evaluations: Evaluations | None = None) -> Observation:
        """Return what the first step does for a prompt; the UNet runs when something is asked of it.

        Args:
            prompt: The prompt.
            evaluations: Counts the UNet sample-evaluations.
        """
        return Observation(self, embed(self._pipe, [prompt]), evaluations)

    def step(self, index: int) -> FirstStep:
        """Return the first step at a timestep of the schedule, without guidance."""
        if index not in self._steps:
            plain = replace(self.settings, guidance=0.0)
            switched = replace(self.protocol, timestep_index=index)
            self._steps[index] = first_step(self._pipe, settings=plain, protocol=switched)
        return self._steps[index]

    def empty(self, index: int, evaluations: Evaluations | None = None) -> Tensor:
        """Return the noise differences of the empty prompt [seed, channel, height, width], computed once."""
        if index not in self._empty:
            self._empty[index] = self.step(index).raw(embed(self._pipe, [""]), evaluations=evaluations)
        return self._empty[index]


class Observation:
    """What the first denoising step does for one prompt; made by `Detector.observe`."""

    def __init__(self, detector: Detector, embedding: Tensor, evaluations: Evaluations | None = None) -> None:
        self._detector, self._embedding, self._evaluations = detector, embedding, evaluations
        self._text: dict[int, Tensor] = {}

    def text(self, index: int) -> Tensor:
        """Return the noise differences of the prompt without guidance, as they are.

        Args:
            index: Position of the timestep in the schedule.

        Returns:
            Noise differences [seed, channel, height, width], float32.
        """
        if index not in self._text:
            step = self._detector.step(index)
            self._text[index] = step.raw(self._embedding, evaluations=self._evaluations)
        return self._text[index]

    def raw(self, *, protocol: Protocol | None = None, guidance: float | None = None) -> Tensor:
        """Return the noise differences eps - x_T with classifier-free guidance, as they are.

        Source: Alg. 1. Equals `nemolib.first_step.FirstStep.raw` up to rounding.

        Args:
            protocol: Which timestep, and whether the halves of the guidance change places; None: the detector's.
            guidance: Guidance scale; 0 means the text-conditional prediction alone; None: the detector's.

        Returns:
            Noise differences [seed, channel, height, width], float32.
        """
        protocol = protocol or self._detector.protocol
        guidance = self._detector.settings.guidance if guidance is None else guidance
        text = self.text(protocol.timestep_index)
        if guidance == 0:
            return text
        base = self._detector.empty(protocol.timestep_index, self._evaluations)
        if protocol.swap_guidance:
            base, text = text, base
        return base + guidance * (text - base)

    def pairs(self, *, protocol: Protocol | None = None, guidance: float | None = None) -> np.ndarray:
        """Return the similarity of every pair of seeds, [pair], float64.

        Source: Sec. 3.1; authors' code, 2_compute_ssim.py.

        Args:
            protocol: Timestep, order of the guidance and measure of similarity; None: the detector's.
            guidance: See `raw`.
        """
        protocol = protocol or self._detector.protocol
        maps = normalize(self.raw(protocol=protocol, guidance=guidance))
        return pair_similarities(maps, settings=self._detector.similarity, protocol=protocol).double().cpu().numpy()

    def guidance_norms(self) -> np.ndarray:
        """Return how far text moves the noise prediction of the first timestep, per seed: [seed], float64, at least 0.

        Source: Wen et al. (ICLR 2024), with one denoising step; see `guidance_norms` for more.
        """
        difference = self.text(0) - self._detector.empty(0, self._evaluations)
        return difference.flatten(1).double().norm(dim=1).cpu().numpy()


@torch.no_grad()
def guidance_norms(
    pipe: StableDiffusionPipeline,
    prompt: str,
    *,
    steps: int = 1,
    guidance: float = 7.5,
    settings: DetectionSettings | None = None,
    evaluations: Evaluations | None = None,
) -> np.ndarray:
    """Return how far text moves the noise prediction in the first denoising steps; Wen's score is the mean of these.

    Source: Wen et al. (ICLR 2024): the norm of eps(x_t, prompt) - eps(x_t, empty prompt), mean over steps and seeds.

    Args:
        pipe: A StableDiffusionPipeline.
        prompt: The prompt.
        steps: How many denoising steps are looked at.
        guidance: Guidance scale with which the images are denoised (their default).
        settings: Seed, samples and steps of the schedule; None means those of the pipeline's profile, else the paper's.
        evaluations: Counts the UNet sample-evaluations.

    Returns:
        Norms [step, seed], float64, at least 0.

    Raises:
        ValueError: There are fewer than one step or more than the schedule has.
    """
    from diffusers import DDIMScheduler

    settings = settings or default_settings(pipe).detection
    if not 1 <= steps <= settings.steps:
        raise ValueError(f"steps is {steps}; it must be between 1 and the {settings.steps} steps of the schedule")
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(settings.steps)
    latents = first_step(pipe, settings=replace(settings, guidance=0.0), protocol="paper").latents
    count, size = len(latents), fitting_size(pipe.unet, len(latents), passes=2)
    embeddings = embed(pipe, ["", prompt])
    norms = []
    for timestep in scheduler.timesteps[:steps]:
        predict = partial(_predict_both, pipe.unet, timestep, embeddings)
        parts = [part for _, part in shrinking(predict, latents, size=size, owner=pipe.unet, use="guidance norms")]
        empty, text = torch.cat(parts, dim=1)
        norms.append((text - empty).flatten(1).double().norm(dim=1).cpu().numpy())
        latents = scheduler.step(empty + guidance * (text - empty), timestep, latents).prev_sample
        if evaluations is not None:
            evaluations.add(2 * count)
    return np.stack(norms)


def _predict_both(unet: nn.Module, timestep: int, embeddings: Tensor, latents: Tensor) -> Tensor:
    """Return the noise predicted without and with the prompt, [2, seed, channel, height, width], float32."""
    dtype = next(unet.parameters()).dtype
    texts = embeddings.repeat_interleave(len(latents), dim=0).to(dtype)
    noise = unet(torch.cat([latents, latents]).to(dtype), timestep, texts, return_dict=False)[0].float()
    return noise.unflatten(0, (2, -1))


Metric = Callable[[np.ndarray, np.ndarray], float]
"""How well scores of memorized prompts and of unmemorized ones are apart."""


def auroc(memorized: Sequence[float] | np.ndarray, unmemorized: Sequence[float] | np.ndarray) -> float:
    """Return the area under the ROC curve: how often a memorized prompt scores above an unmemorized one.

    Source: App. B.4.

    Args:
        memorized: Scores of memorized prompts, at least one.
        unmemorized: Scores of unmemorized prompts, at least one.

    Returns:
        A share in [0, 1]; 0.5 by chance.

    Raises:
        ValueError: There is no score of one kind, or one is not finite.
    """
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(*_labelled(memorized, unmemorized)))


def tpr_at_fpr(
    memorized: Sequence[float] | np.ndarray, unmemorized: Sequence[float] | np.ndarray, *, fpr: float = 0.01
) -> float:
    """Return the largest share of memorized prompts that is found while at most ``fpr`` of the others are taken for them.

    Source: App. B.4 (TPR@1%FPR).

    Args:
        memorized: Scores of memorized prompts, at least one.
        unmemorized: Scores of unmemorized prompts, at least one.
        fpr: Allowed share of false positives, in [0, 1].

    Returns:
        A share in [0, 1].

    Raises:
        ValueError: There is no score of one kind, one is not finite, or ``fpr`` is no share.
    """
    from sklearn.metrics import roc_curve

    if not 0 <= fpr <= 1:
        raise ValueError(f"fpr is {fpr}; a share is in [0, 1]")
    # Points on a line between two others count too: one of them may be the last that is allowed.
    false, true, _ = roc_curve(*_labelled(memorized, unmemorized), drop_intermediate=False)
    return float(true[false <= fpr].max())


def accuracy(
    memorized: Sequence[float] | np.ndarray, unmemorized: Sequence[float] | np.ndarray, *, threshold: float = 0.5
) -> float:
    """Return the share of prompts on the right side of a threshold, both kinds counting half.

    Source: App. B.4 (threshold 0.5; there the kinds are equally many, so that plain accuracy is the same).

    Args:
        memorized: Scores of memorized prompts, at least one.
        unmemorized: Scores of unmemorized prompts, at least one.
        threshold: Scores above it mean memorized.

    Returns:
        A share in [0, 1].

    Raises:
        ValueError: There is no score of one kind, or one is not finite.
    """
    labels, scores = _labelled(memorized, unmemorized)
    found = scores > threshold
    return float((found[labels == 1].mean() + (~found[labels == 0]).mean()) / 2)


def best_accuracy(
    memorized: Sequence[float] | np.ndarray, unmemorized: Sequence[float] | np.ndarray
) -> tuple[float, float]:
    """Return the best balanced accuracy of any threshold, and that threshold.

    A threshold chosen on the scores that it is judged by flatters a little; see `accuracy` for one chosen before.

    Args:
        memorized: Scores of memorized prompts, at least one.
        unmemorized: Scores of unmemorized prompts, at least one.

    Returns:
        Share in [0, 1], and the threshold: scores above it mean memorized.

    Raises:
        ValueError: There is no score of one kind, or one is not finite.
    """
    from sklearn.metrics import roc_curve

    labels, scores = _labelled(memorized, unmemorized)
    false, true, _ = roc_curve(labels, scores, drop_intermediate=False)
    best = int(np.argmax(true - false))
    # roc_curve goes through the distinct scores from above; between two of them lies a threshold that is none.
    distinct = np.unique(scores)[::-1]
    above = distinct[max(best, 1) - 1]
    below = distinct[best] if best < len(distinct) else np.nextafter(above, -np.inf)
    return float((true[best] + 1 - false[best]) / 2), float((above + below) / 2 if best else above)


def interval(
    metric: Metric,
    memorized: Sequence[float] | np.ndarray,
    unmemorized: Sequence[float] | np.ndarray,
    *,
    level: float = 0.95,
    resamples: int = 500,
    seed: int = 0,
) -> tuple[float, float]:
    """Return a bootstrap interval of a metric: what other prompts of the same kinds might have given.

    Args:
        metric: `auroc`, `tpr_at_fpr` or another function of memorized and unmemorized scores.
        memorized: Scores of memorized prompts.
        unmemorized: Scores of unmemorized prompts.
        level: Share of the resamples inside.
        resamples: How often both kinds are drawn anew, with replacement.
        seed: Seed of the draws.

    Returns:
        Lower and upper end (percentiles).
    """
    generator = np.random.default_rng(seed)
    kinds = [np.asarray(values, dtype=np.float64) for values in (memorized, unmemorized)]
    draws = [metric(*(generator.choice(values, len(values)) for values in kinds)) for _ in range(resamples)]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


DETECTION_COLUMNS = (
    "score",
    "memorized",
    "prompts",
    "auroc",
    "auroc_low",
    "auroc_high",
    "tpr_at_1_fpr",
    "accuracy",
    "threshold",
)
"""Columns of `detection_table`."""


def detection_table(scores: pd.DataFrame, columns: Sequence[str], *, resamples: int = 500) -> pd.DataFrame:
    """Return how well each score tells memorized from unmemorized prompts: all, VM alone, TM alone.

    Source: App. B.4.

    Args:
        scores: Columns kind ("vm", "tm", "unmemorized"; others are ignored) and one per score.
        columns: Names of the scores.
        resamples: Resamples of the interval of the AUROC (95 %).

    Returns:
        `DETECTION_COLUMNS`; memorized is "vm", "tm" or "vm + tm", accuracy is the best balanced one, with its threshold.

    Raises:
        ValueError: There is no prompt of a kind.
        KeyError: A column is missing.
    """
    unmemorized = scores[scores["kind"] == "unmemorized"]
    rows = []
    for column in columns:
        for kinds in (("vm", "tm"), ("vm",), ("tm",)):
            chosen = scores[scores["kind"].isin(kinds)]
            positive, negative = chosen[column].to_numpy(), unmemorized[column].to_numpy()
            low, high = interval(auroc, positive, negative, resamples=resamples)
            rows.append(
                (column, " + ".join(kinds), len(chosen), auroc(positive, negative), low, high,
                 tpr_at_fpr(positive, negative), *best_accuracy(positive, negative))
            )  # fmt: skip
    return pd.DataFrame(rows, columns=list(DETECTION_COLUMNS))


@dataclass(frozen=True, slots=True)
class Switch:
    """One difference between the paper's text and the authors' code, as a change of the settings.

    Attributes:
        name: Short name, for tables.
        question: Its number in the notes on the released code, such as "Q1"; empty if it has none.
        change: What changes, in words.
        protocol: The protocol with the change.
        guidance: The guidance scale with the change.
    """

    name: str
    question: str
    change: str
    protocol: Protocol
    guidance: float


def protocol_switches(protocol: Protocol, guidance: float, *, other_guidance: float | None = None) -> list[Switch]:
    """Return a protocol as it is, with each switch of the threshold turned alone, and with all of them turned.

    From `released` with all turned one is at `paper`, and the other way round. The order of the guidance means nothing
    where the guidance is 0, so it is turned at the larger of the two guidance scales.

    Args:
        protocol: Where to start.
        guidance: Guidance scale of the detection.
        other_guidance: The one to compare it with; None: 7 if ``guidance`` is 0, else 0.

    Returns:
        Seven switches: none, timestep, pairs, similarity, all, guidance scale, guidance order.
    """
    other = (7.0 if guidance == 0 else 0.0) if other_guidance is None else other_guidance
    strong = max(guidance, other)
    first = 1 - min(protocol.timestep_index, 1)
    measure = "ssim" if protocol.similarity == "ms_ssim" else "ms_ssim"
    pairs = "max" if protocol.threshold_pairs == "all" else "all"
    order = {"swap_guidance": not protocol.swap_guidance}
    changes = {
        "timestep": ("Q1", f"{_ORDINAL[first]} timestep", {"timestep_index": first}),
        "pairs": ("Q4", _PAIRS[pairs], {"threshold_pairs": pairs}),
        "similarity": ("", _MEASURE[measure], {"similarity": measure}),
    }
    together = order | {key: value for _, _, change in changes.values() for key, value in change.items()}
    target = {"released": "paper", "paper": "released"}.get(protocol.name, f"{protocol.name}, turned")
    return [
        Switch("none", "", f"protocol {protocol.name}", protocol, guidance),
        *(
            Switch(name, question, text, replace(protocol, **change), guidance)
            for name, (question, text, change) in changes.items()
        ),
        Switch("all", "", f"all: protocol {target}", replace(protocol, **together), guidance),
        Switch("guidance", "Q3", f"guidance {other:g}, not {guidance:g}", protocol, other),
        Switch(
            "order", "Q2", f"guidance {strong:g}, {_ORDER[order['swap_guidance']]}", replace(protocol, **order), strong
        ),
    ]


_ORDINAL = ("first", "second")
_MEASURE = {"ssim": "SSIM, not MS-SSIM", "ms_ssim": "MS-SSIM, not SSIM"}
_ORDER = {False: "usual order", True: "halves swapped"}
_PAIRS = {"all": "all pairs, not the largest", "max": "largest pairs, not all"}


def _labelled(
    memorized: Sequence[float] | np.ndarray, unmemorized: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return labels and scores of both kinds together."""
    kinds = [np.asarray(values, dtype=np.float64).ravel() for values in (memorized, unmemorized)]
    for name, values in zip(("memorized", "unmemorized"), kinds, strict=True):
        if not len(values):
            raise ValueError(f"there is no score of {name} prompts; both kinds are needed")
        if not np.isfinite(values).all():
            raise ValueError(f"score {int(np.argmin(np.isfinite(values)))} of {name} prompts is not finite")
    labels = np.repeat([1, 0], [len(values) for values in kinds])
    return labels, np.concatenate(kinds)
