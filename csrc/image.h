/* image.h: what every image format provides, and how the layers above use an image without knowing its format.
 *
 * An image is counted: whoever keeps a pointer holds a reference. The public calls (fl_image_...) pass the image's gate, so that close()
 * keeps them out; the layers above use image_... on their own reference, and go on after close(). The last reference, be it close()'s
 * or theirs, closes the files and gives the locks back; the struct itself lives until the public handle is freed too, so that a call on a
 * closed image finds a gate that is shut.
 */
#ifndef FL_IMAGE_H
#define FL_IMAGE_H

#include <sys/uio.h>

#include "bitmap.h"
#include "gate.h"

/* A dirty bitmap that is in the file, for the formats that have such. */
struct image_bitmap {
    char name[256];
    uint64_t granularity;
    bool enabled;                       /* it is to record */
    bool good;                          /* else it can't be trusted, or used, and has no bits and perhaps no name */
    struct bitmap bits;
};

struct image_ops {
    const char *format;
    /* All or nothing: 0 when every byte was moved. The range is inside the image and not empty (checked by image.c); the vector is the
       caller's and is not changed; it has any number of entries. Errors leave side at FL_SIDE_NONE: only the caller knows the image's
       part. */
    int (*readv)(fl_image *image, const struct iovec *iov, int count, uint64_t offset, size_t length, fl_error *error);
    int (*writev)(fl_image *image, const struct iovec *iov, int count, uint64_t offset, size_t length, fl_error *error);
    int (*zero)(fl_image *image, uint64_t count, uint64_t offset, fl_error *error);
    /* What extents call FL_ZERO must go on reading as zeros: the write path saves nothing before such a discard. */
    int (*discard)(fl_image *image, uint64_t count, uint64_t offset, fl_error *error);
    int (*flush)(fl_image *image, fl_error *error);
    /* As fl_image_extents; length and max are not 0. */
    int (*extents)(fl_image *image, uint64_t offset, uint64_t length, fl_extent *extents, size_t max, size_t *found, fl_error *error);
    uint64_t (*allocated)(fl_image *image);     /* bytes */
    /* Find the place of a range that will soon be written, where the writes are faster for it. It reads as before, and a discard gives the place back. false:
       not done, or not wholly; there is no use in trying again. NULL: no use. */
    bool (*reserve)(fl_image *image, uint64_t count, uint64_t offset);
    /* As image_next_data. NULL: extents tell, whatever it costs them to find out where data ends. */
    uint64_t (*next_data)(fl_image *image, uint64_t offset, uint64_t end);
    /* Let [offset, offset + length) of `target`, an image with the same driver, share the blocks that this one has there, so that it reads as this one did
       at one moment during the call. Errors have no text. -EOPNOTSUPP: these two never can, and nothing was changed; any other: `target` holds there
       what it held, or what this one does. NULL: no two images can. */
    int (*clone)(fl_image *image, uint64_t offset, uint64_t length, fl_image *target);
    /* What only some formats have; NULL: not this one. */
    int (*map)(fl_image *image, uint64_t offset, uint64_t length, fl_mapping *mappings, size_t max, size_t *found, fl_error *error);
    int (*write_compressed)(fl_image *image, const void *buffer, size_t length, uint64_t offset, fl_error *error);    /* as writev */
    int (*grow)(fl_image *image, uint64_t size, fl_error *error);       /* nobody else uses the image; image->size is set afterwards */
    void (*info)(fl_image *image, fl_image_info *info);                 /* the format's details; the rest is filled in */
    int (*snapshots)(fl_image *image, size_t first, fl_internal_snapshot *snapshots, size_t max, size_t *found, fl_error *error);
    int (*bitmaps)(fl_image *image, size_t first, fl_persistent_bitmap *bitmaps, size_t max, size_t *found, fl_error *error);
    /* The least end that a read met before the image's size: what was behind it was cut off, and stays lost when the image is made longer again.
       UINT64_MAX: none. NULL: the driver's images can't be cut off. */
    uint64_t (*ends_at)(fl_image *image);
    /* The file or block device whose identity and times are the image's, or -1; the image's own, to look at, or to begin its writeback.
       NULL: there is none. */
    int (*descriptor)(fl_image *image);
    /* Flush, and write all that closing would still write: until the next change through the image its file does not change. NULL: flush does that. */
    int (*settle)(fl_image *image, fl_error *error);
    /* The index'th dirty bitmap of the file, whose bits the caller destroys then. -ENOENT: there are no more. NULL: the format has none. */
    int (*bitmap_load)(fl_image *image, size_t index, struct image_bitmap *bitmap, fl_error *error);
    /* From now until the next change of the image these are its dirty bitmaps, and no others. All that was written before is durable then. Nothing,
       where the image can't have any. */
    int (*bitmap_store)(fl_image *image, const struct image_bitmap *list, size_t count, fl_error *error);
    /* What must still be written when the last reference goes; may fail (close() reports it when that reference was its own). Not called
       in a forked child. NULL: nothing. */
    int (*sync_close)(fl_image *image, fl_error *error);
    /* The last reference is gone: free the driver's part and close its files, but not the struct. Also called in a forked child: there it
       must not write, unlock, or touch a lock that another thread may have held at the fork. */
    void (*destroy)(fl_image *image);
};

