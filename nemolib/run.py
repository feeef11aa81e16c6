"""One object for a whole experiment: a profile, its pipeline, what is kept of results, and how progress is shown.

    run = nemolib.open_run("tiny")
    found = run.search(run.prompts("vm")["caption"])

What takes long is a task (`Run.compute`): each result is kept in ``build/<profile>/store`` by the content hash of
everything that determines it, so that no result is computed twice, a notebook that runs alone computes what it needs of
earlier ones, and a run that was killed continues.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch

from nemolib import metrics, paths, prompts
from nemolib.batching import batches, check_prompts, progress_bar
from nemolib.encoders import Encoder, load_encoder
from nemolib.first_step import observing, pairs_measure
from nemolib.generation import drawing
from nemolib.holdout import ActivationStatistics, activation_statistics, load_statistics, memorization_threshold
from nemolib.layers import value_layer_hash, widths
from nemolib.localization import Localization, check_threshold, localization_table, localizing
from nemolib.mitigation import Mitigation
from nemolib.pipeline import load_pipeline
from nemolib.provenance import code_hash, content_hash, model_hash
from nemolib.settings import load_profile, load_protocol, search_settings, settings_of
from nemolib.store import (
    ORDINARY,
    PLANTED,
    WITH_AND_WITHOUT,
    Grid,
    Store,
    read_grid,
    read_table,
    write_grid,
    write_table,
)
from nemolib.workers import Batch, FailedPrompts, Failure, Outcomes, Task, distributed, map_prompts

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from PIL import Image

    from nemolib.settings import GenerationSettings, Profile, Protocol, SearchSettings

Role = Literal["copy", "alignment", "quality", "clip_quality"]

Together = int | Callable[[Any], Hashable]
"""How many items make a batch, or what the items of a batch have in common."""

Begun = tuple[list[str], Outcomes]
"""The keys of items, in order, and what yields their outcomes as they come."""

METRICS = ("sscd_orig", "sscd_orig_max", "sscd_gen", "d_sscd", "a_clip")
"""What `Run.measure` measures."""

_SEARCHED = 4
"""Prompts that a worker searches together."""


def open_run(profile: str | Path | Profile = "tiny", *, progress: bool = True) -> Run:
    """Return the run of a profile, whose pipeline is loaded when it is first asked for.

    Args:
        profile: Name of a profile, path of a YAML file, or a profile.
        progress: Whether long work shows progress bars.

    Raises:
        ProfileError: The profile cannot be read.
    """
    return Run(load_profile(profile), progress=progress)


class Run:
    """A profile, its pipeline, and the results that are kept.

    Args:
        profile: The profile.
        pipe: Its pipeline; None: loaded when it is first asked for, since a page of saved tables needs none.
        store: Where results are kept; None: in ``build/<profile>/store``.
        progress: Whether long work shows progress bars.
    """

    def __init__(
        self,
        profile: Profile,
        pipe: StableDiffusionPipeline | None = None,
        *,
        store: Store | None = None,
        progress: bool = True,
    ) -> None:
        self.profile, self.progress = profile, progress
        if pipe is not None:
            self.pipe = pipe
        self.folder = paths.BUILD / profile.name
        self.store = store or Store(self.folder / "store")
        self._encoders: dict[str, Any] = {}

    @cached_property
    def pipe(self) -> StableDiffusionPipeline:
        """The pipeline; raises PipelineError if the profile's model cannot be loaded."""
        return load_pipeline(self.profile)

    @property
    def device(self) -> str:
        """The type of device that the profile names or, with ``auto``, that this machine has."""
        there = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        return (there if self.profile.device == "auto" else torch.device(self.profile.device)).type

    # What was computed, and what is kept

    def compute(
        self,
        task: Task,
        items: Sequence[Any],
        *,
        label: str,
        together: Together = 1,
        **common: Any,
    ) -> list[Any]:
        """Return what a task makes of each item; what the store has is not computed again.

        Args:
            task: A function of a module, ``task(pipe, **common)``, that returns a function of a batch of items, which
                returns a result for each: plain values, or an array.
            items: Each a caption, or a tuple that begins with one; whatever else determines its result is in it too.
            label: What the progress bar calls it.
            together: How many items are computed in one batch; or what neighbours have in common that are.
            common: What all items share.

        Raises:
            ValueError: Something changes the model, such as a hook: what it gives must not be kept as its own.
            FailedPrompts: Prompts raised; all others are finished and kept.
        """
        return _finished(*self._begun(task, items, label, together, common))

    def _begun(self, task: Task, items: Sequence[Any], label: str, together: Together, common: dict[str, Any]) -> Begun:
        """Return the keys of items, and what yields their outcomes as they come; arguments as in `compute`."""
        base = content_hash([model_hash(self.pipe), code_hash(task), common])
        keys = [content_hash([base, item]) for item in items]
        different = dict(zip(keys, items, strict=True))

        def made(waiting: Batch) -> Outcomes:
            if callable(together):
                parts = [list(part) for _, part in groupby(waiting, lambda pair: together(pair[1]))]
            else:
                parts = list(batches(waiting, together))
            with progress_bar(len(different), label, enabled=self.progress) as bar:
                bar.update(len(different) - len(waiting))
                for outcome in map_prompts(task, parts, pipe=self.pipe, common=common):
                    bar.update()
                    yield outcome

        return keys, self._kept(task.__name__, different, made)

    def _kept(self, name: str, items: Mapping[str, Any], made: Callable[[Batch], Outcomes]) -> Outcomes:
        """Yield what the store has of items, one by one; then what ``made`` yields for the others, once it is kept."""
        waiting = []
        for key, item in items.items():
            value = self.store.get(name, key)
            if value is None:
                waiting.append((key, item))
            else:
                yield key, value
        if waiting:
            for key, outcome in made(waiting):
                yield key, outcome if isinstance(outcome, Failure) else self.store.put(name, key, outcome)

    def _once(self, name: str, key: str, made: Callable[[], Any]) -> Any:
        """Return what the store has, else what is made, once it is kept."""
        value = self.store.get(name, key)
        return self.store.put(name, key, made()) if value is None else value

    def save(self, value: pd.DataFrame | Grid, name: str) -> None:
        """Keep a table or an image grid for other notebooks and for the exhibits, all of it or nothing."""
        if isinstance(value, Grid):
            write_grid(value, self.folder / "grids" / f"{name}.safetensors")
        else:
            write_table(value, self.folder / "tables" / f"{name}.csv")

    def load(self, name: str) -> pd.DataFrame | Grid:
        """Return a table or an image grid that a notebook saved.

        Raises:
            FileNotFoundError: No notebook has saved it yet.
            StoreError: The file was cut.
        """
        table, grid = self.folder / "tables" / f"{name}.csv", self.folder / "grids" / f"{name}.safetensors"
        if table.is_file():
            return read_table(table)
        if grid.is_file():
            return read_grid(grid)
        raise FileNotFoundError(
            f"there is no table or image grid {name!r} of profile {self.profile.name!r}; run the notebook that makes it: "
            f"make notebooks PROFILE={self.profile.name}"
        )

    # Prompts and what is normal

    def prompts(self, *kinds: str, most: int | None = None) -> pd.DataFrame:
        """Return the prompts of these kinds, in this order: columns caption, kind, group, copies, image.

        Args:
            kinds: Kinds of prompts.
            most: How many of each, from the top of its table; None: all that the profile has.

        Raises:
            FileNotFoundError: A prompt table is missing.
            PromptTableError: A table is malformed or holds no prompt of a kind.
        """
        return pd.concat([prompts.select(self.profile, kind).head(most) for kind in kinds], ignore_index=True)

    def rows(self, captions: Sequence[str]) -> pd.DataFrame:
        """Return the rows of the memorized prompt table of these captions."""
        return prompts.select(self.profile, "memorized").set_index("caption").loc[list(captions)].reset_index()

    @property
    def statistics(self) -> ActivationStatistics:
        """The activation statistics over the profile's holdout prompts: those of its file, else computed once.

        Source: Sec. 3.2.

        Raises:
            FileNotFoundError: The profile names a file that is missing.
            ValueError: It holds statistics of another model.
        """
        if self.profile.statistics is not None:
            given = load_statistics(paths.resolve(self.profile.statistics))
            given.check(self.pipe.unet)
            return given
        captions = self.prompts("holdout")["caption"].tolist()
        key = content_hash([model_hash(self.pipe), code_hash("holdout"), captions])

        def made() -> np.ndarray:
            found = activation_statistics(self.pipe, captions, progress=self.progress)
            return torch.stack([torch.cat(found.mean), torch.cat(found.std)]).numpy()

        kept = torch.tensor(self._once("statistics", key, made))
        mean, std = (row.split(widths(self.pipe.unet)) for row in kept)
        return ActivationStatistics(mean, std, len(captions), value_layer_hash(self.pipe.unet))

    def observe(self, captions: Sequence[str], measures: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
        """Return what measures of the first denoising step (`nemolib.first_step.observing`) give for each prompt.

        Args:
            captions: The prompts.
            measures: What is measured; measures of one prompt share their UNet passes.
        """
        items = [(caption, measure) for caption in captions for measure in measures]
        # The guidance is that of a measure.
        common = {"detection": replace(self.profile.detection, guidance=0.0), "similarity": self.profile.similarity}
        values = self.compute(observing, items, label="first step", together=itemgetter(0), **common)
        return list(batches(values, len(measures)))

    def holdout_scores(self, *, protocol: str | Protocol | None = None, guidance: float | None = None) -> np.ndarray:
        """Return the similarity of every pair of seeds of the profile's threshold prompts, [prompt, pair], float64.

        Source: Sec. 3.1.

        Args:
            protocol: None means the profile's.
            guidance: Guidance scale of the detection; None means the profile's.
        """
        guidance = self.profile.detection.guidance if guidance is None else guidance
        measure = pairs_measure(load_protocol(protocol or self.profile.protocol), guidance)
        return np.array(self.observe(self.prompts("threshold")["caption"], [measure]))[:, 0]

    @property
    def threshold(self) -> float:
        """The memorization threshold: the one that the profile gives, else by its rule from the holdout scores.

        Source: Sec. 3.1, Sec. 4.
        """
        given = self.profile.thresholds.value
        return self.threshold_at() if given is None else given

    def threshold_at(self, multiplier: float | None = None, *, guidance: float | None = None) -> float:
        """Return the memorization threshold by rule: mean + multiplier standard deviations of holdout scores.

        Args:
            multiplier: None means the profile's.
            guidance: As in `holdout_scores`.
        """
        multiplier = self.profile.thresholds.multiplier if multiplier is None else multiplier
        values = self.holdout_scores(guidance=guidance)
        return memorization_threshold(values, multiplier=multiplier, protocol=self.profile.protocol)

    # The search

    @property
    def searches(self) -> int:
        """How many prompts are searched in one batch: all in this process; on a worker few, so that all have some."""
        return _SEARCHED if distributed(self.profile) else sys.maxsize

    def search(
        self,
        captions: Sequence[str],
        *,
        threshold: float | None = None,
        gate: float | None = None,
        statistics: ActivationStatistics | None = None,
        search: SearchSettings | str | None = None,
    ) -> list[Localization]:
        """Return the memorization neurons of prompts (Alg. 1 to 4), without steps and tests; see `nemolib.localize`.

        What is not given is the profile's.

        Raises:
            ValueError: A threshold is outside (-1, 1]; there are no prompts, or one is empty; the statistics are those
                of another model.
            FailedPrompts: Prompts raised; all others are finished and kept.
        """
        captions, profile = check_prompts(captions), self.profile
        threshold = self.threshold if threshold is None else threshold
        check_threshold(threshold, gate)
        statistics = statistics or self.statistics
        statistics.check(self.pipe.unet)
        common = {"threshold": float(threshold), "gate": None if gate is None else float(gate)}
        common |= {name: getattr(profile, name) for name in ("detection", "similarity", "protocol")}
        common |= {"statistics": statistics, "search": search_settings(search, profile.search)}
        records = self.compute(localizing, captions, label="localization", together=self.searches, **common)
        return [Localization.from_record(record) for record in records]

    # Images and what they show

    def images(
        self,
        captions: Sequence[str],
        mitigation: Mitigation | None = None,
        *,
        settings: GenerationSettings | None = None,
    ) -> np.ndarray:
        """Return generated images of prompts, those of a prompt kept once they are made.

        Source: App. B.3.

        Args:
            captions: Prompts, at least one.
            mitigation: What is done to the model; None changes nothing.
            settings: Seed, samples, steps and guidance; None means those of the profile.

        Returns:
            Images [prompt, seed, height, width, 3], uint8.

        Raises:
            ValueError: There are no prompts, one is empty, or the mitigation cannot handle the pipeline.
            FailedPrompts: Prompts raised; the images of all others are kept.
        """
        return np.stack(_finished(*self._drawn(captions, mitigation, settings or self.profile.generation)))

    def _drawn(self, captions: Sequence[str], mitigation: Mitigation | None, settings: GenerationSettings) -> Begun:
        """Return the keys of the images of prompts, and what yields them as they come."""
        captions = check_prompts(captions)
        if mitigation is not None:
            mitigation.check(self.pipe)
        items = [(caption, None if mitigation is None else mitigation.of(caption)) for caption in captions]
        together = max(1, settings.batch_size // settings.samples)
        return self._begun(drawing, items, "images", together, {"settings": settings})

    def with_and_without(self, captions: Sequence[str], mitigation: Mitigation) -> Grid:
        """Return images of prompts with all neurons active, and beside them those of the same seeds with a mitigation.

        Before them stands the planted image, where all prompts have one; behind them an image of an ordinary prompt of the
        same subject, where the prompt table names subjects.
        """
        groups = {
            name: self.images(captions, item) for name, item in zip(WITH_AND_WITHOUT, (None, mitigation), strict=True)
        }
        table = prompts.select(self.profile, "memorized").set_index("caption").reindex(captions).reset_index()
        if prompts.has_image(table).all():
            groups = {PLANTED: self.planted_like(table, groups[WITH_AND_WITHOUT[0]])[:, None]} | groups
        if ordinary := prompts.ordinary(table):
            groups[ORDINARY] = self.images(ordinary)[:, :1]
        columns = [name for name, images in groups.items() for _ in range(images.shape[1])]
        return Grid(np.concatenate(list(groups.values()), axis=1), tuple(captions), tuple(columns))

    def encoder(self, role: Role) -> Encoder:
        """Return the profile's image encoder for copy detection, alignment or image quality.

        Raises:
            ProfileError: The profile names none.
            FileNotFoundError: Its files are missing.
            EncoderError: Its files are not what they should be.
        """
        if role not in self._encoders:
            self._encoders[role] = load_encoder(self.profile, role, device=self.pipe.device)
        return self._encoders[role]

    def features(
        self,
        role: Role,
        captions: Sequence[str],
        mitigation: Mitigation | None = None,
        *,
        settings: GenerationSettings | None = None,
    ) -> np.ndarray:
        """Return the features of generated images, those of a prompt kept once they are computed.

        Args:
            role: What the features are for; says which encoder.
            captions: As in `images`; so are mitigation and settings.

        Returns:
            Features [prompt, seed, feature], float32.
        """
        settings, encoder = settings or self.profile.generation, self.encoder(role)
        base = content_hash([encoder.identity(), code_hash("encoders")])
        keys = [content_hash([base, key]) for key in self._drawn(captions, mitigation, settings)[0]]

        def described(waiting: Batch) -> Outcomes:
            drawn, outcomes = self._drawn([caption for _, caption in waiting], mitigation, settings)
            wanted = dict(zip(drawn, (key for key, _ in waiting), strict=True))
            # As they come, in any order, so that no more images are held than those of a prompt.
            for image, outcome in outcomes:
                failed = isinstance(outcome, Failure)
                yield wanted[image], outcome if failed else encoder.describe(outcome).numpy()

        return np.stack(_finished(keys, self._kept("features", dict(zip(keys, captions, strict=True)), described)))

    def planted_images(self, rows: pd.DataFrame, *, size: tuple[int, int] | None = None) -> list[np.ndarray]:
        """Return the planted image of each row; with Stable Diffusion, the training image that was found at its URL.

        Args:
            rows: Rows of the memorized prompt table.
            size: Height and width to which each is brought; None: as they are.

        Returns:
            Images [height, width, 3], uint8.

        Raises:
            PromptTableError: A row names no image.
            FileNotFoundError: An image is missing.
        """
        from PIL import Image

        loaded = []
        for path in prompts.image_paths(rows, self.profile):
            with Image.open(path) as image:
                whole = _on_white(image)
            if size is not None and whole.size != size[::-1]:
                whole = whole.resize(size[::-1], Image.Resampling.LANCZOS)
            loaded.append(np.asarray(whole))
        return loaded

    def planted_like(self, rows: pd.DataFrame, images: np.ndarray) -> np.ndarray:
        """Return the planted image of each row, [row, height, width, 3], as large as other images; white where there is none."""
        planted, known = np.full((len(rows), *images.shape[-3:]), 255, dtype=np.uint8), prompts.has_image(rows)
        if known.any():
            planted[known] = self.planted_images(rows[known], size=images.shape[-3:-1])
        return planted

    def planted_features(self, rows: pd.DataFrame) -> np.ndarray:
        """Return the copy-detection features of the planted image of each row, [prompt, feature], float64.

        Each image is seen as it is, whatever its size; a row without an image has missing values.
        """
        encoder, known = self.encoder("copy"), prompts.has_image(rows)
        # Where there is no image, any tells the number of features.
        loaded = self.planted_images(rows[known]) or [np.zeros((64, 64, 3), dtype=np.uint8)]
        key = content_hash([encoder.identity(), code_hash("encoders"), loaded])
        found = self._once("planted", key, lambda: np.concatenate([encoder.describe(image[None]) for image in loaded]))
        features = np.full((len(rows), found.shape[1]), np.nan)
        features[known] = found[: known.sum()]
        return features

    def measure(
        self,
        rows: pd.DataFrame,
        mitigation: Mitigation | None = None,
        *,
        columns: Sequence[str] = METRICS,
        settings: GenerationSettings | None = None,
    ) -> pd.DataFrame:
        """Return the metrics of Table 1 for images of prompts, a row for each prompt.

        Source: Sec. 4 (metrics).

        Args:
            rows: Rows of a prompt table.
            mitigation: What is done to the model; None changes nothing.
            columns: Which metrics: sscd_orig (similarity to the planted image, median over seeds), sscd_orig_max
                (largest of the seeds; both missing without a planted image), sscd_gen (similarity to the same seed's
                image of the untouched model, median over seeds), d_sscd (similarity of two images of the prompt, median
                over pairs; missing for one seed), a_clip (similarity of image and prompt, median over seeds).
            settings: As in `images`.
        """
        captions, found = rows["caption"].tolist(), {}
        if not set(columns) <= {"a_clip"}:
            seen = self.features("copy", captions, mitigation, settings=settings)
        if {"sscd_orig", "sscd_orig_max"} & set(columns):
            original = metrics.sscd_orig(seen, self.planted_features(rows))
            found |= {"sscd_orig": metrics.over_seeds(original), "sscd_orig_max": original.max(axis=1)}
        if "sscd_gen" in columns:
            untouched = self.features("copy", captions, settings=settings)
            found["sscd_gen"] = metrics.over_seeds(metrics.sscd_gen(seen, untouched))
        if "d_sscd" in columns:
            found["d_sscd"] = metrics.over_seeds(metrics.d_sscd(seen))
        if "a_clip" in columns:
            aligned = self.features("alignment", captions, mitigation, settings=settings)
            texts = self.encoder("alignment").describe_texts(captions)
            found["a_clip"] = metrics.over_seeds(metrics.a_clip(aligned, texts))
        return pd.DataFrame(found, index=rows.index)[list(columns)]


def localize_many(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    statistics: ActivationStatistics,
    *,
    threshold: float,
    gate: float | None = None,
    search: SearchSettings | str | None = None,
    seconds: bool = False,
    store: Store | None = None,
    progress: bool = True,
    **settings: Any,
) -> pd.DataFrame:
    """Return the memorization neurons of many prompts as a table, one row per prompt, in their order.

    A prompt that is finished is never computed again: a run that was killed continues, and ends with the same table.

    Args:
        pipe: A StableDiffusionPipeline.
        prompts: The prompts, at least one.
        statistics: Activation statistics of this model.
        threshold: Memorization threshold tau, in (-1, 1].
        gate: As in `nemolib.localize`; so is search.
        seconds: Whether the table has columns for the time of each algorithm. They differ from run to run.
        store: Where finished prompts are kept; None: in the ``build`` folder of the pipeline's profile.
        progress: Whether to show a progress bar.
        settings: detection, similarity and protocol, in place of the profile's.

    Returns:
        The table of `nemolib.localization.localization_table`.

    Raises:
        ValueError: As `Run.search`.
        FailedPrompts: Prompts raised; all others are finished and kept.
    """
    run = Run(replace(settings_of(pipe), **settings), pipe, store=store, progress=progress)
    found = run.search(prompts, threshold=threshold, gate=gate, statistics=statistics, search=search)
    return localization_table(found, seconds=seconds)


def _finished(keys: Sequence[str], outcomes: Outcomes) -> list[Any]:
    """Return the results of keys, in their order, once all have come; raise FailedPrompts if some are failures."""
    come = dict(outcomes)
    found = [come[key] for key in keys]
    failures = [outcome for outcome in found if isinstance(outcome, Failure)]
    if failures:
        raise FailedPrompts(failures)
    return found


def _on_white(image: Image.Image) -> Image.Image:
    """Return an image as a browser shows it: RGB, 8 bits, what is transparent is white."""
    from PIL import Image

    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")
