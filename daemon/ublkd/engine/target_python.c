/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The python target: hands each pass's requests to a Python object.
 *
 * An extension module of its own, ublkd._pytarget, so that the engine stays
 * free of Python; it reaches the engine through target->sv only. The GIL is
 * taken once per pass. There is one Request object per tag, made in open().
 *
 * A handler may keep what it was given, so nothing here trusts that it did
 * not: a Request that someone still holds when its tag comes again is left to
 * them, dead, and replaced; a view that outlives its request is released.
 *
 * Where the driver does not copy to and from io->buf, data crosses straight
 * between a request and the handler's memory as far as can be (enum pyplace);
 * what a handler sees is the same.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <errno.h>
#include <liburing.h>
#include <math.h>
#include <sys/uio.h>
#include <unistd.h>

#include "layout.h"
#include "stats.h"
#include "target.h"

#define NR_OPS 6 /* up to UBLKD_OP_WRITE_ZEROES; 4 is unused */
#define MAX_ERRNO 4095

static const char *const op_names[NR_OPS] = {
	[UBLKD_OP_READ] = "read",	[UBLKD_OP_WRITE] = "write",
	[UBLKD_OP_FLUSH] = "flush",	[UBLKD_OP_DISCARD] = "discard",
	[UBLKD_OP_WRITE_ZEROES] = "write_zeroes",
};

struct pytarget;

/* Where a request's data is. */
enum pyplace {
	PLACE_BUFFER,  /* io->buf; of a read it is pushed in the end */
	PLACE_PINNED,  /* the same, and stays so: a view or an operation names io->buf, or the driver does */
	PLACE_REQUEST, /* with the driver alone: a write's before anybody asked, a read's that was pushed */
};

/* Request: what a handler sees of one tag. Copies of the io's fields stay readable after completion. */
struct pyreq {
	PyObject_HEAD
	struct pytarget *pt; /* good while io is */
	struct ublkd_io *io; /* NULL before arrival and after completion */
	PyObject *source;    /* what copy_from() took a read's data from last, or NULL */
	uint64_t source_off;
	PyObject *view;      /* memoryview of io->buf that .buffer gave out, or NULL */
	PyObject *released;  /* list of those before it that were released while parts of them lived on, or NULL */
	unsigned long long offset;
	unsigned int length;
	unsigned int flags;
	unsigned int unawaited; /* awaitables made of this request and not yet awaited */
	int result;
	unsigned char op;
	unsigned char place; /* enum pyplace */
	unsigned short tag;
	unsigned short queue;
};

/* Batch: the requests of one pass, for handle(). */
struct pybatch {
	PyObject_VAR_HEAD /* ob_size: capacity */
	unsigned int n;
	struct pyreq *reqs[];
};

enum pyop_kind { PYOP_READ, PYOP_WRITE, PYOP_FSYNC, PYOP_SLEEP };
enum pyop_state { PYOP_NEW, PYOP_YIELDED, PYOP_RUNNING, PYOP_DONE };

/* What pread_async() and the like return: to be awaited once, by the handler of its own request. */
struct pyop {
	PyObject_HEAD
	struct pyreq *req; /* NULL: a sleep, which belongs to nobody until awaited */
	uint64_t off;
	uint32_t done;
	int fd;
	int err; /* 0 or -errno, once DONE */
	uint8_t kind;
	uint8_t state;
	struct __kernel_timespec ts;
};

struct pytag {
	struct pyreq *req;
	PyObject *coro;      /* suspended coroutine, or NULL */
	struct pyop *waiting; /* what it waits for */
};

struct pytarget {
	struct ublkd_target base;
	struct ublkd_queue *q;
	PyObject *target;
	PyObject *on_error;
	PyObject *handlers[NR_OPS]; /* bound methods; NULL: not served */
	PyObject *handle_batch;     /* bound method, then it serves every op of ops_mask; or NULL */
	unsigned int ops_mask;
	uint32_t block_size;
	unsigned int depth;
	bool moves_data; /* the driver does not copy */
	int plain_reads; /* see pyreq_gives_straight() */
	struct pytag *tags;
	struct pybatch *batch;
};

static PyTypeObject pyreq_type, pybatch_type, pyop_type;

static bool op_has_data(unsigned op)
{
	return op == UBLKD_OP_READ || op == UBLKD_OP_WRITE;
}

/* ---- errors ---- */

static PyObject *take_exception(void)
{
#if PY_VERSION_HEX >= 0x030c0000
	return PyErr_GetRaisedException();
#else
	PyObject *type, *value, *traceback;

	PyErr_Fetch(&type, &value, &traceback);
	if (!type)
		return NULL;
	PyErr_NormalizeException(&type, &value, &traceback);
	if (traceback)
		PyException_SetTraceback(value, traceback);
	Py_DECREF(type);
	Py_XDECREF(traceback);
	return value;
#endif
}

/* The errno (1..4095) that an exception or an int stands for, 0 if none. No exception is left set. */
static int errno_of(PyObject *error)
{
	PyObject *number;
	long value = 0;

	if (PyLong_Check(error))
		number = Py_NewRef(error);
	else if (PyObject_TypeCheck(error, (PyTypeObject *)PyExc_OSError))
		number = PyObject_GetAttrString(error, "errno");
	else
		return 0;
	if (number && PyLong_Check(number))
		value = PyLong_AsLong(number);
	PyErr_Clear();
	Py_XDECREF(number);
	return value > 0 && value <= MAX_ERRNO ? (int)value : 0;
}

static void report(struct pytarget *pt, const char *where, PyObject *exc)
{
	PyObject *ret = PyObject_CallFunction(pt->on_error, "sO", where, exc);

	if (!ret)
		PyErr_WriteUnraisable(pt->on_error);
	Py_XDECREF(ret);
}

/* Clear the current exception; its -errno. All but an OSError that carries one are reported, as EIO. */
static int fail_current(struct pytarget *pt, const char *where)
{
	PyObject *exc = take_exception();
	int err = exc ? errno_of(exc) : 0;

	if (!err && exc)
		report(pt, where, exc);
	Py_XDECREF(exc);
	return err ? -err : -EIO;
}

/* ---- Request ---- */

static struct pyreq *pyreq_create(struct pytarget *pt, unsigned tag, unsigned queue)
{
	struct pyreq *req = PyObject_New(struct pyreq, &pyreq_type);

