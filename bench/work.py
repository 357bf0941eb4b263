"""The useful work of a trial point, to say what share of the machine's peak a backend reaches.

Level C of the design: a trial point starts as a rank-1 change at its tensor and is carried
through the next linear map by a prepared product; only one head is touched by a change of qkv;
attention is causal; behind the last layer's keys and values only supervised positions are
computed. Additions and multiplications of the linear maps and of attention count, nothing else.
"""

import time

import torch

import psfast


def complete_poll_flops(model: psfast.DecoderOnlyTransformer, inputs, supervised) -> float:
    """The mean over all 2N trial points, those that cannot change the loss at zero.

    inputs: (B, T) tokens; supervised: (B, T) bool
    """
    B, T = inputs.shape
    D, V, L = model.head.in_features, model.head.out_features, len(model.blocks)
    H, F = model.blocks[0].attention.n_heads, model.blocks[0].ff[0].out_features
    keys = torch.arange(1, T + 1).expand(B, T)  # that a query attends to
    everywhere = torch.ones_like(supervised)

    def queries(layer):
        return supervised if layer == L - 1 else everywhere

    def attention(layer, heads):
        return heads * 4 * (D // H) * keys[queries(layer)].sum().item()

    def ff2(layer):
        return 2 * queries(layer).sum().item() * F * D

    def behind_attention(layer, width):  # `width` columns of its output carried into ff1
        rows = queries(layer).sum().item()
        return 2 * rows * width * (D + F) + ff2(layer)

    def from_stream(layer):  # a rank-1 change of the layer's input
        if layer == L:
            return 0
        return attention(layer, H) + behind_attention(layer, D) + from_input(layer + 1)

    def from_input(layer):  # any change of it
        if layer == L:
            return 2 * supervised.sum().item() * D * V
        asked = queries(layer).sum().item()
        return 2 * D * D * (2 * B * T + asked) + from_stream(layer)

    total = 0
    in_use = inputs.unique().numel()
    for row in range(T):  # positions: those behind stay as they are
        total += D * from_input(0) * (T - row) / T
    total += in_use * D * from_input(0)
    for layer in range(L):
        behind = from_input(layer + 1)
        one_head = attention(layer, 1) + behind_attention(layer, D // H) + behind
        total += 3 * D * (D + 1) * one_head
        total += 2 * D * from_stream(layer)  # ln1
        total += (D * (D + 1) + 2 * D) * (ff2(layer) + behind)  # out and ln2
        total += (2 * F * D + F + D) * from_stream(layer + 1)  # ff1 and ff2
    return total / sum(p.numel() for p in model.parameters())


def matrix_product_rate(threads: int, size: int = 2048) -> float:
    """FLOP/s of torch's own large float32 product on so many threads, the best of several."""
    torch.set_num_threads(threads)
    a, b = torch.randn(2, size, size)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
