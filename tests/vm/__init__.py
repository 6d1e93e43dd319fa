# SPDX-License-Identifier: Apache-2.0
"""Boot a real Debian kernel in QEMU and run a command in it, on the host's own files.

One module per job: ``kernels`` finds and caches kernels through ``apt``; ``initramfs`` and ``cpio`` build
what the kernel boots from; ``job`` describes the command; ``qemu`` writes QEMU's command line; ``boot`` runs
it and tells the outcomes of ``outcome`` apart; ``dmesg`` judges the kernel log; ``accel`` tries KVM; ``cli``
is ``scripts/vm``; ``integration`` runs the integration tests on several kernels.
"""