	if (!req)
		return NULL;
	req->pt = pt;
	req->io = NULL;
	req->source = NULL;
	req->source_off = 0;
	req->view = NULL;
	req->released = NULL;
	req->offset = 0;
	req->length = 0;
	req->flags = 0;
	req->unawaited = 0;
	req->result = 0;
	req->op = 0;
	req->place = PLACE_PINNED;
	req->tag = (unsigned short)tag;
	req->queue = (unsigned short)queue;
	return req;
}

static void pyreq_dealloc(struct pyreq *req)
{
	Py_XDECREF(req->view);
	Py_XDECREF(req->released);
	Py_XDECREF(req->source);
	PyObject_Free(req);
}

static const char *pyreq_op_name(const struct pyreq *req)
{
	return req->op < NR_OPS && op_names[req->op] ? op_names[req->op] : "request";
}

/* False with an exception set if req is over, or is none of the operations in mask. */
static bool pyreq_check(const struct pyreq *req, const char *method, unsigned mask)
{
	if (!req->io)
		PyErr_Format(PyExc_ValueError, "%s: this request was answered already", method);
	else if (!(mask & 1u << req->op))
		PyErr_Format(PyExc_ValueError, "%s does not apply to a %s", method, pyreq_op_name(req));
	else
		return true;
	return false;
}

/* Views other than our own that can reach the buffer: slices, arrays made of it. */
static Py_ssize_t view_others(PyObject *view)
{
	PyMemoryViewObject *mv = (PyMemoryViewObject *)view;
	bool released = mv->flags & _Py_MEMORYVIEW_RELEASED;

	return mv->exports + mv->mbuf->exports - (released ? 0 : 1);
}

static bool view_released(PyObject *view)
{
	return ((PyMemoryViewObject *)view)->flags & _Py_MEMORYVIEW_RELEASED;
}

/*
 * The request ends: no view may see the tag's next one. Keeps an untouched
 * view for reuse. Returns false if memory stays reachable that can't be taken
 * back (slices do not die with the view they were made from).
 */
static bool pyreq_revoke_view(struct pyreq *req)
{
	PyObject *view = req->view, *ret;
	bool others = view_others(view) > 0;

	for (Py_ssize_t i = 0; req->released && i < PyList_GET_SIZE(req->released); i++)
		others |= view_others(PyList_GET_ITEM(req->released, i)) > 0;
	Py_CLEAR(req->released);
	if (!others && Py_REFCNT(view) == 1)
		return true;
	if (((PyMemoryViewObject *)view)->exports == 0 && !view_released(view)) {
		ret = PyObject_CallMethod(view, "release", NULL);
		if (!ret)
			PyErr_Clear();
		Py_XDECREF(ret);
	}
	Py_CLEAR(req->view);
	return !others;
}

static bool check_slice(const char *method, const Py_buffer *b, uint64_t off, uint32_t len)
{
	if (off <= (uint64_t)b->len && len <= (uint64_t)b->len - off)
		return true;
	PyErr_Format(PyExc_ValueError, "%s: bytes %llu to %llu are outside the buffer of %zd bytes", method,
		     (unsigned long long)off, (unsigned long long)off + len, b->len);
	return false;
}

/* ---- a request's data ---- */

/* 0, or the -errno that pull or push gave. */
static int pyreq_pull(const struct pyreq *req, void *dst)
{
	int64_t n = req->pt->base.sv->pull(req->pt->q, req->io, 0, dst, req->length);

	return n < 0 ? (int)n : 0;
}

static int pyreq_push(const struct pyreq *req, const void *src, uint32_t len)
{
	int64_t n = req->pt->base.sv->push(req->pt->q, req->io, 0, src, len);

	return n < 0 ? (int)n : 0;
}

static bool raise_errno(int err)
{
	errno = -err;
	PyErr_SetFromErrno(PyExc_OSError);
	return false;
}

/*
 * What was pushed can't be had back from the driver, only once more from where
 * it came from; and that may have changed. So a target's reads are pushed by
 * copy_from() after this many that were answered as copy_from() left them, and
 * no more once a handler looked at what it gave.
 */
#define PLAIN_READS 64
#define NOT_PLAIN (-1)

static bool pyreq_gives_straight(const struct pyreq *req)
{
	return req->place != PLACE_PINNED && req->pt->plain_reads == PLAIN_READS;
}

/* Have the data in io->buf. False with an exception set. */
static bool pyreq_load(struct pyreq *req)
{
	Py_buffer b;
	bool ok;
	int err;

	if (req->source)
		req->pt->plain_reads = NOT_PLAIN;
	if (req->place != PLACE_REQUEST)
		return true;
	if (req->op == UBLKD_OP_WRITE) {
		err = pyreq_pull(req, req->io->buf);
		if (err)
			return raise_errno(err);
	} else {
		if (PyObject_GetBuffer(req->source, &b, PyBUF_SIMPLE) < 0)
			return false;
		ok = check_slice("copy_from", &b, req->source_off, req->length);
		if (ok)
			memmove(req->io->buf, (const char *)b.buf + req->source_off, req->length);
		PyBuffer_Release(&b);
		if (!ok)
			return false;
	}
	req->place = PLACE_BUFFER;
	return true;
}

/* The same, and leave it there until the request is answered. */
static bool pyreq_pin(struct pyreq *req)
{
	if (!pyreq_load(req))
		return false;
	req->place = PLACE_PINNED;
	return true;
}

/* Give a read its data, b[off:off+length], which is there. 0 or -errno. memmove: it may be a view of this request. */
static int pyreq_fill(struct pyreq *req, PyObject *source, const Py_buffer *b, uint64_t off)
{
	const char *src = (const char *)b->buf + off;
	int err;

	if (pyreq_gives_straight(req)) {
		err = pyreq_push(req, src, req->length);
		if (err)
			return err;
		req->place = PLACE_REQUEST;
	} else {
		memmove(req->io->buf, src, req->length);
		if (req->place == PLACE_PINNED)
			return 0;
		req->place = PLACE_BUFFER;
	}
	req->source_off = off;
	Py_XSETREF(req->source, Py_NewRef(source));
	return 0;
}

