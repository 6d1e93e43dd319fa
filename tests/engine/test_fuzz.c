/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Random requests, for UBLKD_FUZZ_SECONDS (5) seconds in all, from
 * UBLKD_FUZZ_SEED (printed; by default from the clock).
 *
 * Model: one request after the other, half of them nonsense, on every target
 * and transport; result and data must be what a plain array says.
 * Hostile: many at once and overlapping, nothing but noise in the descriptors;
 * each is answered once, in words of the block layer, and no byte outside the
 * device changes.
 */
#include <fcntl.h>
#include <time.h>

#include "fake.h"
#include "ramdisk.h"
#include "stats.h"

enum { MARGIN = 4096, MAX_IO = 16 << 10, ROUND = 400 };

static uint64_t rng_state;

static uint64_t rng(void)
{
	/* xorshift64* */
	rng_state ^= rng_state >> 12;
	rng_state ^= rng_state << 25;
	rng_state ^= rng_state >> 27;
	return rng_state * 0x2545f4914f6cdd1dull;
}

static uint64_t below(uint64_t n)
{
	return rng() % n;
}

/* A device of one of the targets, and the bytes it should have. */
struct subject {
	enum { NULL_TARGET, MEMORY_TARGET, LOOP_TARGET, NR_TARGETS } kind;
	const struct ublkd_transport *tp;
	struct ublkd_target *target;
	struct ramdisk ram;
	int fd;
	bool read_only;
	uint64_t bytes;
	unsigned char *model;
};

static struct subject subject_new(unsigned kind, const struct ublkd_transport *tp)
{
	struct subject s = { .kind = kind, .tp = tp, .fd = -1 };
	struct ublkd_null_config null_config = { .zero_reads = 1 };
	struct ublkd_loop_config loop_config = { .offset = MARGIN };
	char margin[MARGIN];

	s.bytes = (1 + below(600)) * 512;
	s.model = calloc(1, s.bytes);
	CHECK(s.model);
	switch (s.kind) {
	case NULL_TARGET:
		CHECK_EQ(ublkd_null_create(&null_config, &s.target), 0);
		break;
	case MEMORY_TARGET:
		s.ram = ramdisk_new(s.bytes, -1);
		s.target = s.ram.target;
		break;
	default:
		/* A margin of bytes that are none of the device's, before and behind. */
		s.fd = (int)CHECK_SYS(memfd_create("backing", MFD_CLOEXEC));
		CHECK_SYS(ftruncate(s.fd, (off_t)(s.bytes + 2 * MARGIN)));
		memset(margin, 'M', sizeof(margin));
		CHECK_EQ(CHECK_SYS(pwrite(s.fd, margin, MARGIN, 0)), MARGIN);
		CHECK_EQ(CHECK_SYS(pwrite(s.fd, margin, MARGIN, (off_t)(MARGIN + s.bytes))), MARGIN);
		s.read_only = below(8) == 0;
		loop_config.fd = s.fd;
		loop_config.flags = (s.read_only ? UBLKD_LOOP_READ_ONLY : 0) |
				    (below(4) ? 0 : UBLKD_LOOP_BLOCK_DEVICE);
		CHECK_EQ(ublkd_loop_create(&loop_config, &s.target), 0);
	}
	return s;
}

static void subject_free(struct subject *s)
{
	char margin[MARGIN];

	if (s->kind == LOOP_TARGET) {
		for (int i = 0; i < 2; i++) {
			CHECK_EQ(CHECK_SYS(pread(s->fd, margin, MARGIN, i ? (off_t)(MARGIN + s->bytes) : 0)), MARGIN);
			CHECK(all_bytes(margin, MARGIN, 'M'));
		}
		close(s->fd);
	}
	if (s->kind == MEMORY_TARGET) {
		/* Behind the disk there are marks, of which there are two kinds. */
		for (uint64_t c = 0; c < ublkd_memory_file_bytes(s->bytes) - s->bytes; c++)
			CHECK(s->ram.marks[c] <= 1);
		ramdisk_free(&s->ram);
	} else {
		ublkd_target_destroy(s->target);
	}
	free(s->model);
}

static const uint8_t known_ops[] = { UBLKD_OP_READ, UBLKD_OP_READ, UBLKD_OP_READ, UBLKD_OP_WRITE, UBLKD_OP_WRITE,
				     UBLKD_OP_WRITE, UBLKD_OP_FLUSH, UBLKD_OP_DISCARD, UBLKD_OP_WRITE_ZEROES };

/* Numbers at which something could wrap. */
static uint64_t odd_number(void)
{
	static const uint64_t odd[] = { 0, 1, 1ull << 23, 1ull << 31, 1ull << 32, 1ull << 54, 1ull << 55, 1ull << 63, ~0ull,
					~0ull >> 9, ~0ull << 9 };

	return odd[below(sizeof(odd) / sizeof(odd[0]))] + below(5) - 2;
}

static struct fake_request random_request(const struct subject *s, bool sane)
{
	const uint64_t sectors = s->bytes >> 9;
	struct fake_request r = {
		.op = known_ops[below(sizeof(known_ops))],
		.flags = (below(4) ? 0 : UBLKD_RQ_FUA) | (below(2) ? 0 : UBLKD_RQ_NOUNMAP),
	};

