#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
# First program in the guest: load what reaching the host's files takes, put a tmpfs overlay over them, switch root.
b=/bin/busybox
while read -r module; do
    $b insmod "/modules/$module" || echo "<0>ublkd-vm: insmod $module failed" >/dev/console
done </modules/boot.list

$b mount -t 9p -o ro,trans=virtio,version=9p2000.L,cache=loose,msize=512000 root /lower || $b poweroff -f
$b mount -t tmpfs -o size=75% tmpfs /upper
$b mkdir /upper/data /upper/work
$b mount -t overlay -o lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work root /root || $b poweroff -f

# what comes from the host at these places is the host's own state
for where in proc sys dev run; do $b mkdir -p /root/$where; done
$b mount -t proc proc /root/proc
$b mount -t sysfs sysfs /root/sys
$b mount -t devtmpfs devtmpfs /root/dev
$b mount -t tmpfs -o mode=755 tmpfs /root/run
$b mkdir /root/run/ublkd-vm
$b cp -r /bin/busybox /init.sh /modules/ublk.list /modules /job /root/run/ublkd-vm/
exec $b switch_root /root /run/ublkd-vm/busybox sh /run/ublkd-vm/init.sh
