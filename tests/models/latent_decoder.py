"""A decoder whose keys and values follow from a latent of a few numbers."""

from __future__ import annotations

from tests.models.tiny_decoder import D, Decoder, H
from tilewright.ir import Value, ops

RANK = 6


class LatentDecoder(Decoder):
    """Four heads of keys and of values, linear in ``RANK`` numbers of a token."""

    def layer(self, i: int, x: Value) -> Value:
        latent = self.b(ops.Linear, x, self.weight(f"{i}.down", RANK, H))
        latent = self.b(ops.RmsNorm, latent, self.weight(f"{i}.latent", RANK))
        q = self.split(self.b(ops.Linear, x, self.weight(f"{i}.q", 4 * D, H)), 4)
        k, v = (self.split(self.b(ops.Linear, latent, self.weight(f"{i}.{n}", 4 * D, RANK)), 4) for n in "kv")
        y = self.b(ops.Attention, q, k, v, scale=D**-0.5, causal=True)
        y = self.b(ops.Reshape, y, (*x.shape[:2], 4 * D))
        return self.b(ops.Add, x, self.b(ops.Linear, y, self.weight(f"{i}.o", H, 4 * D)))
