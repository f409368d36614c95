"""What a command asks of its surroundings before it begins, so that no library stumbles over what is missing."""

import getpass
import os


def settle_user() -> None:
    """Give a user without an entry in /etc/passwd a name, as containers have them.

    MLflow's records, torch's compiler and Ray ask for the name, and ``getpass.getuser`` raises where there is none.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # a KeyError before Python 3.13
        os.environ["LOGNAME"] = f"user-{os.getuid()}"
