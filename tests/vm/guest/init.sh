# SPDX-License-Identifier: Apache-2.0
# Process 1 of the guest, run by busybox sh: prepare what programs expect, run the job, report to the host.
# Ports (see qemu.py): 1 command's stdout, 2 its stderr, 3 report, 4 kernel log.
here=/run/ublkd-vm
b=$here/busybox
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
. $here/job/settings

# the port's device number depends on what else is virtio
until [ -c "$(echo /dev/vport*p4)" ]; do $b usleep 10000; done
port=$(echo /dev/vport*p4)
port=${port%4}
exec 5<>"${port}3"
# cat ends when the log overtakes it
while :; do $b cat /dev/kmsg; done >"${port}4" &

fail() {
    echo "fail $*" >&5
    while :; do $b sleep 1000; done
}

mount_all() {
    $b mkdir -p /dev/pts /dev/shm /dev/mqueue
    $b mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
    $b mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    $b mount -t mqueue mqueue /dev/mqueue
    $b ln -sf /proc/self/fd /dev/fd
    for n in 0:stdin 1:stdout 2:stderr; do $b ln -sf /proc/self/fd/${n%:*} /dev/${n#*:}; done
    $b mount -t cgroup2 cgroup2 /sys/fs/cgroup
    $b mount -t tracefs tracefs /sys/kernel/tracing
    $b mount -t debugfs debugfs /sys/kernel/debug
    $b mount -t configfs configfs /sys/kernel/config 2>/dev/null
    $b mkdir -p /run/lock /run/udev
    $b mkdir -p "/lib/modules/$kernel_release"
    $b mount --bind "$modules_dir" "/lib/modules/$kernel_release" || fail "can't see $modules_dir"
    # bound first: the caller may work below /tmp, which then keeps the host's files (writes vanish either way)
    [ "$private_tmp" = 1 ] && $b mount -t tmpfs -o mode=1777 tmpfs /tmp
    if [ -n "$share" ]; then
        $b mkdir -p "$share"
        $b mount -t 9p -o trans=virtio,version=9p2000.L,cache=mmap,msize=512000 share "$share" \
            || fail "can't mount the shared directory $share"
    fi
}

# Print the name of the disk that QEMU gave this serial.
disk_by_serial() {
    for disk in /sys/block/vd*; do
        [ "$(cat "$disk/serial" 2>/dev/null)" = "$1" ] && echo "/dev/${disk##*/}" && return
    done
    fail "scratch disk $1 did not appear"
}

find_disks() {
    n=0
    disks=
    while [ $n -lt "$disk_count" ]; do
        disks="$disks${disks:+ }$(disk_by_serial "ublkd-$n")"
        n=$((n + 1))
    done
    export UBLKD_VM_DISKS="$disks"
}

load_modules() {
    if [ "$load_ublk" = 1 ]; then
        while read -r module; do $b insmod "$here/modules/$module"; done <$here/modules/ublk.list
    fi
    for module in $here/job/modules/*; do
        [ -e "$module" ] || continue
        error=$($b insmod "$module" 2>&1) || fail "insmod ${module##*/[0-9]-}: $error"
    done
    if [ "$require_ublk" = 1 ] && [ ! -c /dev/ublk-control ]; then
        fail "--require-ublk: kernel $kernel_release has no ublk driver"
    fi
}

# What the guest's programs are waiting for, when the host says that time is up.
show_programs() {
    for process in /proc/[0-9]*; do
        words=$($b tr '\0' ' ' <"$process/cmdline" 2>/dev/null)
        case $words in '' | $here/* | *systemd-udevd*) continue ;; esac
        for task in "$process"/task/*; do
            echo "vm: task ${task##*/} of ${process#/proc/}: $words"
            $b sed -n 's/^State:/    state/p' "$task/status"
            $b sed 's/^/    /' "$task/stack"
        done
    done
}

mount_all
$b hostname ublkd-vm
$b ip link set lo up
$b ip addr add 127.0.0.1/8 dev lo 2>/dev/null
echo 1 >/proc/sys/kernel/sysrq
# without a coldplug: that would load drivers for everything QEMU has
udevd=/usr/lib/systemd/systemd-udevd
[ -x $udevd ] || udevd=/lib/systemd/systemd-udevd
[ -x $udevd ] && $udevd --daemon >/dev/null 2>&1
load_modules
find_disks

# The command writes to pipes, not to the ports: a port can be opened only once, so /dev/stderr would fail.
$b mkfifo $here/out $here/err
$b cat $here/out >"${port}1" &
$b cat $here/err >"${port}2" &
exec 3>$here/out 4>$here/err

{ read -r _ <&5; show_programs >&4 2>/dev/null; } &

[ -d "$directory" ] || fail "the guest has no directory $directory"
if [ "$interactive" = 1 ]; then
    # Held open, as each last close drops what has been typed; not by init, whose terminal it would become.
    $b sleep 1000000000 <>/dev/hvc0 &
    $b stty rows "$rows" cols "$columns" </dev/hvc0
fi
echo "run" >&5
if [ "$interactive" = 1 ]; then
    $b setsid -c /bin/sh $here/job/command </dev/hvc0 >/dev/hvc0 2>&1 3>&- 4>&- 5>&- &
else
    $b setsid /bin/sh $here/job/command </dev/null >&3 2>&4 3>&- 4>&- 5>&- &
fi
wait $!
status=$?

[ -n "$share" ] && $b sync -f "$share"
# Each stream ends with a mark, so that the host knows when it has all of it, whoever else still holds the pipe.
$b printf %s "$mark" >&3
$b printf %s "$mark" >&4
echo "$mark" >/dev/kmsg
echo "status $status" >&5
while :; do $b sleep 1000; done
