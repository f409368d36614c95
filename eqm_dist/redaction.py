"""What must not be shown or kept: user names, passwords and queries in URLs.

One definition for both uses: an option or a flag with such a URL is refused, and in a message it is blotted out.
"""

import re

_SCHEME = r"\b[A-Za-z][A-Za-z0-9+.-]*://"
# A password may hold a slash, if it was typed as it is; what looks like a port does not begin one.
_USER = re.compile(rf"({_SCHEME})(?:[^\s/'\"?#]*@|[^\s/'\"@:]+:(?!\d+/)[^\s'\"@]*@)")
_QUERY = re.compile(rf"({_SCHEME}[^\s'\"?]*)\?[^\s'\"]*")

RULE = (
    "must not hold a user, a password or a query in a URL, which would end up in every record; give secrets in the"
    " environment, as AWS_ACCESS_KEY_ID or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
)
"""Why such a value is refused, and what to do; it does not repeat the value."""


def redacted(text: str) -> str:
    """The text with ``***`` in the place of every user, password and query of a URL in it."""
    return _QUERY.sub(r"\1?***", _USER.sub(r"\1***@", text))


def holds_secret(text: str) -> bool:
    """Whether a URL in the text has a user, a password or a query."""
    return redacted(text) != text
