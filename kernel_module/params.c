// SPDX-License-Identifier: GPL-2.0-only
/*
 * Parameters: what is accepted, and how this kernel is told.
 */
#include <linux/log2.h>

#include "driver.h"

#define UBLK_MAX_SHIFT		28	/* of what becomes 1U << shift bytes */
#define UBLK_DMA_ALIGN		3	/* a server's buffer may begin anywhere */

static bool ublk_basic_ok(struct ublk_device *ub, const struct ublk_param_basic *p)
{
	if (p->logical_bs_shift < SECTOR_SHIFT || p->logical_bs_shift > PAGE_SHIFT)
		return false;
	if (p->physical_bs_shift < p->logical_bs_shift || p->physical_bs_shift > UBLK_MAX_SHIFT)
		return false;
	if (p->io_min_shift > UBLK_MAX_SHIFT || p->io_opt_shift > UBLK_MAX_SHIFT)
		return false;
	if (p->max_sectors > ub->info.max_io_buf_bytes >> SECTOR_SHIFT)
		return false;
	if (p->max_sectors < PAGE_SIZE >> SECTOR_SHIFT)
		return false;
	if ((p->attrs & UBLK_ATTR_FUA) && !(p->attrs & UBLK_ATTR_VOLATILE_CACHE))
		return false;
	/* the block layer splits at a chunk's end, and must not split a block */
	if (p->chunk_sectors & ((1U << (p->logical_bs_shift - SECTOR_SHIFT)) - 1))
		return false;
	return p->dev_sectors <= LLONG_MAX >> SECTOR_SHIFT;
}

static bool ublk_discard_ok(const struct ublk_param_discard *p)
{
	if (p->max_discard_sectors && p->max_discard_segments != 1)
		return false;
	return p->discard_granularity;
}

static bool ublk_dma_ok(const struct ublk_param_dma_align *p)
{
	return p->alignment < PAGE_SIZE && is_power_of_2((u64)p->alignment + 1);
}

static bool ublk_segment_ok(const struct ublk_param_segment *p)
{
	if (!p->max_segments || p->max_segment_size < UBLK_MIN_SEGMENT_SIZE)
		return false;
	/* all ones is no boundary */
	if (p->seg_boundary_mask == U64_MAX)
		return true;
	return p->seg_boundary_mask + 1 >= UBLK_MIN_SEGMENT_SIZE &&
	       is_power_of_2(p->seg_boundary_mask + 1);
}

int ublk_params_check(struct ublk_device *ub, const struct ublk_params *params)
{
	u32 types = params->types;

	if (!(types & UBLK_PARAM_TYPE_BASIC) || !ublk_basic_ok(ub, &params->basic))
		return -EINVAL;
	/* read-only */
	if (types & UBLK_PARAM_TYPE_DEVT)
		return -EINVAL;
	/* a zoned device has them, and no other */
	if (ublk_has(ub, UBLK_F_ZONED) != !!(types & UBLK_PARAM_TYPE_ZONED))
		return -EINVAL;
	if ((types & UBLK_PARAM_TYPE_ZONED) && !ublk_zoned_ok(params))
		return -EINVAL;
	if ((types & UBLK_PARAM_TYPE_DISCARD) && !ublk_discard_ok(&params->discard))
		return -EINVAL;
	if ((types & UBLK_PARAM_TYPE_DMA_ALIGN) && !ublk_dma_ok(&params->dma))
		return -EINVAL;
	if ((types & UBLK_PARAM_TYPE_SEGMENT) && !ublk_segment_ok(&params->seg))
		return -EINVAL;
	return 0;
}

