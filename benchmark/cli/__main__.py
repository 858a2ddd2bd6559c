"""`python -m dualcl.benchmark.cli`, where no console script is at hand."""

import sys

from dualcl.benchmark.cli import main

sys.exit(main())