/* Store a request's data, or zeroes where it has none, at b[off:off+length], which is there. 0 or -errno. */
static int pyreq_drain(const struct pyreq *req, const Py_buffer *b, uint64_t off)
{
	char *dst = (char *)b->buf + off;

	if (!op_has_data(req->op))
		memset(dst, 0, req->length);
	else if (req->place == PLACE_REQUEST)
		return pyreq_pull(req, dst);
	else
		memmove(dst, req->io->buf, req->length);
	return 0;
}

static PyObject *pyreq_get_buffer(struct pyreq *req, void *closure)
{
	uint32_t len = op_has_data(req->op) ? req->length : 0;
	PyObject *view = req->view;

	(void)closure;
	if (!pyreq_check(req, "buffer", ~0u) || !pyreq_pin(req))
		return NULL;
	if (view && !view_released(view)) {
		Py_buffer *b = PyMemoryView_GET_BUFFER(view);

		if (b->len == len && b->buf == req->io->buf)
			return Py_NewRef(view);
	}
	if (view && view_others(view) > 0) {
		if (!req->released)
			req->released = PyList_New(0);
		if (!req->released || PyList_Append(req->released, view) < 0)
			return NULL;
	}
	/* No exporter behind it: the engine's memory outlives every request. */
	view = PyMemoryView_FromMemory(req->io->buf, len, PyBUF_WRITE);
	if (!view)
		return NULL;
	Py_XSETREF(req->view, view);
	return Py_NewRef(view);
}

static PyObject *pyreq_get_fua(struct pyreq *req, void *closure)
{
	(void)closure;
	return PyBool_FromLong(req->flags & UBLKD_RQ_FUA);
}

static PyObject *pyreq_get_nounmap(struct pyreq *req, void *closure)
{
	(void)closure;
	return PyBool_FromLong(req->flags & UBLKD_RQ_NOUNMAP);
}

/* Arguments (first, off=None) of every transfer method. off None or missing: the request's own offset. */
static bool parse_transfer(const struct pyreq *req, const char *method, PyObject *const *args, Py_ssize_t nargs,
			   PyObject *kwnames, uint64_t *ret_off)
{
	Py_ssize_t nkw = kwnames ? PyTuple_GET_SIZE(kwnames) : 0;
	PyObject *off = nargs == 2 ? args[1] : Py_None;

	if (nargs == 1 && nkw == 1 && PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(kwnames, 0), "off") == 0) {
		off = args[1];
	} else if (nargs < 1 || nargs > 2 || nkw) {
		PyErr_Format(PyExc_TypeError, "%s() takes one argument, and off= or nothing more", method);
		return false;
	}
	if (off == Py_None) {
		*ret_off = req->offset;
		return true;
	}
	if (!PyLong_Check(off)) {
		PyErr_Format(PyExc_TypeError, "%s(): off must be an int, not %.100s", method, Py_TYPE(off)->tp_name);
		return false;
	}
	*ret_off = PyLong_AsUnsignedLongLong(off);
	if (*ret_off == UINT64_MAX && PyErr_Occurred()) {
		PyErr_Clear();
		PyErr_Format(PyExc_ValueError, "%s(): off is %R, which is no offset", method, off);
		return false;
	}
	return true;
}

#define OPS_FILL (1u << UBLKD_OP_READ)
#define OPS_DATA (1u << UBLKD_OP_READ | 1u << UBLKD_OP_WRITE)
#define OPS_DRAIN (OPS_DATA | 1u << UBLKD_OP_DISCARD | 1u << UBLKD_OP_WRITE_ZEROES)

static PyObject *pyreq_copy_from(struct pyreq *req, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
	uint64_t off;
	Py_buffer b;
	int err;
	bool ok;

	if (!pyreq_check(req, "copy_from", OPS_FILL) ||
	    !parse_transfer(req, "copy_from", args, nargs, kwnames, &off) ||
	    PyObject_GetBuffer(args[0], &b, PyBUF_SIMPLE) < 0)
		return NULL;
	ok = check_slice("copy_from", &b, off, req->length);
	if (ok) {
		err = pyreq_fill(req, args[0], &b, off);
		ok = !err || raise_errno(err);
	}
	PyBuffer_Release(&b);
	return ok ? Py_NewRef(Py_None) : NULL;
}

static PyObject *pyreq_copy_to(struct pyreq *req, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
	uint64_t off;
	Py_buffer b;
	int err;
	bool ok;

	if (!pyreq_check(req, "copy_to", OPS_DRAIN) ||
	    !parse_transfer(req, "copy_to", args, nargs, kwnames, &off) ||
	    PyObject_GetBuffer(args[0], &b, PyBUF_WRITABLE) < 0)
		return NULL;
	ok = check_slice("copy_to", &b, off, req->length) && (req->op != UBLKD_OP_READ || pyreq_load(req));
	if (ok) {
		err = pyreq_drain(req, &b, off);
		ok = !err || raise_errno(err);
	}
	PyBuffer_Release(&b);
	return ok ? Py_NewRef(Py_None) : NULL;
}

static PyObject *pyreq_zero(struct pyreq *req, PyObject *unused)
{
	(void)unused;
	if (!pyreq_check(req, "zero", OPS_FILL))
		return NULL;
	memset(req->io->buf, 0, req->length);
	if (req->place == PLACE_REQUEST)
		req->place = PLACE_BUFFER;
	Py_CLEAR(req->source);
	Py_RETURN_NONE;
}

static int pwrite_flags(const struct pyreq *req)
{
	return req->flags & UBLKD_RQ_FUA ? RWF_DSYNC : 0;
}

/* Arguments (fd, off=None) checked for a transfer of the whole request. */
static bool parse_file_transfer(const struct pyreq *req, const char *method, PyObject *const *args,
				Py_ssize_t nargs, PyObject *kwnames, int *ret_fd, uint64_t *ret_off)
{
	if (!parse_transfer(req, method, args, nargs, kwnames, ret_off))
		return false;
	if (*ret_off > (uint64_t)INT64_MAX - req->length) {
		PyErr_Format(PyExc_ValueError, "%s(): no file is that long", method);
		return false;
	}
	*ret_fd = PyObject_AsFileDescriptor(args[0]);
	return *ret_fd >= 0;
}