#ifdef UBLK_HAVE_ALLOC_DISK_LIMITS
static struct gendisk *ublk_alloc_disk_limited(struct ublk_device *ub)
{
	const struct ublk_params *p = &ub->params;
	struct queue_limits lim = {
		.logical_block_size = 1U << p->basic.logical_bs_shift,
		.physical_block_size = 1U << p->basic.physical_bs_shift,
		.io_min = 1U << p->basic.io_min_shift,
		.io_opt = 1U << p->basic.io_opt_shift,
		.max_hw_sectors = p->basic.max_sectors,
		.chunk_sectors = p->basic.chunk_sectors,
		.virt_boundary_mask = p->basic.virt_boundary_mask,
		.dma_alignment = UBLK_DMA_ALIGN,
	};

	if (p->types & UBLK_PARAM_TYPE_DISCARD) {
		lim.discard_alignment = p->discard.discard_alignment;
		lim.discard_granularity = p->discard.discard_granularity;
		lim.max_hw_discard_sectors = p->discard.max_discard_sectors;
		lim.max_write_zeroes_sectors = p->discard.max_write_zeroes_sectors;
		lim.max_discard_segments = p->discard.max_discard_segments;
	}
	if (p->types & UBLK_PARAM_TYPE_DMA_ALIGN)
		lim.dma_alignment = p->dma.alignment;
	if (p->types & UBLK_PARAM_TYPE_SEGMENT) {
		lim.seg_boundary_mask = p->seg.seg_boundary_mask;
		lim.max_segment_size = p->seg.max_segment_size;
		lim.max_segments = p->seg.max_segments;
	}
#ifdef UBLK_HAVE_ZONED_LIMITS
	if (p->types & UBLK_PARAM_TYPE_ZONED) {
		lim.features |= BLK_FEAT_ZONED;
		lim.max_open_zones = p->zoned.max_open_zones;
		lim.max_active_zones = p->zoned.max_active_zones;
#ifdef UBLK_HAVE_HW_ZONE_APPEND
		lim.max_hw_zone_append_sectors = p->zoned.max_zone_append_sectors;
#else
		lim.max_zone_append_sectors = p->zoned.max_zone_append_sectors;
#endif
	}
#endif
#ifdef UBLK_HAVE_LIMIT_FEATURES
	if (p->basic.attrs & UBLK_ATTR_VOLATILE_CACHE)
		lim.features |= BLK_FEAT_WRITE_CACHE;
	if (p->basic.attrs & UBLK_ATTR_FUA)
		lim.features |= BLK_FEAT_FUA;
	if (p->basic.attrs & UBLK_ATTR_ROTATIONAL)
		lim.features |= BLK_FEAT_ROTATIONAL;
#endif
	return blk_mq_alloc_disk(&ub->tag_set, &lim, NULL);
}
#else
static struct gendisk *ublk_alloc_disk_limited(struct ublk_device *ub)
{
	const struct ublk_params *p = &ub->params;
	struct gendisk *disk = blk_mq_alloc_disk(&ub->tag_set, NULL);
	struct request_queue *q;

