"""Run large language models in 4 bits on the CPU: closed-form rotations, packed int4 kernels."""
