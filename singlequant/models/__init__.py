# SPDX-License-Identifier: Apache-2.0
"""Model families as data."""
