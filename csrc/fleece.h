/* fleece.h: the public C interface of pyfleece, and the one list of declarations that the Python bindings are made from.
 *
 * Copyright 2026 the pyfleece authors. SPDX-License-Identifier: Apache-2.0
 *
 * Conventions, which hold for every function here:
 *   - It returns 0 or a negative code: -errno, or one of the negated FL_E... codes below.
 *   - Outputs come last and are untouched on failure; `error` (which may be NULL) is filled on failure only.
 *   - Offsets and lengths are bytes; durations are nanoseconds.
 *   - Every function may be called by any number of threads at once on one object. Closing an object makes the calls that come
 *     later return -FL_ECLOSED and waits for those that run; the memory lives until ..._free, which must be the last call.
 *   - After fork() the child's copies are unusable: every call on them returns -FL_EFORKED.
 *   - *_close may be called twice. *_free of an object that is open closes it. *_free(NULL) does nothing.
 */
#ifndef FLEECE_H
#define FLEECE_H

#include <stddef.h>
#include <stdint.h>

/* CFFI BEGIN */

/* ---- errors ---- */

enum fl_code {                  /* beyond errno's range; returned negated */
    FL_EBROKEN = 5001,          /* the snapshot is broken; the error holds the first cause */
    FL_EDISCARDED,              /* this range of the snapshot was discarded */
    FL_ELOST,                   /* this range of the snapshot was lost (policy lose-range) */
    FL_EOUTSIDE,                /* this range is not in the snapshot's dirty bitmap */
    FL_ERANGE,                  /* offset + length is beyond the end */
    FL_ECLOSED,                 /* the object was closed */
    FL_EFORKED,                 /* the object belongs to the parent process */
    FL_ELOCKED,                 /* another program, or another open in this one, has the image in use */
    FL_EFORMAT,                 /* unknown, unsupported or damaged image format */
    FL_ETRUNCATED,              /* the image ended before its size: it was truncated under us */
    FL_ECANCELLED,              /* the job was cancelled */
    FL_EINTERRUPTED,            /* the interrupt hook asked to stop waiting; nothing was changed by the part that waited */
    FL_EEND,                    /* no more chunks */
    FL_ERUNNING,                /* not done within the timeout (-ETIMEDOUT would be what some storage answered) */
    FL_EINCONSISTENT            /* the dirty bitmap may miss writes: only a full backup is a backup */
};

enum fl_side { FL_SIDE_NONE, FL_SIDE_SOURCE, FL_SIDE_FLEECING, FL_SIDE_TARGET };

typedef struct fl_error {
    int code;                   /* what the function returned */
    int cause;                  /* positive errno or FL_E... code of the first failure behind it; 0 when there is none */
    int side;                   /* enum fl_side: where that failure was */
    uint64_t offset, length;    /* the range that it was about */
    char text[700];             /* a sentence for people, with the name of the file; not ended by a full stop */
} fl_error;

/* A short name for a code or errno, never NULL. */
const char *fl_strerror(int code);

/* `hook` is called about every 50 ms by waits that run in `thread` (pthread_self of the program's main thread); when it returns non-zero
   the wait ends with -FL_EINTERRUPTED. NULL takes the hook away. Not to be called while other calls run. */
void fl_set_interrupt(int (*hook)(void), unsigned long thread);

/* ---- extents ---- */

enum fl_kind {
    FL_DATA,                    /* may hold anything */
    FL_ZERO,                    /* reads as zeros: a hole, or known zeros */
    FL_DISCARDED, FL_LOST, FL_OUTSIDE   /* of snapshots only: reading it fails with the code of the same name, but see `whole` */
};

typedef struct fl_extent { uint64_t offset, length; int kind; } fl_extent;

/* ---- images ---- */

typedef struct fl_image fl_image;

