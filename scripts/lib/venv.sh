# SPDX-License-Identifier: Apache-2.0
# The virtual environment .venv with ublkd installed from the checkout.

venv=.venv

check_python() {
    command -v python3 >/dev/null || die "python3 is missing: install Python 3.11 or later"
    python3 -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
        || die "$(python3 -V) is too old: put Python 3.11 or later first in PATH as python3"
    python_is_complete || die "$(command -v python3) has no headers or no venv module: use one that has"
}

# What the installed package depends on: its metadata, and all that the compiled parts are made from.
source_hash() {
    {
        echo "$PWD"
        "$venv/bin/python" -VV
        find pyproject.toml setup.py daemon kernel_module/uapi -type f \
            \( -name '*.toml' -o -name setup.py -o -name '*.[ch]' -o -name build.py -o -name _version.py \) \
            ! -name '_engine.c' -print0 2>/dev/null | sort -z | xargs -0 sha256sum
    } | sha256sum | cut -d ' ' -f 1
}

# install_venv EXTRA...
install_venv() {
    local hash extra wanted=()
    if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
        say "creating $venv with $(python3 -V)"
        python3 -m venv --clear "$venv" || die "python3 -m venv failed: see above"
    fi
    hash=$(source_hash)
    for extra in $(printf '%s\n' "$@" | sort -u); do
        [ "$(cat "$venv/.setup-$extra" 2>/dev/null)" = "$hash" ] || wanted+=("$extra")
    done
    [ ${#wanted[@]} -gt 0 ] || return 0
    build_and_install "$(IFS=,; echo "${wanted[*]}")"
    for extra in "${wanted[@]}"; do echo "$hash" >"$venv/.setup-$extra"; done
}

build_and_install() {
    say "building ublkd and installing it in $venv"
    # in the environment, not in one of pip's own: a rebuild then takes seconds and no network
    run_pip 'setuptools>=66' wheel 'cffi>=1.15'
    # setuptools doesn't see that a header changed
    printf '[build_ext]\nforce = 1\n' >"$venv/force.cfg"
    DIST_EXTRA_CONFIG=$PWD/$venv/force.cfg run_pip --no-build-isolation -e ".[$1]"
}

run_pip() {
    local output
    output=$("$venv/bin/python" -m pip install --no-input --disable-pip-version-check "$@" 2>&1 </dev/null) && return
    echo "$output" >"$venv/pip.log"
    # of a build, what the compiler complained about; else pip's last words
    grep -E -A 4 '\.[ch]:[0-9]+(:[0-9]+)?: (fatal )?error|undefined reference' "$venv/pip.log" >&2 \
        || tail -n 30 "$venv/pip.log" >&2
    die "pip install $* failed: see above, and $venv/pip.log for all of it"
}
