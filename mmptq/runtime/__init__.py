"""The calibrated model in integers."""
