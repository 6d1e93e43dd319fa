// SPDX-License-Identifier: GPL-2.0-only
/*
 * Zoned devices. The server keeps the zones: it is asked for a report of them,
 * by a request of our own whose data is the report, and gets the commands to
 * them like any other request.
 */
#include "driver.h"

#ifdef UBLK_HAVE_ZONED

#include <linux/blkzoned.h>
#include <linux/log2.h>
#include <linux/slab.h>

#define UBLK_REPORT_BYTES	SZ_64K	/* of one request */

static u64 ublk_nr_zones(const struct ublk_params *params)
{
	const struct ublk_param_basic *p = &params->basic;

	return (p->dev_sectors + p->chunk_sectors - 1) >> ilog2(p->chunk_sectors);
}

bool ublk_zoned_ok(const struct ublk_params *params)
{
	const struct ublk_param_zoned *p = &params->zoned;
	u64 zones;

	if (!is_power_of_2(params->basic.chunk_sectors) || !p->max_zone_append_sectors)
		return false;
	zones = ublk_nr_zones(params);
	return zones <= UINT_MAX && p->max_open_zones <= zones && p->max_active_zones <= zones;
}

/* Ask the server about zones from `sector` on; it fills in what there are. */
static int ublk_ask_zones(struct gendisk *disk, sector_t sector, unsigned int zones, struct blk_zone *report)
{
	struct request *req = blk_mq_alloc_request(disk->queue, REQ_OP_DRV_IN, 0);
	struct ublk_request *data;
	int err;

	if (IS_ERR(req))
		return PTR_ERR(req);
	data = blk_mq_rq_to_pdu(req);
	data->zone_sector = sector;
	data->zones = zones;
	err = ublk_rq_map_kern(req, report, zones * sizeof(*report), GFP_KERNEL);
	if (!err)
		err = blk_status_to_errno(blk_execute_rq(req, false));
	blk_mq_free_request(req);
	return err;
}

/* A zone that isn't where it should be would lead whoever reads the report astray. */
static bool ublk_zone_ok(const struct blk_zone *zone, sector_t sector, sector_t zone_sectors)
{
	return zone->start == sector && zone->len <= zone_sectors && zone->capacity <= zone->len;
}

static int ublk_report(struct gendisk *disk, sector_t sector, unsigned int wanted, ublk_zone_fn *fn,
		       struct ublk_zone_args *args)
{
	struct ublk_device *ub = disk->private_data;
	sector_t zone_sectors = ub->params.basic.chunk_sectors;
	unsigned int segments = min_t(unsigned int, queue_max_segments(disk->queue), UBLK_REPORT_BYTES / PAGE_SIZE);
	unsigned int room = min_t(unsigned int, queue_max_hw_sectors(disk->queue) << SECTOR_SHIFT,
				  segments * PAGE_SIZE) / sizeof(struct blk_zone);
	sector_t capacity = get_capacity(disk);
	struct blk_zone *report;
	unsigned int done = 0;
	int err = 0;

	room = min(room, wanted);
	report = kvcalloc(room, sizeof(*report), GFP_KERNEL);
	if (!report)
		return -ENOMEM;
	sector = round_down(sector, zone_sectors);
	while (!err && done < wanted && sector < capacity) {
		u64 there = (capacity - sector + zone_sectors - 1) >> ilog2(zone_sectors);
		unsigned int zones = min_t(u64, min(room, wanted - done), there);
		unsigned int i;

		memset(report, 0, zones * sizeof(*report));
		err = ublk_ask_zones(disk, sector, zones, report);
		for (i = 0; i < zones && !err; i++) {
			/* the server has no more */
			if (!report[i].len)
				break;
			if (!ublk_zone_ok(&report[i], sector, zone_sectors)) {
				err = -EIO;
				break;
			}
			err = fn(disk, &report[i], done, args);
			done++;
			sector += zone_sectors;
		}
		if (i < zones)
			break;
	}
	kvfree(report);
	return err ? err : done;
}

#ifdef UBLK_HAVE_REPORT_ZONES_ARGS
static int ublk_report_one(struct gendisk *disk, struct blk_zone *zone, unsigned int index, struct ublk_zone_args *args)
{
	return disk_report_zone(disk, zone, index, args->core);
}

int ublk_report_zones(struct gendisk *disk, sector_t sector, unsigned int zones, struct blk_report_zones_args *core)
{
	struct ublk_zone_args args = { .core = core };

	return ublk_report(disk, sector, zones, ublk_report_one, &args);
}
#else
static int ublk_report_one(struct gendisk *disk, struct blk_zone *zone, unsigned int index, struct ublk_zone_args *args)
{
	return args->fn(zone, index, args->data);
}

int ublk_report_zones(struct gendisk *disk, sector_t sector, unsigned int zones, report_zones_cb fn, void *data)
{
	struct ublk_zone_args args = { .fn = fn, .data = data };

	return ublk_report(disk, sector, zones, ublk_report_one, &args);
}
#endif

/* Where the server appended to: it must be inside the zone that was written to. */
int ublk_zone_appended(struct ublk_device *ub, struct request *req, u64 sector, int res)
{
	u64 begin = blk_rq_pos(req);

	if (res < 0)
		return res;
	if (sector < begin || sector - begin + blk_rq_sectors(req) > ub->params.basic.chunk_sectors)
		return -EIO;
	req->__sector = sector;
	return res;
}

int ublk_check_zones(struct ublk_device *ub, struct gendisk *disk)
{
	int err;

	/*
	 * The report is waited for with the device locked: it fails if the
	 * server dies, and doesn't wait for the next one.
	 */
	spin_lock(&ub->lock);
	ub->checking_zones = true;
	spin_unlock(&ub->lock);
	queue_delayed_work(ublk_wq, &ub->watch_work, UBLK_WATCH_PERIOD);
	err = ublk_revalidate_disk_zones(disk);
	spin_lock(&ub->lock);
	ub->checking_zones = false;
	spin_unlock(&ub->lock);
	return err;
}

#endif /* UBLK_HAVE_ZONED */
