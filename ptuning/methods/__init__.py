"""The built-in tuning methods. Imports nothing, so that `import ptuning` can list them.

To add a method, add a file to this package and a line here; catalogue.py does the rest.
"""

from __future__ import annotations

# The class of each method and its file.
REGISTERED = {"PrefixTuning": "prefix", "PromptTuning": "prompt", "PTuning": "ptuning"}
DEFAULT = "prefix"  # the `type` of the default method
