"""oneDNN's int8 linear through PyTorch: int8 weights per output, uint8 activations per tensor."""

from .base import Turn, round_int8
from .torch_bf16 import TorchPeer

ZERO = 128


class OneDnnW8A8(TorchPeer):
    name, kind = "onednn_w8a8", "int8"
    activations = "uint8 codes, quantized beforehand: not timed, which favours it"

    def weight_bytes(self, n, k):
        return n * k + 4 * n

    def prepare(self, weight, copies):
        torch, ops = self.torch, self.torch.ops.onednn
        codes, scales = round_int8(weight)
        self.scales = torch.from_numpy(scales)
        self.zeros = torch.zeros(len(weight), dtype=torch.int64)
        codes = torch.from_numpy(codes)
        self.weights = Turn(ops.qlinear_prepack(codes.clone(), None) for _ in range(copies))

    def load(self, x):
        torch, x = self.torch, self.torch.from_numpy(x)
        self.scale = float(x.abs().max()) / 127
        self.codes = (torch.round(x / self.scale) + ZERO).to(torch.uint8)

    def run(self):
        self.y = self.torch.ops.onednn.qlinear_pointwise(
            self.codes, self.scale, ZERO, self.weights(), self.scales, self.zeros, None, 1.0, 0,
            self.torch.float32, "none", [], "")


PEERS = (OneDnnW8A8,)
