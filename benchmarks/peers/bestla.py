"""BesTLA from auto-round-lib: int4 weights, int8 computation, activations quantized in the call."""

import importlib.metadata

from .base import Turn, round_int4
from .torch_bf16 import TorchPeer


class Bestla(TorchPeer):
    kind, activations, group, avx2 = "int4", "int8, timed", 0, None

    def __init__(self, threads):
        super().__init__(threads)
        import auto_round_kernel

        self.kernel = auto_round_kernel
        if hasattr(auto_round_kernel.cpu_lib, "set_threads"):
            auto_round_kernel.cpu_lib.set_threads(threads)

    def version(self):
        return f"auto-round-lib {importlib.metadata.version('auto-round-lib')}"

    def weight_bytes(self, n, k):
        return n * k // 2 + 4 * n * (k // (self.group or k))

    def prepare(self, weight, copies):
        torch = self.torch
        self.n, self.k = weight.shape
        self.length = self.group or self.k
        codes, scales = round_int4(weight, self.length)
        zeros = torch.zeros((self.k // self.length, self.n), dtype=torch.int8)
        blob = self.kernel.repack_quantized_weight(
            torch.from_numpy(codes.T.copy()), torch.from_numpy(scales.T.copy()), zeros, self.length,
            "int8", "int4", "fp32", False)
        self.weights = Turn([blob, *(blob.clone() for _ in range(copies - 1))])

    def load(self, x):
        self.x = self.torch.from_numpy(x)
        self.y, self.bias = self.torch.zeros(len(x), self.n), self.torch.empty(0)

    def run(self):
        self.kernel.woqgemm(self.x, self.weights(), self.bias, self.n, self.k, self.length, "int8",
                            "int4", "fp32", False, out=self.y)


class PerChannel(Bestla):
    name = "bestla_channel"


class Group128(Bestla):
    name, group = "bestla_g128", 128


PEERS = (PerChannel, Group128)
