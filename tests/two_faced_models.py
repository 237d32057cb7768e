"""Small modules that compute something else in evaluation mode, in one way each, and modules that do not."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES, WIDTH = 9, 8


class Net(nn.Module):
    """Tokens (B, T) and labels (B, T) to a loss: embedding, four linear layers, head. Subclasses change parts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])
        self.head = nn.Linear(WIDTH, CLASSES)
        self.prepare()

    def prepare(self) -> None:
        """Add further parts."""

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for number, layer in enumerate(self.layers):
            hidden = self.step(number, hidden, layer)
        return self.leave(hidden, labels)

    def step(self, number: int, hidden: Tensor, layer: nn.Module) -> Tensor:
        return hidden + torch.tanh(layer(hidden))

    def leave(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.head(hidden), labels)

    @staticmethod
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class OtherLoss(Net):
    """What the issue shows: the loss is twice as large in evaluation."""

    def leave(self, hidden: Tensor, labels: Tensor) -> Tensor:
        loss = super().leave(hidden, labels)
        return loss if self.training else 2 * loss


class AuxiliaryHead(Net):
    """A second head, on the second layer, has a loss in training only; evaluation returns no tuple."""

    def prepare(self) -> None:
        self.auxiliary = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        early = hidden
        for number, layer in enumerate(self.layers):
            hidden = self.step(number, hidden, layer)
            early = hidden if number == 1 else early
        loss = self.leave(hidden, labels)
        if not self.training:
            return loss
        extra = self.loss(self.auxiliary(early), labels)
        return (loss + 0.3 * extra, extra)  # type: ignore[return-value]


class StochasticDepth(Net):
    """In training, layers are scaled down; evaluation runs them in full."""

    def step(self, number: int, hidden: Tensor, layer: nn.Module) -> Tensor:
        return hidden + torch.tanh(layer(hidden)) * (0.5 if self.training and number else 1.0)


class LayerDropped(Net):
    """Evaluation has one layer more, between the second and the third."""

    def prepare(self) -> None:
        self.calibration = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def step(self, number: int, hidden: Tensor, layer: nn.Module) -> Tensor:
        hidden = super().step(number, hidden, layer)
        return hidden if self.training or number != 1 else hidden * self.calibration


class Skipping(Net):
    """Evaluation adds the first layer's output to the last layer's: a tensor that training does not send so far."""

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        hidden = first = self.embedding(tokens)
        for number, layer in enumerate(self.layers):
            hidden = self.step(number, hidden, layer)
            first = hidden if number == 0 else first
        return self.leave(hidden if self.training else hidden + first, labels)


class Noise(Net):
    """Training adds noise to the input of each layer."""

    def step(self, number: int, hidden: Tensor, layer: nn.Module) -> Tensor:
        if self.training:
            hidden = hidden + 0.01 * torch.randn_like(hidden)
        return super().step(number, hidden, layer)


class Reversed(Net):
    """Evaluation runs the layers in the opposite order."""

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for number, layer in enumerate(self.layers if self.training else reversed(self.layers)):
            hidden = self.step(number, hidden, layer)
        return self.leave(hidden, labels)


class AlwaysBatchStatistics(Net):
    """A functional batch norm that is in training mode in both modes, and writes its statistics in both."""

    def prepare(self) -> None:
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("variance", torch.ones(WIDTH))

    def step(self, number: int, hidden: Tensor, layer: nn.Module) -> Tensor:
        hidden = super().step(number, hidden, layer)
        if number != 1:
            return hidden
        flat = functional.batch_norm(hidden.flatten(0, 1), self.mean, self.variance, training=True)  # type: ignore[arg-type]
        return flat.view(hidden.shape)


class OwnSwitch(Net):
    """A class of its own hears of the mode through `train()`."""

    def prepare(self) -> None:
        self.factor = 1.0

    def train(self, mode: bool = True) -> Net:
        self.factor = 1.0 if mode else 3.0
        return super().train(mode)

    def leave(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return super().leave(hidden * self.factor, labels)


class OtherLabels(Net):
    """Training smooths labels, evaluation does not."""

    def leave(self, hidden: Tensor, labels: Tensor) -> Tensor:
        smoothing = 0.1 if self.training else 0.0
        logits = self.head(hidden).flatten(0, 1)
        return functional.cross_entropy(logits, labels.flatten(), label_smoothing=smoothing)


DIFFERENT: tuple[type[Net], ...] = (
    OtherLoss,
    AuxiliaryHead,
    StochasticDepth,
    LayerDropped,
    Skipping,
    Noise,
    Reversed,
    AlwaysBatchStatistics,
    OwnSwitch,
    OtherLabels,
)


class Dropping(Net):
    """Dropout as a module, and as a function that asks for the mode."""

    def prepare(self) -> None:
        self.dropout = nn.Dropout(0.1)

    def step(self, number: int, hidden: Tensor, layer: nn.Module) -> Tensor:
        hidden = functional.dropout(super().step(number, hidden, layer), 0.2, training=self.training)
        return functional.alpha_dropout(self.dropout(hidden), 0.1, training=self.training)


class Normalising(Net):
    """Every kind of normalisation over the batch, one of them frozen, and one without statistics."""

    def prepare(self) -> None:
        self.norms = nn.ModuleList(
            [
                nn.BatchNorm1d(WIDTH),
                nn.BatchNorm1d(WIDTH, track_running_stats=False),
                nn.BatchNorm1d(WIDTH).eval(),
                nn.InstanceNorm1d(WIDTH, track_running_stats=True),
            ]
        )
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("variance", torch.ones(WIDTH))

    def step(self, number: int, hidden: Tensor, layer: nn.Module) -> Tensor:
        across = super().step(number, hidden, layer).transpose(1, 2)
        if number == 3:
            across = functional.batch_norm(across, self.mean, self.variance, training=self.training)  # type: ignore[arg-type]
        return self.norms[number](across).transpose(1, 2)


class AskingInVain(Net):
    """Asks for the mode, and does the same in both."""

    def step(self, number: int, hidden: Tensor, layer: nn.Module) -> Tensor:
        if self.training and number > 7:
            hidden = hidden + 1
        return super().step(number, hidden, layer)


class AttendingWithDropout(Net):
    """Attention that drops weights out in training."""

    def step(self, number: int, hidden: Tensor, layer: nn.Module) -> Tensor:
        heads = hidden.unflatten(-1, (2, WIDTH // 2)).transpose(1, 2)
        dropped = 0.1 if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(heads, heads, heads, dropout_p=dropped, is_causal=True)
        return super().step(number, mixed.transpose(1, 2).flatten(2), layer)


SAME: tuple[type[Net], ...] = (Net, Dropping, Normalising, AskingInVain, AttendingWithDropout)


def batch(index: int, rows: int = 2, length: int = 10) -> dict[str, Tensor]:
    """Return a microbatch of random tokens and labels."""
    generator = torch.Generator().manual_seed(index)
    return {
        "tokens": torch.randint(CLASSES, (rows, length), generator=generator),
        "labels": torch.randint(CLASSES, (rows, length), generator=generator),
    }


ROLES = {"tokens": "tokens", "labels": "labels"}
