# SPDX-License-Identifier: Apache-2.0
"""A folder, quantized or not -> logits and text."""