/* The whole request, however many calls it takes. The GIL is dropped: a disk may take its time. */
static PyObject *pyreq_pread(struct pyreq *req, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
	uint32_t done = 0;
	uint64_t off;
	int fd, err = 0;

	if (!pyreq_check(req, "pread", OPS_FILL) ||
	    !parse_file_transfer(req, "pread", args, nargs, kwnames, &fd, &off) || !pyreq_load(req))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	while (done < req->length && !err) {
		ssize_t n = pread(fd, (char *)req->io->buf + done, req->length - done, (off_t)(off + done));

		if (n > 0) {
			done += (uint32_t)n;
		} else if (n == 0) {
			memset((char *)req->io->buf + done, 0, req->length - done);
			break;
		} else if (errno != EINTR) {
			err = errno;
		}
	}
	Py_END_ALLOW_THREADS
	if (err) {
		errno = err;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	Py_RETURN_NONE;
}

static PyObject *pyreq_pwrite(struct pyreq *req, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
	uint32_t done = 0;
	uint64_t off;
	int fd, err = 0;

	if (!pyreq_check(req, "pwrite", OPS_DATA) ||
	    !parse_file_transfer(req, "pwrite", args, nargs, kwnames, &fd, &off) || !pyreq_load(req))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	while (done < req->length && !err) {
		struct iovec iov = { (char *)req->io->buf + done, req->length - done };
		ssize_t n = pwritev2(fd, &iov, 1, (off_t)(off + done), pwrite_flags(req));

		if (n > 0)
			done += (uint32_t)n;
		else if (n == 0)
			err = EIO;
		else if (errno != EINTR)
			err = errno;
	}
	Py_END_ALLOW_THREADS
	if (err) {
		errno = err;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	Py_RETURN_NONE;
}

static PyObject *pyreq_fail(struct pyreq *req, PyObject *error)
{
	int err;

	if (!pyreq_check(req, "fail", ~0u))
		return NULL;
	err = errno_of(error);
	if (!err) {
		PyErr_Format(PyExc_ValueError, "fail() takes an errno or an OSError that has one, not %R", error);
		return NULL;
	}
	req->result = -err;
	Py_RETURN_NONE;
}

static PyObject *pyreq_repr(struct pyreq *req)
{
	return PyUnicode_FromFormat("<ublkd.Request %s offset=%llu length=%u tag=%u queue=%u%s>", pyreq_op_name(req),
				    req->offset, req->length, req->tag, req->queue, req->io ? "" : " answered");
}

/* ---- awaitables ---- */

static struct pyop *pyop_create(struct pyreq *req, enum pyop_kind kind)
{
	struct pyop *op = PyObject_New(struct pyop, &pyop_type);

	if (!op)
		return NULL;
	op->req = (struct pyreq *)Py_XNewRef(req);
	op->off = 0;
	op->done = 0;
	op->fd = -1;
	op->err = 0;
	op->kind = kind;
	op->state = PYOP_NEW;
	if (req)
		req->unawaited++;
	return op;
}

static void pyop_dealloc(struct pyop *op)
{
	Py_XDECREF(op->req);
	PyObject_Free(op);
}

static PyObject *pyreq_async_transfer(struct pyreq *req, const char *method, unsigned mask, enum pyop_kind kind,
				      PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
	struct pyop *op;
	uint64_t off;
	int fd;

	if (!pyreq_check(req, method, mask) ||
	    !parse_file_transfer(req, method, args, nargs, kwnames, &fd, &off) || !pyreq_pin(req))
		return NULL;
	op = pyop_create(req, kind);
	if (op) {
		op->fd = fd;
		op->off = off;
	}
	return (PyObject *)op;
}

static PyObject *pyreq_pread_async(struct pyreq *req, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
	return pyreq_async_transfer(req, "pread_async", OPS_FILL, PYOP_READ, args, nargs, kwnames);
}

static PyObject *pyreq_pwrite_async(struct pyreq *req, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
	return pyreq_async_transfer(req, "pwrite_async", OPS_DATA, PYOP_WRITE, args, nargs, kwnames);
}

static PyObject *pyreq_fsync_async(struct pyreq *req, PyObject *file)
{
	struct pyop *op;
	int fd;

	if (!pyreq_check(req, "fsync_async", ~0u))
		return NULL;
	fd = PyObject_AsFileDescriptor(file);
	if (fd < 0)
		return NULL;
	op = pyop_create(req, PYOP_FSYNC);
	if (op)
		op->fd = fd;
	return (PyObject *)op;
}

static PyObject *pytarget_sleep(PyObject *module, PyObject *seconds)
{
	double value = PyFloat_AsDouble(seconds), whole;
	struct pyop *op;

	(void)module;
	if (value == -1.0 && PyErr_Occurred())
		return NULL;
	if (!(value >= 0 && value < 1e9)) {
		PyErr_Format(PyExc_ValueError, "cannot sleep for %R seconds", seconds);
		return NULL;
	}
	op = pyop_create(NULL, PYOP_SLEEP);
	if (op) {
		op->ts.tv_nsec = (long long)(modf(value, &whole) * 1e9);
		op->ts.tv_sec = (long long)whole;
	}
	return (PyObject *)op;
}

/* The coroutine's side: yielded once to the driver, pytarget_drive(), then over. */
static PyObject *pyop_next(struct pyop *op)
{
	switch (op->state) {
	case PYOP_NEW:
		op->state = PYOP_YIELDED;
		if (op->req)
			op->req->unawaited--;
		return Py_NewRef(op);
	case PYOP_DONE:
		if (op->err) {
			errno = -op->err;
			return PyErr_SetFromErrno(PyExc_OSError);
		}
		return NULL; /* StopIteration: the value of the await is None */
	default:
		PyErr_SetString(PyExc_RuntimeError, "this operation was awaited already");
		return NULL;
	}
}

static PyObject *pyop_await(struct pyop *op)
{
	if (op->state != PYOP_NEW) {
		PyErr_SetString(PyExc_RuntimeError, "this operation was awaited already");
		return NULL;
	}
	return Py_NewRef(op);
}

static void pyop_queue(struct pytarget *pt, struct ublkd_io *io, struct pyop *op)
{
	struct io_uring_sqe *sqe = pt->base.sv->sqe(pt->q);
	char *buf = (char *)io->buf + op->done;
	unsigned left = io->length - op->done;

	switch (op->kind) {
	case PYOP_READ:
		io_uring_prep_read(sqe, op->fd, buf, left, op->off + op->done);
		break;
	case PYOP_WRITE:
		io_uring_prep_write(sqe, op->fd, buf, left, op->off + op->done);
		sqe->rw_flags = pwrite_flags(op->req);
		break;
	case PYOP_FSYNC:
		io_uring_prep_fsync(sqe, op->fd, IORING_FSYNC_DATASYNC);
		break;
	case PYOP_SLEEP:
		io_uring_prep_timeout(sqe, &op->ts, 0, 0);
		break;
	}
	pt->base.sv->sqe_own(pt->q, sqe, io, 0);
}

/* A completion came. True if that ends the operation, false if it must be queued again. */
static bool pyop_advance(struct pytarget *pt, const struct ublkd_io *io, struct pyop *op, int res)
{
	uint64_t *retries = &pt->base.sv->shm(pt->q)->retries;
	bool transfer = op->kind == PYOP_READ || op->kind == PYOP_WRITE;

	if (op->kind == PYOP_SLEEP && res == -ETIME)
		res = 0;
	if (res == -EINTR || res == -EAGAIN) {
		ublkd_stat_add(retries, 1);
		return false;
	}
	if (res < 0) {
		op->err = res;
	} else if (transfer && res == 0) {
		if (op->kind == PYOP_READ)
			memset((char *)io->buf + op->done, 0, io->length - op->done);
		else
			op->err = -EIO;
	} else if (transfer) {
		op->done += (uint32_t)res;
		if (op->done < io->length) {
			ublkd_stat_add(retries, 1);
			return false;
		}
	}
	return true;
}

/* ---- Batch ---- */

static struct pybatch *pybatch_create(unsigned capacity)
{
	struct pybatch *batch = PyObject_NewVar(struct pybatch, &pybatch_type, capacity);

	if (batch)
		batch->n = 0;
	return batch;
}

static void pybatch_clear(struct pybatch *batch)
{
	while (batch->n)
		Py_DECREF(batch->reqs[--batch->n]);
}

static void pybatch_dealloc(struct pybatch *batch)
{
	pybatch_clear(batch);
	PyObject_Free(batch);
}

static Py_ssize_t pybatch_length(struct pybatch *batch)
{
	return batch->n;
}

static PyObject *pybatch_item(struct pybatch *batch, Py_ssize_t i)
{
	if (i < 0 || i >= batch->n) {
		PyErr_SetString(PyExc_IndexError, "batch index out of range");
		return NULL;
	}
	return Py_NewRef(batch->reqs[i]);
}

static bool pybatch_wants(const struct pybatch *batch, unsigned i, unsigned mask)
{
	const struct pyreq *req = batch->reqs[i];

	return req->io && (mask & 1u << req->op) && req->result >= 0;
}

static PyObject *pybatch_copy_from(struct pybatch *batch, PyObject *source)
{
	bool ok = true;
	Py_buffer b;
	int err;

	if (PyObject_GetBuffer(source, &b, PyBUF_SIMPLE) < 0)
		return NULL;
	for (unsigned i = 0; i < batch->n && ok; i++) {
		struct pyreq *req = batch->reqs[i];

		if (!pybatch_wants(batch, i, OPS_FILL))
			continue;
		ok = check_slice("copy_from", &b, req->offset, req->length);
		err = ok ? pyreq_fill(req, source, &b, req->offset) : 0;
		if (err) /* its own trouble */
			req->result = err;
	}
	PyBuffer_Release(&b);
	return ok ? Py_NewRef(Py_None) : NULL;
}

static PyObject *pybatch_copy_to(struct pybatch *batch, PyObject *destination)
{
	bool ok = true;
	Py_buffer b;
	int err;

	if (PyObject_GetBuffer(destination, &b, PyBUF_WRITABLE) < 0)
		return NULL;
	for (unsigned i = 0; i < batch->n && ok; i++) {
		struct pyreq *req = batch->reqs[i];

		if (!pybatch_wants(batch, i, OPS_DRAIN & ~OPS_FILL))
			continue;
		ok = check_slice("copy_to", &b, req->offset, req->length);
		err = ok ? pyreq_drain(req, &b, req->offset) : 0;
		if (err)
			req->result = err;
	}
	PyBuffer_Release(&b);
	return ok ? Py_NewRef(Py_None) : NULL;
}

/* ---- the target: requests in, results out ---- */

/* The tag's Request, filled in for a new arrival; NULL if it had to be answered here. */
static struct pyreq *pytarget_begin(struct pytarget *pt, struct ublkd_io *io)
{
	struct pytag *tag = &pt->tags[io->tag];
	struct pyreq *req = tag->req;

	if (Py_REFCNT(req) != 1) {
		req = pyreq_create(pt, io->tag, req->queue);
		if (!req) {
			PyErr_Clear();
			pt->base.sv->complete(pt->q, io, -ENOMEM);
			return NULL;
		}
		Py_SETREF(tag->req, req);
	}
	req->io = io;
	req->offset = io->offset;
	req->length = io->length;
	req->flags = io->flags;
	req->op = io->op;
	req->unawaited = 0;
	req->result = op_has_data(io->op) ? (int)io->length : 0;
	if (!pt->moves_data)
		req->place = PLACE_PINNED;
	else
		req->place = io->op == UBLKD_OP_WRITE ? PLACE_REQUEST : PLACE_BUFFER;
	return req;
}

/* The one place where a request ends. The caller has dropped what the handler left behind. */
static void pytarget_finish(struct pytarget *pt, struct pyreq *req, const char *where, int res)
{
	struct ublkd_io *io = req->io;

	if (res >= 0 && req->unawaited) {
		PyErr_Format(PyExc_RuntimeError, "an operation of %R was never awaited, so nothing was done", req);
		res = fail_current(pt, where);
	}
	if (req->view && !pyreq_revoke_view(req)) {
		PyErr_Format(PyExc_RuntimeError,
			     "part of the buffer of %R is still in use: copy what you keep, as with bytes(view)", req);
		res = fail_current(pt, where);
	}
	/* All of a read that was not pushed yet, filled or not: its pages hold what the kernel had there before. */
	if (res > 0 && pt->moves_data && req->op == UBLKD_OP_READ && req->place != PLACE_REQUEST) {
		int err = pyreq_push(req, io->buf, (uint32_t)res);

		res = err ? err : res;
	}
	if (req->source && pt->plain_reads >= 0 && pt->plain_reads < PLAIN_READS)
		pt->plain_reads++;
	req->io = NULL;
	req->result = res;
	pt->base.sv->complete(pt->q, io, res);
	Py_CLEAR(req->source);
}

/* What a handler's return value means: bytes done, or -errno. */
static int pytarget_result(struct pytarget *pt, const struct pyreq *req, const char *where, PyObject *value)
{
	long long n;

	if (req->result < 0 || value == Py_None)
		return req->result;
	if (!PyLong_Check(value)) {
		PyErr_Format(PyExc_TypeError, "%s() returned %.100s; return None or a number of bytes", where,
			     Py_TYPE(value)->tp_name);
		return fail_current(pt, where);
	}
	n = PyLong_AsLongLong(value);
	PyErr_Clear(); /* out of range is -1, refused below */
	if (n < 0 || n > req->length) {
		PyErr_Format(PyExc_ValueError, "%s() returned %R, which is not 0 to %u bytes", where, value,
			     req->length);
		return fail_current(pt, where);
	}
	if (!op_has_data(req->op))
		return 0;
	/* The driver asks again for the rest of a short transfer, which has to begin at a block. */
	n -= n % pt->block_size;
	if (!n) {
		PyErr_Format(PyExc_ValueError, "%s() returned %R of %u bytes, less than a block", where, value,
			     req->length);
		return fail_current(pt, where);
	}
	return (int)n;
}

/*
 * The coroutine awaited something of another kind. Say so inside it, at the
 * await: the traceback then names the line.
 */
static int pytarget_refuse_await(struct pytarget *pt, struct pytag *tag, const char *where, PyObject *what)
{
	PyObject *exc, *ret;
	int err;

	if (Py_IS_TYPE(what, &pyop_type))
		PyErr_SetString(PyExc_RuntimeError,
				"a handler can only await operations of its own request, each of them once");
	else
		PyErr_Format(PyExc_RuntimeError,
			     "a handler can only await ublkd's own operations; what was awaited gave %.100s",
			     Py_TYPE(what)->tp_name);
	exc = take_exception();
	ret = PyObject_CallMethod(tag->coro, "throw", "O", exc);
	if (ret || PyErr_ExceptionMatches(PyExc_StopIteration)) {
		/* It took no notice. */
		PyErr_Clear();
		Py_XDECREF(ret);
		report(pt, where, exc);
		err = -EIO;
		ret = PyObject_CallMethod(tag->coro, "close", NULL);
		if (!ret)
			PyErr_Clear();
		Py_XDECREF(ret);
	} else {
		err = fail_current(pt, where);
	}
	Py_DECREF(exc);
	return err;
}

/* Run the tag's coroutine until it waits for something of ours or ends. */
static void pytarget_drive(struct pytarget *pt, struct pyreq *req)
{
	const char *where = pyreq_op_name(req);
	struct pytag *tag = &pt->tags[req->tag];
	PyObject *value = NULL;
	struct pyop *op;
	int res;

	switch (PyIter_Send(tag->coro, Py_None, &value)) {
	case PYGEN_RETURN:
		res = pytarget_result(pt, req, where, value);
		break;
	case PYGEN_NEXT:
		op = (struct pyop *)value;
		if (Py_IS_TYPE(value, &pyop_type) && op->state == PYOP_YIELDED && (!op->req || op->req == req)) {
			op->state = PYOP_RUNNING;
			tag->waiting = op; /* with the reference */
			pyop_queue(pt, req->io, op);
			return;
		}
		res = pytarget_refuse_await(pt, tag, where, value);
		break;
	default:
		res = fail_current(pt, where);
	}
	Py_XDECREF(value);
	Py_CLEAR(tag->coro);
	pytarget_finish(pt, req, where, res);
}

static void pytarget_dispatch(struct pytarget *pt, struct pyreq *req)
{
	const char *where = pyreq_op_name(req);
	PyObject *value = PyObject_CallOneArg(pt->handlers[req->op], (PyObject *)req);
	int res;

	if (value && PyCoro_CheckExact(value)) {
		pt->tags[req->tag].coro = value;
		pytarget_drive(pt, req);
		return;
	}
	res = value ? pytarget_result(pt, req, where, value) : fail_current(pt, where);
	Py_XDECREF(value);
	pytarget_finish(pt, req, where, res);
}

static void pytarget_dispatch_batch(struct pytarget *pt)
{
	struct pybatch *batch = pt->batch;
	PyObject *value = PyObject_CallOneArg(pt->handle_batch, (PyObject *)batch);
	int err = 0;

	if (value && value != Py_None)
		PyErr_Format(PyExc_TypeError, "handle() returned %.100s; it must return None", Py_TYPE(value)->tp_name);
	Py_XDECREF(value);
	if (PyErr_Occurred())
		err = fail_current(pt, "handle");
	for (unsigned i = 0; i < batch->n; i++) {
		struct pyreq *req = batch->reqs[i];

		pytarget_finish(pt, req, "handle", req->result < 0 || !err ? req->result : err);
	}
	pybatch_clear(batch);
}

/* Add to this pass's batch. One that a handler kept is left to it, empty. */
static int pytarget_collect(struct pytarget *pt, struct pyreq *req)
{
	struct pybatch *batch = pt->batch;

	if (!batch || (batch->n == 0 && Py_REFCNT(batch) != 1)) {
		batch = pybatch_create(pt->depth);
		if (!batch) {
			PyErr_Clear();
			return -ENOMEM;
		}
		Py_XSETREF(pt->batch, batch);
	}
	batch->reqs[batch->n++] = (struct pyreq *)Py_NewRef(req);
	return 0;
}

static void pytarget_request(struct pytarget *pt, struct ublkd_io *io)
{
	struct pyreq *req;

	if (io->op >= NR_OPS || !(pt->ops_mask & 1u << io->op)) {
		/* Without a handler for flush no volatile cache is advertised: nothing to do. */
		pt->base.sv->complete(pt->q, io, io->op == UBLKD_OP_FLUSH ? 0 : -EOPNOTSUPP);
		return;
	}
	req = pytarget_begin(pt, io);
	if (!req)
		return;
	if (!pt->handle_batch)
		pytarget_dispatch(pt, req);
	else if (pytarget_collect(pt, req) < 0)
		pytarget_finish(pt, req, "handle", -ENOMEM);
}

static void pytarget_cqe(struct pytarget *pt, struct ublkd_io *io, int res)
{
	struct pytag *tag = &pt->tags[io->tag];
	struct pyop *op = tag->waiting;

	if (!op)
		return;
	if (!pyop_advance(pt, io, op, res)) {
		pyop_queue(pt, io, op);
		return;
	}
	op->state = PYOP_DONE;
	tag->waiting = NULL;
	Py_DECREF(op);
	pytarget_drive(pt, tag->req);
}

/* ---- the engine's callbacks ---- */

static void pytarget_handle(struct ublkd_target *t, struct ublkd_queue *q, struct ublkd_event *events, unsigned n)
{
	struct pytarget *pt = (struct pytarget *)t;
	struct ublkd_shm_queue *shm = t->sv->shm(q);
	PyGILState_STATE gil;

	ublkd_stat_set(&shm->stage, UBLKD_SHM_PYTHON);
	gil = PyGILState_Ensure();
	ublkd_stat_add(&shm->python_entries, 1);
	for (unsigned i = 0; i < n; i++) {
		if (events[i].kind == UBLKD_EVENT_REQUEST)
			pytarget_request(pt, events[i].io);
		else
			pytarget_cqe(pt, events[i].io, events[i].res);
	}
	if (pt->batch && pt->batch->n)
		pytarget_dispatch_batch(pt);
	PyGILState_Release(gil);
	ublkd_stat_set(&shm->stage, UBLKD_SHM_ENGINE);
}

/* Under the GIL. Whatever a handler kept of a tag is dead from here on. */
static void pytarget_free_tags(struct pytarget *pt)
{
	for (unsigned i = 0; pt->tags && i < pt->depth; i++) {
		struct pytag *tag = &pt->tags[i];

		if (tag->coro) {
			PyObject *ret = PyObject_CallMethod(tag->coro, "close", NULL);

			if (!ret)
				fail_current(pt, pyreq_op_name(tag->req));
			Py_XDECREF(ret);
			Py_CLEAR(tag->coro);
		}
		Py_CLEAR(tag->waiting);
		if (tag->req) {
			if (tag->req->view)
				pyreq_revoke_view(tag->req);
			tag->req->io = NULL;
			Py_CLEAR(tag->req->source);
		}
		Py_CLEAR(tag->req);
	}
	PyMem_Free(pt->tags);
	pt->tags = NULL;
	Py_CLEAR(pt->batch);
}

static int pytarget_open(struct ublkd_target *t, struct ublkd_queue *q)
{
	struct pytarget *pt = (struct pytarget *)t;
	unsigned queue = t->sv->qid(q);
	PyGILState_STATE gil;
	int err = 0;

	if (t->sv->size < sizeof(struct ublkd_services))
		return -EINVAL;
	gil = PyGILState_Ensure();
	pt->q = q;
	pt->depth = t->sv->depth(q);
	pt->moves_data = !t->sv->driver_copies(q);
	pt->tags = PyMem_Calloc(pt->depth, sizeof(*pt->tags));
	for (unsigned i = 0; pt->tags && i < pt->depth && !err; i++) {
		pt->tags[i].req = pyreq_create(pt, i, queue);
		if (!pt->tags[i].req)
			err = -ENOMEM;
	}
	if (!pt->tags || err) {
		PyErr_Clear();
		pytarget_free_tags(pt);
		err = -ENOMEM;
	}
	PyGILState_Release(gil);
	return err;
}

static void pytarget_close(struct ublkd_target *t, struct ublkd_queue *q)
{
	PyGILState_STATE gil = PyGILState_Ensure();

	(void)q;
	pytarget_free_tags((struct pytarget *)t);
	PyGILState_Release(gil);
}

static void pytarget_free(struct pytarget *pt)
{
	for (unsigned op = 0; op < NR_OPS; op++)
		Py_XDECREF(pt->handlers[op]);
	Py_XDECREF(pt->handle_batch);
	Py_XDECREF(pt->target);
	Py_XDECREF(pt->on_error);
	PyMem_Free(pt);
}

static void pytarget_destroy(struct ublkd_target *t)
{
	PyGILState_STATE gil = PyGILState_Ensure();

	pytarget_free((struct pytarget *)t);
	PyGILState_Release(gil);
}

static const struct ublkd_target_ops pytarget_ops = {
	.size = sizeof(pytarget_ops),
	.abi = UBLKD_TARGET_ABI,
	.name = "python",
	.flags = UBLKD_TARGET_WANTS_BUFFER | UBLKD_TARGET_MOVES_DATA,
	.sqes_per_io = 1,
	.open = pytarget_open,
	.handle = pytarget_handle,
	.close = pytarget_close,
	.destroy = pytarget_destroy,
};

/* ---- the module ---- */

/* Look up the bound methods once; a class that defines handle() gets everything there. */
static bool pytarget_bind(struct pytarget *pt, PyObject *operations)
{
	if (PyObject_HasAttrString(pt->target, "handle")) {
		pt->handle_batch = PyObject_GetAttrString(pt->target, "handle");
		if (!pt->handle_batch)
			return false;
	}
	for (unsigned op = 0; op < NR_OPS; op++) {
		PyObject *name;
		int wanted;

		if (!op_names[op])
			continue;
		name = PyUnicode_FromString(op_names[op]);
		wanted = name ? PySequence_Contains(operations, name) : -1;
		if (wanted > 0) {
			pt->ops_mask |= 1u << op;
			if (!pt->handle_batch) {
				pt->handlers[op] = PyObject_GetAttr(pt->target, name);
				wanted = pt->handlers[op] ? 1 : -1;
			}
		}
		Py_XDECREF(name);
		if (wanted < 0)
			return false;
	}
	return true;
}

static PyObject *pytarget_py_create(PyObject *module, PyObject *args, PyObject *kwargs)
{
	static char *names[] = { "target", "on_error", "operations", "block_size", NULL };
	PyObject *target, *on_error = NULL, *operations = NULL;
	unsigned int block_size = 512;
	struct pytarget *pt;

	(void)module;
	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|$OOI", names, &target, &on_error, &operations,
					 &block_size))
		return NULL;
	if (!on_error || !operations) {
		PyErr_SetString(PyExc_TypeError, "create() needs on_error and operations");
		return NULL;
	}
	if (!block_size) {
		PyErr_SetString(PyExc_ValueError, "block_size must not be 0");
		return NULL;
	}
	pt = PyMem_Calloc(1, sizeof(*pt));
	if (!pt)
		return PyErr_NoMemory();
	pt->base.ops = &pytarget_ops;
	pt->target = Py_NewRef(target);
	pt->on_error = Py_NewRef(on_error);
	pt->block_size = block_size;
	if (!pytarget_bind(pt, operations)) {
		pytarget_free(pt);
		return NULL;
	}
	return PyLong_FromVoidPtr(pt);
}

