"""Encoders that their authors published as TorchScript files."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

import torch

from nemolib.encoders.base import ImageEncoder
from nemolib.encoders.checksums import load_torchscript


class TorchScriptEncoder(ImageEncoder):
    """An image encoder whose network is a TorchScript file with a known SHA-256.

    Attributes:
        called: What tables call it if nothing else is said.
    """

    called: ClassVar[str]

    def __init__(
        self, model: torch.nn.Module, *, sha256: str, name: str | None = None, device: str | torch.device = "cpu"
    ) -> None:
        """Wrap a network.

        Args:
            model: The network, on its device.
            sha256: SHA-256 of its file.
            name: What tables call it; None: `called`.
            device: Where it runs.

        Raises:
            EncoderError: It is not the network that the class is made for.
        """
        self.model, self.sha256, self.name, self.device = model, sha256, name or self.called, torch.device(device)
        self._check_network()

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        sha256: str | None = None,
        name: str | None = None,
        device: str | torch.device = "cpu",
    ) -> Self:
        """Return the encoder from its file; read `nemolib.encoders.checksums.load_torchscript` first.

        Raises:
            FileNotFoundError: There is no such file.
            EncoderError: The SHA-256 differs, or the file holds no TorchScript or another network.
        """
        model, found = load_torchscript(path, sha256=sha256, device=device)
        return cls(model, sha256=found, device=device, name=name)

    def _check_network(self) -> None:
        """Raise EncoderError if the network is another one; nothing is known of it here."""
