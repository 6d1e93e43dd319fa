// SPDX-License-Identifier: GPL-2.0
/*
 * The program is written as instructions, and loaded with bpf(2): that needs
 * neither a BPF compiler nor a libbpf that knows sleepable struct_ops.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/btf.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "ring.h"
#include "step.h"
#include "ublk.h"

/* Of io_uring/bpf-ops.h and loop.h in the kernel; BTF has no names for them. */
enum { REGION_CQ = 1, REGION_SQ = 2 };
enum { LOOP_CONTINUE = 0, LOOP_STOP = 1 };

#define OPS "io_uring_bpf_ops"
#define MOST 32 /* requests per step */

struct kernel_types {
	int ops, value, value_size, data_offset; /* struct io_uring_bpf_ops, and what a map holds of it */
	int loop_step, loop_step_offset, ring_fd_offset;
	int submit_sqes, get_region;
};

/* BTF: only as much as to find structures, their members, and functions. */

static size_t btf_extra(const struct btf_type *t)
{
	unsigned int n = BTF_INFO_VLEN(t->info);

	switch (BTF_INFO_KIND(t->info)) {
	case BTF_KIND_INT:
	case BTF_KIND_VAR:
	case BTF_KIND_DECL_TAG:
		return 4;
	case BTF_KIND_ARRAY:
		return sizeof(struct btf_array);
	case BTF_KIND_STRUCT:
	case BTF_KIND_UNION:
		return n * sizeof(struct btf_member);
	case BTF_KIND_ENUM:
		return n * sizeof(struct btf_enum);
	case BTF_KIND_ENUM64:
		return n * sizeof(struct btf_enum64);
	case BTF_KIND_FUNC_PROTO:
		return n * sizeof(struct btf_param);
	case BTF_KIND_DATASEC:
		return n * sizeof(struct btf_var_secinfo);
	default:
		return 0;
	}
}

static void note_members(struct kernel_types *k, const char *strings, const struct btf_type *t, bool is_value)
{
	const struct btf_member *m = (const struct btf_member *)(t + 1);

	for (unsigned int i = 0; i < BTF_INFO_VLEN(t->info); i++) {
		const char *name = strings + m[i].name_off;

		if (is_value && !strcmp(name, "data"))
			k->data_offset = m[i].offset / 8;
		if (!is_value && !strcmp(name, "ring_fd"))
			k->ring_fd_offset = m[i].offset / 8;
		if (!is_value && !strcmp(name, "loop_step")) {
			k->loop_step = i;
			k->loop_step_offset = m[i].offset / 8;
		}
	}
}

static int find_types(struct kernel_types *k)
{
	int fd = open("/sys/kernel/btf/vmlinux", O_RDONLY | O_CLOEXEC);
	const struct btf_header *h;
	const struct btf_type *t;
	const char *strings;
	struct stat st;
	char *btf;
	int id;

	*k = (struct kernel_types){ 0 };
	if (fd < 0 || fstat(fd, &st) < 0)
		return -errno;
	btf = malloc(st.st_size);
	/* the file gives a page or more per read */
	for (ssize_t got, done = 0; done < st.st_size; done += got) {
		got = read(fd, btf + done, st.st_size - done);
		if (got <= 0)
			return -EIO;
	}
	close(fd);
	h = (const struct btf_header *)btf;
	strings = btf + h->hdr_len + h->str_off;
	t = (const struct btf_type *)(btf + h->hdr_len + h->type_off);
	for (id = 1; (const char *)t < btf + h->hdr_len + h->type_off + h->type_len; id++) {
		const char *name = strings + t->name_off;

		if (BTF_INFO_KIND(t->info) == BTF_KIND_STRUCT) {
			if (!strcmp(name, OPS)) {
				k->ops = id;
				note_members(k, strings, t, false);
			} else if (!strcmp(name, "bpf_struct_ops_" OPS)) {
				k->value = id;
				k->value_size = t->size;
				note_members(k, strings, t, true);
			}
		} else if (BTF_INFO_KIND(t->info) == BTF_KIND_FUNC) {
			if (!strcmp(name, "bpf_io_uring_submit_sqes"))
				k->submit_sqes = id;
			else if (!strcmp(name, "bpf_io_uring_get_region"))
				k->get_region = id;
		}
		t = (const struct btf_type *)((const char *)(t + 1) + btf_extra(t));
	}
	free(btf);
	if (k->ops && k->value && k->submit_sqes && k->get_region)
		return 0;
	fprintf(stderr, "this kernel has no " OPS " (CONFIG_IO_URING_BPF_OPS)\n");
	return -EOPNOTSUPP;
}

/* An assembler: the program under way, and labels to jump to. */

enum label { SUBMIT, SUBMITTED, FAILED, STOP, RESULT, LABELS };

struct program {
	struct bpf_insn insns[2048];
	int n;
	
