/* bitmap_store.c: the bits of persistent dirty bitmaps (section "Bitmaps"): read when a disk is opened on the image, written when it is closed.
 *
 * In between they are void: the first write clears the autoclear bit (qcow2_prepare), and gives their clusters back. So what is in the file is either what
 * a clean close stored, or nothing that anybody may trust. Meanwhile the bits are safe elsewhere (sidecar.h).
 *
 * The order of a store: bits, tables and directory; refcounts, synced with them (a commit); the extension, synced; the autoclear bit, synced. A crash before
 * that leaves clusters that nobody uses, and bitmaps that are void.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <stdlib.h>

#include "driver.h"

#define EXT_BITMAPS UINT32_C(0x23852875)
#define EXTENSION_LENGTH 24u
#define ENTRY_FIXED 24u
#define TYPE_DIRTY_TRACKING 1
#define TABLE_RESERVED UINT64_C(0xff000000000001fe)
#define TABLE_ONES UINT64_C(1)          /* of an entry without a cluster */

static int no_memory(const struct qcow2 *q, fl_error *error)
{
    return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for the dirty bitmaps of image '%s'", q->image.name);
}

static struct header header_now(struct qcow2 *q)
{
    pthread_mutex_lock(&q->lock);
    struct header header = q->header;
    pthread_mutex_unlock(&q->lock);
    return header;
}

/* ---- loading ---- */

/* A bitmap's table, in host order; every cluster that it names is in the file. -EBADMSG: it is damaged. Free *table. */
static int read_table(struct qcow2 *q, const struct bitmap_entry *entry, uint64_t **table, fl_error *error)
{
    uint64_t *read = calloc((size_t)entry->table_size + 1, sizeof *read), length = io_length(&q->io);
    int rc = read ? 0 : no_memory(q, error);
    if (rc == 0 && entry->table_size)
        rc = io_read_metadata(&q->io, read, entry->table_size * sizeof *read, entry->table_offset, error);
    for (uint32_t i = 0; i < entry->table_size && rc == 0; i++) {
        read[i] = be64toh(read[i]);
        uint64_t at = read[i] & OFFSET_MASK;
        if (read[i] & TABLE_RESERVED || at & q->cluster_mask || (at && (read[i] & TABLE_ONES || !in_range(q->cluster_size, at, align_up(length, q->cluster_size)))))
            rc = -EBADMSG;
    }
    if (rc)
        free(read);
    else
        *table = read;
    return rc;
}

/* Set in `bits` what `length` bytes, from bit `first` on, have set. */
static void set_bytes(struct bitmap *bits, uint64_t first, const unsigned char *bytes, uint64_t length)
{
    for (uint64_t done = 0; done < length && first + done * 8 < bits->bits; done += 8) {
        uint64_t word = 0, at = first + done * 8;
        memcpy(&word, bytes + done, MIN(8, length - done));
        word = le64toh(word);
        if (at + 64 > bits->bits)
            word &= UINT64_MAX >> (at + 64 - bits->bits);
        if (word)
            bitmap_fetch_or(bits, at / 64, word);
    }
}

static int read_bits(struct qcow2 *q, const uint64_t *table, uint32_t entries, struct bitmap *bits, fl_error *error)
{
    const uint64_t per_cluster = q->cluster_size * 8;
    unsigned char *bytes = malloc(q->cluster_size);
    int rc = bytes ? 0 : no_memory(q, error);
    for (uint32_t i = 0; i < entries && rc == 0 && i * per_cluster < bits->bits; i++) {
        uint64_t at = table[i] & OFFSET_MASK, first = i * per_cluster;
        if (at) {
            rc = io_read_metadata(&q->io, bytes, q->cluster_size, at, error);
            if (rc == 0)
                set_bytes(bits, first, bytes, q->cluster_size);
        } else if (table[i] & TABLE_ONES) {
            bitmap_set(bits, first, MIN(per_cluster, bits->bits - first));
        }
    }
    free(bytes);
    return rc;
}