typedef struct fl_image_options {
    const char *format;         /* "raw" or "qcow2"; never NULL: nothing is guessed */
    int writable;
    int direct;                 /* O_DIRECT; buffers, offsets and lengths may be unaligned all the same */
    int share;                  /* take no lock: another program may have it open for writing */
    uint64_t cache_size;        /* qcow2: the most bytes that its tables may take in memory, for each image of a chain; 0: the default */
    /* Backing files are opened below this directory only, symbolic links resolved. NULL: the directory of the image that names them; "/":
       anywhere; "-": never. Always read-only, and only with a format that the image tells. */
    const char *backing_root;
    int inspect;                /* to look at only: no backing file is opened, and what is on the disk can't be read. Not with `writable` */
    /* of fl_image_create only, and for qcow2 only */
    uint32_t cluster_size;      /* a power of two, 512 bytes to 2 MiB; 0: 64 KiB */
    const char *backing;        /* what the image shall say: a relative path is relative to the image's directory. NULL: none */
    const char *backing_format; /* with backing: "raw" or "qcow2" */
    const char *compression;    /* of clusters that are written compressed: "zlib" or "zstd"; NULL: zlib */
} fl_image_options;

typedef struct fl_image_info {
    uint64_t size;              /* the guest's size */
    uint64_t allocated;         /* bytes that it occupies on its file system; a block device: its size */
    uint32_t cluster_size;      /* the unit in which the image allocates: raw: the file system's block, or the device's sector */
    uint32_t alignment;         /* what the storage asks of offsets and lengths: 1 when buffered */
    int block_device, writable, direct;
    char format[16];
    /* what only some formats have, else 0 and "" */
    uint32_t version;           /* qcow2: 2 or 3 */
    uint32_t refcount_bits;
    int dirty, corrupt, lazy_refcounts;         /* as the file says */
    char compression[8];        /* of compressed clusters */
    char backing[1024], backing_format[16];     /* as the image tells; "": none */
    uint32_t snapshots, bitmaps;                /* how many fl_image_snapshots and fl_image_bitmaps list */
} fl_image_info;

/* A snapshot inside of an image, made by another program. They are kept as they are: nothing here makes, reads or removes one. */
typedef struct fl_internal_snapshot {
    char id[128], name[256];    /* longer ones are cut */
    uint64_t size;              /* of the disk then; 0: not told, it is as the image's */
    uint64_t vm_state_size;     /* bytes */
    uint64_t date_ns;           /* since 1970 */
    uint64_t vm_clock_ns;
    uint64_t icount;            /* UINT64_MAX: not told */
} fl_internal_snapshot;

/* A dirty bitmap stored in an image. */
typedef struct fl_persistent_bitmap {
    char name[1024];
    uint64_t granularity;       /* bytes */
    int in_use;                 /* not closed properly: it is not to be trusted */
    int enabled;                /* whoever writes the image must keep it up to date ("auto") */
    int extra;                  /* it has extra data of an unknown kind */
} fl_persistent_bitmap;

enum fl_map_flags {
    FL_MAP_DATA = 1,            /* may hold anything */
    FL_MAP_ZERO = 2,            /* reads as zeros */
    FL_MAP_ALLOCATED = 4,       /* an image of the chain says what is here: `depth` tells which; else nobody does, and it reads as zeros */
    FL_MAP_COMPRESSED = 8,
    FL_MAP_OFFSET = 16          /* the bytes are in that image's file, at `host_offset` */
};

typedef struct fl_mapping {
    uint64_t offset, length, host_offset;
    uint32_t depth;             /* 0: this image; 1: its backing file, ... */
    int flags;                  /* enum fl_map_flags, or'ed */
} fl_mapping;

/* Open a regular file or a block device. -FL_ELOCKED: in use; -FL_EFORMAT; -errno. */
int fl_image_open(const char *path, const fl_image_options *options, fl_image **image, fl_error *error);
/* Make a new sparse image of `size` bytes, opened for writing. The file must not exist (-EEXIST). */
int fl_image_create(const char *path, uint64_t size, const fl_image_options *options, fl_image **image, fl_error *error);
/* A raw image without a name in `directory` (O_TMPFILE), gone with its last user, of `size` bytes (sparse). */
int fl_image_create_nameless(const char *directory, uint64_t size, fl_image **image, fl_error *error);

int fl_image_pread(fl_image *image, void *buffer, size_t count, uint64_t offset, fl_error *error);
int fl_image_pwrite(fl_image *image, const void *buffer, size_t count, uint64_t offset, fl_error *error);
int fl_image_zero(fl_image *image, uint64_t count, uint64_t offset, fl_error *error);     /* reads as zeros afterwards; space freed where possible */
int fl_image_discard(fl_image *image, uint64_t count, uint64_t offset, fl_error *error);  /* a hint: contents are undefined afterwards */
int fl_image_flush(fl_image *image, fl_error *error);
/* Describe [offset, offset + length) in up to `max` extents, in order and without gaps, from `offset` on; `found` may cover less
   than was asked for (call again from where it ended), but never nothing. Neighbours differ in kind. */
