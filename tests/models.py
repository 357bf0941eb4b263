"""Small models and batches for the tests; CASES: of every kind that `batched` serves."""

import torch
import torch.nn.functional as F
from torch import nn

from psfast.models import DecoderOnlyTransformer, MaskedCrossEntropy


class First(nn.Module):
    """The output sequence of a recurrent layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


class Tied(nn.Module):
    """The token embedding is the head's weight too."""

    def __init__(self):
        super().__init__()
        self.body = DecoderOnlyTransformer(11, 8, 1, 2, 16, max_len=6, dropout=0.1)
        self.body.head.weight = self.body.token_embedding.weight

    def forward(self, tokens):
        return self.body(tokens)


class UsedTwice(nn.Module):
    """One matrix as weight, as its own transpose, and by itself; in-place ops on views."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))
        self.scale = nn.Parameter(torch.randn(()))
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        h = torch.tanh(x @ self.weight)
        h = h @ self.weight.t() + self.weight.mean(0)
        h[:, 1:3] += 0.5
        h[:, 0].mul_(self.scale)
        return self.out(torch.relu_(h))


class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("mask", torch.tensor([1.0, 0, 1, 1, 0, 1]))
        self.frozen = nn.Linear(6, 3).requires_grad_(False)
        self.unused = nn.Parameter(torch.randn(2))

    def forward(self, x):
        return self.frozen(self.norm(nn.functional.gelu(self.linear(x))) * self.mask)


def images():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 2, stride=2, groups=1),
        nn.Conv2d(3, 6, 1, groups=3, bias=False),
        nn.Sigmoid(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(6, 3),
    )


def encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 1)


def again():
    """Layers that go by two names each."""
    layers = nn.Linear(5, 5), nn.Tanh()
    return nn.Sequential(*layers, *layers, nn.Linear(5, 3))


def tokens(B, T, V):
    return torch.randint(0, V, (B, T))


def some_ignored(B, T, V):
    targets = tokens(B, T, V)
    targets[:, : T // 2] = 100
    return targets


def classes(B=3, C=3):
    return torch.randint(0, C, (B,))


CASES = {
    "mlp": lambda: (
        nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.SiLU(), nn.Linear(6, 3)),
        nn.CrossEntropyLoss(),
        torch.randn(4, 5),
        classes(4),
    ),
    "one row": lambda: (
        nn.Sequential(nn.Linear(5, 7), nn.Softplus(), nn.Linear(7, 3)),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        torch.randn(1, 5),
        classes(1),
    ),
    "cnn": lambda: (images(), nn.CrossEntropyLoss(), torch.randn(3, 2, 8, 8), classes()),
    "conv1d": lambda: (
        nn.Sequential(nn.Conv1d(2, 3, 3), nn.ELU(), nn.Conv1d(3, 2, 2, dilation=2), nn.Flatten()),
        nn.MSELoss(),
        torch.randn(2, 2, 9),
        torch.randn(2, 10),
    ),
    "group norm, one row": lambda: (
        nn.Sequential(
            *(nn.Conv1d(2, 4, 3), nn.InstanceNorm1d(4, affine=True), nn.Flatten()),
            *(nn.GroupNorm(2, 12), nn.Tanh(), nn.Linear(12, 3)),
        ),
        nn.CrossEntropyLoss(),
        torch.randn(1, 2, 5),
        classes(1),
    ),
    "gru": lambda: (
        First(nn.GRU(3, 5, num_layers=2, dropout=0.3, batch_first=True)),
        nn.MSELoss(),
        torch.randn(2, 4, 3),
        torch.randn(2, 4, 5),
    ),
    "lstm": lambda: (
        First(nn.LSTM(3, 4, bidirectional=True)),
        nn.SmoothL1Loss(),
        torch.randn(3, 2, 3),
        torch.randn(3, 2, 8),
    ),
    "encoder": lambda: (encoder(), nn.MSELoss(), torch.randn(2, 3, 8), torch.randn(2, 3, 8)),
    "decoder": lambda: (
        DecoderOnlyTransformer(11, 8, 2, 2, 16, max_len=7, dropout=0.2),
        MaskedCrossEntropy(),
        tokens(2, 6, 11),
        some_ignored(2, 6, 11),
    ),
    "tied": lambda: (Tied(), MaskedCrossEntropy(), tokens(2, 5, 11), some_ignored(2, 5, 11)),
    "bag": lambda: (
        nn.Sequential(nn.EmbeddingBag(10, 4, mode="mean"), nn.Linear(4, 3)),
        nn.CrossEntropyLoss(),
        tokens(3, 5, 10),
        classes(),
    ),
    "used twice": lambda: (UsedTwice(), nn.L1Loss(), torch.randn(3, 5), torch.randn(3, 3)),
    "two names": lambda: (again(), nn.MSELoss(), torch.randn(4, 5), torch.randn(4, 3)),
    "buffers": lambda: (Buffers(), nn.CrossEntropyLoss(), torch.randn(4, 4), classes(4)),
}


def build(name, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    model, criterion, inputs, targets = CASES[name]()
    inputs, targets = (x.to(dtype) if x.is_floating_point() else x for x in (inputs, targets))
    model = model.to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # no zeros and ones
    return model, criterion, inputs, targets


def some_points(f, per_tensor, seed=0):
    """A few coordinates of every tensor, each with its step."""
    generator = torch.Generator().manual_seed(seed)
    index = [
        torch.randint(start, stop, (per_tensor,), generator=generator)
        for start, stop in zip(f.flat.offsets, f.flat.offsets[1:], strict=False)
    ]
    index = torch.cat(index)
    index = index[torch.randperm(len(index), generator=generator)]
    delta = 0.3 * torch.randn(len(index), generator=generator, dtype=torch.float64)
    return index, delta.to(f.flat.buffer.dtype)


def regression(seed=0, dtype=torch.float64, dropout=0.0):
    """A small model, and its closure."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 2)).to(dtype)
    x, y = torch.randn(10, 4, dtype=dtype), torch.randn(10, 2, dtype=dtype)
    return net, lambda: F.mse_loss(net(x), y)


def values(net):
    return [p.detach().clone() for p in net.parameters()]


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