struct fl_image {
    /* fixed after creation; the size: but for fl_image_grow, while nobody else uses the image */
    const struct image_ops *ops;
    uint64_t size;
    uint32_t cluster_size, alignment;
    bool writable, block_device, direct, inspect;
    char *name;                 /* for messages: the path (a long one: its end), or what it is */

    atomic_bool punches;        /* discard gives space back and the range then reads as zeros; goes false when that turns out not to work */
    atomic_bool closed;         /* the handle's reference was given back */
    atomic_bool taken;          /* it is the source of a disk, or a fleecing image: nobody else may use it so */
    atomic_uint references;     /* of those who use it; the handle's is one until it is closed */
    atomic_uint memory;         /* of the struct: one for all references together, one for a public handle */
    struct gate gate;           /* of the public calls */
};

/* For drivers: embed struct fl_image first, in memory from image_alloc (zeroed; release with free() when image_init was not reached or
   failed). image_init sets everything common (copies name) with one reference; from then on image_unref is the way to get rid of it. */
void *image_alloc(size_t size);
int image_init(fl_image *image, const struct image_ops *ops, const char *name);

/* As fl_image_open, for the layers below the public handle: a reference, given back with image_unref. */
int image_open(const char *path, const fl_image_options *options, fl_image **image, fl_error *error);

/* For whoever got a public handle from the user: a reference, unless it is closed. -EINVAL (NULL), -FL_ECLOSED, -FL_EFORKED. */
int image_use(fl_image *image, fl_error *error);
/* The same, for `what` ("the source of a disk"), which may have the image for itself only: -EBUSY while somebody else has. */
int image_take(fl_image *image, const char *what, fl_error *error);
void image_untake(fl_image *image);             /* others may take it; the reference stays */
fl_image *image_ref(fl_image *image);           /* one more, for who has one; returns it */
void image_unref(fl_image *image);              /* NULL: nothing */

/* The checked calls of the layers above (and of the public ones): range checks, read-only checks; a length of 0 succeeds. */
int image_readv(fl_image *image, const struct iovec *iov, int count, uint64_t offset, fl_error *error);
int image_writev(fl_image *image, const struct iovec *iov, int count, uint64_t offset, fl_error *error);
int image_read(fl_image *image, void *buffer, size_t length, uint64_t offset, fl_error *error);
int image_write(fl_image *image, const void *buffer, size_t length, uint64_t offset, fl_error *error);
int image_zero(fl_image *image, uint64_t count, uint64_t offset, fl_error *error);
int image_discard(fl_image *image, uint64_t count, uint64_t offset, fl_error *error);
int image_flush(fl_image *image, fl_error *error);
int image_extents(fl_image *image, uint64_t offset, uint64_t length, fl_extent *extents, size_t max, size_t *found, fl_error *error);
int image_map(fl_image *image, uint64_t offset, uint64_t length, fl_mapping *mappings, size_t max, size_t *found, fl_error *error);
int image_write_compressed(fl_image *image, const void *buffer, size_t length, uint64_t offset, fl_error *error);

/* Where the first data in [offset, end) may begin; `end`: all of it reads as zeros. What can't be found out is data. */
uint64_t image_next_data(fl_image *image, uint64_t offset, uint64_t end);

static inline uint64_t image_ends_at(fl_image *image)
{
    return image->ops->ends_at ? image->ops->ends_at(image) : UINT64_MAX;
}

int image_settle(fl_image *image, fl_error *error);
int image_bitmap_load(fl_image *image, size_t index, struct image_bitmap *bitmap, fl_error *error);
int image_bitmap_store(fl_image *image, const struct image_bitmap *list, size_t count, fl_error *error);

/* The range is inside both, and `target` is writable. */
static inline int image_clone(fl_image *image, uint64_t offset, uint64_t length, fl_image *target)
{
    return image->ops->clone && image->ops == target->ops ? image->ops->clone(image, offset, length, target) : -EOPNOTSUPP;
}

/* The range is inside. */
static inline bool image_reserve(fl_image *image, uint64_t count, uint64_t offset)
{
    return image->ops->reserve && image->ops->reserve(image, count, offset);
}

static inline int image_descriptor(fl_image *image)
{
    return image->ops->descriptor ? image->ops->descriptor(image) : -1;
}

/* raw.c */
int raw_open(const char *path, const fl_image_options *options, fl_image **image, fl_error *error);
int raw_create(const char *path, uint64_t size, const fl_image_options *options, fl_image **image, fl_error *error);
int raw_create_nameless(const char *directory, uint64_t size, fl_image **image, fl_error *error);

/* qcow2/qcow2.c */
int qcow2_open(const char *path, const fl_image_options *options, fl_image **image, fl_error *error);
int qcow2_create(const char *path, uint64_t size, const fl_image_options *options, fl_image **image, fl_error *error);

/* io_fault.c: an image around `inner`, of which it takes a reference. */
int faulty_new(fl_image *inner, fl_image **image, fl_error *error);

#endif
