"""Commands of the command line that work on the user's models."""


class CommandFailed(RuntimeError):
    """The command failed; the message is one line that says why."""
