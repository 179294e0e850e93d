"""``python -m iscsi_targetd``: the daemon."""

import sys

from iscsi_targetd import daemon

sys.exit(daemon())
