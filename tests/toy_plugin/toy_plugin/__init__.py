"""A user's package that adds 2-bit weights, hardware, a layout and a kernel to nybble."""