int fl_image_extents(fl_image *image, uint64_t offset, uint64_t length, fl_extent *extents, size_t max, size_t *found, fl_error *error);
/* The same for the place of the bytes: which image of the chain has them, and where. */
int fl_image_map(fl_image *image, uint64_t offset, uint64_t length, fl_mapping *mappings, size_t max, size_t *found, fl_error *error);
/* Write whole clusters (the last one of the image may be short), each compressed if that makes it smaller. They must not be allocated
   before. -EOPNOTSUPP: the format has no compression; -EINVAL: not whole clusters. */
int fl_image_write_compressed(fl_image *image, const void *buffer, size_t count, uint64_t offset, fl_error *error);
/* Make the disk larger; what is new reads as zeros. -EBUSY while a disk, a snapshot or a backup uses the image; -EINVAL: it would shrink;
   -EOPNOTSUPP: not with this format. */
int fl_image_grow(fl_image *image, uint64_t size, fl_error *error);
int fl_image_info_get(fl_image *image, fl_image_info *info, fl_error *error);
/* The snapshots, or dirty bitmaps, that are stored in the file, from the `first`th on; found is 0 at the end. -FL_EFORMAT: damaged. */
int fl_image_snapshots(fl_image *image, size_t first, fl_internal_snapshot *snapshots, size_t max, size_t *found, fl_error *error);
int fl_image_bitmaps(fl_image *image, size_t first, fl_persistent_bitmap *bitmaps, size_t max, size_t *found, fl_error *error);
/* Snapshots, disks and jobs that use the image keep it open until they end. */
int fl_image_close(fl_image *image, fl_error *error);
void fl_image_free(fl_image *image);

/* ---- is an image as it should be? ---- */

enum fl_repair { FL_REPAIR_NONE, FL_REPAIR_LEAKS, FL_REPAIR_ALL };

enum fl_finding_kind {
    FL_FOUND_CORRUPTION,        /* using the image may damage data, or has */
    FL_FOUND_LEAK,              /* space that nobody uses and nobody gets */
    FL_FOUND_ERROR,             /* the check could not be finished */
    FL_FOUND_NOTE               /* counted nowhere */
};

#define FL_CHECK_FINDINGS 256

typedef struct fl_finding {
    int kind;                   /* enum fl_finding_kind */
    int repaired;
    uint64_t guest, host;       /* offsets in the disk and in the file; UINT64_MAX: it has none */
    uint64_t length;            /* bytes of the file, in clusters */
    char text[120];
} fl_finding;

typedef struct fl_check {
    /* as they are now, after the repair; leaks in clusters, corruptions in entries or clusters */
    uint64_t corruptions, leaks, check_errors;
    uint64_t corruptions_fixed, leaks_fixed;
    uint64_t image_end_offset;  /* behind the last cluster that is in use */
    uint64_t total_clusters, allocated_clusters, compressed_clusters, fragmented_clusters;    /* of the disk */
    size_t finding_count;
    uint64_t findings_dropped;  /* there was no room for so many more */
    fl_finding findings[FL_CHECK_FINDINGS];
} fl_check;

/* Check an image that nobody has open, and repair it: enum fl_repair. Of `options`, format and share count. 0: `result` says what was found.
   -FL_EFORMAT: the header is not even good enough to look further; -EOPNOTSUPP: images of this format can't be checked; -FL_ELOCKED; -errno. */
int fl_image_check(const char *path, const fl_image_options *options, int repair, fl_check *result, fl_error *error);

/* ---- fault injection: an image around another one (which stays usable), for tests of this library and of its users ---- */

enum fl_op { FL_OP_READ = 1, FL_OP_WRITE = 2, FL_OP_ZERO = 4, FL_OP_DISCARD = 8, FL_OP_FLUSH = 16, FL_OP_EXTENTS = 32, FL_OP_ANY = 63 };

