"""OpenBLAS from scipy-openblas32, through its C interface: sgemm, and sgemv for one row."""

import ctypes
from pathlib import Path

import numpy as np

from .base import Peer, Turn

ROW_MAJOR, NO_TRANSPOSE, TRANSPOSE = 101, 111, 112


class OpenBlas(Peer):
    name, kind, activations = "openblas", "32-bit", "float32"
    avx2 = {"OPENBLAS_CORETYPE": "Haswell"}

    def __init__(self, threads):
        super().__init__(threads)
        import scipy_openblas32

        folder = Path(scipy_openblas32.get_lib_dir())
        self.library = ctypes.CDLL(str(folder / scipy_openblas32.get_library(fullname=True)))
        self.library.scipy_openblas_set_num_threads(threads)
        self.sgemm = self.library.scipy_cblas_sgemm
        integer, number, pointer = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
        self.sgemm.argtypes = [*[integer] * 6, number, pointer, integer, pointer, integer, number,
                               pointer, integer]
        self.sgemv = self.library.scipy_cblas_sgemv
        self.sgemv.argtypes = [*[integer] * 4, number, pointer, integer, pointer, integer, number,
                               pointer, integer]
        self.sgemm.restype = self.sgemv.restype = None

    def version(self):
        config = self.library.scipy_openblas_get_config
        core = self.library.scipy_openblas_get_corename
        config.restype = core.restype = ctypes.c_char_p
        return f"{config().decode()}, core {core().decode()}"

    def weight_bytes(self, n, k):
        return 4 * n * k

    def prepare(self, weight, copies):
        self.weights = Turn(weight.copy() for _ in range(copies))

    def load(self, x):
        self.x = x
        self.y = np.empty((len(x), len(self.weights.items[0])), np.float32)

    def run(self):
        (m, k), n = self.x.shape, self.y.shape[1]
        if m == 1:  # sgemm is four times slower there
            self.sgemv(ROW_MAJOR, NO_TRANSPOSE, n, k, 1.0, self.weights().ctypes.data, k,
                       self.x.ctypes.data, 1, 0.0, self.y.ctypes.data, 1)
            return
        self.sgemm(ROW_MAJOR, NO_TRANSPOSE, TRANSPOSE, m, n, k, 1.0, self.x.ctypes.data, k,
                   self.weights().ctypes.data, k, 0.0, self.y.ctypes.data, n)

    def result(self):
        return self.y


PEERS = (OpenBlas,)
