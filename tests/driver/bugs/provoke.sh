#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# provoke.sh BUGS.KO BUG...: make these bugs happen, in this order.
module=$1
shift
leaks=/sys/kernel/debug/kmemleak
echo 2 >/proc/sys/kernel/hung_task_timeout_secs
for bug; do
    answer=$(insmod "$module" bug="$bug" 2>&1)
    case $answer in *'Operation canceled'*) ;; *) echo "$bug: $answer"; exit 1 ;; esac
    if [ "$bug" = leak ]; then
        sleep 6 # younger memory is not looked at
        echo scan >$leaks
        echo scan >$leaks
        cat $leaks
    fi
done
