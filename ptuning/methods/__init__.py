"""Which tuning methods there are. Imports nothing, so that `import ptuning` can list them.

A new method is a file in this package and a line here; catalogue.py makes the rest of it.
"""

from __future__ import annotations

# The class of each method and its file.
REGISTERED = {"PrefixTuning": "prefix", "PromptTuning": "prompt", "PTuning": "ptuning"}
DEFAULT = "prefix"  # the `type` of the method that is used where none is named
