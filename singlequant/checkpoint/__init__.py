# SPDX-License-Identifier: Apache-2.0
"""A `save_pretrained` folder as tensors with roles."""
