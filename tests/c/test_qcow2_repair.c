/* test_qcow2_repair.c DIR: a repair that is cut off at any moment loses nothing, and can be done again.
 *
 * What the repair of a damaged image does to the file is recorded: writes and syncs. A state: everything up to a sync, and of what came after it
 * any part. In each state the disk reads as it did before, and another repair puts all right.
 */
#define _GNU_SOURCE
#include "image_kit.h"
#include "storage.h"

#define CLUSTER 512u
#define DISK (256u << 10)
#define MOST 4000u
#define STATES 60u              /* with parts missing, for each damage; the prefixes are all tried */
#define NAME "repair.qcow2"

static char path[4200];

/* ---- the file as bytes ---- */

struct file { unsigned char *bytes; uint64_t length; };

static struct file load(void)
{
    FILE *f = fopen(path, "rb");
    struct file file = { malloc(4u << 20), 0 };
    CHECK(f && file.bytes);
    memset(file.bytes, 0, 4u << 20);
    file.length = fread(file.bytes, 1, 4u << 20, f);
    fclose(f);
    return file;
}

static void save(const struct file *file)
{
    FILE *f = fopen(path, "wb");
    CHECK(f && fwrite(file->bytes, 1, file->length, f) == file->length && fclose(f) == 0, "%s", path);
}

static uint64_t get(const struct file *file, uint64_t at, unsigned width)
{
    uint64_t value = 0;
    for (unsigned i = 0; i < width; i++)
        value = value << 8 | file->bytes[at + i];
    return value;
}

static void put(struct file *file, uint64_t at, unsigned width, uint64_t value)
{
    for (unsigned i = width; i-- > 0; value >>= 8)
        file->bytes[at + i] = (unsigned char)value;
}

#define COPIED (UINT64_C(1) << 63)
#define OFFSET UINT64_C(0xfffffffffffe00)

static uint64_t l1(const struct file *f) { return get(f, 40, 8); }
static uint64_t l2(const struct file *f, unsigned i) { return get(f, l1(f) + 8 * i, 8) & OFFSET; }
static uint64_t reftable(const struct file *f) { return get(f, 48, 8); }
static uint64_t block(const struct file *f) { return get(f, reftable(f), 8); }

/* ---- damages ---- */

static void leaks(struct file *f)
{
    for (uint64_t i = 0; i < 40; i++)
        put(f, block(f) + 2 * (100 + i), 2, 3);
}

static void low_refcounts(struct file *f)
{
    for (uint64_t i = 20; i < 60; i++)
        put(f, block(f) + 2 * i, 2, 0);
}

static void no_refcounts(struct file *f) { put(f, reftable(f), 8, 0); }
static void table_in_a_block(struct file *f) { put(f, reftable(f), 8, l1(f)); }

static void l2_in_l1(struct file *f)
{
    put(f, l2(f, 1) + 8, 8, l1(f) | COPIED);
    put(f, l2(f, 2) + 16, 8, l2(f, 2) | COPIED);
    put(f, l2(f, 3) + 24, 8, reftable(f) | COPIED);
}

static void shared_clusters(struct file *f)
{
    for (unsigned i = 0; i < 30; i++)
        put(f, l2(f, 1) + 8 * i, 8, get(f, l2(f, 2) + 8 * i, 8));
}

static void shared_table(struct file *f) { put(f, l1(f) + 8, 8, get(f, l1(f) + 16, 8)); }

static void copied_bits(struct file *f)
{
    for (unsigned i = 0; i < 40; i++)
        put(f, l2(f, i % 4) + 8 * i, 8, get(f, l2(f, i % 4) + 8 * i, 8) ^ COPIED);
    put(f, l1(f) + 8, 8, get(f, l1(f) + 8, 8) ^ COPIED);
}

static void all_of_them(struct file *f)
{
    leaks(f);
    low_refcounts(f);
    copied_bits(f);
    l2_in_l1(f);
}

static const struct damage { const char *name; void (*inflict)(struct file *); } damages[] = {
    { "leaks", leaks }, { "low refcounts", low_refcounts }, { "no refcounts", no_refcounts }, { "a table in a block", table_in_a_block },
    { "data in tables", l2_in_l1 }, { "shared clusters", shared_clusters }, { "a shared table", shared_table },
    { "COPIED bits", copied_bits }, { "all of them", all_of_them },
};

/* ---- recording ---- */

static struct event { uint64_t offset, length; unsigned char *data; } events[MOST];     /* length 0: a sync */
static size_t event_count;

