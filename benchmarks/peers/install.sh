#!/usr/bin/env bash
# The environment of the peers that are no dependencies of ours: llama.cpp, CTranslate2 and
# OpenVINO GenAI.
#
#     benchmarks/peers/install.sh [FOLDER]      default: .venv beside this file
#
# llama.cpp is built from source for this machine's processor: needs cmake, a C++ compiler and some
# minutes. A peer that cannot be installed is named in one line and skipped by the benchmarks.
# PYTHON=... chooses the interpreter; pip's own settings (PIP_INDEX_URL and so on) hold. Without a
# GPU, on a machine whose pip would take a CUDA torch, set
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
set -uo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
folder="${1:-$here/.venv}"
log="$folder/install.log"

# torch and transformers are those of constraints.txt: CTranslate2's converter reads with them what
# the other peers run. An exact torch, because a looser pin can pull gigabytes.
TORCH="torch==2.13.0"
TRANSFORMERS="transformers==5.23.0"
COMMON=(numpy==2.4.6 safetensors==0.8.0)
LLAMA="llama-cpp-python==0.3.36"
GGUF="gguf==0.19.0"
CTRANSLATE2="ctranslate2==4.8.5"
OPENVINO=(openvino==2026.4.1 openvino-genai==2026.4.1.0)

failed=0

# install NAME REQUIREMENT... ; says in one line how it went.
install() {
    local name="$1" && shift
    echo "peers: installing $name ..."
    if "${pip[@]}" install --quiet "$@" >>"$log" 2>&1; then
        echo "peers: $name is installed"
    else
        echo "peers: $name could not be installed; see $log"
        failed=1
    fi
}

if ! "${PYTHON:-python3.11}" -m venv "$folder"; then
    echo "peers: no environment could be made in $folder"
    exit 1
fi
: >"$log"
pip=(nice -n 10 "$folder/bin/python" -m pip)
wheels="$(mktemp -d)"
trap 'rm -rf "$wheels"' EXIT

# The build takes longest, so it runs beside all else. No ready wheel and no cache: those may be made
# for another processor.
export CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_OPENMP=ON ${CMAKE_ARGS:-}"
export CMAKE_BUILD_PARALLEL_LEVEL="${JOBS:-$(nproc)}"
if [ "$("${pip[@]}" show llama-cpp-python 2>/dev/null | grep -c "^Version: ${LLAMA#*==}$")" = 0 ]; then
    echo "peers: building llama.cpp from source, some minutes ..."
    "${pip[@]}" wheel --verbose --no-deps --no-cache-dir --no-binary llama-cpp-python \
        --wheel-dir "$wheels" "$LLAMA" >"$folder/llama.log" 2>&1 &
else
    true &
fi
build=$!

install gguf "${COMMON[@]}" "$GGUF"
install CTranslate2 "${COMMON[@]}" "$TORCH" "$TRANSFORMERS" "$CTRANSLATE2"
install "OpenVINO GenAI" "${COMMON[@]}" "${OPENVINO[@]}"
if wait "$build"; then
    install llama.cpp "${COMMON[@]}" --find-links "$wheels" --only-binary llama-cpp-python "$LLAMA"
else
    echo "peers: llama.cpp could not be built; see $folder/llama.log"
    failed=1
fi

if [ "$folder" != "$here/.venv" ]; then
    echo "peers: export SUPERPOSE_PEERS_PYTHON=$folder/bin/python"
fi
exit "$failed"
