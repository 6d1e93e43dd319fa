# SPDX-License-Identifier: Apache-2.0
# Debian packages. What is wanted is a program or a file; who has those from elsewhere needs no package.

missing_packages=()

# need PROGRAM-or-/FILE PACKAGE
need() {
    local there
    case $1 in
        /*) there=$([ -e "$1" ] && echo yes) || true ;;
        *) there=$(PATH=$PATH:/usr/sbin:/sbin command -v "$1") || true ;;
    esac
    [ -n "$there" ] || missing_packages+=("$2")
}

need_build_packages() {
    need gcc gcc
    need /usr/include/stdio.h libc6-dev
    need /usr/include/linux/version.h linux-libc-dev
    need make make
    need pkg-config pkg-config
    need /usr/include/liburing.h liburing-dev
    need python3 python3
    need_python_packages
}

# Headers and venv come with any Python but Debian's own, which has them in packages.
need_python_packages() {
    python_is_complete || missing_packages+=(python3-dev python3-venv)
}

python_is_complete() {
    python3 -I - 2>/dev/null <<'PY'
import ensurepip, os, sys, sysconfig, venv
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))
PY
}

need_test_packages() {
    need fio fio
    need mkfs.ext4 e2fsprogs
    need mkfs.xfs xfsprogs
    need mkfs.btrfs btrfs-progs
    need lsblk util-linux
    need fdisk fdisk
    need udevadm udev
    need ps procps
    need modprobe kmod
    need dmsetup dmsetup
    need systemd-analyze systemd
    need ip iproute2
    need nsenter util-linux
}

need_vm_packages() {
    need qemu-system-x86_64 qemu-system-x86
    # the other busybox package is not static
    if ! busybox_is_static; then missing_packages+=(busybox-static); fi
    need modprobe kmod
    need udevadm udev
    need python3 python3
}

# Headers come by the kernel's name, with the compiler that this Debian's kernels are built with.
need_driver_packages() {
    need gcc-12 gcc-12
    need make make
    need debootstrap debootstrap
    need unshare util-linux
}

# A kernel of one's own, from its source package.
need_debug_kernel_packages() {
    need_driver_packages
    need flex flex
    need bison bison
    need bc bc
    need xz xz-utils
    need depmod kmod
    need /usr/include/gelf.h libelf-dev
}

need_bench_packages() {
    need fio fio
    need mkfs.ext4 e2fsprogs
    need nbd-client nbd-client
    need nbdkit nbdkit
    nbdkit --dump-plugin python >/dev/null 2>&1 || missing_packages+=(nbdkit-plugin-python)
    need qemu-nbd qemu-utils
    # for the kernel's source
    need dpkg dpkg
    need xz xz-utils
}

busybox_is_static() {
    local program
    program=$(command -v busybox) && ! grep -q /ld-linux "$program"
}

install_packages() {
    [ ${#missing_packages[@]} -gt 0 ] || return 0
    local packages
    mapfile -t packages < <(printf '%s\n' "${missing_packages[@]}" | sort -u)
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null \
        || die "missing here; as root: apt-get install --no-install-recommends ${packages[*]}"
    say "installing ${packages[*]}"
    # old or empty lists show as a package that isn't there: fetch them and try once more
    apt_install "${packages[@]}" >/dev/null 2>&1 && return
    say "fetching package lists"
    apt-get update -q >/dev/null || die "apt-get update failed: see above"
    apt_install "${packages[@]}" >/dev/null || die "could not install ${packages[*]}: see above"
}

apt_install() {
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$@" </dev/null
}
