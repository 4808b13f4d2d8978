"""`python -m pipelines`: the same as the `ptuning` command."""

import os
import sys

# Python puts the working directory first on the path of a module that it runs. Before anything
# else is imported it goes, unless our packages lie there: a file of the user's called click.py or
# json.py must not be taken for the library.
_here, _root = os.getcwd(), os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if sys.path and os.path.abspath(sys.path[0]) == _here != _root:
    del sys.path[0]

from pipelines.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
