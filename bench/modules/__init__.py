"""Models of modules other than Linear layers: what is timed, checked and shown by ``--preset modules``.

Each file has ``MODELS``, with those who run them, and ``GOALS``; `table` lists the files. The rest is that of ``whole``.
"""
