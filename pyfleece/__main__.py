"""`python -m pyfleece` is the `pyfleece` command."""

import sys

from pyfleece.cli import main

sys.exit(main())