enum fl_fault_action {
    FL_FAULT_ERROR,             /* fail with `err`, nothing done */
    FL_FAULT_SHORT,             /* read or write: do the first half, then fail with `err` (0: the rest is done too, in a second go) */
    FL_FAULT_DELAY,             /* sleep `delay_ns`, then do it */
    FL_FAULT_HANG,              /* wait for fl_fault_resume, then do it */
    FL_FAULT_HANG_AFTER         /* do it, then wait for fl_fault_resume */
};

typedef struct fl_fault {
    int ops;                    /* enum fl_op, or'ed: which operations count and are hit */
    int action, err;            /* enum fl_fault_action; positive errno */
    uint64_t nth;               /* the first hit is the nth matching operation from now on, counted from 1 */
    uint64_t times;             /* how many matching operations in a row are hit; 0: all from then on */
    uint64_t offset, length;    /* only operations that touch this range match; length 0: all */
    uint64_t delay_ns;
    double probability;         /* 0 or 1: always; else each hit happens with this probability, from `seed` */
    uint64_t seed;
} fl_fault;

int fl_image_faulty(fl_image *inner, fl_image **image, fl_error *error);
int fl_fault_add(fl_image *image, const fl_fault *fault, fl_error *error);  /* the first rule that hits an operation acts on it */
int fl_fault_clear(fl_image *image);                    /* forget all rules and let go of what hangs */
int fl_fault_resume(fl_image *image);                   /* let go of what hangs now */
uint64_t fl_fault_seen(fl_image *image, int ops);       /* operations of these kinds since it was made, hit or not */
uint64_t fl_fault_hanging(fl_image *image);             /* operations that hang now */

/* ---- the disk: the guest's view ---- */

typedef struct fl_disk fl_disk;
typedef struct fl_snapshot fl_snapshot;

int fl_disk_open(fl_image *source, fl_disk **disk, fl_error *error);
uint64_t fl_disk_size(fl_disk *disk);
int fl_disk_pread(fl_disk *disk, void *buffer, size_t count, uint64_t offset, fl_error *error);
int fl_disk_pwrite(fl_disk *disk, const void *buffer, size_t count, uint64_t offset, fl_error *error);
int fl_disk_zero(fl_disk *disk, uint64_t count, uint64_t offset, fl_error *error);
int fl_disk_discard(fl_disk *disk, uint64_t count, uint64_t offset, fl_error *error);
int fl_disk_flush(fl_disk *disk, fl_error *error);
/* As fl_image_extents, of what the source holds now. */
int fl_disk_extents(fl_disk *disk, uint64_t offset, uint64_t length, fl_extent *extents, size_t max, size_t *found, fl_error *error);
/* Ends the disk's snapshots too: their later reads fail with -FL_ECLOSED. */
int fl_disk_close(fl_disk *disk, fl_error *error);
void fl_disk_free(fl_disk *disk);

/* Dirty bitmaps: what was written since the bitmap was added, cleared, or last frozen by a cut. `granularity`: a power of two, 4 KiB to 2 GiB.
   Names have 1 to 255 bytes. Where not said otherwise: -ENOENT: there is none of that name; -EBUSY: a snapshot has it frozen;
   -FL_EINCONSISTENT. */
int fl_disk_bitmap_add(fl_disk *disk, const char *name, uint64_t granularity, fl_error *error);     /* in memory. -EEXIST */
int fl_disk_bitmap_remove(fl_disk *disk, const char *name, fl_error *error);    /* one that is inconsistent, too */
/* At one instant between writes: nothing is dirty. Makes one that was inconsistent good again. */
int fl_disk_bitmap_clear(fl_disk *disk, const char *name, fl_error *error);
/* Record what is written from now on, or (0) do not: what it has it keeps. */
int fl_disk_bitmap_enable(fl_disk *disk, const char *name, int enabled, fl_error *error);
/* What is dirty in any of `from` is dirty in `into` as well; of any granularities. All or none of them. */
int fl_disk_bitmap_merge(fl_disk *disk, const char *into, const char *const *from, size_t count, fl_error *error);
int fl_disk_bitmap_info(fl_disk *disk, const char *name, uint64_t *granularity, uint64_t *dirty_bytes, fl_error *error);
/* The name of bitmap `index`, into `name` of 256 bytes; -ENOENT past the last. */
int fl_disk_bitmap_name(fl_disk *disk, size_t index, char *name, fl_error *error);
/* As fl_image_extents; FL_DATA is dirty, FL_OUTSIDE is clean. */
int fl_disk_bitmap_extents(fl_disk *disk, const char *name, uint64_t offset, uint64_t length,
                           fl_extent *extents, size_t max, size_t *found, fl_error *error);

