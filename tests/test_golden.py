"""Files that every later version must read: a packed folder of format version 1 and its logits.

Made once, by `python tests/test_golden.py`, and kept for ever: a change that breaks this breaks
users' files.
"""

from pathlib import Path

import numpy as np
import pytest

import singlequant as sq
from singlequant import _C

GOLDEN = Path(__file__).resolve().parent / "data" / "golden" / "v1"
TOKENS = np.arange(24).reshape(1, 24) * 7 + 3


@pytest.mark.parametrize("kernels", _C.kernels()["runnable"])
def test_golden_folder_gives_the_logits_it_gave(kernels):
    _C.use_kernels(kernels)
    logits = sq.load(GOLDEN / "packed").forward(TOKENS)
    np.testing.assert_allclose(logits, np.load(GOLDEN / "logits.npy"), atol=1e-3, rtol=0)


def test_golden_folder_says_what_it_is():
    checkpoint = sq.load_checkpoint(GOLDEN / "packed")
    config = checkpoint.quant_config
    assert (config.scheme, config.group_size, config.clip) == ("w4a8", 32, 1.0)
    assert config.ignore == ("*.k_proj",)
    recipe = sq.QuantConfig.from_file(GOLDEN / "packed" / "recipe.json")
    assert recipe.calibration_tokens == 64


if __name__ == "__main__":
    import tempfile

    from conftest import make_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        source = make_checkpoint(Path(folder) / "source", hidden=64, intermediate=96, layers=1,
                                 vocab=258)
        checkpoint = sq.load_checkpoint(source)
        config = sq.QuantConfig(scheme="w4a8", group_size=32, ignore=("*.k_proj",), clip=1.0,
                                calibration_tokens=64)
        rotations = sq.solve_rotations(sq.calibrate(checkpoint, np.arange(64).reshape(2, 32)))
        GOLDEN.mkdir(parents=True)
        sq.save(sq.quantize(checkpoint, rotations, config), GOLDEN / "packed", checkpoint, config)
    np.save(GOLDEN / "logits.npy", sq.load(GOLDEN / "packed").forward(TOKENS))
