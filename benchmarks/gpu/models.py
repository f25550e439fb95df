"""The models that are measured on a GPU; the nets are torchvision's and PyTorch's, with seeded weights.

    python benchmarks/gpu/models.py FOLDER

writes resnet50.onnx and encoder.onnx there; it needs torch and torchvision.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

IMAGE_SHAPE = (8, 3, 224, 224)
TOKENS_SHAPE = (4, 128)


def resnet50(path: Path) -> None:
    """Torchvision's ResNet-50: image [batch, 3, 224, 224] → logits [batch, 1000].

    Its batch normalization has seen random images, as if it had been trained: with the statistics of a fresh net,
    activations grow from block to block.
    """
    import torch
    import torchvision

    torch.manual_seed(0)
    net = torchvision.models.resnet50(weights=None)
    net.train()
    with torch.no_grad():
        for _ in range(8):
            net(torch.randn(8, 3, 224, 224))
    _export(net, torch.randn(*IMAGE_SHAPE), path, "image", "logits")


def encoder(path: Path) -> None:
    """A transformer encoder, 6 layers of 512: tokens [batch, 128] → hidden [batch, 128, 512]."""
    import torch

    torch.manual_seed(0)

    class Encoder(torch.nn.Module):  # type: ignore[misc,unused-ignore]  # torch need not be installed
        def __init__(self) -> None:
            super().__init__()
            self.tokens = torch.nn.Embedding(30522, 512)
            self.positions = torch.nn.Parameter(0.02 * torch.randn(1, TOKENS_SHAPE[1], 512))
            layer = torch.nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.0, activation="gelu", batch_first=True)
            self.layers = torch.nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
            for weight in self.layers.parameters():
                if weight.dim() > 1:  # The layers start as copies of one.
                    torch.nn.init.xavier_uniform_(weight)

        def forward(self, tokens: Any) -> Any:
            return self.layers(self.tokens(tokens) + self.positions)

    _export(Encoder(), torch.randint(0, 30522, TOKENS_SHAPE), path, "tokens", "hidden")


def _export(net: Any, example: Any, path: Path, name: str, output: str) -> None:
    import torch

    net.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net,
            (example,),
            path,
            input_names=[name],
            output_names=[output],
            dynamic_axes={name: {0: "batch"}, output: {0: "batch"}},
            opset_version=17,
            dynamo=False,
        )


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    resnet50(folder / "resnet50.onnx")
    encoder(folder / "encoder.onnx")


if __name__ == "__main__":
    main()
