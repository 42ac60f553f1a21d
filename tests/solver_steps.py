"""What the tests of inspection share: the steps of each method, in the solver's order."""

# "ART, axis 2" is left out: whether a token is left to act on depends on the data.
STEPS = {
    "none": ["original"],
    "hadamard": ["original", "Hadamard, both axes"],
    "art": ["original", "ART, axis 1", "Hadamard, axis 2"],
    "urt": ["original", "URT, axis 1", "Hadamard, axis 2", "URT, axis 2"],
    "paper": ["original", "ART, axis 1", "URT, axis 1", "Hadamard, axis 2", "URT, axis 2"],
    "singlequant": ["original", "Hadamard, both axes", "ART, axis 1", "sweep 1, axis 1",
                    "sweep 1, axis 2", "sweep 2, axis 1", "sweep 2, axis 2"],
    "balanced": ["original", "balance", "principal directions, axis 1", "Hadamard, axis 2",
                 "sweep 1, axis 1", "sweep 1, axis 2", "sweep 2, axis 1", "sweep 2, axis 2"],
    "random": ["original", "random rotation, axis 1", "random rotation, axis 2"],
    "duquant": ["original", "balance", "first blocks", "permutation", "second blocks"],
    "smoothquant": ["original", "balance"],
}

# of an aligned site; where nothing is aligned, `balanced` is what is left
_BALANCED = STEPS["balanced"]
STEPS |= {
    "aligned": [*_BALANCED[:2], "alignment", *_BALANCED[2:]],
    "aligned-o": _BALANCED,
    "aligned-down": [*_BALANCED[:2], "alignment", *_BALANCED[2:]],
}
STEPS |= {
    "cat": ["original", "alignment", "Hadamard, both axes"],
    "wush": ["original", "alignment"],
    "efficientqat": ["original"],
}