int qcow2_bitmap_load(fl_image *image, size_t index, struct image_bitmap *out, fl_error *error)
{
    struct qcow2 *q = qcow2_of(image);
    struct header header = header_now(q);
    struct bitmap_directory directory;
    uint64_t *table = NULL;
    int rc = bitmaps_load(&q->io, &header, &directory, error);
    if (rc)
        return rc;
    if (index >= directory.count) {
        bitmaps_free(&directory);
        return -ENOENT;
    }
    const struct bitmap_entry *entry = &directory.entries[index];
    memset(out, 0, sizeof *out);
    out->granularity = entry->about.granularity;
    out->enabled = entry->about.enabled;
    out->good = !entry->about.in_use && strlen(entry->about.name) < sizeof out->name;
    if (out->good) {
        strcpy(out->name, entry->about.name);
        rc = read_table(q, entry, &table, error);
        if (rc == 0)
            rc = bitmap_init(&out->bits, div_up(header.size, out->granularity)) ? no_memory(q, error) : 0;
        if (rc == 0)
            rc = read_bits(q, table, entry->table_size, &out->bits, error);
        if (rc == -EBADMSG) {
            out->good = false;          /* one that is damaged is one less, and no reason not to open the disk */
            rc = 0;
        }
        if (rc)
            bitmap_destroy(&out->bits);
        free(table);
    }
    bitmaps_free(&directory);
    return rc;
}

/* ---- giving back ---- */

static int add_run(struct runs *runs, uint64_t first, uint64_t count)
{
    if (runs_reserve(runs, 1))
        return -ENOMEM;
    runs_add(runs, first, count);
    return 0;
}

void bitmap_store_clusters(struct qcow2 *q, const struct header *header, struct runs *runs)
{
    struct bitmap_directory directory;
    if (header->bitmap_count == 0 || bitmaps_load(&q->io, header, &directory, NULL))
        return;
    int rc = add_run(runs, header->bitmap_directory_offset >> q->cluster_bits, clusters_for(q, header->bitmap_directory_size));
    for (size_t i = 0; i < directory.count && rc == 0; i++) {
        const struct bitmap_entry *entry = &directory.entries[i];
        uint64_t *table;
        if (entry->table_size == 0 || read_table(q, entry, &table, NULL))
            continue;
        for (uint32_t n = 0; n < entry->table_size && rc == 0; n++)
            if (table[n] & OFFSET_MASK)
                rc = add_run(runs, (table[n] & OFFSET_MASK) >> q->cluster_bits, 1);
        if (rc == 0)
            rc = add_run(runs, entry->table_offset >> q->cluster_bits, clusters_for(q, entry->table_size * UINT64_C(8)));
        free(table);
    }
    bitmaps_free(&directory);
}

/* ---- storing ---- */

/* What a store took from the file so far, for when it fails. */
struct store { struct qcow2 *q; struct runs taken; };

static int take(struct store *store, uint64_t clusters, uint64_t *offset, fl_error *error)
{
    struct run run;
    if (runs_reserve(&store->taken, 1))
        return no_memory(store->q, error);
    int rc = alloc_in_a_row(store->q, clusters, &run, error);
    if (rc == 0) {
        store->taken.run[store->taken.count++] = run;   /* not joined: it may have to be undone as it was taken */
        *offset = run.first << store->q->cluster_bits;
    }
    return rc;
}

/* The bits of cluster `index` of them, into `bytes`. */
static void get_bytes(const struct bitmap *bits, uint64_t first, unsigned char *bytes, uint64_t length)
{
    for (uint64_t done = 0; done < length; done += 8) {
        uint64_t at = first + done * 8, word = at < bits->bits ? bitmap_word(bits, at / 64) : 0;
        if (at < bits->bits && at + 64 > bits->bits)
            word &= UINT64_MAX >> (at + 64 - bits->bits);
        word = htole64(word);
        memcpy(bytes + done, &word, 8);
    }
}

