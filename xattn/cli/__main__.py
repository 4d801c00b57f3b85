"""``python -m xattn.cli``, for launchers such as ``torchrun``."""

import sys

from xattn.cli import main

sys.exit(main())
