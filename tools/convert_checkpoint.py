"""Converts a checkpoint of another code base for mmdet 3 and mmsegmentation 1: python
tools/convert_checkpoint.py SOURCE TARGET.
"""

import sys

from mmptq.cli import main

if __name__ == '__main__':
    sys.exit(main(['convert-checkpoint', *sys.argv[1:]]))
