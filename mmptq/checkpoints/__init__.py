"""FILES: what is read from them, after checks that run nothing of it, and what is
written.
"""
