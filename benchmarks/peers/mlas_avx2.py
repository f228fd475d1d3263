"""Make an OpenVINO under a virtual environment take MLAS's path of AVX2 on a CPU that has AVX-512.

    python mlas_avx2.py .venvs/openvino-avx2

OpenVINO's float32 products are those of MLAS, which asks the CPU what it has and can be told nothing. Its question for
AVX-512 is one instruction in the CPU plugin, `test r9d, 1 << 16` (bit 16 of CPUID's leaf 7: AVX512F); with a mask of 0
the answer is no. Everything else in OpenVINO obeys `OV_CPU_MAX_ISA` and `ONEDNN_MAX_CPU_ISA`.
"""

import sys
from pathlib import Path

_QUESTION = bytes.fromhex("41f7c1 00000100 0f84")  # test r9d, imm32; je
_ANSWERED = bytes.fromhex("41f7c1 00000000 0f84")


def main(environment: Path) -> None:
    """Change the plugin in place; exit with a message when it is not the one that this knows."""
    found = list(environment.glob("lib/python*/site-packages/openvino/libs/libopenvino_intel_cpu_plugin.so"))
    if len(found) != 1:
        sys.exit(f"mlas_avx2.py: no OpenVINO under {environment}; install openvino there first")
    plugin = found[0].read_bytes()
    if plugin.count(_ANSWERED) == 1:
        return
    if plugin.count(_QUESTION) != 1:
        sys.exit("mlas_avx2.py: this OpenVINO's plugin is not the one of 2026.4.1; find MLAS's test for AVX512F in it")
    found[0].write_bytes(plugin.replace(_QUESTION, _ANSWERED))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python mlas_avx2.py ENVIRONMENT")
    main(Path(sys.argv[1]))