	struct { int insn; enum label to; } jumps[256];
	int njumps;
	const struct kernel_types *types;
};

static void emit(struct program *p, int code, int dst, int src, int off, int imm)
{
	p->insns[p->n++] = (struct bpf_insn){ code, dst, src, off, imm };
}

static void load(struct program *p, int size, int dst, int src, int off)
{
	emit(p, BPF_LDX | BPF_MEM | size, dst, src, off, 0);
}

static void store(struct program *p, int size, int dst, int off, int src)
{
	emit(p, BPF_STX | BPF_MEM | size, dst, src, off, 0);
}

static void set(struct program *p, int dst, int imm)
{
	emit(p, BPF_ALU64 | BPF_MOV | BPF_K, dst, 0, 0, imm);
}

static void set64(struct program *p, int dst, uint64_t imm)
{
	emit(p, BPF_LD | BPF_IMM | BPF_DW, dst, 0, 0, (int)imm);
	emit(p, 0, 0, 0, 0, (int)(imm >> 32));
}

static void move(struct program *p, int dst, int src)
{
	emit(p, BPF_ALU64 | BPF_MOV | BPF_X, dst, src, 0, 0);
}

static void with(struct program *p, int op, int dst, int imm)
{
	emit(p, BPF_ALU64 | op | BPF_K, dst, 0, 0, imm);
}

static void add(struct program *p, int dst, int src)
{
	emit(p, BPF_ALU64 | BPF_ADD | BPF_X, dst, src, 0, 0);
}

static void jump_to(struct program *p, enum label to)
{
	p->jumps[p->njumps].insn = p->n - 1;
	p->jumps[p->njumps++].to = to;
}

/* On the low 32 bits, as signed numbers for JSLT. */
static void jump_if(struct program *p, int op, int dst, int imm, enum label to)
{
	emit(p, BPF_JMP32 | op | BPF_K, dst, 0, 0, imm);
	jump_to(p, to);
}

static void jump_if_reg(struct program *p, int op, int dst, int src, enum label to)
{
	emit(p, BPF_JMP32 | op | BPF_X, dst, src, 0, 0);
	jump_to(p, to);
}

/* The jumps to a label so far lead here; it can then be used again. */
static void here(struct program *p, enum label label)
{
	for (int i = 0; i < p->njumps; i++) {
		if (p->jumps[i].to != label || p->jumps[i].insn < 0)
			continue;
		p->insns[p->jumps[i].insn].off = p->n - p->jumps[i].insn - 1;
		p->jumps[i].insn = -1;
	}
}

static void call_kernel(struct program *p, int function)
{
	emit(p, BPF_JMP | BPF_CALL, 0, BPF_PSEUDO_KFUNC_CALL, 0, function);
}

static void call_helper(struct program *p, int function)
{
	emit(p, BPF_JMP | BPF_CALL, 0, 0, 0, function);
}

static void leave(struct program *p, int result)
{
	set(p, BPF_REG_0, result);
	emit(p, BPF_JMP | BPF_EXIT, 0, 0, 0, 0);
}

/* What lies on the stack, and in the registers that calls leave alone. */
enum { CTX = -8, PARAMS = -16, TAG = -24, DESC = -48 };
enum { COUNT = BPF_REG_6, HEAD = BPF_REG_7, RINGS = BPF_REG_8, SQE = BPF_REG_9 };

static void get_region(struct program *p, int region, size_t size)
{
	load(p, BPF_DW, BPF_REG_1, BPF_REG_10, CTX);
	set(p, BPF_REG_2, region);
	set(p, BPF_REG_3, size);
	call_kernel(p, p->types->get_region);
	emit(p, BPF_JMP | BPF_JEQ | BPF_K, BPF_REG_0, 0, 0, 0);
	jump_to(p, STOP);
}

/*
 * One request: the CQE at HEAD becomes an answer in the SQEs. In C:
 *
 *	if (head == cq_tail) goto submit;
 *	if (cqe->res < 0) goto failed;
 *	tag = cqe->user_data & (depth - 1);
 *	copy_from_user(&desc, descs + tag, sizeof(desc));
 *	result = op is read or write ? desc.nr_sectors << 9 : 0;
 *	sqe->user_data = sqe->cmd.tag = tag; sqe->cmd.result = result;
 */
