"""PyTorch's int4 weights with bfloat16 activations: aten._weight_int4pack_mm_for_cpu."""

from .base import Turn, round_int4
from .torch_bf16 import TorchPeer


class TorchInt4(TorchPeer):
    kind, activations, group = "int4", "bfloat16, converted beforehand", 0

    def weight_bytes(self, n, k):
        return n * k // 2 + 4 * n * (k // self.group)

    def prepare(self, weight, copies):
        torch, aten = self.torch, self.torch.ops.aten
        codes, scales = round_int4(weight, self.group)
        unsigned = torch.from_numpy(codes.astype("int32") + 8)
        packed = aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
        rules = torch.zeros(scales.shape[1], scales.shape[0], 2, dtype=torch.bfloat16)
        rules[:, :, 0] = torch.from_numpy(scales.T.copy()).bfloat16()  # (u - 8) scale + zero
        self.weights = Turn((packed.clone(), rules.clone()) for _ in range(copies))

    def load(self, x):
        self.x = self.torch.from_numpy(x).bfloat16()

    def run(self):
        packed, rules = self.weights()
        self.y = self.torch.ops.aten._weight_int4pack_mm_for_cpu(self.x, packed, self.group, rules)


class Group32(TorchInt4):
    name, group = "torch_int4_g32", 32


class Group128(TorchInt4):
    name, group = "torch_int4_g128", 128


PEERS = (Group32, Group128)
