"""`python -m pipelines`: the same as the `ptuning` command."""

import os
import sys

# For `python -m`, Python puts the working directory first on the import path. Unless our packages
# are there, it is removed before anything else is imported: a user's file named click.py or json.py
# must not be imported instead of the library.
_here, _root = os.getcwd(), os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if sys.path and os.path.abspath(sys.path[0]) == _here != _root:
    del sys.path[0]

from pipelines.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
