# SPDX-License-Identifier: Apache-2.0
"""Other libraries' models on our kernels. Importing this folder imports none of them."""
