"""``python -m flora_core.cli`` is the flora command."""

import sys

from .main import main

if __name__ == "__main__":
    sys.exit(main())
