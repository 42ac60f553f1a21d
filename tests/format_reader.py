# SPDX-License-Identifier: Apache-2.0
"""A second, plain reader of the packed format: what docs/format.md says is enough to write it."""

import json
from pathlib import Path

import numpy as np

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4",
          "I8": "<i1", "U8": "<u1"}


def read_tensors(path: Path) -> dict:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    tensors = {}
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            values = np.frombuffer(raw[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
            if entry["dtype"] == "BF16":  # the upper half of a float32
                values = (values.astype(np.uint32) << 16).view(np.float32)
            tensors[name] = values
    return tensors


def read_model(folder: Path) -> tuple:
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "singlequant"
    assert quantization["format_version"] in (1, 2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {file: read_tensors(folder / file) for file in set(index.values())}
    return quantization, {name: shards[file][name] for name, file in index.items()}


def sites(quantization: dict, layer: int) -> dict:
    """Names of the linears by site; version 1 knew one kind of layer."""
    if quantization["format_version"] == 1:
        names = {"qkv": "self_attn.q self_attn.k self_attn.v", "o": "self_attn.o",
                 "gate_up": "mlp.gate mlp.up", "down": "mlp.down"}
        return {site: [f"model.layers.{layer}.{name}_proj" for name in text.split()]
                for site, text in names.items()}
    model = quantization["model"]
    kind = model["kinds"][model["pattern"][layer % len(model["pattern"])]]
    return {site: [kind["linears"][role]["name"].replace("{i}", str(layer)) for role in roles]
            for site, roles in kind["sites"].items()}


def weight(tensors: dict, linear: str) -> np.ndarray:
    """[n, k] as the linear multiplies it."""
    if f"{linear}.weight" in tensors:
        return tensors[f"{linear}.weight"].astype(np.float64)
    words, scales, (n, k) = (tensors[f"{linear}.weight_{p}"] for p in ("packed", "scale", "shape"))
    bits = int(tensors.get(f"{linear}.weight_bits", [4])[0])
    stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, : k * bits]
    codes = stream.reshape(n, k, bits) @ 2.0 ** np.arange(bits) - 2 ** (bits - 1)
    return codes * np.repeat(scales, k // scales.shape[1], axis=1)


def table(quantization: dict, tensors: dict, key: str) -> np.ndarray:
    """[vocab, width] of the embedding (key: embed) or the head."""
    model = quantization["model"]
    name = model["embed" if model["tied"] else key]
    bits = quantization.get({"embed": "embedding_bits", "head": "head_bits"}[key], 16)
    if bits == 16:
        return tensors[f"{name}.weight"].astype(np.float64)
    codes, scales = tensors[f"{name}.weight_codes"], tensors[f"{name}.weight_scale"]
    width = model.get("embed_width") or model["hidden"]
    spread = np.repeat(scales, 32, axis=1)
    if bits == 8:
        return codes.astype(np.float64) * spread[:, :width]
    blocks = codes.reshape(*scales.shape, 4 * bits).astype(np.int64)
    column = np.arange(32)
    values = blocks[..., column % 16] >> column // 16 * 4 & 15
    if bits == 6:
        values |= (blocks[..., 16 + column % 8] >> column // 8 * 2 & 3) << 4
    return ((values - 2 ** (bits - 1)).reshape(len(codes), -1) * spread)[:, :width]


def quantize(tensors: dict, layer: int, site: str, activations: dict, x: np.ndarray) -> np.ndarray:
    """x [m, k], rotated, as the packed linears of a site read it: codes times scales."""
    clip, high = (tensors.get(f"model.layers.{layer}.activations.{site}.{name}", [default])[0]
                  for name, default in (("clip", activations["clip"]), ("high", 0)))
    y = x.copy()
    for part, bits, share in ((y[:, :high], 8, 1), (y[:, high:], activations["bits"], clip)):
        if bits < 16 and part.size:
            scale = share * np.abs(part).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
            codes = np.rint(part / np.where(scale > 0, scale, 1))
            part[:] = np.clip(codes, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
    return y


def paley(q: int, border: int) -> np.ndarray:
    """The bordered Jacobsthal matrix of order q + 1."""
    chi, s = np.full(q, -1), np.ones((q + 1, q + 1))
    chi[np.arange(q) ** 2 % q], chi[0], s[1:, 0], s[0, 0] = 1, 0, border, 0
    s[1:, 1:] = chi[(np.arange(q)[:, None] - np.arange(q)) % q]
    return s


def hadamard(n: int) -> np.ndarray:
    """The matrix of order n of docs/format.md."""
    two, odd = n & -n, n // (n & -n)
    angle = 2 * np.pi * np.outer(np.arange(odd), np.arange(odd)) / odd
    core = np.cos(angle) + np.sin(angle)
    for r in [2**i for i in range(2, 11) if odd > 1 and 2**i <= two and odd * 2**i <= 1024]:
        p = odd * r
        if all((p - 1) % d for d in range(2, p - 1)):  # prime
            core = paley(p - 1, -1) + np.eye(p)
            break
        if r == 4 and all((p // 2 - 1) % d for d in range(2, p // 2 - 1)):
            core = np.kron(paley(p // 2 - 1, 1), [[1, 1], [1, -1]])
            core += np.kron(np.eye(p // 2), [[1, -1], [-1, -1]])
            break
    while len(core) < n:
        core = np.kron(core, [[1, 1], [1, -1]])
    return core / np.sqrt(n)


def factor(tensors: dict, name: str) -> np.ndarray:
    """[order, order] acting on column vectors; for `right` that is the transpose of the matrix."""
    if name in tensors:
        return tensors[name].T if name.endswith("right") else tensors[name]
    order, mixed = tensors[f"{name}_chain"]
    matrix = hadamard(int(order)) if mixed else np.eye(order)
    for (i, j), angle in zip(tensors[f"{name}_pairs"], tensors[f"{name}_angles"], strict=True):
        c, s = np.cos(angle), np.sin(angle)
        matrix[i], matrix[j] = c * matrix[i] - s * matrix[j], s * matrix[i] + c * matrix[j]
    return matrix


def rotate(tensors: dict, layer: int, site: str, x: np.ndarray) -> np.ndarray:
    """x [m, k] as it enters the linears of a site, before it is quantized."""
    prefix = f"model.layers.{layer}.rotations.{site}"
    if f"{prefix}.first" in tensors:
        for t in (tensors[f"{prefix}.{part}"] for part in ("first", "permutation", "second")):
            x = x[:, t] if t.ndim == 1 else (x.reshape(len(x), len(t), 1, -1) @ t).reshape(x.shape)
    elif f"{prefix}.left" in tensors or f"{prefix}.left_chain" in tensors:
        left = factor(tensors, f"{prefix}.left")
        if f"{prefix}.align" in tensors:
            blocks = tensors[f"{prefix}.align"].astype(np.float64)
            rows = x.reshape(len(x), len(blocks), 1, -1)
            x = (rows @ blocks).reshape(x.shape)
        if f"{prefix}.right" in tensors or f"{prefix}.right_chain" in tensors:
            right = factor(tensors, f"{prefix}.right")
        else:
            right = np.eye(x.shape[1] // len(left))
        x = (left @ x.reshape(len(x), len(left), len(right)) @ right.T).reshape(x.shape)
    return x
