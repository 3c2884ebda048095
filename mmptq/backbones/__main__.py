"""``python -m mmptq.backbones`` prints the table of known backbones that is in the
README.
"""

from . import support_table

print(support_table())
