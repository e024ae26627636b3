"""Compiles the kernels that call a Formula for a GPU that need not be there, in a line of JSON each.

`python -P compile_formula.py 90 FILE.py:CLASS`: the kernel's name and its PTX, or why there is none.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "helpers")]  # after all others

import compile_kernels
import kernel_compiler

from offmoe.decode.device_formula import cause

if __name__ == "__main__":
    with kernel_compiler.caught() as launches:
        compile_kernels.residency(sys.argv[2], pdl=int(sys.argv[1]) >= 90)
    for launch in launches:
        try:
            line = {"ptx": kernel_compiler.Pipeline(launch, int(sys.argv[1])).ptx()}
        except Exception as error:
            line = {"error": cause(error)}
        print(json.dumps({"kernel": launch[0].__name__, **line}))
