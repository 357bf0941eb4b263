"""The decoder-only transformer of the state-tracking runs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psfast.checks import check_count, check_number


class CausalSelfAttention(nn.Module):
    """Causal softmax attention.

    The rows of ``qkv`` are grouped by head: head h owns rows [3 h d_k, 3 (h + 1) d_k), its
    query rows first, then key, then value. So a change of one row touches one head only.

    x: (B, T, d_model) -> (B, T, d_model)
    """

    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        B, T, d_model = x.shape
        heads = self.qkv(x).view(B, T, self.n_heads, 3 * (d_model // self.n_heads)).transpose(1, 2)
        q, k, v = heads.chunk(3, dim=-1)  # each (B, n_heads, T, d_k)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(B, T, d_model))


class Block(nn.Module):
    """Pre-LayerNorm block: ``x + attention(ln1(x))``, then ``x + ff(ln2(x))``.

    x: (B, T, d_model) -> (B, T, d_model)
    """

    def __init__(self, d_model: int, n_heads: int, d_ff: int, dropout: float):
        super().__init__()
        self.ln1 = nn.LayerNorm(d_model)
        self.attention = CausalSelfAttention(d_model, n_heads)
        self.ln2 = nn.LayerNorm(d_model)
        self.ff = nn.Sequential(
            nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln1(x))
        return x + self.ff(self.ln2(x))


class DecoderOnlyTransformer(nn.Module):
    """Token and learned position embeddings, ``n_layers`` blocks, LayerNorm, linear head.

    tokens: (B, T) int64, each in [0, vocab_size), T <= max_len -> logits: (B, T, vocab_size)

    The defaults are the "small" size: 121,446 parameters. Positions start at zero.

    Raises ValueError for sizes that cannot be, a sequence longer than ``max_len`` and (on
    CPU) a token outside the vocabulary; TypeError for tokens that are not integers.
    """

    def __init__(
        self,
        vocab_size: int = 102,
        d_model: int = 64,
        n_layers: int = 2,
        n_heads: int = 4,
        d_ff: int = 256,
        max_len: int = 128,
        dropout: float = 0.1,
    ):
        super().__init__()
        sizes = {
            "vocab_size": vocab_size,
            "d_model": d_model,
            "n_layers": n_layers,
            "n_heads": n_heads,
            "d_ff": d_ff,
            "max_len": max_len,
        }
        for name, value in sizes.items():
            check_count(name, value)
        if d_model % n_heads:
            raise ValueError(
                f"d_model must be divisible by n_heads, got d_model={d_model}, n_heads={n_heads}"
            )
        check_number("dropout", dropout, at_least=0.0, below=1.0)
        self.vocab_size = vocab_size
        self.max_len = max_len
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.position_embedding = nn.Parameter(torch.zeros(max_len, d_model))
        self.blocks = nn.ModuleList(Block(d_model, n_heads, d_ff, dropout) for _ in range(n_layers))
        self.final_norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, T) int64 -> logits: (B, T, vocab_size)"""
        if tokens.ndim != 2:
            raise ValueError(f"tokens must have shape (B, T), got {tuple(tokens.shape)}")
        if tokens.is_floating_point():
            raise TypeError(f"tokens must be integers, got {tokens.dtype}")
        T = tokens.shape[1]
        if self.max_len < T:
            raise ValueError(f"tokens must have T <= max_len = {self.max_len}, got T = {T}")
        try:
            x = self.token_embedding(tokens)
        except IndexError as error:
            low, high = tokens.min().item(), tokens.max().item()
            raise ValueError(
                f"tokens must lie in [0, {self.vocab_size}), got values from {low} to {high}"
            ) from error
        x = x + self.position_embedding[:T]
        for block in self.blocks:
            x = block(x)
        return self.head(self.final_norm(x))


class MaskedCrossEntropy(nn.Module):
    """Mean cross-entropy over the supervised positions (target != ``ignore_index``).

    logits: (B, T, V) float; targets: (B, T) int64 -> scalar

    Equivalent to: ``F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=...)``

    A batch without supervised positions has the loss NaN, which never wins a poll.
    """

    def __init__(self, ignore_index: int = 100):
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """logits: (B, T, V), targets: (B, T) int64 -> the mean loss, a scalar"""
        if logits.ndim != 3 or logits.shape[:2] != targets.shape:
            raise ValueError(
                "logits must be (B, T, V) and targets (B, T), "
                f"got {tuple(logits.shape)} and {tuple(targets.shape)}"
            )
        return F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=self.ignore_index
        )
