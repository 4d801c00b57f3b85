"""``python -m xattn``, for launchers such as ``torchrun``."""

import sys

from xattn.cli import main

sys.exit(main())
