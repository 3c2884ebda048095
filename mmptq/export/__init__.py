"""The calibrated backbone for other runtimes."""
