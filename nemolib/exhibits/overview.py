"""Exhibit of the whole method: one memorized prompt from the noise differences to images without its neurons."""

from __future__ import annotations

import numpy as np

from nemolib.exhibits.base import Exhibit, Reading, Sources
from nemolib.exhibits.detection import SCORE_NOTEBOOK
from nemolib.exhibits.localization import NOTEBOOK
from nemolib.figures import overview
from nemolib.neurons import NeuronSet


def _prompt(sources: Sources) -> str:
    return str(sources["overview"]["prompt"].iloc[0])


def _unmemorized(sources: Sources) -> list[str]:
    """Return the unmemorized prompts whose images and noise differences were saved, in order."""
    table = sources["scores"]
    kinds = dict(zip(table["caption"], table["kind"], strict=True))
    saved = set(sources["samples"].rows)
    return [row for row in sources["noise_differences"].rows if row in saved and kinds.get(row) == "unmemorized"]


def _needs(sources: Sources) -> str:
    prompt = _prompt(sources)
    if prompt not in sources["noise_differences"].rows:
        return f"image grid 'noise_differences' does not have the prompt {prompt!r}, which notebook {NOTEBOOK} follows"
    if prompt not in set(sources["localization"]["prompt"]):
        return f"table 'localization' does not have the prompt {prompt!r}"
    if not _unmemorized(sources):
        return "image grid 'noise_differences' has no unmemorized prompt"
    return ""


def _run(sources: Sources) -> overview.Run:
    """Return the run of the prompt that notebook 03 follows, beside the last unmemorized prompt."""
    prompt, other = _prompt(sources), _unmemorized(sources)[-1]
    found = sources["localization"].set_index("prompt").loc[prompt]
    scores = sources["scores"].set_index("caption")["score"]
    differences, samples, pair = sources["noise_differences"], sources["samples"], sources["overview_images"]
    neurons = sources["overview"].copy()
    for name, column in (("initial", "initial"), ("refined", "neurons")):
        chosen = NeuronSet.from_json(found[column])
        neurons[name] = [
            (layer - 1, neuron) in chosen for layer, neuron in zip(neurons["layer"], neurons["neuron"], strict=True)
        ]
    seeds = pair.images.shape[1] // 2
    return overview.Run(
        prompt=prompt,
        other=other,
        images=np.stack([pair.images[0, 0], samples.images[samples.rows.index(other), 1]]),
        differences=np.stack([differences.images[differences.rows.index(row)] for row in (prompt, other)]),
        scores=(float(scores[prompt]), float(scores[other])),
        threshold=float(sources["search_steps"]["threshold"].iloc[0]),
        neurons=neurons,
        theta=None if np.isnan(found["theta"]) else float(found["theta"]),
        before=pair.images[0, :seeds],
        after=pair.images[0, seeds:],
    )


def _read(sources: Sources) -> Reading:
    run = _run(sources)
    initial, refined = int(run.neurons["initial"].sum()), int(run.neurons["refined"].sum())
    told_apart = run.scores[0] > run.threshold >= run.scores[1]
    return Reading(
        f"“{run.prompt}”: most similar seeds {run.scores[0]:.2f}, an unmemorized prompt {run.scores[1]:.2f}, threshold "
        f"{run.threshold:.2f}; of {len(run.neurons):,} neurons {initial} are candidates and {refined} stay",
        "the candidates of one prompt are neurons 124, 221 and 362; the rest is a drawing without numbers",
        "agrees" if told_apart and 0 < refined < initial else "differs",
        "agrees if the threshold tells the two prompts apart and refinement leaves some of the candidates, not all",
    )


FIGURE_1 = Exhibit(
    "figure_1", "Figure 1", "the method, followed for one memorized prompt", NOTEBOOK,
    "(a) An image and noise differences of a memorized and of an unmemorized prompt, and the similarity of the most similar pair of "
    "seeds. (b) z-scores of all neurons for the memorized prompt, in colour those of the initial selection: beyond the threshold "
    "of the z-score or among the most active of their layer. (c) Those that refinement keeps (filled) and gives back (hollow). (d) Images "
    "of the same seeds with all neurons active, and with the neurons of (c) deactivated.",
    lambda s: overview.figure_1(_run(s)), _read, tables=("overview", "localization", "scores", "search_steps"),
    grids=("overview_images", "noise_differences", "samples"), needs=(_needs,),
    elsewhere=tuple((name, SCORE_NOTEBOOK) for name in ("scores", "noise_differences", "samples")),
)  # fmt: skip