typedef struct fl_bitmap_state {
    uint64_t granularity;
    int enabled;                /* it records */
    int busy;                   /* a snapshot has it frozen */
    int persistent;             /* it is in the disk's bitmap file */
    int write_intent;           /* it is good after a crash of the machine, too */
    int inconsistent;
    char uuid[37];              /* of a persistent one: never the same for two; else "" */
    char problem[160];          /* why it is inconsistent, or why it will be when the disk is opened next; else "" */
} fl_bitmap_state;
int fl_disk_bitmap_state(fl_disk *disk, const char *name, fl_bitmap_state *state, fl_error *error);

/* Persistent dirty bitmaps are in a file beside the disk, see docs/bitmap-format.md. Open it, once, before the first write; the bitmaps that it has are
   then the disk's, those that can't be trusted as inconsistent ones. `create`: make it when there is none. Closing the disk closes it, and flushes the
   source first. -ENOENT, -EEXIST (a name is taken, or a file is open already), -FL_ELOCKED, -FL_EFORMAT, -ENOTSUP, -errno. */
int fl_disk_bitmap_file(fl_disk *disk, const char *path, int create, fl_error *error);
/* As fl_disk_bitmap_add, in that file: it survives the process, and with `write_intent` a crash of the machine as well, for one sync more before the
   first write to each unit. -EINVAL: there is no file. */
int fl_disk_bitmap_add_persistent(fl_disk *disk, const char *name, uint64_t granularity, int write_intent, fl_error *error);

/* ---- snapshots ---- */

/* What becomes of the frozen dirty bitmap. It is merged back:
     on-success: unless the snapshot is committed; what was lost always is
     always:     as above; without a commit only what was not discarded from the snapshot
     never:      whatever happens */
enum fl_bitmap_mode { FL_BITMAP_ON_SUCCESS, FL_BITMAP_ALWAYS, FL_BITMAP_NEVER };

enum fl_policy { FL_BREAK_SNAPSHOT, FL_BREAK_GUEST_WRITE, FL_LOSE_RANGE };

typedef struct fl_snapshot_options {
    uint32_t cluster_size;      /* a power of two, 4 KiB to 64 MiB; 0: the default */
    int on_cbw_error;           /* enum fl_policy */
    uint64_t cbw_timeout;       /* ns: the longest that one guest write waits for room, in all */
    uint64_t stage_size;        /* bytes of memory, used lazily; at least one cluster */
    fl_image *fleecing;         /* writable; NULL: the stage is all there is */
    uint64_t fleecing_limit;    /* bytes of the fleecing image that may be in use; 0: all of it */
    const char *bitmap;         /* NULL: a full snapshot; else freeze this dirty bitmap at the cut */
    int bitmap_mode;            /* enum fl_bitmap_mode */
    /* Of an incremental: save what is outside of the bitmap, too, so that all of the disk can be read. What belongs to the incremental stays what
       the bitmap holds: fl_snapshot_extents tells it, backups copy and discard that. A full snapshot is whole in any case. */
    int whole;
} fl_snapshot_options;

/* Cut `count` different disks at one instant. All or none. */
int fl_snapshot_cut(fl_disk *const *disks, const fl_snapshot_options *options, size_t count,
                    fl_snapshot **snapshots, fl_error *error);
uint64_t fl_snapshot_size(fl_snapshot *snapshot);
uint32_t fl_snapshot_cluster_size(fl_snapshot *snapshot);
/* All of the bytes at the cut, or a failure (-FL_EBROKEN, -FL_EDISCARDED, -FL_ELOST, -FL_EOUTSIDE, -FL_ERANGE, -errno). On failure the buffer's
   contents are undefined. Never makes a guest write wait. */
int fl_snapshot_pread(fl_snapshot *snapshot, void *buffer, size_t count, uint64_t offset, fl_error *error);
int fl_snapshot_extents(fl_snapshot *snapshot, uint64_t offset, uint64_t length,
                        fl_extent *extents, size_t max, size_t *found, fl_error *error);
/* The same for what can be read, whether the bitmap holds it or not: FL_OUTSIDE is told only where it was not saved, so not of a `whole` one. */
int fl_snapshot_extents_readable(fl_snapshot *snapshot, uint64_t offset, uint64_t length,
                                 fl_extent *extents, size_t max, size_t *found, fl_error *error);
