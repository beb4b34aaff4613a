/* driver.h: an open qcow2 image, and what the files of the driver give each other. The promises Q1 to Q5 are in qcow2.h.
 *
 * Locks, in the order in which they are taken (nobody takes one on the left while holding one on the right):
 *
 *   claims (not a lock: see claim_take)  ->  tables  ->  alloc  ->  lock  ->  a shard of the cache
 *
 *   tables   making L2 tables: new ones, and copies of shared ones. May be held during I/O (the new table's cluster is zeroed or copied).
 *   alloc    refcounts, and with them who owns which cluster of the file. May be held while a slice of refcounts is read.
 *   lock     the instant: entries, refcounts and L1 change under it, and commit copies them under it. Never held during I/O.
 *   shard    who is in the cache, and pins. Never held during I/O.
 *
 * The transfers of mapped clusters take none of them but, for the look at an entry, one shard's.
 */
#ifndef FL_QCOW2_DRIVER_H
#define FL_QCOW2_DRIVER_H

#include "../bitmap.h"
#include "epoch.h"
#include "qcow2.h"

#define SLICE_MAX 4096u                 /* bytes of a slice: the smaller of this and a cluster */
#define DEFAULT_CACHE (UINT64_C(32) << 20)
#define BATCH 512u                      /* clusters that one change of the map takes at most; a slice has no more entries */
#define ALLOCATE_MAX (UINT64_C(4) << 20)        /* bytes of clusters that one write allocates at a time, if a cluster is not more */

/* ---- cache.c: slices of L2 tables and of refcount blocks ---- */

enum slice_kind { SLICE_L2, SLICE_REFCOUNTS };

enum { SLICE_DIRTY = 1, SLICE_WRITING = 2 };

struct slice {
    /* fixed while it is in the table */
    uint64_t offset;                    /* in the file */
    enum slice_kind kind;
    _Atomic uint64_t *words;            /* as in the file. Entries of L2 tables are loaded and stored atomically, stored under `lock`; refcounts are
                                           stored under `alloc` and `lock` and read under either */
    /* under the shard's lock */
    struct slice *next;                 /* in the bucket */
    unsigned pins;
    enum { SLICE_LOADING, SLICE_READY, SLICE_FAILED } state;
    bool used;                          /* since the clock's hand came by */
    atomic_uint flags;                  /* SLICE_DIRTY, SLICE_WRITING; changed under `lock`. Either keeps the slice in the cache; both come from 0 only
                                           while it is pinned */
    struct slice *next_dirty;           /* under `lock` */
};

struct shard {
    _Alignas(CACHE_LINE) pthread_mutex_t lock;
    pthread_cond_t loaded;              /* a slice left SLICE_LOADING */
    struct slice **buckets;             /* a power of two of them */
    struct slice **all;                 /* `count` of them, in room for `room` */
    unsigned count, room, hand;
};

struct cache {
    /* fixed after opening */
    uint32_t slice_size;
    unsigned shard_bits, bucket_bits, share;    /* slices that a shard should hold at most */
    unsigned limit;                     /* slices in all */
    struct shard *shards;
};

/* ---- refcount.c, allocate.c, free.c: who owns which cluster of the file ---- */

struct run { uint64_t first, count; };                  /* clusters of the file */
struct runs { struct run *run; size_t count, room; };

/* What was taken out of the map, and waits to be free: see Q3. */
struct freed {
    struct runs runs;                   /* a cluster is in as many of them as it lost references */
    uint64_t ticket;                    /* of the epoch, once the entries are durable that do not point at it any more */
    struct freed *next;
};

/* ---- write.c, discard.c, compressed.c: who is changing the map (Q5) ---- */

struct claim { uint64_t first, count; struct claim *next; };        /* guest clusters; on the stack of who claims */

struct claims {
    pthread_mutex_t lock;
    pthread_cond_t released;
    struct claim *list;
    unsigned waiters;
};

