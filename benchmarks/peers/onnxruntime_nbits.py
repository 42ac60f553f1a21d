"""onnxruntime's MatMulNBits: int4 weights in groups, activations to int8 per block (MLAS)."""

import numpy as np

from .base import Peer, Turn, nibbles, round_int4


class OrtPeer(Peer):
    """What peers inside onnxruntime share: a model of one node, a session for each copy."""

    def __init__(self, threads):
        super().__init__(threads)
        import onnx
        import onnxruntime

        self.onnx, self.ort = onnx, onnxruntime
        onnxruntime.set_default_logger_severity(3)

    def version(self):
        return f"onnxruntime {self.ort.__version__}"

    def nodes(self, weight):
        """(nodes from x to y, initializers name -> array) of the model."""
        raise NotImplementedError

    def prepare(self, weight, copies):
        helper, kinds = self.onnx.helper, self.onnx.TensorProto
        self.n, k = weight.shape
        nodes, arrays = self.nodes(weight)
        graph = helper.make_graph(
            nodes, "linear", [helper.make_tensor_value_info("x", kinds.FLOAT, ["m", k])],
            [helper.make_tensor_value_info("y", kinds.FLOAT, ["m", self.n])],
            [self.onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()])
        model = helper.make_model(graph, ir_version=10, opset_imports=[
            helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)])
        options = self.ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        data = model.SerializeToString()
        self.sessions = [self.ort.InferenceSession(data, options,
                                                   providers=["CPUExecutionProvider"])
                         for _ in range(copies)]

    def load(self, x):
        self.x, self.y = x, np.empty((len(x), self.n), np.float32)
        self.bound = []
        for session in self.sessions:
            binding = session.io_binding()
            binding.bind_cpu_input("x", x)
            binding.bind_output("y", "cpu", 0, np.float32, self.y.shape, self.y.ctypes.data)
            self.bound.append((session, binding))
        self.turn = Turn(self.bound)

    def run(self):
        session, binding = self.turn()
        session.run_with_iobinding(binding)

    def result(self):
        return self.y


class MatMulNBits(OrtPeer):
    kind, activations, group = "int4", "int8 per block, timed", 0

    def weight_bytes(self, n, k):
        return n * k // 2 + 4 * n * (k // self.group)

    def nodes(self, weight):
        n, k = weight.shape
        codes, scales = round_int4(weight, self.group)
        packed = nibbles(codes.reshape(n, k // self.group, self.group) + 8)
        node = self.onnx.helper.make_node(
            "MatMulNBits", ["x", "w", "scales"], ["y"], domain="com.microsoft", K=k, N=n, bits=4,
            block_size=self.group, accuracy_level=4)
        return [node], {"w": packed, "scales": scales.reshape(-1)}


class Group32(MatMulNBits):
    name, group = "onnxruntime_nbits_g32", 32


class Group128(MatMulNBits):
    name, group = "onnxruntime_nbits_g128", 128


PEERS = (Group32, Group128)
