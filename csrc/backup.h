/* backup.h: the inside of a backup job, shared by backup*.c. fleece.h has the calls.
 *
 *   backup.c         the job: start, workers, first failure, wait, close
 *   backup_cursor.c  what to do next: the snapshot's extents, cut into pieces of work, and what was done out of order
 *   backup_read.c    reads one piece of work, in order, and says of each part what it is
 *   backup_copy.c    a part goes to the target
 *   backup_clone.c   or is shared with the source
 *   backup_writeback.c  what was copied is on its way to the disk, and out of the page cache, while the rest is copied
 *   backup_chunks.c  a part goes to whoever asks for chunks
 *
 * A worker takes a piece of work under the lock, and does it without: nobody holds the lock during I/O, so a worker that hangs in the
 * kernel keeps nobody else from going on, from looking at the job, or from ending it. It holds a reference to the job, and with it to all
 * that its system call may still touch.
 */
#ifndef FL_BACKUP_H
#define FL_BACKUP_H

#include "bitmap.h"
#include "image.h"
#include "snapshot.h"
#include "throttle.h"

#define JOB_NAME "backup job"   /* for gate_pass */
#define MAX_WORKERS 64
#define CURSOR_BATCH 256        /* extents asked for at once */
#define LARGEST_CLONE (UINT64_C(1) << 20)       /* guest writes wait for one: measured, see io_clone.c */
#define LONG_ZEROS 65536u       /* zeros shorter than this, between data, are cheaper to write than to treat apart */

#define WORK_MIXED (-1)         /* beside enum fl_kind: one granule, of several extents */
/* What a worker does in one go. FL_DATA and WORK_MIXED: inside one granule, aligned to granules (the last one ends at the disk's end). The
   other kinds, and FL_DATA that is to be cloned: whole granules, any number of them. */
struct work { uint64_t offset, length; int kind; };

static inline bool work_needs_buffer(const struct work *work) { return work->kind == FL_DATA || work->kind == WORK_MIXED; }

/* Where the workers are. Protected by the job's lock, except that `batch` belongs to the worker that has set `fetching`. */
struct cursor {
    uint64_t position;          /* of a granule's start, or the disk's size: all before it was taken, all after it only if in `hot` */
    bool fetching;              /* a worker asks for extents, without the lock */
    size_t index, found;        /* of `batch`: the extent that covers `position`, if index < found */
    fl_extent batch[CURSOR_BATCH];
};

struct buffer {
    unsigned char *data;        /* one granularity; fixed */
    uint32_t users;             /* data chunks in it that are not acknowledged */
    int32_t next;               /* free list */
};

struct worker {
    fl_backup *job;
    unsigned char *buffer;      /* one granularity; copy mode: its own, fixed; chunks mode: the piece of work's, or NULL */
    struct item *item;          /* chunks mode: the piece of work's place in the queue */
    uint64_t data_start, data_end;      /* chunks mode: data in the buffer that is not a chunk yet; empty if equal */
    uint64_t run_start, run_end;        /* compressing: what is in the buffer and not written yet; empty if equal */
    bool pressing;              /* copy mode: the guest writes, and the stage fills */
    uint64_t zero_step;         /* copy mode: bytes that the target zeroes in a moment, as far as we know */
};

#define NO_INDEX UINT32_MAX

/* A piece of work in the queue of chunks mode, in the order of offsets. It becomes a list of chunks when its worker is done. */
enum item_state { ITEM_WORKING, ITEM_DONE, ITEM_FAILED };
struct item {
    enum item_state state;
    uint64_t offset;
    struct buffer *buffer;      /* NULL: none */
    uint32_t first, last;       /* of its chunks that were not handed out; NO_INDEX: none */
};

enum chunk_state { CHUNK_FREE, CHUNK_QUEUED, CHUNK_HANDED_OUT };
struct chunk {
    enum chunk_state state;
    int kind;
    uint64_t id;                /* a number used once, over its index in the table */
    uint64_t offset, length;
    struct buffer *buffer;
    uint32_t next;              /* in its item, or in the free list */
};

struct chunks {                 /* all of it protected by the job's lock */
    struct buffer *buffers;
    uint32_t buffers_count;     /* fixed */
    int32_t free_buffer;        /* the one used last, so that the memory is warm; -1: none */
    struct item *ring;          /* the queue */
    uint32_t ring_size;         /* fixed */
    uint32_t head, count;
    struct chunk *table;        /* grows: a consumer may keep any number of zero chunks */
    uint32_t table_size, free_chunk;
    uint64_t next_number;
    uint64_t pending;           /* chunks in the queue, handed out, or in the middle of being acknowledged */
};

struct fl_backup {
    struct gate gate;           /* of the public calls */
    atomic_uint references;     /* the caller, and every worker */

    /* fixed after creation */
    uint64_t size, total, granularity, started_ns;
    uint32_t cluster_size, planned;             /* planned: the most workers there will be */
    int (*on_piece)(uint64_t context, uint64_t offset, uint64_t length, const void *data);     /* or NULL */
    uint64_t piece_context;
    bool discard, target_is_zero, skip_lost, compress, reflink;
    uint32_t clone_unit;        /* what ranges that are cloned must be multiples of; a power of two, up to 64 KiB */
    bool copies;                /* there is a target; else chunks mode */
    unsigned char *memory;      /* all buffers */
    void *mapping;              /* that they are in, of `memory_size` bytes */
    size_t memory_size;

