"""The losses of whole parameter vectors, for the peers that change all coordinates at once."""

import torch
import torch.nn.functional as F
from torch import Tensor

from psfast.random_state import seeded

_CHUNK = 16  # vectors at a time; activations beyond the cache cost more than small products


class Population:
    """``MaskedCrossEntropy(model(inputs), targets)`` of many parameter vectors, dropout on.

    A forward pass of ``DecoderOnlyTransformer`` in plain PyTorch with one batched product a
    layer for all vectors, and the head only at supervised positions. ``torch.func.vmap`` of
    the model needs 1.5 to 2 times as long for the tiny one, and 1.2 to 1.5 for the small.
    """

    def __init__(self, model, criterion):
        self.model, self.ignore_index = model, criterion.ignore_index
        self.names = [name for name, _ in model.named_parameters()]
        self.shapes = [p.shape for p in model.parameters()]
        self.sizes = [p.numel() for p in model.parameters()]

    @torch.no_grad()
    def losses(self, points: Tensor, inputs: Tensor, targets: Tensor, seed: int) -> Tensor:
        """points: (P, N), in the order of the model's parameters; inputs, targets: (B, T)

        Returns (P,), all with the dropout masks that the model draws under ``seed``.
        """
        ones = torch.ones(*inputs.shape, self.shapes[0][1])
        with seeded(seed, points.device):
            masks = [F.dropout(ones, block.ff[3].p).flatten(0, 1) for block in self.model.blocks]
        keep = (targets != self.ignore_index).flatten().nonzero().squeeze(1)
        wanted = targets.flatten()[keep]
        chunks = points.split(_CHUNK)
        return torch.cat([self._chunk(chunk, inputs, masks, keep, wanted) for chunk in chunks])

    def _chunk(self, points, inputs, masks, keep, wanted) -> Tensor:
        P, (B, T) = len(points), inputs.shape
        pieces = zip(self.names, points.split(self.sizes, 1), self.shapes, strict=True)
        value = {name: piece.view(P, *shape) for name, piece, shape in pieces}

        def linear(x, name):  # (P, n, in) -> (P, n, out)
            weight, bias = value[f"{name}.weight"], value[f"{name}.bias"]
            return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)

        def norm(x, name):
            weight, bias = value[f"{name}.weight"].unsqueeze(1), value[f"{name}.bias"].unsqueeze(1)
            return torch.addcmul(bias, F.layer_norm(x, x.shape[-1:]), weight)

        def attention(x, name, n_heads):
            heads = linear(x, f"{name}.qkv").view(P * B, T, n_heads, -1).transpose(1, 2)
            mixed = F.scaled_dot_product_attention(*heads.chunk(3, dim=-1), is_causal=True)
            return linear(mixed.transpose(1, 2).reshape(P, B * T, -1), f"{name}.out")

        x = value["token_embedding.weight"][:, inputs]
        x = (x + value["position_embedding"][:, None, :T]).flatten(1, 2)
        for number, (block, mask) in enumerate(zip(self.model.blocks, masks, strict=True)):
            name = f"blocks.{number}"
            x = x + attention(norm(x, f"{name}.ln1"), f"{name}.attention", block.attention.n_heads)
            hidden = linear(norm(x, f"{name}.ln2"), f"{name}.ff.0").relu_()
            x = x + linear(hidden, f"{name}.ff.2") * mask
        logits = linear(norm(x[:, keep], "final_norm"), "head")
        right = logits.gather(2, wanted.expand(P, -1).unsqueeze(2)).squeeze(2)
        return (logits.logsumexp(2) - right).mean(1)
