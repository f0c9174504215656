"""``python -m speechbrain_bestrq``: the command ``sb-bestrq``, where its script is not on the path."""

import sys

from speechbrain_bestrq.cli import main

if __name__ == "__main__":
    sys.exit(main())
