"""PyTorch in bfloat16 and float32: weights as they stand, and in oneDNN's blocked layout."""

from .base import Peer, Turn


class TorchPeer(Peer):
    """What all peers inside PyTorch share."""

    # ATen's kernels and oneDNN's each have their own switch
    avx2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}

    def __init__(self, threads):
        super().__init__(threads)
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch = torch

    def version(self):
        return f"torch {self.torch.__version__}, {self.torch.backends.cpu.get_cpu_capability()}"

    def result(self):
        return self.y.float().numpy()


class Bfloat16(TorchPeer):
    name, kind, activations = "torch_bf16", "16-bit", "bfloat16, converted beforehand"

    def weight_bytes(self, n, k):
        return 2 * n * k

    def prepare(self, weight, copies):
        tensor = self.torch.from_numpy(weight).bfloat16()
        self.weights = Turn(tensor.clone() for _ in range(copies))

    def load(self, x):
        self.x = self.torch.from_numpy(x).bfloat16()

    def run(self):
        self.y = self.torch.nn.functional.linear(self.x, self.weights())


class PackedBfloat16(Bfloat16):
    name = "torch_bf16_packed"

    def prepare(self, weight, copies):
        ops, tensor = self.torch.ops.mkldnn, self.torch.from_numpy(weight).bfloat16()
        # None: one layout for every m
        self.weights = Turn(ops._reorder_linear_weight(tensor, None) for _ in range(copies))

    def run(self):
        self.y = self.torch.ops.mkldnn._linear_pointwise(self.x, self.weights(), None, "none", [],
                                                         "")


class Float32(Bfloat16):
    name, kind, activations = "torch_fp32", "32-bit", "float32"

    def weight_bytes(self, n, k):
        return 4 * n * k

    def prepare(self, weight, copies):
        tensor = self.torch.from_numpy(weight)
        self.weights = Turn(tensor.clone() for _ in range(copies))

    def load(self, x):
        self.x = self.torch.from_numpy(x)


PEERS = (Bfloat16, PackedBfloat16, Float32)
