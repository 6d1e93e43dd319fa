/* SPDX-License-Identifier: Apache-2.0 */
/* A long no-operation (nopl with a displacement) that no compiler makes: the guest's sign to the plugin. */
#define MARK 0x0f, 0x1f, 0x80, 0x75, 0x62, 0x6c, 0x6b
