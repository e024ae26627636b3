#!/usr/bin/env bash
# Tests and benchmarks on a GPU machine, in stages. A stage prints the end of its output; $OUT/log.txt has all of it.
#   bash bench/gpu.sh OUT [STAGE …]      OUT: folder for the log and the CSV files; default: all stages
# Stages: build (llama.cpp, in the background; it outlives this script), tests, kernels, peer (waits for the build),
# decode, decode-long, decode-gpt-oss, decode-prefetch, misses, families, quick, prefill, memory, demo; sweep
# (tiles of the GEMV).
# Optional folders, ignored by git: .whl (wheels of missing packages), .traces, .peer (bench/peer.sh pack).
# ARGS_decode="--caps 50" and so on: additional arguments of a stage.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?give a folder for the log and the CSV files}
shift
mkdir -p "$out"
out=$(cd "$out" && pwd)
[ $# -gt 0 ] || set -- build tests kernels peer decode decode-long decode-gpt-oss decode-prefetch misses families prefill memory demo
peer=/tmp/offmoe-peer

export OFFMOE_TRACES=${OFFMOE_TRACES:-$([ -d .traces ] && echo "$PWD/.traces" || echo "$PWD/../shared/traces")}
need_trace() {
    [ -f "$OFFMOE_TRACES/gpt-oss-20b.npz" ] || { echo "$OFFMOE_TRACES/gpt-oss-20b.npz is absent: carry .traces, or set OFFMOE_TRACES" >&2; exit 1; }
}

# The layout of the installed package. Not the root itself: Python would find its folders under their own names.
view=$(mktemp -d)
mkdir -p "$view/offmoe"
ln -s "$PWD"/offmoe/* "$PWD/cache" "$PWD/kernels" "$view/offmoe/"
if compgen -G '.whl/*.whl' >/dev/null; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$view" .whl/*.whl || exit 1
fi
export PYTHONPATH="$view${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export OFFMOE_COMMIT=${OFFMOE_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}

failed=()
stage() { # NAME LINES SECONDS COMMAND …: run COMMAND with a timeout and print its last LINES
    local name=$1 lines=$2 limit=$3 began=$SECONDS rc=0
    shift 3
    # shellcheck disable=SC2086,SC2154
    local more="ARGS_${name//-/_}"
    printf '\n## %s: %s\n' "$name" "$*" >>"$out/log.txt"
    # shellcheck disable=SC2086
    timeout -k 5 "$limit" "$@" ${!more:-} 2>&1 | tee -a "$out/log.txt" | tail -n "$lines" || rc=$?
    echo "== $name: $((SECONDS - began)) s, exit $rc"
    [ $rc = 0 ] || failed+=("$name")
}

build() { # once per machine, in a session of its own, so that it outlives this script
    [ -e $peer.started ] && return
    : >$peer.started
    setsid bash -c "bash bench/peer.sh build $peer >$peer.log 2>&1; echo \$? >$peer.built" </dev/null >/dev/null 2>&1 &
    echo "== build: started, $peer.log"
}

run_peer() {
    local gguf
    build
    for _ in $(seq "${PEER_WAIT:-400}"); do [ -e $peer.built ] && break || sleep 1; done
    [ "$(cat $peer.built 2>/dev/null)" = 0 ] || { tail -n 15 $peer.log; echo "llama-bench is not built"; return 1; }
    gguf=$(python3 bench/rig.py qwen3-30b-a3b | tail -n 1)
    bash bench/peer.sh bench $peer "$gguf" "$out/peer.csv" 48
}

for name in "$@"; do
    case $name in
        build) build ;;
        tests) # compiling takes most of the time: several processes, if pytest-xdist is installed
            need_trace
            workers=$(python3 -P -c 'import xdist' 2>/dev/null && echo "-n $(($(nproc) * 2 / 3))")
            # shellcheck disable=SC2086
            stage tests 25 420 python3 -P -m pytest tests/gpu -q -p no:cacheprovider --durations=5 $workers
            ;;
        kernels)
            for file in bench/kernels.py bench/gemm.py; do
                [ ! -f $file ] || stage kernels 60 120 python3 $file "$out/$(basename $file .py).csv"
            done
            ;;
        sweep) stage sweep 100 240 python3 bench/kernels.py --sweep "$out/sweep.csv" ;;
        peer)
            run_peer 2>&1 | tee -a "$out/log.txt" | tail -n 20 || failed+=(peer)
            python3 bench/rig.py --peer "$out/peer.csv"
            ;;
        quick) stage quick 12 150 python3 bench/decode.py --quick --peer "$out/peer.csv" --out "$out/decode.csv" ;;
        decode) stage decode 24 420 python3 bench/decode.py --caps 25,50,75,100 --routing realistic,uniform --policies crf:h=16,lru@25,lru@50 --peer "$out/peer.csv" --out "$out/decode.csv" ;;
        decode-long) stage decode-long 10 200 python3 bench/decode.py --caps 50,100 --routing realistic --context 128,32768 --tokens 256 --peer "$out/peer.csv" --out "$out/decode.csv" ;;
        decode-gpt-oss)
            need_trace
            stage decode-gpt-oss 10 240 python3 bench/decode.py --shape gpt-oss-20b --caps 25,50,100 --routing trace --policies crf:h=16,lru@50 --out "$out/decode.csv"
            ;;
        decode-prefetch) # published pairs of recall and precision on the misses; and the upper bound
            stage decode-prefetch 14 300 python3 bench/decode.py --caps 25,50 --routing realistic --prefetch none emulated:recall=0.727,precision=0.557,d=1 emulated:recall=0.142,precision=0.987,d=1 oracle:d=2 --out "$out/decode.csv" ;;
        misses) # cost of a miss: experts of 13 MB, which are repacked, and of 2.7 MB, which are not
            for shape in gpt-oss-20b qwen3-30b-a3b; do
                stage misses 11 120 python3 bench/misses.py --shape $shape --out "$out/misses.csv"
            done
            ;;
        families) # a file of 5 to 20 GB each, written and deleted
            for shape in ${SHAPES:-deepseek-v2-lite glm-4.7-flash qwen3.6-35b-a3b gemma-4-26b-a4b lfm2-8b-a1b llama-4-scout}; do
                stage families 5 150 python3 bench/decode.py --shape "$shape" --caps 50,100 --routing own,uniform --tokens 200 --out "$out/decode.csv"
                rm -f "${TMPDIR:-/tmp}/offmoe-bench/$shape.gguf"
            done
            ;;
        prefill) stage prefill 12 240 python3 bench/prefill.py --shape qwen3-30b-a3b,demo --peer "$out/peer.csv" --out "$out/prefill.csv" ;;
        memory) stage memory 20 180 python3 bench/memory.py ${SHAPE_LAYERS:-} ;;
        demo)
            stage demo 12 60 python3 -P -m offmoe doctor
            stage demo 30 90 python3 -P -m offmoe run demo 'What is the capital of France?' --greedy --json --vram 50%
            ;;
        *) echo "stage $name is unknown" >&2; exit 2 ;;
    esac
done
[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