static PyObject *pytarget_py_destroy(PyObject *module, PyObject *address)
{
	struct ublkd_target *t = PyLong_AsVoidPtr(address);

	(void)module;
	if (!t && PyErr_Occurred())
		return NULL;
	if (t)
		t->ops->destroy(t);
	Py_RETURN_NONE;
}

#define FAST_METHOD(name, function) \
	{ name, (PyCFunction)(void (*)(void))function, METH_FASTCALL | METH_KEYWORDS, NULL }

static PyMethodDef pyreq_methods[] = {
	FAST_METHOD("copy_from", pyreq_copy_from),
	FAST_METHOD("copy_to", pyreq_copy_to),
	FAST_METHOD("pread", pyreq_pread),
	FAST_METHOD("pwrite", pyreq_pwrite),
	FAST_METHOD("pread_async", pyreq_pread_async),
	FAST_METHOD("pwrite_async", pyreq_pwrite_async),
	{ "fsync_async", (PyCFunction)pyreq_fsync_async, METH_O, NULL },
	{ "zero", (PyCFunction)pyreq_zero, METH_NOARGS, NULL },
	{ "fail", (PyCFunction)pyreq_fail, METH_O, NULL },
	{ 0 },
};

static PyMemberDef pyreq_members[] = {
	{ "op", T_UBYTE, offsetof(struct pyreq, op), READONLY, NULL },
	{ "offset", T_ULONGLONG, offsetof(struct pyreq, offset), READONLY, NULL },
	{ "length", T_UINT, offsetof(struct pyreq, length), READONLY, NULL },
	{ "flags", T_UINT, offsetof(struct pyreq, flags), READONLY, NULL },
	{ "tag", T_USHORT, offsetof(struct pyreq, tag), READONLY, NULL },
	{ "queue", T_USHORT, offsetof(struct pyreq, queue), READONLY, NULL },
	{ "result", T_INT, offsetof(struct pyreq, result), READONLY, NULL },
	{ 0 },
};