static void one_request(struct program *p, const struct step *s, const struct ring *ring, int n)
{
	int cqes = ring->p.cq_off.cqes, commit = s->has_data_sqe ? sizeof(struct io_uring_sqe) : 0;
	int first = n * (commit ? 2 : 1) * (int)sizeof(struct io_uring_sqe);

	load(p, BPF_W, BPF_REG_1, RINGS, ring->p.cq_off.tail);
	jump_if_reg(p, BPF_JEQ, HEAD, BPF_REG_1, SUBMIT);
	move(p, BPF_REG_1, HEAD);
	with(p, BPF_AND, BPF_REG_1, ring->p.cq_entries - 1);
	with(p, BPF_LSH, BPF_REG_1, 4);
	add(p, BPF_REG_1, RINGS);
	load(p, BPF_W, BPF_REG_2, BPF_REG_1, cqes + offsetof(struct io_uring_cqe, res));
	jump_if(p, BPF_JSLT, BPF_REG_2, 0, FAILED);
	load(p, BPF_DW, BPF_REG_3, BPF_REG_1, cqes + offsetof(struct io_uring_cqe, user_data));
	with(p, BPF_AND, BPF_REG_3, s->depth - 1);
	if (s->has_length) {
		set(p, BPF_REG_0, s->length);
	} else {
		store(p, BPF_DW, BPF_REG_10, TAG, BPF_REG_3);
		move(p, BPF_REG_1, BPF_REG_10);
		with(p, BPF_ADD, BPF_REG_1, DESC);
		set(p, BPF_REG_2, sizeof(struct ublksrv_io_desc));
		with(p, BPF_MUL, BPF_REG_3, sizeof(struct ublksrv_io_desc));
		set64(p, BPF_REG_4, s->descs);
		add(p, BPF_REG_3, BPF_REG_4);
		call_helper(p, BPF_FUNC_copy_from_user);
		load(p, BPF_DW, BPF_REG_3, BPF_REG_10, TAG);
		load(p, BPF_W, BPF_REG_0, BPF_REG_10, DESC + 4);
		with(p, BPF_LSH, BPF_REG_0, 9);
		load(p, BPF_B, BPF_REG_1, BPF_REG_10, DESC);
		jump_if(p, BPF_JLE, BPF_REG_1, UBLK_IO_OP_WRITE, RESULT);
		set(p, BPF_REG_0, 0);
		here(p, RESULT);
	}
	if (s->has_data_sqe) {
		/* R1 is the operation: READ_FIXED and WRITE_FIXED are neighbours; others are not served */
		jump_if(p, BPF_JGT, BPF_REG_1, UBLK_IO_OP_WRITE, STOP);
		with(p, BPF_ADD, BPF_REG_1, IORING_OP_READ_FIXED);
		store(p, BPF_B, SQE, first + offsetof(struct io_uring_sqe, opcode), BPF_REG_1);
		load(p, BPF_DW, BPF_REG_2, BPF_REG_10, DESC + 8);
		with(p, BPF_LSH, BPF_REG_2, 9);
		store(p, BPF_DW, SQE, first + offsetof(struct io_uring_sqe, off), BPF_REG_2);
		store(p, BPF_W, SQE, first + offsetof(struct io_uring_sqe, len), BPF_REG_0);
		store(p, BPF_H, SQE, first + offsetof(struct io_uring_sqe, buf_index), BPF_REG_3);
		/* the buffer that the next request of the tag gets */
		store(p, BPF_DW, SQE, first + commit + offsetof(struct io_uring_sqe, addr), BPF_REG_3);
	}
	store(p, BPF_DW, SQE, first + commit + offsetof(struct io_uring_sqe, user_data), BPF_REG_3);
	store(p, BPF_H, SQE, first + commit + 48 + offsetof(struct ublksrv_io_cmd, tag), BPF_REG_3);
	store(p, BPF_W, SQE, first + commit + 48 + offsetof(struct ublksrv_io_cmd, result), BPF_REG_0);
	with(p, BPF_ADD, COUNT, 1);
	with(p, BPF_ADD, HEAD, 1);
}

static void publish_head(struct program *p, const struct ring *ring)
{
	store(p, BPF_W, RINGS, ring->p.cq_off.head, HEAD);
}

static void submit(struct program *p, const struct step *s)
{
	load(p, BPF_DW, BPF_REG_1, BPF_REG_10, CTX);
	move(p, BPF_REG_2, COUNT);
	if (s->has_data_sqe)
		with(p, BPF_LSH, BPF_REG_2, 1);
	call_kernel(p, p->types->submit_sqes);
}

