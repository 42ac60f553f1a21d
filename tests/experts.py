"""Layers with experts for tests."""

import numpy as np
from blocks import PLAIN, geometry, llama, shapes

from singlequant import _C

HIDDEN, INNER, SHARED = 64, 32, 96
A = geometry(HIDDEN, INNER, 4, 2, 16)
BASE = {"count": 8, "chosen": 2, "scoring": "softmax", "activation": "silu"}


def orthogonal(rng, n):
    return np.linalg.qr(rng.normal(size=(n, n)))[0].astype(np.float32)


class Maker:
    """Makes linears of a layer and of its twin, and the sites that they read."""

    def __init__(self, rng, packed=False, bits=16, bias=False, rotated=False):
        self.rng, self.packed, self.bits, self.bias, self.rotated = rng, packed, bits, bias, rotated
        self.sites = {}

    def site(self, name, k):
        if name not in self.sites:
            turn = None
            if self.rotated:
                factors = [orthogonal(self.rng, f) for f in _C.factor_sizes(k)]
                turn = _C.Rotation(k, *factors)
            self.sites[name] = (k, turn, self.bits, 0.95) if self.packed else (k, *PLAIN)
        return name

    def linear(self, site, n, k):
        """(linear, the twin's)."""
        rng, site = self.rng, self.site(site, k)
        w = (rng.normal(size=(n, k)) / np.sqrt(k)).astype(np.float32)
        bias = rng.normal(size=n).astype(np.float32) / 4 if self.bias else None
        if not self.packed:
            return (site, w, bias), (site, w, bias)
        codes, scales, _ = _C.quantize(w)
        weight = _C.PackedWeight(_C.pack(codes), scales, k)
        return (site, weight, bias), (site, self.twin(_C.dequantize(codes, scales), site), bias)

    def twin(self, values, site):
        _, rotation, bits, clip = self.sites[site]

        def weight(x):
            x = x.astype(np.float32)
            if rotation is not None:
                x = _C.rotate(x, rotation)
            if bits < 16:
                x = _C.dequantize(*_C.quantize(x, bits=bits, clip=clip)[:2])
            return x.astype(np.float64) @ values.T

        return weight

    def mlp(self, sites, inner, gated=True):
        """(gate, up, down) of the layer, and of its twin."""
        roles = [self.linear(sites[0], inner, HIDDEN) if gated else (None, None),
                 self.linear(sites[0], inner, HIDDEN), self.linear(sites[1], HIDDEN, inner)]
        return tuple(zip(*roles, strict=True))


def layers(options=(), shared=None, gated=True, dtype=np.float32, parallel=False, **how):
    """(arguments of a layer with experts, of its twin). options change BASE; shared: the site that
    the shared MLP reads, or None."""
    rng = np.random.default_rng(3)
    make, e = Maker(rng, **how), BASE | dict(options)
    site_of = {role: "qkv" if role in "qkv" else "o" for role in "qkvo"}
    attention = {role: make.linear(site_of[role], *shapes(A)[role]) for role in "qkvo"}
    each = [make.mlp((f"gate_up.{i}", f"down.{i}"), INNER, gated) for i in range(e["count"])]
    e["router"] = rng.normal(size=(e["count"], HIDDEN)).astype(dtype) / np.asarray(6, dtype)
    if "router_bias" in e:
        e["router_bias"] = rng.normal(size=e["count"]).astype(np.float32)
    if "correction" in e:
        e["correction"] = rng.normal(size=e["count"]).astype(np.float32) / 4
    if "shared_gate" in e:
        e["shared_gate"] = rng.normal(size=(1, HIDDEN)).astype(dtype) / np.asarray(6, dtype)
    both = shared and make.mlp((shared, "shared_down"), SHARED)
    result = []
    for which in (0, 1):
        own = e | {"each": [mlps[which] for mlps in each]}
        if shared:
            roles = dict(zip(("gate", "up", "down"), both[which], strict=True))
            own["shared"] = {"activation": "gelu_tanh", **roles}
        linears = {role: pair[which][1:] for role, pair in attention.items()}
        filler = {role: (None, None) for role in ("gate", "up", "down")}
        parts = llama(A, linears | filler) | {"mlp": None, "experts": own, "parallel": parallel}
        parts["sites"] = dict(make.sites)
        if parallel:
            del parts["norms"]["before_mlp"]
        result.append(parts)
    return result
