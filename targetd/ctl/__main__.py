"""``python -m targetd.ctl``."""

import sys

from targetd.ctl import main

sys.exit(main())
