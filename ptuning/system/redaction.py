"""Remove what must not be printed: passwords in addresses, and users' ids in messages."""

from __future__ import annotations

import re

# `scheme://user:password@host`: the password ends at the last @ before a slash or a blank.
_IN_AUTHORITY = re.compile(r"(?P<before>[A-Za-z][A-Za-z0-9+.-]*://[^\s/:@]*:)[^\s/]*(?=@)")
_IN_QUERY = re.compile(r"(?i)(?P<before>[?&](?:password|passwd|pwd|sslpassword|token)=)[^&\s#]*")


def hide_passwords(text: str) -> str:
    """The text with each password in an address replaced by `***`.

    >>> hide_passwords("cannot open postgresql://me:hunter2@db:5432/mlflow")
    'cannot open postgresql://me:***@db:5432/mlflow'
    """
    text = _IN_AUTHORITY.sub(r"\g<before>***", text)
    return _IN_QUERY.sub(r"\g<before>***", text)


def hide_user(text: str, user_id: str) -> str:
    """The text with the user's id replaced; an error may quote the id as it is or as a literal.

    Only whole words are replaced: the id "a" must not remove letters from the message.
    """
    for form in {user_id, repr(user_id)[1:-1]} - {""}:
        text = re.sub(rf"(?<!\w){re.escape(form)}(?!\w)", "<user>", text)
    return text
