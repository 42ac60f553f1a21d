# SPDX-License-Identifier: Apache-2.0
"""Folders that are whole or not there at all."""
