"""Integer products and transformer blocks of a GPU's, in Triton.

Nothing is imported here: the files of this room need the package ``triton``, which may
be absent.
"""