static PyGetSetDef pyreq_getset[] = {
	{ "buffer", (getter)pyreq_get_buffer, NULL, NULL, NULL },
	{ "fua", (getter)pyreq_get_fua, NULL, NULL, NULL },
	{ "nounmap", (getter)pyreq_get_nounmap, NULL, NULL, NULL },
	{ 0 },
};

static PyTypeObject pyreq_type = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "ublkd.Request",
	.tp_doc = "One request for the device, valid until it is answered; see ublkd-python(7).",
	.tp_basicsize = sizeof(struct pyreq),
	.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
	.tp_dealloc = (destructor)pyreq_dealloc,
	.tp_repr = (reprfunc)pyreq_repr,
	.tp_methods = pyreq_methods,
	.tp_members = pyreq_members,
	.tp_getset = pyreq_getset,
};

static PyMethodDef pybatch_methods[] = {
	{ "copy_from", (PyCFunction)pybatch_copy_from, METH_O, NULL },
	{ "copy_to", (PyCFunction)pybatch_copy_to, METH_O, NULL },
	{ 0 },
};

static PySequenceMethods pybatch_sequence = {
	.sq_length = (lenfunc)pybatch_length,
	.sq_item = (ssizeargfunc)pybatch_item,
};

static PyTypeObject pybatch_type = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "ublkd.Batch",
	.tp_doc = "The requests of one pass, a sequence, valid until handle() returns; see ublkd-python(7).",
	.tp_basicsize = sizeof(struct pybatch),
	.tp_itemsize = sizeof(struct pyreq *),
	.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
	.tp_dealloc = (destructor)pybatch_dealloc,
	.tp_as_sequence = &pybatch_sequence,
	.tp_methods = pybatch_methods,
};

