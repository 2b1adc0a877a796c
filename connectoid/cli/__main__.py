"""`python -m connectoid.cli`, as the command `connectoid`."""

from __future__ import annotations

import sys

from connectoid.cli import main

sys.exit(main())