/* Where compressed clusters are put next. Under `alloc`. */
struct area {
    uint64_t position, end;             /* bytes of the file; position == end: there is none */
    uint64_t touched;                   /* the first cluster from which on each has one reference that belongs to the area itself */
};

struct qcow2 {
    fl_image image;                     /* first: image.h */
    struct io io;

    /* fixed after opening */
    fl_image *backing;                  /* NULL: none */
    uint64_t cluster_size, cluster_mask;
    unsigned cluster_bits, l2_bits, slice_bits; /* log2: bytes of a cluster, entries of an L2 table, entries of a slice of one */
    unsigned refcount_order, block_bits, region_bits;       /* log2: bits of a refcount; clusters that a block, and a slice of one, describe */
    uint64_t refcount_max;
    uint64_t sparse_from;               /* clusters of the file from here on read as zeros until they are used; UINT64_MAX: not known of any */
    bool has_zero_flag;                 /* version 3 */
    struct cache cache;

    struct epoch epoch;
    struct claims claims;
    pthread_mutex_t tables;

    pthread_mutex_t alloc;              /* protects: */
    struct bitmap maybe_free;           /* by region: clusters were freed there since it was last looked through */
    uint64_t scan, scan_end;            /* regions [scan, scan_end) were not looked at since opening; only `scan` changes */
    _Atomic uint64_t tail;              /* clusters from here on were never used. Changed under `alloc` */
    struct area area;
    bool growing;                       /* the refcount table is being given a new place */

    pthread_mutex_t lock;               /* protects changes of these, and of slices: */
    struct header header;               /* the tables' places and the disk's size */
    _Atomic uint64_t *l1;               /* host order; atomic for readers */
    _Atomic uint64_t fixed_tables[3];   /* where L1, refcount and snapshot table are, for readers: see tables_moved */
    uint64_t *reftable;                 /* host order. Changed under `alloc` and `lock`, read under either */
    uint64_t reftable_size;             /* entries */
    struct slice *dirty[2];             /* by kind */
    atomic_uint dirty_count;            /* slices; changed under it */
    struct bitmap l1_dirty, reftable_dirty;     /* entries */
    uint64_t l1_dirty_count;
    bool header_dirty;                  /* the refcount table moved: all of it must be written, and then the header */
    bool must_commit;                   /* something changed that a flush must make durable: anything but refcounts that went down */
    struct freed *freed;                /* taken out of the map since the last commit */
    atomic_ullong freed_bytes;          /* in it; changed under it */

    pthread_mutex_t settling;           /* protects, with `lock`: */
    struct freed *waiting;              /* taken out of the map durably; transfers may still know of it. Oldest first */
    atomic_bool any_waiting;

    pthread_mutex_t committing;         /* protects: */
    pthread_cond_t committed;
    uint64_t commits_begun, commits_ended;
    bool commit_runs;
    bool background;                    /* a thread was started for one */
    int commit_rc;                      /* of the last one that ended */
    fl_error commit_error;
    void *commit_buffer;                /* of the commit that runs */
    size_t commit_room;

    atomic_bool prepared;               /* for the first write: see qcow2_prepare */
    bool flush_failed;                  /* of the commit that runs: what was written may be lost, and no other flush can tell */
    atomic_bool broken;                 /* no more changes; never goes back */
    pthread_mutex_t breaking;           /* protects: */
    fl_error broken_by;                 /* the first reason */
};

static inline struct qcow2 *qcow2_of(fl_image *image) { return (struct qcow2 *)image; }
static inline uint64_t clusters_for(const struct qcow2 *q, uint64_t bytes) { return bytes / q->cluster_size + (bytes % q->cluster_size != 0); }

/* ---- qcow2.c ---- */

/* Before any change: refused once the image is broken; the first one makes the header fit for writing. */
int qcow2_prepare(struct qcow2 *q, fl_error *error);
/* The file is not what it should be: -FL_EFORMAT, and no more changes from now on. `guest`: the offset that it was about; UINT64_MAX: none. */
int qcow2_corrupt(struct qcow2 *q, uint64_t guest, fl_error *error, const char *format, ...) __attribute__((format(printf, 4, 5)));
void qcow2_break(struct qcow2 *q, const fl_error *why);