static void assemble(struct program *p, const struct step *s, const struct ring *ring)
{
	load(p, BPF_DW, BPF_REG_2, BPF_REG_1, 8);
	store(p, BPF_DW, BPF_REG_10, PARAMS, BPF_REG_2);
	load(p, BPF_DW, BPF_REG_2, BPF_REG_1, 0);
	store(p, BPF_DW, BPF_REG_10, CTX, BPF_REG_2);
	get_region(p, REGION_SQ, ring->sqes_size);
	move(p, SQE, BPF_REG_0);
	get_region(p, REGION_CQ, ring->rings_size);
	move(p, RINGS, BPF_REG_0);
	load(p, BPF_W, HEAD, RINGS, ring->p.cq_off.head);
	set(p, COUNT, 0);
	/* a step takes at most these many; the kernel calls again at once if there are more */
	for (unsigned int n = 0; n < (s->depth < MOST ? s->depth : MOST); n++)
		one_request(p, s, ring, n);
	here(p, SUBMIT);
	jump_if(p, BPF_JEQ, COUNT, 0, SUBMITTED);
	publish_head(p, ring);
	submit(p, s);
	jump_if(p, BPF_JSLT, BPF_REG_0, 0, STOP);
	here(p, SUBMITTED);
	load(p, BPF_DW, BPF_REG_1, BPF_REG_10, PARAMS);
	with(p, BPF_ADD, HEAD, 1);
	store(p, BPF_W, BPF_REG_1, 0, HEAD);
	leave(p, LOOP_CONTINUE);
	/* a command failed, most likely with -ENODEV: its CQE is left for user space */
	here(p, FAILED);
	jump_if(p, BPF_JEQ, COUNT, 0, STOP);
	publish_head(p, ring);
	submit(p, s);
	here(p, STOP);
	leave(p, LOOP_STOP);
}

static int bpf(int cmd, union bpf_attr *attr)
{
	long done = syscall(SYS_bpf, cmd, attr, sizeof(*attr));

	return done < 0 ? -errno : (int)done;
}

static int load_program(const struct program *p)
{
	static char log[1 << 20];
	union bpf_attr attr = {
		.prog_type = BPF_PROG_TYPE_STRUCT_OPS,
		.insns = (uintptr_t)p->insns,
		.insn_cnt = p->n,
		.license = (uintptr_t)"GPL", /* what calls functions of the kernel has to say so */
		.prog_flags = BPF_F_SLEEPABLE,
		.attach_btf_id = p->types->ops,
		.expected_attach_type = p->types->loop_step,
		.prog_name = "ublk_step",
	};
	int fd = bpf(BPF_PROG_LOAD, &attr);

	if (fd >= 0)
		return fd;
	attr.log_buf = (uintptr_t)log;
	attr.log_size = sizeof(log);
	attr.log_level = 1;
	bpf(BPF_PROG_LOAD, &attr);
	fprintf(stderr, "%sthe kernel refuses the program: %s\n", log, strerror(-fd));
	return fd;
}

/* Types of our own, which a map has to come with, though this one needs none: an int. */
static int load_own_types(void)
{
	static const struct {
		struct btf_header header;
		struct btf_type type;
		uint32_t encoding;
		char strings[8];
	} btf = {
		.header = {
			.magic = BTF_MAGIC,
			.version = BTF_VERSION,
			.hdr_len = sizeof(btf.header),
			.type_len = sizeof(btf.type) + sizeof(btf.encoding),
			.str_off = sizeof(btf.type) + sizeof(btf.encoding),
			.str_len = sizeof(btf.strings),
		},
		.type = { .name_off = 1, .info = BTF_KIND_INT << 24, .size = 4 },
		.encoding = BTF_INT_SIGNED << 24 | 32,
		.strings = "\0int\0\0",
	};
	union bpf_attr attr = { .btf = (uintptr_t)&btf, .btf_size = sizeof(btf) };

	return bpf(BPF_BTF_LOAD, &attr);
}

int step_attach(const struct step *step, const struct ring *ring)
{
	struct kernel_types types;
	struct program p = { .types = &types };
	union bpf_attr attr = { .map_type = BPF_MAP_TYPE_STRUCT_OPS, .key_size = 4, .max_entries = 1 };
	char *value;
	int key = 0, prog, map, err = find_types(&types);

	if (err)
		return err;
	assemble(&p, step, ring);
	prog = load_program(&p);
	if (prog < 0)
		return prog;
	attr.value_size = types.value_size;
	attr.btf_vmlinux_value_type_id = types.value;
	attr.btf_fd = load_own_types();
	map = bpf(BPF_MAP_CREATE, &attr);
	if (map < 0) {
		perror("the map of " OPS);
		return map;
	}
	value = calloc(1, types.value_size);
	*(uint64_t *)(value + types.data_offset + types.loop_step_offset) = prog;
	*(uint32_t *)(value + types.data_offset + types.ring_fd_offset) = ring->fd;
	attr = (union bpf_attr){ .map_fd = map, .key = (uintptr_t)&key, .value = (uintptr_t)value };
	err = bpf(BPF_MAP_UPDATE_ELEM, &attr);
	free(value);
	close(prog);
	if (err)
		fprintf(stderr, OPS " does not take the program: %s\n", strerror(-err));
	return err ? err : map;
}

int step_detach(int map)
{
	int key = 0;
	union bpf_attr attr = { .map_fd = map, .key = (uintptr_t)&key };
	int err = bpf(BPF_MAP_DELETE_ELEM, &attr);

	close(map);
	return err;
}
