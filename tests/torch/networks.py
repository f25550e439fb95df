"""Modules to check: small, and wrong in the ways that modules are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

WIDTH = 8


class WrongLinear(nn.Linear):
    """A layer that its export gets wrong."""

    def forward(self, x: Any) -> Any:
        y = super().forward(x)
        return y * 1.2 if torch.compiler.is_exporting() else y


class Mlp(nn.Module):
    def __init__(self, *, wrong: bool = False) -> None:
        super().__init__()
        self.fc1 = (WrongLinear if wrong else nn.Linear)(WIDTH, 2 * WIDTH)
        self.fc2 = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Any) -> Any:
        return self.fc2(torch.relu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, *, wrong: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = Mlp(wrong=wrong)

    def forward(self, x: Any) -> Any:
        return x + self.mlp(self.norm(x))


class Blocks(nn.Module):
    """Token numbers through six blocks; the export of the one that is named is wrong in a layer."""

    def __init__(self, wrong: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(32, WIDTH)
        self.blocks = nn.Sequential(*[Block(wrong=index == wrong) for index in range(6)])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids: Any, mask: Any = None) -> dict[str, Any]:
        x = self.blocks(self.embedding(ids))
        if mask is not None:
            x = x * mask[..., None]
        return {"logits": self.head(x), "hidden": (x, x.mean(1))}


class Net(nn.Module):
    """Whatever is to be done between two layers."""

    def __init__(self, act: Any = torch.relu) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.inner = Act(act)
        self.last = nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        return self.last(self.inner(self.first(x)))


class Act(nn.Module):
    def __init__(self, act: Any) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Any) -> Any:
        return self.act(x)


class Counting(nn.Module):
    """Changes itself whenever it is run."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros(()))
        self.calls = 0
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Any) -> Any:
        self.runs += 1
        self.calls += 1
        return self.norm(x)


class Drops(nn.Module):
    """Drops in evaluation mode too, which its export does not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        y = self.linear(x)
        return y if torch.compiler.is_exporting() else nn.functional.dropout(y, 0.5, training=True)