static int store_bits(struct store *store, const struct bitmap *bits, uint64_t *table_offset, uint32_t *table_size, fl_error *error)
{
    struct qcow2 *q = store->q;
    const uint64_t per_cluster = q->cluster_size * 8, entries = div_up(div_up(bits->bits, 8), q->cluster_size);
    const uint64_t table_bytes = clusters_for(q, entries * 8) << q->cluster_bits;
    uint64_t *table = calloc(1, MAX(table_bytes, 8));
    unsigned char *bytes = malloc(q->cluster_size);
    int rc = table && bytes ? 0 : no_memory(q, error);
    for (uint64_t i = 0; i < entries && rc == 0; i++) {
        uint64_t first = i * per_cluster, end = MIN(first + per_cluster, bits->bits), at;
        if (bitmap_next_set(bits, first, end) == end)
            continue;
        if (bitmap_next_clear(bits, first, end) == end) {
            table[i] = htobe64(TABLE_ONES);
            continue;
        }
        get_bytes(bits, first, bytes, q->cluster_size);
        rc = take(store, 1, &at, error);
        if (rc == 0)
            rc = io_write_metadata(&q->io, bytes, q->cluster_size, at, error);
        table[i] = htobe64(rc ? 0 : at);
    }
    *table_size = (uint32_t)entries;
    *table_offset = 0;
    if (rc == 0 && entries)
        rc = take(store, table_bytes >> q->cluster_bits, table_offset, error);
    if (rc == 0 && entries)
        rc = io_write_metadata(&q->io, table, table_bytes, *table_offset, error);
    free(table);
    free(bytes);
    return rc;
}

static void put16(unsigned char *p, uint16_t v) { v = htobe16(v); memcpy(p, &v, 2); }
static void put32(unsigned char *p, uint32_t v) { v = htobe32(v); memcpy(p, &v, 4); }
static void put64(unsigned char *p, uint64_t v) { v = htobe64(v); memcpy(p, &v, 8); }
static uint32_t get32(const unsigned char *p) { uint32_t v; memcpy(&v, p, 4); return be32toh(v); }

static int store_directory(struct store *store, const struct image_bitmap *list, size_t count, uint64_t *offset, uint64_t *size, fl_error *error)
{
    struct qcow2 *q = store->q;
    uint64_t bytes = 0, at = 0;
    for (size_t i = 0; i < count; i++)
        bytes += align_up(ENTRY_FIXED + strlen(list[i].name), 8);
    uint64_t whole = clusters_for(q, bytes) << q->cluster_bits;
    unsigned char *directory = calloc(1, whole);
    int rc = directory ? 0 : no_memory(q, error);
    for (size_t i = 0; i < count && rc == 0; i++) {
        unsigned char *p = directory + at;
        uint64_t table_offset;
        uint32_t table_size;
        size_t name = strlen(list[i].name);
        rc = store_bits(store, &list[i].bits, &table_offset, &table_size, error);
        if (rc)
            break;
        put64(p, table_offset);
        put32(p + 8, table_size);
        put32(p + 12, list[i].enabled ? BITMAP_AUTO : 0);
        p[16] = TYPE_DIRTY_TRACKING;
        p[17] = (unsigned char)__builtin_ctzll(list[i].granularity);
        put16(p + 18, (uint16_t)name);
        memcpy(p + ENTRY_FIXED, list[i].name, name);
        at += align_up(ENTRY_FIXED + name, 8);
    }
    if (rc == 0)
        rc = take(store, whole >> q->cluster_bits, offset, error);
    if (rc == 0)
        rc = io_write_metadata(&q->io, directory, whole, *offset, error);
    *size = bytes;
    free(directory);
    return rc;
}

/* ---- the extension ---- */

static void fill_extension(unsigned char *p, const struct header *header)
{
    put32(p, header->bitmap_count);
    put32(p + 4, 0);
    put64(p + 8, header->bitmap_directory_size);
    put64(p + 16, header->bitmap_directory_offset);
}

