"""``python -m d3etr`` is ``d3etr``."""

import sys

from d3etr.cli.main import main

sys.exit(main())