/* "I have it": the whole clusters in the range (the tail counts as whole) are not saved on write any more, can't be read any more,
   and what the store holds of them is freed. */
int fl_snapshot_discard(fl_snapshot *snapshot, uint64_t count, uint64_t offset, fl_error *error);
/* 0 while it lives; -FL_EBROKEN with the first cause. */
int fl_snapshot_check(fl_snapshot *snapshot, fl_error *error);
/* When it breaks, send one byte to this socket, at once if it is broken already. A copy of the socket is kept as long as the snapshot's memory; nobody
   ever waits for it: when it is full or shut down nothing is sent. Once: -EBUSY. -errno. */
int fl_snapshot_tell_break(fl_snapshot *snapshot, int socket, fl_error *error);
/* Of an incremental: the backup is good, or it is not; what becomes of the frozen dirty bitmap is decided at once, and for good (see enum fl_bitmap_mode).
   Close aborts, where neither was called. -EINVAL after the other one; nothing on a full snapshot. */
int fl_snapshot_commit(fl_snapshot *snapshot, fl_error *error);
int fl_snapshot_abort(fl_snapshot *snapshot, fl_error *error);
/* Never waits for fleecing storage that hangs. */
int fl_snapshot_close(fl_snapshot *snapshot, fl_error *error);
void fl_snapshot_free(fl_snapshot *snapshot);

#define FL_LATENCY_BUCKETS 256

typedef struct fl_stats {
    uint64_t clusters_saved;    /* in the store, ever; zero clusters not counted */
    uint64_t bytes_copied;      /* old data that went through the stage */
    uint64_t zero_clusters;     /* saved as zeros: nothing stored */
    uint64_t clusters_lost;
    uint64_t clusters_discarded;
    uint64_t staged_bytes, staged_peak;         /* in memory now, and at most */
    uint64_t fleecing_bytes, fleecing_peak;     /* in the fleecing image */
    uint64_t bytes_spilled;     /* written to the fleecing image, ever */
    uint64_t spill_errors;
    uint64_t room_waits;        /* guest writes that had to wait for room */
    uint64_t room_timeouts;
    uint64_t claim_waits;       /* guest writes that waited for another one that was saving the same cluster */
    uint64_t reads_repeated;    /* source reads whose range was saved meanwhile, read again from the store */
    uint64_t latency_count, latency_max;        /* ns added to guest writes by copy-before-write */
    uint64_t latency[FL_LATENCY_BUCKETS];       /* counts; fl_latency_bound(i) is the upper bound of bucket i; the last one has none */
} fl_stats;

int fl_snapshot_stats(fl_snapshot *snapshot, fl_stats *stats, fl_error *error);
uint64_t fl_latency_bound(unsigned bucket);

/* ---- backup ---- */

typedef struct fl_backup fl_backup;

typedef struct fl_backup_options {
    uint64_t granularity;       /* a multiple of the cluster; 0: the default */
    uint32_t workers;           /* threads, 1 to 64; 0: one a processor, 2 to 16 */
    uint32_t buffers;           /* chunks mode: buffers of one granularity, at least 2; 0: the default */
    uint64_t speed;             /* bytes per second; 0: unlimited */
    int discard;                /* discard from the snapshot what was copied (chunks mode: what was acknowledged) */
    int target_is_zero;         /* the target reads as zeros: zeros need not be written */
    int compress;               /* whole clusters of the target, which were never written before, are written compressed */
    int reflink;                /* let the target share blocks with the source where both are files that can; needs a target; not with compress or on_piece */
    int skip_lost;              /* ranges that were lost, or discarded by others, are listed in the result instead of failing the job */
    /* Copy mode: called by the workers with each piece that they hold, before they write it; `data` NULL: `length` zeros. Any order, several at once, each
       byte that is copied once. Non-zero cancels the job. NULL: nobody wants to know. */
    int (*on_piece)(uint64_t context, uint64_t offset, uint64_t length, const void *data);
    uint64_t piece_context;
} fl_backup_options;

