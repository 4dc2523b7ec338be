"""The command line, as ``python -m dynamicvis_geo``."""

import sys

from dynamicvis_geo.cli import main

if __name__ == '__main__':
    sys.exit(main())
