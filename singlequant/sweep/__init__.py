# SPDX-License-Identifier: Apache-2.0
"""Calibrate, solve, quantize and write, layer by layer."""