/* ---- bitmap_store.c: see image.h ---- */

int qcow2_bitmap_load(fl_image *image, size_t index, struct image_bitmap *bitmap, fl_error *error);
int qcow2_bitmap_store(fl_image *image, const struct image_bitmap *list, size_t count, fl_error *error);
/* Add the clusters of the bitmaps that the header says are there, as far as they can be found out. */
void bitmap_store_clusters(struct qcow2 *q, const struct header *header, struct runs *runs);

/* ---- cache.c ---- */

int cache_init(struct qcow2 *q, uint64_t bytes);
void cache_destroy(struct qcow2 *q);
/* The slice at `offset` of the file, read if need be, pinned. Call from inside the epoch, or when it cannot go away for another reason. */
int cache_get(struct qcow2 *q, enum slice_kind kind, uint64_t offset, struct slice **slice, fl_error *error);
void cache_put(struct qcow2 *q, struct slice *slice);
/* The same for a short look: the slice with its shard locked, if it is there already; NULL: it is not. */
struct slice *cache_peek(struct qcow2 *q, enum slice_kind kind, uint64_t offset);
void cache_unpeek(struct qcow2 *q, struct slice *slice);
/* The cluster at `offset` becomes a table: forget what was known of its slices in a former life. Nobody knows of the cluster. */
int cache_forget(struct qcow2 *q, uint64_t offset, fl_error *error);    /* -FL_EFORMAT: somebody does, so the refcounts are wrong */
/* Under `lock`, of a pinned slice that is about to change, or has just changed. */
void cache_dirty(struct qcow2 *q, struct slice *slice);

/* ---- refcount.c ---- */

int refcount_init(struct qcow2 *q, fl_error *error);    /* of an image that is open for writing */

/* ---- free.c ---- */

int runs_reserve(struct runs *runs, size_t more);       /* room for `more` runs_add; -ENOMEM */
void runs_add(struct runs *runs, uint64_t first, uint64_t count);
int freed_reserve(struct qcow2 *q, size_t more);        /* the same for q->freed. Under `lock` */
void freed_add(struct qcow2 *q, uint64_t first, uint64_t count);
void freed_destroy(struct freed *list);
/* What waits to be free and can be, is. Called without locks. */
void settle(struct qcow2 *q);

/* ---- allocate.c ---- */

/* Clusters that nobody has, with a reference each: a run of 1 to `want` in a row. *fresh: they read as zeros. */
int alloc_clusters(struct qcow2 *q, uint64_t want, struct run *got, bool *fresh, fl_error *error);
/* The same, all in a row, never used since opening. */
int alloc_in_a_row(struct qcow2 *q, uint64_t want, struct run *got, fl_error *error);
/* A cluster that will hold a table, or a block of refcounts: zeros that are inside the file, and unknown to the cache. So the entry that points at it may
   become durable before anything else is written to it. */
int alloc_clean(struct qcow2 *q, uint64_t cluster, bool fresh, fl_error *error);
/* Clusters that were allocated and have never been in the map. */
void alloc_undo(struct qcow2 *q, struct run run);

/* ---- area.c ---- */

/* `count` bytes for a compressed cluster, with a reference to each cluster that they touch. */
int alloc_bytes(struct qcow2 *q, uint64_t count, uint64_t *offset, fl_error *error);
void alloc_undo_bytes(struct qcow2 *q, uint64_t offset, uint64_t count);
void alloc_close_area(struct qcow2 *q);

/* ---- commit.c ---- */

/* All that was changed and written before the call is durable when it returns 0. */
int commit(struct qcow2 *q, fl_error *error);
/* Before a change, with no lock or claim held: keeps the caches from filling up with what can't be evicted, and the file from growing for want of a
   commit, which runs in the background as long as that keeps up. */
