"""Compiles the kernels that call a Formula for a GPU that need not be there, in a line of JSON each.

`python -P formula_compiled.py 90 FILE.py:CLASS`: the kernel's name and its PTX, or why there is none.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # behind all else: -P left it out

import compiled
import compiler

from offmoe.device_formula import cause

if __name__ == "__main__":
    with compiler.caught() as launches:
        compiled.residency(sys.argv[2], pdl=int(sys.argv[1]) >= 90)
    for launch in launches:
        try:
            line = {"ptx": compiler.Pipeline(launch, int(sys.argv[1])).ptx()}
        except Exception as error:
            line = {"error": cause(error)}
        print(json.dumps({"kernel": launch[0].__name__, **line}))
