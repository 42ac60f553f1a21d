# SPDX-License-Identifier: Apache-2.0
"""What quantizing costs: evaluation, comparison, outliers, speed."""
