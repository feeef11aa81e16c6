"""Every number that defines the tiny world, in one frozen object."""

import hashlib
import json
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class DataSettings:
    """Images and captions of the world.

    A copy is one image of the training set, from which samples are drawn uniformly: a caption with 24 copies has its one
    image 24 times in it, and a template with 40 copies has 40 images.
    """

    seed: int = 0
    image_size: int = 64
    vm_copies: int = 24
    tm_copies: int = 40
    #: (copies, captions): more captions where memorization begins.
    ladder: tuple[tuple[int, int], ...] = ((1, 4), (2, 6), (4, 6), (8, 6), (16, 6), (32, 6), (64, 4), (128, 4))
    trained_wordings: int = 10
    trained_pairs: int = 2400
    images_per_subject: int = 120
    images_per_pair: int = 4
    unmemorized_prompts: int = 200
    holdout_prompts: int = 2500


@dataclass(frozen=True)
class AutoencoderSettings:
    """Stage 1: ``AutoencoderTiny``, 64 x 64 x 3 pixels to 16 x 16 x 8 latents; stage 4 trains its decoder on."""

    seed: int = 1
    steps: int = 4000
    cooldown: int = 3000
    batch_size: int = 32
    crop: int = 32
    learning_rate: float = 2e-3
    channels: tuple[int, ...] = (48, 48, 48)
    encoder_blocks: tuple[int, ...] = (1, 1, 3)
    decoder_blocks: tuple[int, ...] = (3, 2, 1)
    latents: int = 8
    noise: float = 0.05
    edge_weight: float = 0.3


@dataclass(frozen=True)
class ClipSettings:
    """Stage 2: a ``CLIPModel``; its text tower conditions the UNet, its image tower gives the alignment score."""

    seed: int = 2
    steps: int = 3000
    cooldown: int = 1500
    batch_size: int = 128
    learning_rate: float = 1e-3
    vocabulary: int = 3000
    tokens: int = 16
    width: int = 128
    layers: int = 3
    heads: int = 4
    patch: int = 16
    projection: int = 64


@dataclass(frozen=True)
class UNetSettings:
    """Stage 3: ``UNet2DConditionModel`` with the down and mid blocks of Stable Diffusion.

    14,000 steps of 48 are 672,000 samples.
    """

    seed: int = 3
    steps: int = 14_000
    cooldown: int = 2500
    batch_size: int = 48
    learning_rate: float = 8e-4
    channels: tuple[int, ...] = (64, 96, 128, 128)
    heads: int = 2
    up_attention: bool = False
    caption_dropout: float = 0.1
    sparsity: float = 1e-3
    ema: float = 0.999


UNETS = {
    "unet": {},
    "short": {"steps": 10_000},
    "plain": {"steps": 10_000, "sparsity": 0.0},
    "up": {"steps": 9_000, "up_attention": True},
}
"""The UNets, by what is set otherwise: the shipped one, and variants that the model card compares with it."""


@dataclass(frozen=True)
class DescriptorSettings:
    """Stage 5: the copy-detection descriptor, trained with SSCD's recipe (InfoNCE on augmented copies, entropy term)."""

    seed: int = 4
    steps: int = 900
    cooldown: int = 600
    batch_size: int = 64
    learning_rate: float = 1e-3
    channels: tuple[int, ...] = (24, 48, 96, 160)
    features: int = 128
    temperature: float = 0.05
    entropy_weight: float = 5.0


@dataclass(frozen=True)
class ClassifierSettings:
    """Stage 6: names subjects, for acceptance alone. Scores between -1 and 1 are multiplied by ``scale``."""

    seed: int = 6
    steps: int = 2000
    cooldown: int = 1500
    batch_size: int = 64
    learning_rate: float = 2e-3
    channels: tuple[int, ...] = (24, 48, 96, 128)
    scale: float = 20.0


@dataclass(frozen=True)
class WorldSettings:
    """The whole world."""

    data: DataSettings = field(default_factory=DataSettings)
    autoencoder: AutoencoderSettings = field(default_factory=AutoencoderSettings)
    clip: ClipSettings = field(default_factory=ClipSettings)
    unet: UNetSettings = field(default_factory=UNetSettings)
    decoder: AutoencoderSettings = field(
        default_factory=lambda: AutoencoderSettings(seed=5, steps=3000, cooldown=2000, learning_rate=1e-3, noise=0.1)
    )
    descriptor: DescriptorSettings = field(default_factory=DescriptorSettings)
    classifier: ClassifierSettings = field(default_factory=ClassifierSettings)

    def hash(self, *stages: str) -> str:
        """Return the content hash of the settings of the named stages (all without a name).

        Numbers of steps are left out: a run can be made longer, see ``training.schedule``.
        """
        settings = asdict(self)
        for numbers in settings.values():
            numbers.pop("steps", None)
        chosen = {stage: settings[stage] for stage in (stages or settings)}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()
