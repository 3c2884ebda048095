"""The configs of one model: as it is tested, quantizable, float and free of what
belongs to a run.
"""