	if (IS_ERR(disk))
		return disk;
	q = disk->queue;
	blk_queue_logical_block_size(q, 1U << p->basic.logical_bs_shift);
	blk_queue_physical_block_size(q, 1U << p->basic.physical_bs_shift);
	blk_queue_io_min(q, 1U << p->basic.io_min_shift);
	blk_queue_io_opt(q, 1U << p->basic.io_opt_shift);
	blk_queue_max_hw_sectors(q, p->basic.max_sectors);
	blk_queue_chunk_sectors(q, p->basic.chunk_sectors);
	blk_queue_dma_alignment(q, UBLK_DMA_ALIGN);
	if (p->types & UBLK_PARAM_TYPE_DISCARD) {
		q->limits.discard_alignment = p->discard.discard_alignment;
		q->limits.discard_granularity = p->discard.discard_granularity;
		blk_queue_max_discard_sectors(q, p->discard.max_discard_sectors);
		blk_queue_max_write_zeroes_sectors(q, p->discard.max_write_zeroes_sectors);
		blk_queue_max_discard_segments(q, p->discard.max_discard_segments);
	}
	if (p->types & UBLK_PARAM_TYPE_DMA_ALIGN)
		blk_queue_dma_alignment(q, p->dma.alignment);
	if (p->types & UBLK_PARAM_TYPE_SEGMENT) {
		blk_queue_segment_boundary(q, p->seg.seg_boundary_mask);
		blk_queue_max_segment_size(q, p->seg.max_segment_size);
		blk_queue_max_segments(q, p->seg.max_segments);
	}
	/* after the segment size, which it makes unlimited */
	if (p->basic.virt_boundary_mask)
		blk_queue_virt_boundary(q, p->basic.virt_boundary_mask);
#ifdef UBLK_HAVE_ZONED_SETTERS
	if (p->types & UBLK_PARAM_TYPE_ZONED) {
		disk_set_zoned(disk, BLK_ZONED_HM);
		disk_set_max_open_zones(disk, p->zoned.max_open_zones);
		disk_set_max_active_zones(disk, p->zoned.max_active_zones);
		blk_queue_max_zone_append_sectors(q, p->zoned.max_zone_append_sectors);
		blk_queue_flag_set(QUEUE_FLAG_ZONE_RESETALL, q);
		/* a scheduler that keeps the writes to a zone in order */
		blk_queue_required_elevator_features(q, ELEVATOR_F_ZBD_SEQ_WRITE);
	}
#endif
	return disk;
}
#endif

/* Before 6.11 these were no limits but flags of the queue. */
static void ublk_set_queue_flags(struct ublk_device *ub, struct request_queue *q)
{
#ifndef UBLK_HAVE_LIMIT_FEATURES
	u32 attrs = ub->params.basic.attrs;

	blk_queue_write_cache(q, attrs & UBLK_ATTR_VOLATILE_CACHE, attrs & UBLK_ATTR_FUA);
	if (attrs & UBLK_ATTR_ROTATIONAL)
		blk_queue_flag_clear(QUEUE_FLAG_NONROT, q);
	else
		blk_queue_flag_set(QUEUE_FLAG_NONROT, q);
#endif
}

static int ublk_blk_check_open(struct gendisk *disk)
{
	struct ublk_device *ub = disk->private_data;

	/* under open_mutex, as TRY_STOP_DEV */
	if (ub->no_open)
		return -ENXIO;
	if (!ublk_has(ub, UBLK_F_UNPRIVILEGED_DEV))
		return 0;
	if (from_kuid(&init_user_ns, current_euid()) != ub->info.owner_uid ||
	    from_kgid(&init_user_ns, current_egid()) != ub->info.owner_gid)
		return -EPERM;
	return 0;
}

#ifdef UBLK_HAVE_OPEN_DISK
static int ublk_blk_open(struct gendisk *disk, blk_mode_t mode)
{
	return ublk_blk_check_open(disk);
}
#else
static int ublk_blk_open(struct block_device *bdev, fmode_t mode)
{
	return ublk_blk_check_open(bdev->bd_disk);
}
#endif

static void ublk_blk_free(struct gendisk *disk)
{
	struct ublk_device *ub = disk->private_data;

	ublk_put(ub);
}

static const struct block_device_operations ublk_blk_ops = {
	.owner = THIS_MODULE,
	.open = ublk_blk_open,
	.free_disk = ublk_blk_free,
	.report_zones = ublk_report_zones,
};

struct gendisk *ublk_alloc_disk(struct ublk_device *ub)
{
	struct gendisk *disk = ublk_alloc_disk_limited(ub);

	if (IS_ERR(disk))
		return disk;
	ublk_set_queue_flags(ub, disk->queue);
	snprintf(disk->disk_name, sizeof(disk->disk_name), "ublkb%u", ub->id);
	disk->fops = &ublk_blk_ops;
	disk->private_data = ub;
	set_capacity(disk, ub->params.basic.dev_sectors);
	if (ub->params.basic.attrs & UBLK_ATTR_READ_ONLY)
		set_disk_ro(disk, true);
	return disk;
}
