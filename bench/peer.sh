#!/usr/bin/env bash
# llama.cpp's llama-bench for comparison, built from llama-cpp-python's source distribution.
#   bash bench/peer.sh pack               needs a network: write .peer/llama.cpp.tar.xz, reduced to llama-bench
#   bash bench/peer.sh build DIR          needs no network: unpack into DIR and compile (CUDA=90; CUDA=off: CPU only)
#   bash bench/peer.sh bench DIR GGUF OUT.csv LAYERS
# LAYERS is the model's number of layers. The experts of 0 to LAYERS layers are on the CPU: 100 to 0 % are in VRAM.
set -euo pipefail
version=${LLAMA_CPP_PYTHON:-0.3.36}
root=$(cd "$(dirname "$0")/.." && pwd)
packed=$root/.peer/llama.cpp.tar.xz

pack() {
    local source keep
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    mkdir -p "$root/.peer"
    python3 -m pip download -q --no-deps --no-binary llama-cpp-python -d "$work" "llama-cpp-python==$version"
    tar xzf "$work"/llama_cpp_python-*.tar.gz -C "$work"
    source=$(echo "$work"/llama_cpp_python-*/vendor/llama.cpp)
    (
        cd "$source"
        # Remove Vulkan, SYCL, … and miniaudio, which only multimodal tools use; CMake needs their CMakeLists.txt.
        find ggml/src -mindepth 1 -maxdepth 1 -type d ! -name ggml-cpu ! -name ggml-cuda -exec rm -rf {} +
        rm -rf ggml/src/ggml-cpu/arch/{arm,loongarch,powerpc,riscv,s390,wasm} ggml/src/ggml-cpu/{spacemit,kleidiai}
        rm -rf vendor/{miniaudio,stb}/*.[ch]* src/*.md
        printf 'find_package(Threads REQUIRED)\nllama_add_compile_flags()\nadd_subdirectory(llama-bench)\n' >tools/CMakeLists.txt
        keep=(CMakeLists.txt LICENSE cmake common ggml include src vendor tools/CMakeLists.txt tools/llama-bench)
        tar c --sort=name --mtime=@0 --owner=0 --group=0 "${keep[@]}" | xz -9e -T1 >"$packed"
    )
    ls -l "$packed"
}

build() {
    local dir=$1 cuda=(-DGGML_CUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=${CUDA:-90}" -DGGML_CUDA_FA_ALL_QUANTS=OFF -DGGML_CUDA_NCCL=OFF)
    [ -f "$packed" ] || { echo "$packed is absent: run bash bench/peer.sh pack on a machine with a network" >&2; exit 1; }
    [ "${CUDA:-}" = off ] && cuda=(-DGGML_CUDA=OFF)
    mkdir -p "$dir"
    tar xJf "$packed" -C "$dir"
    cmake -S "$dir" -B "$dir/build" -G Ninja -DCMAKE_BUILD_TYPE=Release "${cuda[@]}" -DGGML_NATIVE=ON -DGGML_CCACHE=OFF \
        -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF \
        -DLLAMA_BUILD_APP=OFF -DBUILD_SHARED_LIBS=OFF
    [ -n "${CONFIGURE_ONLY:-}" ] || cmake --build "$dir/build" --target llama-bench -j "${JOBS:-16}"
}

bench() {
    local dir=$1 gguf=$2 out=$3 layers=$4 part
    local tool=$dir/build/bin/llama-bench
    # Without mmap (-lm none), as llama.cpp itself recommends for experts on the CPU, which are then pinned.
    local common=(-m "$gguf" -ngl 99 -fa 1 -lm "${PEER_LOAD:-none}" -r "${PEER_RUNS:-3}" -t "${PEER_THREADS:-$(nproc)}" -o csv)
    # shellcheck disable=SC2206
    local on_cpu=(${PEER_ON_CPU:-0 $((layers / 4)) $((layers / 2)) $((layers * 3 / 4)) $layers})
    : >"$out"
    rows() { # append llama-bench's rows, with one header
        part=$(timeout 150 "$tool" "${common[@]}" "$@" 2>"$dir/bench.log") || { echo "llama-bench $* failed:"; tail -n 5 "$dir/bench.log"; } >&2
        [ -z "$part" ] || { [ ! -s "$out" ] || part=$(tail -n +2 <<<"$part"); echo "$part" >>"$out"; }
    }
    for cpu in "${on_cpu[@]}"; do
        rows -ncmoe "$cpu" -n "${PEER_TOKENS:-128}" -p 512,4096 -b 4096 -ub 4096
    done
    [ -n "${PEER_DEPTH-32768}" ] || return 0
    for cpu in 0 $((layers / 2)); do
        rows -ncmoe "$cpu" -n 64 -p 0 -d "${PEER_DEPTH-32768}" -b 4096 -ub 4096 -r 1
    done
}

case ${1:-} in
    pack) pack ;;
    build) build "$2" ;;
    bench) bench "$2" "$3" "$4" "$5" ;;
    *) sed -n '2,6p' "$0" >&2; exit 2 ;;
esac
