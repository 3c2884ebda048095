"""Integer products of a CPU's own: oneDNN's, where it has VNNI."""
