"""Train the network and write everything that the tests need: ``python -m digits.train``.

Needs ``pip install -r requirements-train.txt``. With the same PyTorch on the same kind of CPU it writes the same
model; elsewhere the last digits differ, because the order of additions does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from digits.data import Split, load
from digits.net import DigitNet

ROOT = Path(__file__).resolve().parent.parent
EPOCHS, BATCH, SEED = 60, 64, 20240
CALIBRATION_FILES, CALIBRATION_IMAGES = 4, 32


def shift(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The images, each moved by up to one pixel both ways: writers do not centre their digits."""
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    rows, columns = torch.randint(0, 3, (2, len(images)), generator=generator).tolist()
    return torch.stack([image[:, r : r + 8, c : c + 8] for image, r, c in zip(padded, rows, columns, strict=True)])


def train(data: Split) -> DigitNet:
    """A network trained on `data`, ready for inference."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(SEED)
    images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    net = DigitNet()
    steps = EPOCHS * -(-len(images) // BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for epoch in range(EPOCHS):
        order = torch.randperm(len(images), generator=generator)
        losses = []
        for batch in order.split(BATCH):
            loss = cross_entropy(net(shift(images[batch], generator)), labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1}: loss {np.mean(losses):.4f}")
    net.eval()
    return net


def accuracy(net: DigitNet, data: Split) -> float:
    """The share of `data` that the network labels correctly, 0 to 1."""
    with torch.inference_mode():
        return float((net(torch.from_numpy(data.images)).argmax(1).numpy() == data.labels).mean())


def export(net: DigitNet, path: Path) -> None:
    """Write the network as ONNX, with a batch dimension that stays free."""
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.onnx.export(
        net,
        (torch.zeros(2, 1, 8, 8),),
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes={"image": {0: batch}},
        opset_version=18,
        dynamo=True,
        external_data=False,
    )
    assert program is not None
    for node in program.model.graph:  # the exporter notes source lines of this machine in every node
        node.metadata_props.clear()
    program.model.graph.metadata_props.clear()
    program.save(path, external_data=False)


def main() -> None:
    """Train, export, and cut the data that the tests use."""
    training, held_out = load()
    net = train(training)
    print(f"accuracy: training {accuracy(net, training):.4f}, held out {accuracy(net, held_out):.4f}")
    export(net, ROOT / "models" / "digits.onnx")

    # Calibration data must be what the model sees in use, but never what it is judged by.
    chosen = np.random.default_rng(SEED).permutation(len(training.labels))[: CALIBRATION_FILES * CALIBRATION_IMAGES]
    (ROOT / "data" / "calibration").mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(np.split(chosen, CALIBRATION_FILES)):
        np.savez_compressed(ROOT / "data" / "calibration" / f"part-{number}.npz", image=training.images[part])
    np.savez_compressed(ROOT / "data" / "held_out.npz", images=held_out.images, labels=held_out.labels)


if __name__ == "__main__":
    main()
