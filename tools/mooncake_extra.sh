#!/bin/sh
# Prints the extra of pyproject.toml whose mooncake wheel fits this host's NVIDIA driver.
set -eu
cuda=$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p' | head -n 1)
case "${cuda:-none}" in
    none) echo mooncake ;;
    [0-9] | 1[0-2]) echo mooncake-cu12 ;;
    *) echo mooncake-cu13 ;;
esac
