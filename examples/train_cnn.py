"""Any `nn.Module` with a loss: a small residual network with batch norm, on pictures made up on the spot.

Run it with `python examples/train_cnn.py`. Everything happens on this machine; for a real pool, leave `local_pool`
out and pass that pool's join token as `broker`.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn

import fusionai

CLASSES = 6
SIDE = 16


class Net(nn.Module):
    """Pictures (B, 3, 16, 16) and classes (B,) to a loss. Nothing in it knows of FusionAI."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(16)
        self.convolution1 = nn.Conv2d(16, 16, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(16)
        self.convolution2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.norm3 = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, CLASSES)

    def scores(self, images: Tensor) -> Tensor:
        """Return a score for each class, (B, CLASSES)."""
        hidden = torch.relu(self.norm1(self.stem(images)))
        hidden = hidden + torch.relu(self.norm2(self.convolution1(hidden)))
        hidden = torch.relu(self.norm3(self.convolution2(hidden)))
        return self.head(hidden.mean(dim=(2, 3)))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy loss."""
        return nn.functional.cross_entropy(self.scores(images), labels)


def stripes(step: int, index: int, size: int = 32) -> dict[str, Tensor]:
    """Return a microbatch of noisy stripes, whose direction is the class; a pure function of step and index."""
    generator = torch.Generator().manual_seed(1_000 * step + index)
    labels = torch.randint(0, CLASSES, (size,), generator=generator)
    angle = (labels * math.pi / CLASSES)[:, None, None]
    phase = 2 * math.pi * torch.rand((size, 1, 1), generator=generator)
    row, column = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    wave = torch.sin(1.5 * (row * angle.sin() + column * angle.cos()) + phase)
    noise = 0.5 * torch.randn((size, 3, SIDE, SIDE), generator=generator)
    return {"images": wave[:, None] + noise, "labels": labels}


def main() -> None:
    """Train, then count how many new pictures the trained network gets right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--run", help="run folder (default: a new one under runs)")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    net = Net()
    with fusionai.local_pool(compnodes=2) as pool:
        result = fusionai.train(
            net,
            stripes,
            broker=pool.token,
            steps=arguments.steps,
            microbatches=4,
            learning_rate=3e-3,
            heldout=[stripes(1_000_000, index) for index in range(4)],
            run=arguments.run,
        )
    print(f"trained on {', '.join(result.compnodes)}: loss {result.first_loss:.3f} -> {result.final_loss:.3f}")
    print(f"held-out loss {result.heldout_loss:.3f}; checkpoint {result.checkpoint}")

    net.eval()  # the trained weights are back in the module
    fresh = stripes(2_000_000, 0, size=600)
    with torch.no_grad():
        right = (net.scores(fresh["images"]).argmax(dim=1) == fresh["labels"]).float().mean()
    print(f"{right:.0%} of 600 new pictures are classified right; guessing gets {1 / CLASSES:.0%}")


if __name__ == "__main__":
    main()
