# SPDX-License-Identifier: Apache-2.0
"""Imported before what needs torch: says which extra brings it."""

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError(f"this needs torch: pip install 'singlequant[torch]' ({error})") from None
