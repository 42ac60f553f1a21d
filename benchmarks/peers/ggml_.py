"""llama.cpp's matrix product from ggml-python, built from source on this machine.

Weights lie in the buffer type that ggml itself would take for them: AMX, else the repacked rows,
else plain ones. The AVX2 build is a second installation, in the folder of GGML_AVX2 (README.md).
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

import numpy as np

from .base import Peer, Turn, held_to_avx2

FLOAT32 = 0
CPU = "CPU"
POINTER, SIZE, INT, INT64, FLAG = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64,
                                   ctypes.c_bool)


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", SIZE), ("mem_buffer", POINTER), ("no_alloc", FLAG)]


SIGNATURES = {
    "ggml_init": (POINTER, InitParams),
    "ggml_free": (None, POINTER),
    "ggml_tensor_overhead": (SIZE,),
    "ggml_graph_overhead": (SIZE,),
    "ggml_new_tensor_2d": (POINTER, POINTER, INT, INT64, INT64),
    "ggml_mul_mat": (POINTER, POINTER, POINTER, POINTER),
    "ggml_new_graph": (POINTER, POINTER),
    "ggml_build_forward_expand": (None, POINTER, POINTER),
    "ggml_quantize_chunk": (SIZE, INT, POINTER, POINTER, INT64, INT64, INT64, POINTER),
    "ggml_row_size": (SIZE, INT, INT64),
    "ggml_backend_cpu_init": (POINTER,),
    "ggml_backend_cpu_set_n_threads": (None, POINTER, INT),
    "ggml_backend_cpu_reg": (POINTER,),
    "ggml_backend_reg_dev_get": (POINTER, POINTER, SIZE),
    "ggml_backend_reg_get_proc_address": (POINTER, POINTER, ctypes.c_char_p),
    "ggml_backend_buft_name": (ctypes.c_char_p, POINTER),
    "ggml_backend_cpu_buffer_type": (POINTER,),
    "ggml_backend_alloc_ctx_tensors_from_buft": (POINTER, POINTER, POINTER),
    "ggml_backend_buffer_free": (None, POINTER),
    "ggml_backend_tensor_set": (None, POINTER, POINTER, SIZE, SIZE),
    "ggml_backend_tensor_get": (None, POINTER, POINTER, SIZE, SIZE),
    "ggml_backend_graph_compute": (INT, POINTER, POINTER),
    "ggml_backend_dev_supports_op": (FLAG, POINTER, POINTER),
}


def folder() -> Path:
    """Where the libraries of the asked-for build are."""
    if held_to_avx2():
        root = Path(os.environ.get("GGML_AVX2") or Path(sys.prefix) / "ggml-avx2") / "ggml"
        if not root.is_dir():
            raise ImportError(f"no AVX2 build of ggml in {root}: see benchmarks/README.md")
        return root / "lib"
    spec = importlib.util.find_spec("ggml")
    if spec is None:
        raise ImportError("ggml-python is not installed")
    return Path(spec.origin).parent / "lib"


class Library:
    """The functions of SIGNATURES as attributes, without their prefix."""

    def __init__(self):
        names = ("libggml-base.so", "libggml-cpu.so", "libggml.so")
        files = [ctypes.CDLL(str(folder() / name), mode=ctypes.RTLD_GLOBAL) for name in names]
        for name, (result, *arguments) in SIGNATURES.items():
            file = next((f for f in files if hasattr(f, name)), None)
            if file is None:
                raise ImportError(f"this ggml has no {name}")
            function = getattr(file, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)

    def context(self, tensors):
        size = self.tensor_overhead() * tensors + self.graph_overhead() + 4096
        return self.init(InitParams(size, None, True))

    def buffer_types(self):
        """(CPU device, name -> buffer type, the preferred first)."""
        registry = self.backend_cpu_reg()
        found = {}
        address = self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        device = self.backend_reg_dev_get(registry, 0)
        if address:
            listed = ctypes.CFUNCTYPE(ctypes.POINTER(POINTER), POINTER)(address)(device)
            i = 0
            while listed and listed[i]:
                found[self.backend_buft_name(listed[i]).decode()] = listed[i]
                i += 1
        return device, {**found, CPU: self.backend_cpu_buffer_type()}


class Ggml(Peer):
    kind, avx2, type_number = "int4", {}, -1

    def __init__(self, threads):
        super().__init__(threads)
        self.ggml = Library()
        self.backend = self.ggml.backend_cpu_init()
        self.ggml.backend_cpu_set_n_threads(self.backend, threads)
        self.device, self.types = self.ggml.buffer_types()
        self.made, self.used = [], None

    def version(self):
        found = importlib.metadata.version("ggml-python")
        build = "AVX2 build" if held_to_avx2() else "native build"
        return f"ggml-python {found}, {build}, buffer types {', '.join(self.types)}"

    def weight_bytes(self, n, k):
        return self.ggml.row_size(self.type_number, k) * n

    def release(self):
        for context, buffer in self.made:
            self.ggml.backend_buffer_free(buffer)
            self.ggml.free(context)
        self.made = []

    def allocate(self, context, buffer_type):
        buffer = self.ggml.backend_alloc_ctx_tensors_from_buft(context, buffer_type)
        if not buffer:
            raise MemoryError("ggml could not allocate")
        self.made.append((context, buffer))

    def product(self, weight, m):
        """(x, y, graph) of y = x weight^T."""
        context = self.ggml.context(16)
        x = self.ggml.new_tensor_2d(context, FLOAT32, self.k, m)
        y = self.ggml.mul_mat(context, weight, x)
        graph = self.ggml.new_graph(context)
        self.ggml.build_forward_expand(graph, y)
        return context, x, y, graph

    def weight_in(self, buffer_type, data):
        context = self.ggml.context(4)
        weight = self.ggml.new_tensor_2d(context, self.type_number, self.k, self.n)
        self.allocate(context, buffer_type)
        self.ggml.backend_tensor_set(weight, data.ctypes.data, 0, data.nbytes)
        return weight

    def prepare(self, weight, copies):
        self.release()
        self.n, self.k = weight.shape
        data = np.empty(self.weight_bytes(self.n, self.k), np.uint8)
        self.ggml.quantize_chunk(self.type_number, weight.ctypes.data, data.ctypes.data, 0, self.n,
                                 self.k, None)
        for name, buffer_type in self.types.items():
            context, probe = self.ggml.context(4), None
            probe = self.ggml.new_tensor_2d(context, self.type_number, self.k, self.n)
            self.allocate(context, buffer_type)
            scratch, _, y, _ = self.product(probe, 4)
            supported = self.ggml.backend_dev_supports_op(self.device, y)
            self.ggml.free(scratch)
            if supported:
                self.used = name
                break
        self.weights = [self.weight_in(self.types[self.used], data) for _ in range(copies)]

    def load(self, x):
        self.m, graphs = len(x), []
        for weight in self.weights:
            context, target, y, graph = self.product(weight, self.m)
            self.allocate(context, self.types[CPU])
            self.ggml.backend_tensor_set(target, x.ctypes.data, 0, x.nbytes)
            graphs.append((graph, y))
        self.turn = Turn(graphs)

    def run(self):
        graph, self.y = self.turn()
        if self.ggml.backend_graph_compute(self.backend, graph):
            raise RuntimeError("ggml could not compute")

    def result(self):
        y = np.empty((self.m, self.n), np.float32)
        self.ggml.backend_tensor_get(self.y, y.ctypes.data, 0, y.nbytes)
        return y


class Q4_0(Ggml):  # noqa: N801
    name, type_number, activations = "ggml_q4_0", 2, "int8 in groups of 32, timed"


class Q4_K(Ggml):  # noqa: N801
    name, type_number, activations = "ggml_q4_k", 12, "int8 in groups of 256, timed"


class Q8_0(Ggml):  # noqa: N801
    name, kind, type_number, activations = "ggml_q8_0", "int8", 8, "int8 in groups of 32, timed"


PEERS = (Q4_0, Q4_K, Q8_0)
