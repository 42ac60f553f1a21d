# SPDX-License-Identifier: Apache-2.0
"""`python -m singlequant` is the command line."""

import sys

from .cli.main import main

sys.exit(main())
