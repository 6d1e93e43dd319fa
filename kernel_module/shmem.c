// SPDX-License-Identifier: GPL-2.0-only
/*
 * Memory that server and client share. The server registers its mapping; a
 * request whose pages are found in it is not copied, the server is told where
 * in the buffer its data is.
 *
 * Requests look pages up in a table that is never changed, only replaced, so
 * registering stops no I/O. Those at work on a buffer are counted: it is given
 * up when the last has ended.
 */
#include <linux/bsearch.h>
#include <linux/mm.h>
#include <linux/slab.h>
#include <linux/sort.h>
#include <linux/uaccess.h>

#include "driver.h"

#define UBLK_SHMEM_MAX	(1ULL << 32)	/* bytes of one buffer, as an offset has 32 bits */

struct ublk_buffer {
	struct rcu_head rcu;
	atomic_t users;		/* requests */
	bool leaving;
	bool read_only;
	u32 index;
	unsigned long n;
	struct page **pages;
};

/* Pages that are neighbours, both in memory and in the buffer. */
struct ublk_extent {
	unsigned long pfn;
	unsigned long n;
	unsigned long at;	/* page in the buffer */
	struct ublk_buffer *buffer;
};

struct ublk_shmem_table {
	size_t n;
	struct ublk_extent extents[];	/* by pfn */
};

static int ublk_extent_order(const void *a, const void *b)
{
	const struct ublk_extent *x = a, *y = b;

	return x->pfn < y->pfn ? -1 : x->pfn > y->pfn;
}

static int ublk_extent_find(const void *key, const void *extent)
{
	const struct ublk_extent *e = extent;
	unsigned long pfn = *(const unsigned long *)key;

	if (pfn < e->pfn)
		return -1;
	return pfn - e->pfn >= e->n;
}

/* The next extent of a buffer's pages, from page `at` on. */
static struct ublk_extent ublk_extent_at(struct ublk_buffer *buffer, unsigned long at)
{
	struct ublk_extent e = { .pfn = page_to_pfn(buffer->pages[at]), .n = 1, .at = at, .buffer = buffer };

	while (at + e.n < buffer->n && page_to_pfn(buffer->pages[at + e.n]) == e.pfn + e.n)
		e.n++;
	return e;
}

static size_t ublk_count_extents(struct ublk_buffer *buffer)
{
	unsigned long at;
	size_t n = 0;

	for (at = 0; at < buffer->n; at += ublk_extent_at(buffer, at).n)
		n++;
	return n;
}

/* The table without the buffers that leave, and with one more if `more` is one. */
static struct ublk_shmem_table *ublk_shmem_remake(const struct ublk_shmem_table *old, struct ublk_buffer *more)
{
	size_t room = (old ? old->n : 0) + (more ? ublk_count_extents(more) : 0), i;
	struct ublk_shmem_table *table;
	unsigned long at;

	table = kvzalloc(struct_size(table, extents, room), GFP_KERNEL_ACCOUNT);
	if (!table)
		return ERR_PTR(-ENOMEM);
	for (i = 0; old && i < old->n; i++)
		if (!old->extents[i].buffer->leaving)
			table->extents[table->n++] = old->extents[i];
	for (at = 0; more && at < more->n; at += table->extents[table->n - 1].n)
		table->extents[table->n++] = ublk_extent_at(more, at);
	if (!more)
		return table;
	sort(table->extents, table->n, sizeof(*table->extents), ublk_extent_order, NULL);
	/* which of two places a page belongs to could not be told */
	for (i = 1; i < table->n; i++) {
		const struct ublk_extent *e = &table->extents[i - 1];

		if (e->pfn + e->n > table->extents[i].pfn) {
			kvfree(table);
			return ERR_PTR(-EEXIST);
		}
	}
	return table;
}

/* From its return on no request sees the table that was there. */
static void ublk_shmem_replace(struct ublk_device *ub, struct ublk_shmem_table *table)
{
	struct ublk_shmem_table *old = rcu_replace_pointer(ub->shmem, table, lockdep_is_held(&ub->shmem_mutex));

	synchronize_rcu();
	kvfree(old);
}