typedef struct fl_progress {
    uint64_t total;             /* bytes to be visited: the disk, or what its bitmap holds */
    uint64_t done;              /* of these, copied, or found to be zeros, or skipped */
    uint64_t data_bytes, zero_bytes, lost_bytes;  /* done, by kind; lost: or discarded by others */
    uint64_t reflinked_bytes;   /* of data_bytes: shared with the source */
    uint64_t fleecing_bytes;    /* of the fleecing image that the snapshot has in use; 0 once it was closed */
    uint64_t elapsed_ns;
    uint64_t retries;           /* reads repeated */
    int finished;               /* no worker runs any more */
} fl_progress;

typedef struct fl_chunk {
    uint64_t offset, length;
    int kind;                   /* FL_DATA or FL_ZERO */
    void *buffer;               /* FL_DATA: `length` bytes, until the chunk is acknowledged; else NULL */
    uint64_t id;
} fl_chunk;

/* Copy to `target`, whose size is at least the snapshot's, in any order; or, where target is NULL, hand out chunks in the order of their
   offsets. The job runs in threads of its own, keeps snapshot and target alive, and discards in whole chunks. */
int fl_backup_start(fl_snapshot *snapshot, fl_image *target, const fl_backup_options *options, fl_backup **job, fl_error *error);
/* 0 when the job is done and succeeded; -FL_ERUNNING when it still runs; else the first failure (-FL_ECANCELLED after a cancel). */
int fl_backup_wait(fl_backup *job, uint64_t timeout, fl_error *error);
int fl_backup_progress(fl_backup *job, fl_progress *progress, fl_error *error);
int fl_backup_set_speed(fl_backup *job, uint64_t speed, fl_error *error);
/* Ranges that were skipped (FL_LOST, FL_DISCARDED), merged and in order, from the `index`th on; found is 0 at the end. */
int fl_backup_lost(fl_backup *job, size_t index, fl_extent *extents, size_t max, size_t *found, fl_error *error);
/* The next chunk in order: 0, -FL_ERUNNING, -FL_EEND after the last, or the first failure. */
int fl_backup_next(fl_backup *job, uint64_t timeout, fl_chunk *chunk, fl_error *error);
/* Give a chunk's buffer back; with `discard`, and where the job discards at all, discard its range from the snapshot. Any order. -EINVAL: not
   handed out. */
int fl_backup_ack(fl_backup *job, uint64_t id, int discard, fl_error *error);
/* Ask the job to end. Does not wait. */
int fl_backup_cancel(fl_backup *job);
/* Cancel, and wait up to half a second for the workers; one that hangs in the kernel ends by itself later and keeps what it needs till then. */
int fl_backup_close(fl_backup *job, fl_error *error);
void fl_backup_free(fl_backup *job);

/* ---- mount: disks and their snapshots as files (FUSE). -ENOSYS from fl_mount_start where this was built without libfuse3 ----
 *
 *   MOUNTPOINT/NAME                     a disk
 *   MOUNTPOINT/.snap/CUT/NAME           its state at a cut: holes can be punched (a discard), nothing can be written
 *   MOUNTPOINT/.snap/CUT/STEM.changed   of an incremental: the same, but what is not in the bitmap is a hole. STEM: NAME without its suffix,
 *                                       or all of it where two disks have the same
 *
 * Threads of the mount's own (fl-fuse) serve all of it. Cuts are made by whoever takes the requests for them: mkdir and rmdir in .snap wait
 * in fl_mount_next_request for somebody who makes snapshots and shows them, or hides and ends them, and then answers.
 */

typedef struct fl_mount fl_mount;

typedef struct fl_mount_options {
    uint32_t threads;           /* 1 to 256; 0: the default. The most requests that are worked on at once */
    int allow_other;            /* other users may use it, as far as the files' modes let them */
} fl_mount_options;

enum fl_mount_request_kind { FL_MOUNT_MKDIR, FL_MOUNT_RMDIR };

typedef struct fl_mount_request {
    uint64_t id;
    int kind;                   /* enum fl_mount_request_kind */
    char name[256];             /* in .snap; any bytes but '/' */
} fl_mount_request;

typedef struct fl_mount_failure {
    char path[640];             /* below the mount point */
    fl_error error;
    uint64_t left_out;          /* like it, on the same file, since the last one that was told; or, with an empty path, failures of any kind that
                                   nobody fetched in time */
} fl_mount_failure;

