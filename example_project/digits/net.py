"""The network: a small residual convolutional net, as PyTorch."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


class ConvNormAct(nn.Sequential):
    """Convolution, batch normalization, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )


class Residual(nn.Module):
    """Two convolutions with a shortcut around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = ConvNormAct(channels, channels)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) → the same shape."""
        return cast("Tensor", torch.relu(x + self.second(self.first(x))))


class DigitNet(nn.Module):
    """(N, 1, 8, 8) → logits (N, 10); about 60,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            ConvNormAct(1, 32),
            ConvNormAct(32, 48, stride=2),
            Residual(48),
            ConvNormAct(48, 64, kernel=1),
        )
        self.classify = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of a batch of images."""
        return cast("Tensor", self.classify(self.features(image).mean(dim=(2, 3))))
