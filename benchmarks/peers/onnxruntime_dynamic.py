"""onnxruntime's dynamic W8A8: activations to uint8 per tensor, int8 weights per output (MLAS)."""

import numpy as np

from .base import round_int8
from .onnxruntime_nbits import OrtPeer


class DynamicW8A8(OrtPeer):
    name, kind, activations = "onnxruntime_dynamic", "int8", "uint8 per tensor, timed"

    def weight_bytes(self, n, k):
        return n * k + 4 * n

    def nodes(self, weight):
        codes, scales = round_int8(weight)
        node = self.onnx.helper.make_node("DynamicQuantizeMatMul", ["x", "w", "scales", "zeros"],
                                          ["y"], domain="com.microsoft")
        return [node], {"w": np.ascontiguousarray(codes.T), "scales": scales,
                        "zeros": np.zeros(len(scales), np.int8)}


PEERS = (DynamicW8A8,)
