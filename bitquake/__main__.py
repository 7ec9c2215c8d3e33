"""``python -m bitquake`` is the ``bitquake`` command."""

from __future__ import annotations

import sys

from bitquake.cli import main

sys.exit(main())
