"""`python -m projected_grpo COMMAND`."""

import sys

from projected_grpo.cli import main

sys.exit(main())