static void ublk_buffer_free(struct ublk_buffer *buffer)
{
	unpin_user_pages(buffer->pages, buffer->n);
	kvfree(buffer->pages);
	/* its last user may still be looking at ->leaving */
	kfree_rcu(buffer, rcu);
}

/* The caller's pages, pinned for as long as the buffer is there. */
static struct ublk_buffer *ublk_buffer_pin(const struct ublk_shmem_buf_reg *reg)
{
	bool read_only = reg->flags & UBLK_SHMEM_BUF_READ_ONLY;
	struct ublk_buffer *buffer = kzalloc(sizeof(*buffer), GFP_KERNEL_ACCOUNT);
	unsigned long wanted = reg->len >> PAGE_SHIFT;
	int err = -ENOMEM;
	long n;

	if (!buffer)
		return ERR_PTR(-ENOMEM);
	buffer->read_only = read_only;
	buffer->pages = kvmalloc_array(wanted, sizeof(*buffer->pages), GFP_KERNEL_ACCOUNT);
	if (!buffer->pages)
		goto free;
	n = pin_user_pages_fast(reg->addr, wanted, FOLL_LONGTERM | (read_only ? 0 : FOLL_WRITE), buffer->pages);
	if (n == wanted) {
		buffer->n = n;
		return buffer;
	}
	err = n < 0 ? n : -EFAULT;
	if (n > 0)
		unpin_user_pages(buffer->pages, n);
	kvfree(buffer->pages);
free:
	kfree(buffer);
	return ERR_PTR(err);
}

static int ublk_shmem_add(struct ublk_device *ub, struct ublk_buffer *buffer)
{
	struct ublk_shmem_table *table;
	int err;

	lockdep_assert_held(&ub->shmem_mutex);
	err = xa_alloc(&ub->buffers, &buffer->index, buffer, XA_LIMIT(0, USHRT_MAX), GFP_KERNEL);
	if (err)
		return err == -EBUSY ? -ENOSPC : err;
	table = ublk_shmem_remake(rcu_dereference_protected(ub->shmem, lockdep_is_held(&ub->shmem_mutex)), buffer);
	if (IS_ERR(table)) {
		xa_erase(&ub->buffers, buffer->index);
		return PTR_ERR(table);
	}
	ublk_shmem_replace(ub, table);
	return buffer->index;
}

/* The buffer's index, or an error. */
int ublk_shmem_register(struct ublk_device *ub, u64 addr, unsigned int len)
{
	struct ublk_shmem_buf_reg reg = {};
	struct ublk_buffer *buffer;
	int res;

	if (!ublk_has(ub, UBLK_F_SHMEM_ZC))
		return -EOPNOTSUPP;
	if (copy_from_user(&reg, u64_to_user_ptr(addr), min_t(size_t, len, sizeof(reg))))
		return -EFAULT;
	if ((reg.flags & ~UBLK_SHMEM_BUF_READ_ONLY) || reg.reserved)
		return -EINVAL;
	if (!reg.len || reg.len > UBLK_SHMEM_MAX || !PAGE_ALIGNED(reg.len) || !PAGE_ALIGNED(reg.addr))
		return -EINVAL;
	buffer = ublk_buffer_pin(&reg);
	if (IS_ERR(buffer))
		return PTR_ERR(buffer);
	res = -EINTR;
	if (!mutex_lock_interruptible(&ub->shmem_mutex)) {
		res = ublk_shmem_add(ub, buffer);
		mutex_unlock(&ub->shmem_mutex);
	}
	if (res < 0)
		ublk_buffer_free(buffer);
	return res;
}

static int ublk_shmem_remove(struct ublk_device *ub, struct ublk_buffer *buffer)
{
	lockdep_assert_held(&ub->shmem_mutex);
	if (!buffer->leaving) {
		struct ublk_shmem_table *old, *table;

		old = rcu_dereference_protected(ub->shmem, lockdep_is_held(&ub->shmem_mutex));
		WRITE_ONCE(buffer->leaving, true);
		table = ublk_shmem_remake(old, NULL);
		if (IS_ERR(table)) {
			WRITE_ONCE(buffer->leaving, false);
			return PTR_ERR(table);
		}
		ublk_shmem_replace(ub, table);
	}
	/* interrupted it stays pinned, but matches nothing: to be asked for again */
	if (wait_event_interruptible(ub->wait, !atomic_read(&buffer->users)))
		return -EINTR;
	xa_erase(&ub->buffers, buffer->index);
	ublk_buffer_free(buffer);
	return 0;
}

