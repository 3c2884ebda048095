"""The one error that mmptq raises for what a user can mend; its text says what to do."""


class QuantizationError(RuntimeError):
    """Input that cannot be quantized as asked. The message names the file, key or layer and the remedy."""
