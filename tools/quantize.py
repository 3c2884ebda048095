"""Quantizes a detector or segmentor of OpenMMLab: python tools/quantize.py CONFIG
CHECKPOINT --recipe adalog_w4a4.
"""

import sys

from mmptq.cli import main

if __name__ == '__main__':
    sys.exit(main(['quantize', *sys.argv[1:]]))
