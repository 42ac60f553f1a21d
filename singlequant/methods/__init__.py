# SPDX-License-Identifier: Apache-2.0
"""Transformations of a site's inputs, one file per method."""
