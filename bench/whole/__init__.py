"""Whole models under nybble, torch and other runtimes: what is timed, checked and shown by ``--preset whole-models``."""
