"""The errors a user is meant to read. ``pipeline/cli.py`` alone turns them into a message and an exit status."""


class MedcotError(Exception):
    """Something the user can act on, in one sentence: what is wrong, where, and what to do. Exit status 1."""

    exit_status = 1


class GateFailed(MedcotError):
    """A measured value missed its threshold (verification or regression); names the numbers. Exit status 3."""

    exit_status = 3
