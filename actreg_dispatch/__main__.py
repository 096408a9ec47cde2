"""``python -m actreg_dispatch``, which is the command ``actreg``."""

import sys

from actreg_dispatch.cli import main

if __name__ == "__main__":
    sys.exit(main())
