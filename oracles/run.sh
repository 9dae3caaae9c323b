#!/bin/sh
# Rewrites every golden. Usage: oracles/run.sh PYTHON FLA_PYTHON  (see README.md for the two environments)
set -eu
[ $# -eq 2 ] || { echo "usage: $0 PYTHON FLA_PYTHON" >&2; exit 2; }
cd "$(dirname "$0")"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=2 PYTHONDONTWRITEBYTECODE=1
for script in attention ssm approximate lra lra_more pool_mlp models imports quantise; do "$1" "$script.py"; done
"$2" linear.py
"$2" imports_fla.py
"$1" qwen3_next.py
