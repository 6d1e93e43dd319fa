// SPDX-License-Identifier: GPL-2.0-only
/*
 * Data between a request's pages and the server's memory, at the driver's
 * initiative (copy mode) or the server's (pread and pwrite on the char device).
 */
#include <linux/highmem.h>
#include <linux/uio.h>

#include "driver.h"

/*
 * To (ITER_DEST) or from the iterator, from a byte of the request on: bytes
 * moved. The plain forms of the copies: pages of a request may be parts of slab
 * objects that the checked ones don't let user space see.
 */
size_t ublk_copy_request(struct request *req, size_t offset, struct iov_iter *iter, int dir)
{
	struct req_iterator pos;
	struct bio_vec vec;
	size_t total = 0;

	rq_for_each_segment(vec, req, pos) {
		size_t len, moved;
		void *page;

		if (offset >= vec.bv_len) {
			offset -= vec.bv_len;
			continue;
		}
		len = min_t(size_t, vec.bv_len - offset, iov_iter_count(iter));
		if (!len)
			break;
		page = kmap_local_page(vec.bv_page);
		if (dir == ITER_DEST) {
			moved = _copy_to_iter(page + vec.bv_offset + offset, len, iter);
		} else {
			moved = _copy_from_iter(page + vec.bv_offset + offset, len, iter);
			flush_dcache_page(vec.bv_page);
		}
		kunmap_local(page);
		total += moved;
		if (moved < len)
			break;
		offset = 0;
	}
	return total;
}

size_t ublk_copy_to_server(struct request *req, u64 addr)
{
	struct ublk_user_iter user;

	if (ublk_user_iter_init(&user, ITER_DEST, addr, blk_rq_bytes(req)))
		return 0;
	return ublk_copy_request(req, 0, &user.iter, ITER_DEST);
}

size_t ublk_copy_from_server(struct request *req, u64 addr, size_t bytes)
{
	struct ublk_user_iter user;

	if (ublk_user_iter_init(&user, ITER_SOURCE, addr, bytes))
		return 0;
	return ublk_copy_request(req, 0, &user.iter, ITER_SOURCE);
}

/* Take hold of the request that the server has on a tag. Give back by ublk_req_put(). */
struct request *ublk_req_get(struct ublk_queue *q, unsigned int tag)
{
	struct ublk_io *io = &q->ios[tag];
	struct request *req = NULL;
	struct ublk_request *data;

	spin_lock(&io->lock);
	if (io->state == UBLK_IO_SERVED) {
		req = io->req;
		data = blk_mq_rq_to_pdu(req);
		refcount_inc(&data->ref);
	}
	spin_unlock(&io->lock);
	return req;
}

static ssize_t ublk_user_copy(struct kiocb *iocb, struct iov_iter *iter, int dir)
{
	struct ublk_file *file = iocb->ki_filp->private_data;
	struct ublk_device *ub = file->ub;
	u64 pos = iocb->ki_pos;
	unsigned int qid, tag;
	struct ublk_queue *q;
	struct request *req;
	size_t offset;
	ssize_t moved;

	/* for servers, not for kernel code that was handed the file */
	if (!user_backed_iter(iter))
		return -EACCES;
	if (READ_ONCE(ub->info.state) == UBLK_S_DEV_DEAD)
		return -EACCES;
	if (pos < UBLKSRV_IO_BUF_OFFSET || pos - UBLKSRV_IO_BUF_OFFSET >= UBLKSRV_IO_BUF_TOTAL_SIZE)
		return -EINVAL;
	pos -= UBLKSRV_IO_BUF_OFFSET;
	qid = (pos >> UBLK_QID_OFF) & UBLK_QID_BITS_MASK;
	tag = (pos >> UBLK_TAG_OFF) & UBLK_TAG_BITS_MASK;
	offset = pos & UBLK_IO_BUF_BITS_MASK;
	if (qid >= ub->info.nr_hw_queues)
		return -EINVAL;
	if (!ublk_has(ub, UBLK_F_USER_COPY))
		return -EACCES;
	if (tag >= ub->info.queue_depth)
		return -EINVAL;
	q = ub->queues[qid];
	req = ublk_req_get(q, tag);
	if (!req)
		return -EINVAL;
	if (!(ublk_req_fills(req) || ublk_req_drains(req)) || offset > blk_rq_bytes(req))
		moved = -EINVAL;
	else if (dir == ITER_DEST ? !ublk_req_drains(req) : !ublk_req_fills(req))
		moved = -EACCES;
	else
		moved = ublk_copy_request(req, offset, iter, dir);
	ublk_req_put(q, req);
	if (moved > 0)
		iocb->ki_pos += moved;
	return moved;
}

ssize_t ublk_file_read(struct kiocb *iocb, struct iov_iter *iter)
{
	return ublk_user_copy(iocb, iter, ITER_DEST);
}

ssize_t ublk_file_write(struct kiocb *iocb, struct iov_iter *iter)
{
	return ublk_user_copy(iocb, iter, ITER_SOURCE);
}