    pthread_mutex_t lock;       /* protects what follows, up to the atomics; never held during I/O or calls of the snapshot */
    pthread_cond_t fetched;     /* for workers: the cursor has extents again, or the job ends */
    pthread_cond_t room;        /* for workers of chunks mode: a buffer or a place in the queue came free, or the job ends */
    pthread_cond_t news;        /* for fl_backup_next: the first of the queue is ready, or the job ends */
    pthread_cond_t ended;       /* for fl_backup_wait and close: `over` or `running` changed */
    fl_snapshot *snapshot;      /* referenced; set to NULL by close once no worker runs */
    fl_image *target;           /* the same; NULL in chunks mode */
    uint32_t started, running;  /* workers ever; threads now, that of the writeback too */
    bool writeback_runs;
    uint64_t writeback_begun;   /* data_bytes when writeback was last asked for */
    bool over;                  /* nothing will change any more: succeeded, or failed and no worker runs */
    bool cancelled;
    bool closing;               /* calls that wait return */
    bool closed;                /* and all have: nobody but workers uses what the job holds */
    int failed;                 /* 0 or the first failure's code, as returned; `failure` has it all */
    fl_error failure;
    uint64_t failed_ns;         /* when it failed */
    uint64_t ended_ns;
    struct cursor cursor;
    struct bitmap hot;          /* granules at or after the cursor that were taken out of order; copy mode with discard only */
    uint64_t hot_count;         /* bits set in `hot` at or after the cursor */
    fl_extent *lost;            /* merged and in order */
    size_t lost_count, lost_room;
    struct chunks chunks;

    /* atomic */
    atomic_bool stop;           /* leave what you are doing. Chunks mode: by a cancel only, for what comes before a failure is finished */
    atomic_bool clones;         /* `reflink`, and it has not turned out that these two can't share blocks */
    _Atomic uint64_t done, data_bytes, zero_bytes, lost_bytes, reflinked_bytes, retries;

    struct throttle throttle;
    struct worker workers[MAX_WORKERS];
};

static inline void count_up(_Atomic uint64_t *counter, uint64_t n) { atomic_fetch_add_explicit(counter, n, memory_order_relaxed); }
static inline bool job_clones(fl_backup *job) { return atomic_load_explicit(&job->clones, memory_order_relaxed); }
static inline bool must_stop(fl_backup *job) { return atomic_load_explicit(&job->stop, memory_order_relaxed); }

/* ---- backup.c ---- */

/* Keep the first failure and make the workers end. Lock held. */
void job_fail(fl_backup *job, int rc, const fl_error *error);
/* See whether the job is over now. Lock held. To be called after whatever may end it. */
void job_settle(fl_backup *job);

/* Discard from the snapshot what was copied. That it broke meanwhile is no failure here: there is nothing left to free, and what was read
   before was right. Without the lock. */
int job_discard(fl_backup *job, uint64_t offset, uint64_t length, fl_error *error);

/* Start a thread that uses the job. It calls job_leave at its end, and nothing of the job's after that. 0 or -errno. Lock held. */
int job_thread(fl_backup *job, void *(*body)(void *), void *argument);
void job_leave(fl_backup *job);
void job_step_back(void);       /* this thread stands behind the guest */

/* ---- backup_cursor.c ---- */

/* The next piece of work in order, without taking it. false: there is none, or the job fails. Lock held; let go of while extents are
   fetched. */
bool cursor_look(fl_backup *job, struct work *work);
void cursor_take(fl_backup *job, const struct work *work);      /* right after cursor_look, lock held all the time */
/* Take the granule that `offset` is in out of order. false: somebody has taken it already. Lock held. */
bool cursor_take_hot(fl_backup *job, uint64_t offset, struct work *work);

/* ---- backup_read.c ---- */

/* Read a piece of work into the worker's buffer (at the same place in it as in the granule), and hand its parts on, in order and without
   gaps, by part_copy or part_chunk. 0, or a failure that is not recorded yet. */
int work_read(struct worker *worker, const struct work *work, fl_error *error);

/* ---- backup_copy.c ---- */

void copy_loop(struct worker *worker);          /* until there is nothing left to do */
/* `data` is the part's place in the worker's buffer, and what it holds if it is FL_DATA; NULL: the piece of work has no buffer. kind is FL_DATA
   or FL_ZERO. */
int part_copy(struct worker *worker, int kind, uint64_t offset, uint64_t length, unsigned char *data, fl_error *error);
int part_copy_end(struct worker *worker, fl_error *error);      /* the piece of work ends: write what still waits for its neighbours */

/* ---- backup_clone.c ---- */

/* Share of [offset, offset + length), which was data, what can be shared: the first *cloned bytes are done, and the target was not touched behind them, or
   is zeros there. 0, or a failure that is not recorded yet. */
int part_clone(struct worker *worker, uint64_t offset, uint64_t length, uint64_t *cloned, fl_error *error);
/* Do a piece of work of several granules: share what can be shared, read and copy the rest by granules. As work_read. */
int work_clone(struct worker *worker, const struct work *work, fl_error *error);

/* ---- backup_writeback.c ---- */

void writeback_if_due(fl_backup *job);          /* by a worker of copy mode. Lock held */

/* ---- backup_chunks.c ---- */

int chunks_init(fl_backup *job, uint32_t buffers);              /* 0 or -ENOMEM; `memory` is there */
void chunks_destroy(fl_backup *job);
void chunk_loop(struct worker *worker);
/* FL_DATA is in the worker's buffer, as work_read left it. */
int part_chunk(struct worker *worker, int kind, uint64_t offset, uint64_t length, fl_error *error);
void chunks_drop_empty(fl_backup *job);         /* forget pieces of work at the queue's head that have nothing to hand out. Lock held */

#endif
