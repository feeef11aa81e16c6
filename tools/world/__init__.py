"""The tiny world: a small text-to-image model whose memorized images we planted ourselves.

Modules, in the order of the work: ``settings`` (every number of the world), ``emoji`` and ``render`` (images),
``captions`` (prompt tables), ``dataset`` (images and captions joined, with sampling weights), ``training`` (a loop that
resumes), ``autoencoder`` -> ``clip`` -> ``unet`` -> ``descriptor`` (the stages), ``acceptance`` and ``card``.
``python -m tools.world`` runs them all.
"""