/* Put a new extension at the end of those that are there; the name of the backing file, if it stands in the way, moves behind it. All of it in one write. */
static int insert_extension(struct qcow2 *q, struct header *header, unsigned char *cluster, fl_error *error)
{
    const uint64_t limit = header->backing_offset ? header->backing_offset : q->cluster_size;
    uint64_t at = header->header_length, end;
    while (limit - at >= 8 && get32(cluster + at) != 0)
        at += MIN(8 + align_up(get32(cluster + at + 4), 8), limit - at);        /* validated when it was opened */
    end = at + 8 + EXTENSION_LENGTH + 8;        /* and the end mark */
    if (end + header->backing_length > q->cluster_size)
        return fail(error, ENOSPC, FL_SIDE_NONE, 0, 0, "image '%s' has no room for dirty bitmaps in its header", q->image.name);
    if (header->backing_offset && end > header->backing_offset) {
        memmove(cluster + end, cluster + header->backing_offset, header->backing_length);
        header->backing_offset = end;
        put64(cluster + 8, end);
    }
    put32(cluster + at, EXT_BITMAPS);
    put32(cluster + at + 4, EXTENSION_LENGTH);
    fill_extension(cluster + at + 8, header);
    memset(cluster + at + 8 + EXTENSION_LENGTH, 0, 8);
    header->bitmap_extension_offset = (uint32_t)at + 8;
    return io_write_metadata(&q->io, cluster, MAX(end, header->backing_offset + header->backing_length), 0, error);
}

static int write_extension(struct qcow2 *q, struct header *header, fl_error *error)
{
    unsigned char *cluster = malloc(q->cluster_size);
    int rc = cluster ? io_read_metadata(&q->io, cluster, q->cluster_size, 0, error) : no_memory(q, error);
    uint32_t at = header->bitmap_extension_offset;
    if (rc == 0 && at && get32(cluster + at - 4) == EXTENSION_LENGTH) {
        fill_extension(cluster + at, header);
        rc = io_write_metadata(&q->io, cluster + at, EXTENSION_LENGTH, at, error);
    } else if (rc == 0 && at) {
        rc = fail(error, FL_EFORMAT, FL_SIDE_NONE, 0, 0, "image '%s' is damaged: its bitmaps extension has another length than 24", q->image.name);
    } else if (rc == 0) {
        rc = insert_extension(q, header, cluster, error);
    }
    free(cluster);
    return rc == 0 ? io_flush(&q->io, error) : rc;
}

/* All that they need is durable: now they are there. The next write makes them void again. */
static int publish(struct qcow2 *q, struct header *changes, fl_error *error)
{
    int rc = write_extension(q, changes, error);
    if (rc)
        return rc;
    pthread_mutex_lock(&q->tables);             /* as qcow2_prepare does */
    atomic_store(&q->prepared, false);
    pthread_mutex_lock(&q->lock);
    q->header.autoclear |= AUTOCLEAR_BITMAPS;
    q->header.bitmap_count = changes->bitmap_count;
    q->header.bitmap_directory_offset = changes->bitmap_directory_offset;
    q->header.bitmap_directory_size = changes->bitmap_directory_size;
    q->header.bitmap_extension_offset = changes->bitmap_extension_offset;
    q->header.backing_offset = changes->backing_offset;
    struct header header = q->header;
    pthread_mutex_unlock(&q->lock);
    rc = header_write(&q->io, &header, error);
    if (rc == 0)
        rc = io_flush(&q->io, error);
    pthread_mutex_unlock(&q->tables);
    return rc;
}

int qcow2_bitmap_store(fl_image *image, const struct image_bitmap *list, size_t count, fl_error *error)
{
    struct qcow2 *q = qcow2_of(image);
    struct header header = header_now(q);
    struct store store = { .q = q };
    if (header.version < 3 || (count == 0 && header.bitmap_count == 0))
        return 0;
    int rc = qcow2_prepare(q, error);           /* what was there is void, and its clusters are given back */
    if (rc == 0 && count)
        rc = store_directory(&store, list, count, &header.bitmap_directory_offset, &header.bitmap_directory_size, error);
    if (rc == 0) {
        pthread_mutex_lock(&q->lock);
        q->must_commit = true;
        pthread_mutex_unlock(&q->lock);
        rc = commit_all(q, error);
    }
    for (size_t i = 0; i < store.taken.count && rc; i++)
        alloc_undo(q, store.taken.run[i]);
    free(store.taken.run);
    if (rc == 0 && count) {
        struct header now = header_now(q);
        now.bitmap_count = (uint32_t)count;
        now.bitmap_directory_offset = header.bitmap_directory_offset;
        now.bitmap_directory_size = header.bitmap_directory_size;
        rc = publish(q, &now, error);
    }
    return rc;
}
