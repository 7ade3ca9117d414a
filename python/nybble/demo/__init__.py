"""`nybble demo`: a trained sentence encoder under torch and under nybble, measured side by side on this machine."""


class DemoUnavailable(RuntimeError):
    """Something that the demo needs is not installed; the message says what to install."""