static void record(enum storage_event kind, const struct iovec *iov, int count, uint64_t offset, uint64_t length)
{
    if (kind == STORAGE_SYNC_BEGINS)
        return;
    CHECK(event_count < MOST && kind != STORAGE_PUNCH && count <= 1);
    struct event *e = &events[event_count++];
    *e = (struct event){ offset, kind == STORAGE_WRITE ? length : 0, NULL };
    if (e->length) {
        e->data = malloc(length);
        CHECK(e->data);
        memcpy(e->data, iov[0].iov_base, length);
    }
}

static void apply(struct file *file, const struct event *e)
{
    if (e->length == 0)
        return;
    memcpy(file->bytes + e->offset, e->data, e->length);
    if (e->offset + e->length > file->length)
        file->length = e->offset + e->length;
}

/* ---- checks ---- */

static fl_check found;

static void check(int repair)
{
    const fl_image_options options = { .format = "qcow2" };
    MUST(fl_image_check(path, &options, repair, &found, &why));
}

static void read_disk(unsigned char *bytes)
{
    const fl_image_options options = { .format = "qcow2" };
    fl_image *image;
    MUST(fl_image_open(path, &options, &image, &why));
    MUST(fl_image_pread(image, bytes, DISK, 0, &why));
    fl_image_free(image);
}

static void verify(const struct file *state, const unsigned char *wanted, const char *name, size_t at)
{
    static unsigned char now[DISK];
    save(state);
    read_disk(now);
    CHECK(!memcmp(now, wanted, DISK), "%s: after a crash at event %zu the disk reads differently", name, at);
    check(FL_REPAIR_ALL);
    CHECK(!found.corruptions && !found.leaks && !found.check_errors, "%s: after a crash at event %zu and a repair: %s", name, at, found.findings[0].text);
    read_disk(now);
    CHECK(!memcmp(now, wanted, DISK), "%s: after a crash at event %zu and a repair the disk reads differently", name, at);
}

static void try(const struct file *sound, const struct damage *damage, uint64_t *random)
{
    static unsigned char wanted[DISK];
    struct file base = { malloc(4u << 20), sound->length }, state = { malloc(4u << 20), 0 };
    CHECK(base.bytes && state.bytes);
    memcpy(base.bytes, sound->bytes, 4u << 20);
    damage->inflict(&base);
    save(&base);
    read_disk(wanted);
    event_count = 0;
    storage_watch = record;
    check(FL_REPAIR_ALL);
    storage_watch = NULL;
    CHECK(!found.corruptions && !found.leaks && (found.corruptions_fixed || found.leaks_fixed), "%s: %s", damage->name, found.findings[0].text);

    memcpy(state.bytes, base.bytes, 4u << 20);
    state.length = base.length;
    for (size_t i = 0; i <= event_count; i++) {
        verify(&state, wanted, damage->name, i);
        if (i < event_count)
            apply(&state, &events[i]);
    }
    for (unsigned n = 0; n < STATES; n++) {
        size_t crash = below(random, event_count + 1), synced = crash;
        while (synced > 0 && events[synced - 1].length)
            synced--;
        memcpy(state.bytes, base.bytes, 4u << 20);
        state.length = base.length;
        for (size_t i = 0; i < crash; i++)
            if (i < synced || chance(random, 50))
                apply(&state, &events[i]);
        verify(&state, wanted, damage->name, crash);
    }
    for (size_t i = 0; i < event_count; i++)
        free(events[i].data);
    free(base.bytes);
    free(state.bytes);
}

int main(int argc, char **argv)
{
    static unsigned char data[DISK];
    const fl_image_options options = { .format = "qcow2", .writable = 1, .cluster_size = CLUSTER };
    uint64_t random = 7;
    fl_image *image;
    CHECK(argc == 2, "usage: %s DIR", argv[0]);
    snprintf(path, sizeof path, "%.4000s/" NAME, argv[1]);
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (unsigned char)(i / CLUSTER % 251 + 1);
    MUST(fl_image_create(path, DISK, &options, &image, &why));
    for (uint64_t at = 0; at < DISK; at += DISK / 8)        /* not where the next one would be */
        MUST(fl_image_pwrite(image, data + at, DISK / 8 - 8 * CLUSTER, at, &why));
    MUST(fl_image_close(image, &why));
    fl_image_free(image);
    struct file sound = load();
    for (size_t i = 0; i < sizeof damages / sizeof *damages; i++)
        try(&sound, &damages[i], &random);
    free(sound.bytes);
    unlink(path);
    return 0;
}
