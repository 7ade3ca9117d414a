"""`nybble demo`: a trained sentence encoder under torch and under nybble, measured side by side on this machine."""


class DemoUnavailable(RuntimeError):
    """A package that the demo needs is not installed; the message says which, and how to install it."""
