"""The commands of the command line that work on models of the user's."""


class CommandFailed(RuntimeError):
    """What was asked for cannot be done; the message, one line, says why."""
