"""What a quantized model is made of and what it costs."""