int commit_if_due(struct qcow2 *q, fl_error *error);
int commit_all(struct qcow2 *q, fl_error *error);       /* nothing is left to do, and no thread of ours is left: for closing */

/* ---- map.c ---- */

enum state { UNALLOCATED, ZERO, MAPPED, COMPRESSED };

/* What is at an offset of the disk, and for how long it goes on like that. */
struct place {
    enum state state;
    bool ours;                          /* MAPPED: nobody shares it, neither the cluster nor the table: may be overwritten */
    uint64_t host;                      /* MAPPED: of the first byte; COMPRESSED: the entry */
    uint64_t length;                    /* bytes; of COMPRESSED: to the end of the cluster */
};

/* Inside the epoch, or with a claim of what is looked at and inside the epoch for the call itself. */
int map_look(struct qcow2 *q, uint64_t offset, uint64_t length, struct place *place, fl_error *error);
/* With a claim: the entries of `count` clusters from `first` on, all in one slice. */
int map_entries(struct qcow2 *q, uint64_t first, uint64_t count, uint64_t *entries, bool *table_ours, fl_error *error);
/* Clusters from `cluster` on whose entries are in one slice. */
static inline uint64_t map_left_in_slice(const struct qcow2 *q, uint64_t cluster)
{
    return (UINT64_C(1) << q->slice_bits) - (cluster & ((UINT64_C(1) << q->slice_bits) - 1));
}
/* The header says where the L1, refcount or snapshot table is: no entry of an L1 or L2 table may lead there. Called under `lock`. */
void tables_moved(struct qcow2 *q);
/* What an entry says; checks it (`guest`: what to say it was about). */
int map_place(struct qcow2 *q, uint64_t guest, uint64_t entry, bool table_ours, struct place *place, fl_error *error);
/* With a claim: `count` entries in one slice change from `old` to `new`, at one instant; what the old ones had is freed. Makes the table if need be. */
int map_change(struct qcow2 *q, uint64_t first, uint64_t count, const uint64_t *old, const uint64_t *new, fl_error *error);

void l1_set_dirty(struct qcow2 *q, uint64_t index);    /* under `lock` */

/* Q5: the clusters are nobody else's to change until claim_release. One at a time for each thread. */
void claim_take(struct qcow2 *q, struct claim *claim, uint64_t first, uint64_t count);
void claim_release(struct qcow2 *q, struct claim *claim);

/* ---- extents.c ---- */

int map_extents(fl_image *image, uint64_t offset, uint64_t length, fl_extent *extents, size_t max, size_t *found, fl_error *error);
int map_map(fl_image *image, uint64_t offset, uint64_t length, fl_mapping *mappings, size_t max, size_t *found, fl_error *error);

/* ---- grow.c ---- */

int qcow2_grow(fl_image *image, uint64_t size, fl_error *error);

/* ---- write.c ---- */

int qcow2_readv(fl_image *image, const struct iovec *iov, int count, uint64_t offset, size_t length, fl_error *error);
int qcow2_writev(fl_image *image, const struct iovec *iov, int count, uint64_t offset, size_t length, fl_error *error);
/* Zeros as data, where it does not read as zeros already. */
int write_zeros(struct qcow2 *q, uint64_t count, uint64_t offset, fl_error *error);

/* ---- discard.c ---- */

int qcow2_zero(fl_image *image, uint64_t count, uint64_t offset, fl_error *error);
int qcow2_discard(fl_image *image, uint64_t count, uint64_t offset, fl_error *error);

/* ---- compressed.c ---- */

/* The whole cluster that the entry describes, into `buffer`. */
int compressed_read(struct qcow2 *q, uint64_t guest, uint64_t entry, void *buffer, fl_error *error);
/* The clusters of the file that it touches. */
struct run compressed_clusters(const struct qcow2 *q, uint64_t entry);
int qcow2_write_compressed(fl_image *image, const void *buffer, size_t length, uint64_t offset, fl_error *error);

#endif
