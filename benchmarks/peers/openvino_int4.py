"""OpenVINO's CPU plugin: int4 weights decompressed or multiplied by dynamically quantized int8."""

import numpy as np

from .base import Peer, Turn, nibbles, round_int4


class OpenVino(Peer):
    kind, group, settings = "int4", 0, {}

    def __init__(self, threads):
        super().__init__(threads)
        import openvino

        self.openvino, self.core = openvino, openvino.Core()

    def version(self):
        return f"openvino {self.openvino.__version__}"

    def weight_bytes(self, n, k):
        return n * k // 2 + 2 * n * (k // (self.group or k))

    def model(self, weight):
        ov = self.openvino
        op = ov.opset13
        n, k = weight.shape
        g = self.group or k
        codes, scales = round_int4(weight, g)
        shape = (n, k // g, g) if g < k else (n, k)
        packed = ov.Tensor(ov.Type.i4, ov.Shape(list(shape)))
        packed.data.view(np.uint8).reshape(-1)[:] = nibbles(codes & 15).reshape(-1)
        scales = scales.astype(np.float16).reshape(*shape[:-1], 1)
        x = op.parameter([-1, k], ov.Type.f32, name="x")
        w = op.multiply(op.convert(op.constant(packed), "f16"), op.constant(scales))
        if g < k:
            w = op.reshape(w, op.constant(np.array([n, k], np.int64)), False)
        return ov.Model([op.matmul(x, op.convert(w, "f32"), False, True)], [x], "linear")

    def prepare(self, weight, copies):
        settings = {"INFERENCE_NUM_THREADS": self.threads, "NUM_STREAMS": "1",
                    "ENABLE_CPU_PINNING": False, **self.settings}
        model = self.model(weight)
        self.requests = Turn(
            self.core.compile_model(model, "CPU", settings).create_infer_request()
            for _ in range(copies))

    def load(self, x):
        tensor = self.openvino.Tensor(x, shared_memory=True)
        self.x = x
        for request in self.requests.items:
            request.set_input_tensor(tensor)

    def run(self):
        self.request = self.requests()
        self.request.infer()

    def result(self):
        return np.array(self.request.get_output_tensor().data)


class Group128(OpenVino):
    name, group, activations = "openvino_int4_g128", 128, "the plugin's default, timed"


class Group128Int8(OpenVino):
    name, group, activations = "openvino_int4_g128_int8", 128, "int8 in groups of 128, timed"
    settings = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "128", "INFERENCE_PRECISION_HINT": "f32"}


class PerChannel(OpenVino):
    name, activations = "openvino_int4_channel", "the plugin's default, timed"


PEERS = (Group128, Group128Int8, PerChannel)