static PyAsyncMethods pyop_async = {
	.am_await = (unaryfunc)pyop_await,
};

static PyTypeObject pyop_type = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "ublkd.Operation",
	.tp_doc = "I/O or a pause that a coroutine handler awaits; see ublkd-python(7).",
	.tp_basicsize = sizeof(struct pyop),
	.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
	.tp_dealloc = (destructor)pyop_dealloc,
	.tp_as_async = &pyop_async,
	.tp_iter = PyObject_SelfIter,
	.tp_iternext = (iternextfunc)pyop_next,
};

static PyMethodDef module_methods[] = {
	{ "create", (PyCFunction)(void (*)(void))pytarget_py_create, METH_VARARGS | METH_KEYWORDS, NULL },
	{ "destroy", pytarget_py_destroy, METH_O, NULL },
	{ "sleep", pytarget_sleep, METH_O, NULL },
	{ 0 },
};

static struct PyModuleDef module_def = {
	PyModuleDef_HEAD_INIT,
	.m_name = "ublkd._pytarget",
	.m_size = -1,
	.m_methods = module_methods,
};

PyMODINIT_FUNC PyInit__pytarget(void)
{
	PyObject *module = PyModule_Create(&module_def);

	if (!module)
		return NULL;
	if (PyModule_AddType(module, &pyreq_type) < 0 || PyModule_AddType(module, &pybatch_type) < 0 ||
	    PyModule_AddType(module, &pyop_type) < 0 || PyModule_AddIntConstant(module, "READ", UBLKD_OP_READ) < 0 ||
	    PyModule_AddIntConstant(module, "WRITE", UBLKD_OP_WRITE) < 0 ||
	    PyModule_AddIntConstant(module, "FLUSH", UBLKD_OP_FLUSH) < 0 ||
	    PyModule_AddIntConstant(module, "DISCARD", UBLKD_OP_DISCARD) < 0 ||
	    PyModule_AddIntConstant(module, "WRITE_ZEROES", UBLKD_OP_WRITE_ZEROES) < 0) {
		Py_DECREF(module);
		return NULL;
	}
	return module;
}
