"""`python -m connectoid`: the command line."""

import sys

from connectoid.cli import main

sys.exit(main())
