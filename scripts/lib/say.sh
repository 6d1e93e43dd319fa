# SPDX-License-Identifier: Apache-2.0
# Messages of the scripts.

say() {
    echo "${0##*/}: $*" >&2
}

die() {
    say "$*"
    exit 1
}
