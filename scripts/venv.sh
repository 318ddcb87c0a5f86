# Sourced by the scripts beside it: venv EXTRAS makes .venv with this package and its extras, once.
venv() {
  local extras=$1 python stamp
  stamp=".venv/installed-$extras-$(cksum < pyproject.toml | tr -d ' ')"
  if [ ! -e "$stamp" ]; then
    for python in python3 python3.13 python3.12 python3.11 python3.10; do
      "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && break
      python=
    done
    if [ -z "$python" ]; then
      echo "allranks needs Python 3.10 or newer with its venv module; python3 here is $(python3 --version 2>&1)." >&2
      exit 2
    fi
    echo "Installing into .venv (the first time takes some minutes: PyTorch is large) ..."
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --editable ".[$extras]"
    : > "$stamp"
  fi
  PATH="$PWD/.venv/bin:$PATH"
}