/* Mount on an empty directory. `names` are file names, each once. The mount keeps the disks' memory alive, but not the disks open: a file of a disk
   that was closed fails with ESTALE. -EINVAL; -errno with what libfuse said. */
int fl_mount_start(const char *mountpoint, fl_disk *const *disks, const char *const *names, size_t count, const fl_mount_options *options,
                   fl_mount **mount, fl_error *error);
/* Show snapshots as .snap/`cut`: in the order of the disks, NULL for a disk that is not in it. They are the caller's; the mount keeps their memory
   alive. -EEXIST, -EINVAL. */
int fl_mount_show(fl_mount *mount, const char *cut, fl_snapshot *const *snapshots, fl_error *error);
/* Take the directory away; files that are open go on working as long as their snapshots live. -ENOENT. */
int fl_mount_hide(fl_mount *mount, const char *cut, fl_error *error);
/* The oldest mkdir or rmdir that nobody took: 0, -FL_ERUNNING when there is none within `timeout`, -FL_EEND after the end. */
int fl_mount_next_request(fl_mount *mount, uint64_t timeout, fl_mount_request *request, fl_error *error);
/* End a request that was taken: with success (code 0; a mkdir must have been shown), or with a positive errno and the story behind it, which
   is then .snap's attribute user.pyfleece.error. */
int fl_mount_answer(fl_mount *mount, uint64_t id, int code, const char *story, fl_error *error);
/* What failed in reads and writes: 0, -FL_ERUNNING when nothing did within `timeout`, -FL_EEND after the end. */
int fl_mount_next_failure(fl_mount *mount, uint64_t timeout, fl_mount_failure *failure, fl_error *error);
int fl_mount_open_files(fl_mount *mount, uint64_t *count, fl_error *error);
/* 0 when it is unmounted, by whomever; -FL_ERUNNING. */
int fl_mount_wait(fl_mount *mount, uint64_t timeout, fl_error *error);
/* Unmount, end the snapshots that are shown, let the requests that run end (those that hang in storage are waited for up to 5 s). Files that are
   open fail with ENOTCONN from then on. */
int fl_mount_close(fl_mount *mount, fl_error *error);
void fl_mount_free(fl_mount *mount);

/* ---- load: a guest that reads and writes, and how long each of its operations took; for measuring what a snapshot costs it ---- */

typedef struct fl_load fl_load;

enum fl_order {
    FL_ORDER_ONCE,              /* each block once, in an order that looks random, the same for the same seed */
    FL_ORDER_RANDOM,
    FL_ORDER_SEQUENTIAL         /* and again from the beginning */
};

typedef struct fl_load_options {
    uint32_t block;             /* bytes of an operation, up to 16 MiB; the disk's last part that is no whole block is left alone */
    uint64_t stride;            /* bytes from one block's start to the next one's; 0: block */
    uint32_t threads;           /* operations at once, 1 to 256 */
    int order;                  /* enum fl_order */
    uint32_t read_percent;      /* of the operations */
    uint32_t hot_percent, hot_space_percent;    /* FL_ORDER_RANDOM: so many of the operations go to so much of the disk; 0: all alike */
    uint64_t rate;              /* operations per second, all threads together; 0: as fast as it goes */
    uint64_t operations;        /* then it ends; 0: when it is told to, or FL_ORDER_ONCE is through */
    uint64_t seed;
} fl_load_options;

typedef struct fl_load_stats {
    uint64_t operations, bytes_read, bytes_written, elapsed_ns;
    uint64_t latency_max;       /* ns. With a rate, from the moment when the operation was due: waiting for a stalled one before it counts */
    uint64_t latency[FL_LATENCY_BUCKETS];       /* as in fl_stats */
    int finished;
} fl_load_stats;

/* Runs in threads of its own. What it writes is noise: the disk's contents are destroyed. The load must be freed before the disk is. */
int fl_load_start(fl_disk *disk, const fl_load_options *options, fl_load **load, fl_error *error);
int fl_load_stats_get(fl_load *load, fl_load_stats *stats, fl_error *error);
/* 0 when it is over; -FL_ERUNNING; or the first failure of an operation, which ended it. */
int fl_load_wait(fl_load *load, uint64_t timeout, fl_error *error);
/* Ask it to end. Does not wait. */
int fl_load_stop(fl_load *load);
void fl_load_free(fl_load *load);               /* stops it, and waits */

/* CFFI END */
#endif
