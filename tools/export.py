"""Writes a quantized backbone as an ONNX file: python tools/export.py CONFIG QUANTIZED
--out backbone.onnx --shape 800 1216.
"""

import sys

from mmptq.cli import main

if __name__ == '__main__':
    sys.exit(main(['export', *sys.argv[1:]]))
