"""python -m paged_kv: the command line."""

import sys

from .cli import main

sys.exit(main())