	r.sector = below(sectors);
	r.sectors = (uint32_t)(1 + below(sectors - r.sector));
	if ((r.op == UBLKD_OP_READ || r.op == UBLKD_OP_WRITE) && r.sectors > MAX_IO >> 9)
		r.sectors = (uint32_t)(1 + below(MAX_IO >> 9));
	if (sane)
		return r;
	r.flags |= (uint32_t)rng() & 0xffffff00;
	if (!below(3))
		r.op = (uint8_t)rng();
	if (!below(2))
		r.sector = below(2) ? odd_number() : below(2 * sectors);
	if (!below(2))
		r.sectors = (uint32_t)(below(2) ? odd_number() : below(2 * sectors));
	return r;
}

/* What the block layer should be told, by the rules of target.h alone. */
static int32_t expected(const struct subject *s, const struct fake_request *r)
{
	const unsigned __int128 end = ((unsigned __int128)r->sector + r->sectors) * 512;
	const bool transfer = r->op == UBLKD_OP_READ || r->op == UBLKD_OP_WRITE;

	if (r->op == UBLKD_OP_FLUSH)
		return 0;
	if (!transfer && r->op != UBLKD_OP_DISCARD && r->op != UBLKD_OP_WRITE_ZEROES)
		return -EOPNOTSUPP;
	if (!r->sectors || end > s->bytes || (transfer && r->sectors > MAX_IO >> 9))
		return -EIO;
	if (s->read_only && r->op != UBLKD_OP_READ)
		return -EROFS;
	return transfer ? (int32_t)(r->sectors << 9) : 0;
}

static void apply(struct subject *s, const struct fake_request *r)
{
	if (r->result < 0 || r->op == UBLKD_OP_FLUSH || s->kind == NULL_TARGET)
		return;
	if (r->op == UBLKD_OP_READ)
		CHECK(!memcmp(r->data, s->model + (r->sector << 9), (size_t)r->sectors << 9));
	else if (r->op == UBLKD_OP_WRITE)
		memcpy(s->model + (r->sector << 9), r->data, (size_t)r->sectors << 9);
	else /* a discard too: both targets punch */
		memset(s->model + (r->sector << 9), 0, (size_t)r->sectors << 9);
}

static void check_answer(struct fake *f, struct fake_request *r)
{
	struct subject *s = f->priv;
	const int32_t want = expected(s, r);

	if (r->result != want)
		check_failed(__FILE__, __LINE__, "target %d %s, %llu bytes: op %u flags %#x sector %#llx sectors %#x: %d, not %d",
			     s->kind, s->tp->name, (unsigned long long)s->bytes, r->op, r->flags,
			     (unsigned long long)r->sector, r->sectors, r->result, want);
	if (f->p.depth == 1)
		apply(s, r);
}

static void serve_round(struct subject *s, bool model)
{
	static char pool[64][MAX_IO];
	struct fake_request *reqs = calloc(ROUND, sizeof(*reqs));
	struct fake *f = fake_new(s->bytes);

	CHECK(reqs);
	for (int i = 0; i < ROUND; i++) {
		reqs[i] = random_request(s, model && below(2));
		reqs[i].data = pool[i % 64];
	}
	for (size_t i = 0; i < sizeof(pool); i += 8) {
		const uint64_t noise = rng();

		memcpy((char *)pool + i, &noise, 8);
	}
	f->p.max_io_bytes = MAX_IO;
	f->p.depth = model ? 1 : (uint16_t)(1 + below(64));
	f->p.qid = (uint16_t)below(8);
	f->priv = s;
	f->on_answer = check_answer;
	f->batch.below = below;
	fake_serve(f, s->tp, s->target, reqs, ROUND);
	fake_free(f);
	free(reqs);
}

int main(void)
{
	static const struct ublkd_transport *const transports[] = {
		&fake_copy,
		&fake_user_copy,
		&ublkd_transport_batch_user_copy,
		&ublkd_transport_batch_zero_copy,
	};
	const char *seconds = getenv("UBLKD_FUZZ_SECONDS"), *seed = getenv("UBLKD_FUZZ_SEED");
	const uint64_t end = ublkd_now_ns() + (uint64_t)(seconds ? atof(seconds) * 1e9 : 5e9);
	unsigned long long rounds = 0;

	rng_state = seed ? strtoull(seed, NULL, 0) : (uint64_t)time(NULL) * 1000003 + ublkd_now_ns();
	if (!rng_state)
		rng_state = 1;
	fprintf(stderr, "seed %llu\n", (unsigned long long)rng_state);
	do {
		struct subject s = subject_new((unsigned)(rounds % NR_TARGETS), transports[rounds / NR_TARGETS % 4]);

		for (int i = 0; i < 3; i++)
			serve_round(&s, true);
		serve_round(&s, false);
		subject_free(&s);
		rounds++;
	} while (ublkd_now_ns() < end);
	fprintf(stderr, "%llu requests\n", rounds * 4 * ROUND);
	return 0;
}
