#!/usr/bin/env bash
# Everything for a GPU machine in one call: the installed shape on the path, tests/gpu, the benchmark tables.
#   bash bench/gpu.sh [OUT]      OUT: a folder for logs and rows (default: bench/results)
set -u
cd "$(dirname "$0")/.."
out=${1:-bench/results}
view=$(mktemp -d)
mkdir -p "$view/offmoe" "$out"
ln -s "$PWD"/offmoe/* "$PWD/cache" "$PWD/kernels" "$view/offmoe/"
export PYTHONPATH="$view${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OFFMOE_COMMIT=${OFFMOE_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null)}
# -P: the root must not be on the path, or its folders would be found under their own names.
python3 -P -m pytest tests/gpu -p no:cacheprovider 2>&1 | tee "$out/gpu-tests.log" | tail -25
python3 bench/memory.py "${SHAPE_LAYERS:-}" 2>&1 | tee "$out/memory.log"
python3 -P -m offmoe doctor 2>&1 | tee "$out/doctor.log"
python3 -P -m offmoe run demo 'What is the capital of France?' --greedy --json --vram 50% 2>&1 | tee "$out/run.json"
