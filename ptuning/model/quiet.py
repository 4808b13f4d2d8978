"""Silence Transformers' progress bars and warnings."""

from __future__ import annotations

from transformers.utils import logging as hf_logging


class quiet_transformers:
    """Context manager: no progress bars or warnings from Transformers; errors still raise."""

    def __enter__(self) -> None:
        self._level = hf_logging.get_verbosity()
        self._bars = hf_logging.is_progress_bar_enabled()
        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()

    def __exit__(self, *_exc: object) -> None:
        hf_logging.set_verbosity(self._level)
        if self._bars:
            hf_logging.enable_progress_bar()
