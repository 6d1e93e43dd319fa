/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A plugin for QEMU (7.2 or later): how often each translated block of the
 * guest ran. When the guest executes mark.c's instruction, what was counted so
 * far goes to DIR/count.N as lines of address, instructions, executions.
 *
 * The few declarations of qemu-plugin.h that it takes are here, since Debian
 * packages no such header.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mark.h"

#define EXPORT __attribute__((visibility("default")))

struct qemu_plugin_tb;
struct qemu_plugin_insn;
typedef void (*trans_cb)(uint64_t id, struct qemu_plugin_tb *tb);
typedef void (*exec_cb)(unsigned cpu, void *arg);

size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *tb);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *tb, size_t i);
size_t qemu_plugin_insn_size(const struct qemu_plugin_insn *insn);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *insn);
void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, trans_cb cb);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *tb, int op, void *word, uint64_t n);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *insn, exec_cb cb, int flags, void *arg);

EXPORT int qemu_plugin_version = 1;
EXPORT int qemu_plugin_install(uint64_t id, const void *info, int argc, char **argv);

#define INLINE_ADD 0

/* One CPU, one thread: nothing here needs a lock. */
#define BLOCKS (1u << 22)

static struct block {
	uint64_t address;
	uint64_t executions;
	uint32_t instructions; /* 0: free */
} *blocks;
static const char *dir;

static struct block *find(uint64_t address, uint32_t instructions)
{
	uint64_t at = (address * 0x9e3779b97f4a7c15ull >> 40) + instructions * 7919;
	struct block *b;

	for (;; at++) {
		b = &blocks[at % BLOCKS];
		if (!b->instructions || (b->address == address && b->instructions == instructions))
			break;
	}
	b->address = address;
	b->instructions = instructions;
	return b;
}

static void write_counts(unsigned cpu, void *arg)
{
	static unsigned number;
	char path[4096];
	FILE *file;

	(void)cpu;
	(void)arg;
	snprintf(path, sizeof(path), "%s/count.%u", dir, number++);
	file = fopen(path, "w");
	if (!file) {
		perror(path);
		exit(1);
	}
	for (unsigned i = 0; i < BLOCKS; i++)
		if (blocks[i].executions)
			fprintf(file, "%" PRIx64 " %" PRIu32 " %" PRIu64 "\n", blocks[i].address,
				blocks[i].instructions, blocks[i].executions);
	fclose(file);
}

static void translated(uint64_t id, struct qemu_plugin_tb *tb)
{
	static const unsigned char mark[] = { MARK };
	const size_t n = qemu_plugin_tb_n_insns(tb);
	struct block *b = find(qemu_plugin_tb_vaddr(tb), (uint32_t)n);

	(void)id;
	qemu_plugin_register_vcpu_tb_exec_inline(tb, INLINE_ADD, &b->executions, 1);
	for (size_t i = 0; i < n; i++) {
		struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);

		if (qemu_plugin_insn_size(insn) == sizeof(mark) &&
		    !memcmp(qemu_plugin_insn_data(insn), mark, sizeof(mark)))
			qemu_plugin_register_vcpu_insn_exec_cb(insn, write_counts, 0, NULL);
	}
}

int qemu_plugin_install(uint64_t id, const void *info, int argc, char **argv)
{
	(void)info;
	if (argc != 1 || strncmp(argv[0], "dir=", 4)) {
		fprintf(stderr, "count: give it dir=DIRECTORY\n");
		return -1;
	}
	dir = strdup(argv[0] + 4);
	blocks = calloc(BLOCKS, sizeof(*blocks));
	if (!dir || !blocks)
		return -1;
	qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
	return 0;
}