/* When it returns, no request is left that was told of this buffer. */
int ublk_shmem_unregister(struct ublk_device *ub, u64 index)
{
	struct ublk_buffer *buffer;
	int err = -ENOENT;

	if (!ublk_has(ub, UBLK_F_SHMEM_ZC))
		return -EOPNOTSUPP;
	/* an int, as for the kernel's driver */
	if ((int)index < 0 || (int)index > USHRT_MAX)
		return -EINVAL;
	if (mutex_lock_interruptible(&ub->shmem_mutex))
		return -EINTR;
	buffer = xa_load(&ub->buffers, (u32)index);
	if (buffer)
		err = ublk_shmem_remove(ub, buffer);
	mutex_unlock(&ub->shmem_mutex);
	return err;
}

/* The device goes, and has no request any more. */
void ublk_shmem_free(struct ublk_device *ub)
{
	struct ublk_buffer *buffer;
	unsigned long index;

	xa_for_each(&ub->buffers, index, buffer)
		ublk_buffer_free(buffer);
	xa_destroy(&ub->buffers);
	kvfree(rcu_dereference_protected(ub->shmem, true));
}

/* Does a piece of a request continue what was found before? */
static bool ublk_shmem_continue(const struct ublk_shmem_table *table, const struct bio_vec *vec,
				struct ublk_buffer **buffer, u64 *begin, u64 *bytes)
{
	unsigned long pfn = page_to_pfn(vec->bv_page) + (vec->bv_offset >> PAGE_SHIFT);
	unsigned int inside = offset_in_page(vec->bv_offset);
	u64 left = vec->bv_len;

	while (left) {
		const struct ublk_extent *e;
		u64 at, there;

		e = bsearch(&pfn, table->extents, table->n, sizeof(*e), ublk_extent_find);
		if (!e)
			return false;
		at = ((u64)(e->at + (pfn - e->pfn)) << PAGE_SHIFT) + inside;
		if (!*buffer) {
			*buffer = e->buffer;
			*begin = at;
		} else if (*buffer != e->buffer || at != *begin + *bytes) {
			return false;
		}
		there = min_t(u64, left, ((u64)(e->n - (pfn - e->pfn)) << PAGE_SHIFT) - inside);
		*bytes += there;
		left -= there;
		pfn = e->pfn + e->n;
		inside = 0;
	}
	return true;
}

/* Are the request's pages all in one buffer, in a row? Then it uses the buffer until ublk_shmem_put(). */
bool ublk_shmem_match(struct ublk_device *ub, struct request *req, u64 *addr)
{
	struct ublk_request *data = blk_mq_rq_to_pdu(req);
	const struct ublk_shmem_table *table;
	struct ublk_buffer *buffer = NULL;
	u64 begin = 0, bytes = 0;
	struct req_iterator pos;
	bool found = true;
	struct bio_vec vec;

	data->buffer = NULL;
	if (!(ublk_req_fills(req) || ublk_req_drains(req)))
		return false;
	rcu_read_lock();
	table = rcu_dereference(ub->shmem);
	if (table && table->n) {
		rq_for_each_bvec(vec, req, pos) {
			found = ublk_shmem_continue(table, &vec, &buffer, &begin, &bytes);
			if (!found)
				break;
		}
		/* what the server can't write it can't fill */
		if (found && buffer && !(buffer->read_only && ublk_req_fills(req))) {
			atomic_inc(&buffer->users);
			data->buffer = buffer;
			*addr = ublk_shmem_zc_addr(buffer->index, begin);
		}
	}
	rcu_read_unlock();
	return data->buffer;
}

void ublk_shmem_put(struct ublk_device *ub, struct request *req)
{
	struct ublk_request *data = blk_mq_rq_to_pdu(req);
	struct ublk_buffer *buffer = data->buffer;

	if (!buffer)
		return;
	data->buffer = NULL;
	rcu_read_lock();
	if (atomic_dec_and_test(&buffer->users) && READ_ONCE(buffer->leaving))
		wake_up_all(&ub->wait);
	rcu_read_unlock();
}
