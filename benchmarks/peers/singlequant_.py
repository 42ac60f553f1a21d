"""Ours: float activations in, float out; rotation and quantization inside the timed call.

`ours_w4a4` is the default recipe: a dense Kronecker rotation, an eighth of the inputs at 8 bits.
`ours_w4a4_singlequant` is that without the 8-bit inputs, `ours_w4a4_none` without a rotation too.
The bare rows are the multiplication alone, `read_loop` the fastest way to read the same panels.
"""

from singlequant import _C, __version__
from singlequant.study.bench import TransformedLinear, best_read

from .base import Peer, Turn


class Ours(Peer):
    kind, avx2 = "ours", {}
    scheme, int8_inputs, rotated = "w4a4", None, True

    def __init__(self, threads):
        super().__init__(threads)
        _C.set_num_threads(threads)

    def version(self):
        return f"singlequant {__version__}, {_C.kernels()['active']}"

    def weight_bytes(self, n, k):
        return n * k // 2 + 4 * n

    def prepare(self, weight, copies):
        self.linear = TransformedLinear(weight, self.scheme, self.int8_inputs, copies, self.rotated)

    def load(self, x):
        self.x = x

    def run(self):
        self.y = self.linear(self.x)

    def result(self):
        return self.y


class W4A4(Ours):
    name, activations = "ours_w4a4", "rotated, int4 per token and an eighth int8, timed"


class W4A4Singlequant(Ours):
    name, activations, int8_inputs = "ours_w4a4_singlequant", "rotated, int4 per token, timed", 0


class W4A4None(Ours):
    name, activations, int8_inputs, rotated = "ours_w4a4_none", "int4 per token, timed", 0, False


class W4A8(Ours):
    name, scheme, activations = "ours_w4a8", "w4a8", "rotated, int8 per token, timed"


class W4A16(Ours):
    name, scheme, activations = "ours_w4a16", "w4a16", "rotated, float32, timed"


class Bare(Ours):
    """The multiplication alone, of prepared activations."""

    kind, activations, int8_inputs, rotated = "bound", "prepared beforehand", 0, False

    def load(self, x):
        self.x, self.weights = x, Turn(self.linear.weights)

    def run(self):
        return _C.measure_linear(self.x, self.weights(), self.linear.bits, self.linear.clip)[1]

    def result(self):
        return None


class BareW4A4(Bare):
    name = "bare_w4a4"


class BareW4A8(Bare):
    name, scheme = "bare_w4a8", "w4a8"


class BareW4A16(Bare):
    name, scheme = "bare_w4a16", "w4a16"


class ReadLoop(Bare):
    name, activations = "read_loop", "none"

    def load(self, x):
        super().load(x)
        found = best_read(self.linear.weights, 0.3)
        self.variant = found["prefetch"], found["streams"]

    def run(self):
        _C.read_loop(self.weights(), *self.variant)


PEERS = (W4A4, W4A4Singlequant, W4A4None, W4A8, W4A16, BareW4A4, BareW4A8, BareW4A16, ReadLoop)
