"""The tiny world: a small text-to-image model whose memorized images we planted ourselves.

Modules, in the order of the work: ``settings`` (every number of the world), ``render`` (images), ``captions`` (prompt
tables), ``dataset`` (images and captions joined, with sampling weights), ``training`` (a loop that resumes),
``autoencoder`` -> ``clip`` -> ``unet`` -> ``descriptor`` -> ``classifier`` (the stages), ``build`` (runs and exports
them), ``acceptance`` and ``card``. ``python -m tools.world`` runs them all. Tables that are data: ``subjects.csv``
(subjects and planted wordings), ``bounds.csv`` (what the world has to do, set before training), ``tried.csv``.
"""
