"""``python -m mea_ray`` is ``mea-ray``."""

from __future__ import annotations

import sys

from mea_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
