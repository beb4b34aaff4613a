/* fuzz_qcow2.c: whatever the bytes of a qcow2 file are, the library neither crashes, hangs nor takes unbounded memory; and
 *
 *   F1 no file is opened but the image and what is in its directory;
 *   F2 a repair that says that all is well is believed by the next check;
 *   F3 what could be read before a repair reads the same after it;
 *   F4 an image without corruption has none after any operations, and no leaks; what was written is read, also after opening it again;
 *   F5 a check, and opening for reading, change nothing.
 *
 * Time and memory are bounded by libFuzzer's -timeout, -rss_limit_mb and -malloc_limit_mb. See fuzz.h for what an input is.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fleece.h"
#include "fuzz.h"

typedef unsigned long long ull;

#define WHOLE (UINT64_C(1) << 20)               /* disks up to this size are read as a whole */
#define MOST_OPERATIONS 24u

static char directory[PATH_MAX], path[PATH_MAX], outside[PATH_MAX];

#define CHECK(condition, ...) do { \
    if (!(condition)) { \
        fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
        fprintf(stderr, __VA_ARGS__); \
        fputc('\n', stderr); \
        abort(); \
    } \
} while (0)

/* ---- F1: the linker leads the library's open() here ---- */

int __real_open(const char *name, int flags, ...);
int __wrap_open(const char *name, int flags, ...);

int __wrap_open(const char *name, int flags, ...)
{
    va_list args;
    va_start(args, flags);
    int mode = va_arg(args, int);
    va_end(args);
    char resolved[PATH_MAX];
    if (realpath(name, resolved))
        CHECK(!strncmp(resolved, directory, strlen(directory)) && resolved[strlen(directory)] == '/', "'%s' was opened", resolved);
    return __real_open(name, flags, mode);
}

/* ---- the files ---- */

static void write_file(const char *name, const void *bytes, size_t size, uint64_t length)
{
    int fd = __real_open(name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    CHECK(fd >= 0 && write(fd, bytes, size) == (ssize_t)size, "%s", name);
    if (length > size && ftruncate(fd, (off_t)length) < 0) {    /* no file of that length here */ }
    close(fd);
}

static void remove_files(void)
{
    const char *names[] = { "t.qcow2", "base.raw", "base.qcow2", "link.raw", "sub", "" };
    char name[PATH_MAX + 16];
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        snprintf(name, sizeof name, "%s/%s", directory, names[i]);
        remove(name);
    }
    remove(outside);
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    static unsigned char pattern[65536];
    char name[PATH_MAX + 16];
    (void)argc, (void)argv;
    const char *where = getenv("FUZZ_DIRECTORY");
    snprintf(directory, sizeof directory, "%s/fuzz-qcow2-XXXXXX", where ? where : access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
    CHECK(mkdtemp(directory), "%s", directory);
    snprintf(outside, sizeof outside, "%.*s-outside.raw", (int)sizeof outside - 16, directory);
    snprintf(path, sizeof path, "%.*s/t.qcow2", (int)sizeof path - 16, directory);
    for (size_t i = 0; i < sizeof pattern; i++)
        pattern[i] = (unsigned char)(i / 512 + 1);
    write_file(outside, "secret", 6, 65536);
    snprintf(name, sizeof name, "%s/base.raw", directory);
    write_file(name, pattern, sizeof pattern, 0);
    snprintf(name, sizeof name, "%s/link.raw", directory);
    CHECK(symlink(outside, name) == 0, "%s", name);
    snprintf(name, sizeof name, "%s/sub", directory);
    CHECK(mkdir(name, 0700) == 0, "%s", name);
    snprintf(name, sizeof name, "%s/base.qcow2", directory);
    fl_image_options options = { .format = "qcow2", .writable = 1, .cluster_size = 512 };
    fl_image *base;
    if (fl_image_create(name, 100000, &options, &base, NULL) == 0) {
        fl_image_pwrite(base, pattern, 40000, 20000, NULL);
        fl_image_free(base);
    }
    atexit(remove_files);
    return 0;
}

/* ---- what is known about a disk ---- */


/* Pieces, so that one bad cluster does not hide the rest; `known` has a byte for each. */
#define PIECE 512u

struct content { uint64_t size; unsigned char *bytes, *known; };

static void read_content(fl_image *image, uint64_t size, struct content *c)
{
    c->size = size;
    c->bytes = malloc(size + 1);
    c->known = malloc(size / PIECE + 1);
    if (fl_image_pread(image, c->bytes, size, 0, NULL) == 0) {
        memset(c->known, 1, size / PIECE + 1);
        return;
    }
    for (uint64_t at = 0; at < size; at += PIECE) {
        size_t n = (size_t)(size - at < PIECE ? size - at : PIECE);
        c->known[at / PIECE] = fl_image_pread(image, c->bytes + at, n, at, NULL) == 0;
    }
}

static void free_content(struct content *c)
{
    free(c->bytes);
    free(c->known);
    c->bytes = c->known = NULL;
}

static void compare_content(fl_image *image, const struct content *c, const char *when)
{
    unsigned char now[PIECE], *whole = malloc(c->size + 1);
    bool same = fl_image_pread(image, whole, c->size, 0, NULL) == 0 && !memcmp(whole, c->bytes, c->size) &&
                !memchr(c->known, 0, (c->size + PIECE - 1) / PIECE);
    free(whole);
    for (uint64_t at = 0; !same && at < c->size; at += PIECE) {
        size_t n = (size_t)(c->size - at < PIECE ? c->size - at : PIECE);
        fl_error error = { 0 };
        if (!c->known[at / PIECE])
            continue;
        int rc = fl_image_pread(image, now, n, at, &error);
        CHECK(rc == 0, "%s: %llu can't be read any more: %s", when, (ull)at, error.text);
        CHECK(!memcmp(now, c->bytes + at, n), "%s: %llu reads differently", when, (ull)at);
    }
}

/* ---- looking ---- */

static void look_around(fl_image *image, uint64_t size)
{
    static fl_extent extents[64];
    static fl_mapping mappings[64];
    static fl_internal_snapshot snapshots[8];
    static fl_persistent_bitmap bitmaps[4];
    uint64_t at = 0, end;
    size_t n = 0;
    for (int i = 0; i < 8 && at < size; i++) {
        if (fl_image_extents(image, at, size - at, extents, 64, &n, NULL) < 0)
            break;
        CHECK(n > 0 && n <= 64 && extents[0].offset == at, "extents from %llu", (ull)at);
        end = extents[n - 1].offset + extents[n - 1].length;
        CHECK(end > at && end <= size, "extents from %llu", (ull)at);
        at = end;
    }
    at = 0;
    for (int i = 0; i < 8 && at < size; i++) {
        if (fl_image_map(image, at, size - at, mappings, 64, &n, NULL) < 0)
            break;
        CHECK(n > 0 && n <= 64 && mappings[0].offset == at, "map from %llu", (ull)at);
        end = mappings[n - 1].offset + mappings[n - 1].length;
        CHECK(end > at && end <= size, "map from %llu", (ull)at);
        at = end;
    }
    for (size_t first = 0; first < 32 && fl_image_snapshots(image, first, snapshots, 8, &n, NULL) == 0 && n > 0; first += n)
        CHECK(n <= 8, "snapshots");
    for (size_t first = 0; first < 32 && fl_image_bitmaps(image, first, bitmaps, 4, &n, NULL) == 0 && n > 0; first += n)
        CHECK(n <= 4, "bitmaps");
}

static void read_far(fl_image *image, uint64_t size, uint64_t random)
{
    static unsigned char buffer[8192];
    for (int i = 0; i < 16; i++) {
        uint64_t at = next_random(&random) % size >> next_random(&random) % 40;
        size_t n = (size_t)(size - at < sizeof buffer ? size - at : sizeof buffer);
        fl_image_pread(image, buffer, n, at, NULL);
    }
    fl_image_pread(image, buffer, 1, size - 1, NULL);
}

/* ---- writing ---- */

struct writer {
    fl_image *image;
    uint64_t size, cluster, random;
    struct content *model;      /* NULL: the disk is too large, or was not in order to begin with */
};

static uint64_t pick(struct writer *w, uint64_t n)
{
    return next_random(&w->random) % n;
}

/* The model follows what succeeded. What failed half-way, or was discarded, may be anything: it is read anew. */
static void learn(struct writer *w, uint64_t offset, size_t count, int rc, int value)
{
    struct content *c = w->model;
    if (!c)
        return;
    if (rc == 0 && value >= 0) {
        memset(c->bytes + offset, value, count);
        return;
    }
    for (uint64_t at = offset / PIECE * PIECE; at < offset + count; at += PIECE) {
        size_t n = (size_t)(c->size - at < PIECE ? c->size - at : PIECE);
        c->known[at / PIECE] = fl_image_pread(w->image, c->bytes + at, n, at, NULL) == 0;
    }
}

static void operate(struct writer *w)
{
    static unsigned char buffer[32768];
    uint64_t what = pick(w, 16), offset, count;
    int value = (int)pick(w, 255) + 1, rc;
    offset = w->size <= WHOLE || pick(w, 4) ? pick(w, w->size < 4 * WHOLE ? w->size : 4 * WHOLE) : pick(w, w->size);
    if (pick(w, 3) == 0)
        offset -= offset % w->cluster;
    count = pick(w, 3) ? 1 + pick(w, 3000) : w->cluster * (1 + pick(w, 4));
    if (count > w->size - offset)
        count = w->size - offset;
    if (what < 9) {
        if (count > sizeof buffer)
            count = sizeof buffer;
        memset(buffer, value, count);
        rc = fl_image_pwrite(w->image, buffer, count, offset, NULL);
        learn(w, offset, count, rc, value);
    } else if (what < 11) {
        rc = fl_image_zero(w->image, count, offset, NULL);
        learn(w, offset, count, rc, 0);
    } else if (what < 14) {
        rc = fl_image_discard(w->image, count, offset, NULL);
        learn(w, offset, count, rc, -1);
    } else if (what == 14) {
        offset -= offset % w->cluster;
        if ((count = w->cluster) <= sizeof buffer && offset + count <= w->size) {
            memset(buffer, value, count);
            rc = fl_image_write_compressed(w->image, buffer, count, offset, NULL);
            learn(w, offset, count, rc, value);
        }
    } else {
        fl_image_flush(w->image, NULL);
    }
}

/* ---- the phases ---- */

static fl_image_options how_to_open(const uint8_t *script, bool writable)
{
    static char inside[PATH_MAX + 8];
    fl_image_options options = { .format = "qcow2", .writable = writable, .cache_size = 65536 };
    snprintf(inside, sizeof inside, "%s/.", directory);
    if (getenv("FUZZ_ALLOW"))                   /* does F1 notice anything? */
        options.backing_root = "/";
    switch (script[0] >> 3 & 3) {
    case 1: options.backing_root = inside; break;
    case 2: options.backing_root = "-"; break;
    }
    return options;
}

static int check(int repair, fl_check *result)
{
    const fl_image_options options = { .format = "qcow2" };
    fl_error error = { 0 };
    int rc = fl_image_check(path, &options, repair, result, &error);
    CHECK(rc == 0 || rc == -FL_EFORMAT, "check: %s", error.text);
    return rc;
}

/* 0, or why it can't be opened. */
static int open_image(const uint8_t *script, bool writable, fl_image **image, fl_image_info *info)
{
    const fl_image_options options = how_to_open(script, writable);
    int rc = fl_image_open(path, &options, image, NULL);
    if (rc < 0)
        return rc;
    CHECK(fl_image_info_get(*image, info, NULL) == 0, "info");
    return 0;
}

static void phase_read(const uint8_t *script, struct content *content)
{
    fl_image *image;
    fl_image_info info;
    if (open_image(script, false, &image, &info) < 0)
        return;
    look_around(image, info.size);
    if (info.size > 0 && info.size <= WHOLE)
        read_content(image, info.size, content);
    else if (info.size > 0)
        read_far(image, info.size, script[2]);
    fl_image_free(image);
}

static void phase_repair(const uint8_t *script, const struct content *content, fl_check *result)
{
    static fl_check again;
    fl_image *image;
    fl_image_info info;
    if (check(script[0] & 3, result) < 0)
        return;
    int rc = check(FL_REPAIR_NONE, &again);
    CHECK(rc == 0, "after the repair it can't be checked: %d", rc);
    CHECK(again.corruptions == result->corruptions && again.leaks == result->leaks && again.check_errors == result->check_errors,
          "corruptions %llu, leaks %llu, after a repair that left %llu and %llu", (ull)again.corruptions, (ull)again.leaks,
          (ull)result->corruptions, (ull)result->leaks);
    if (content->bytes && open_image(script, false, &image, &info) == 0) {
        compare_content(image, content, "after the repair");
        fl_image_free(image);
    }
}

static int by_value(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

/* Do two entries of the active tables lead to one cluster? No program makes that, but it is no corruption when the refcounts say so (and a
   repair makes them say so). When one of them goes elsewhere, nobody finds the other one to set its COPIED bit. */
static bool is_twisted(const uint8_t *image, size_t size)
{
    static uint64_t offsets[20000];
    const uint64_t bits = get_number(image, size, 20, 4), l1 = get_number(image, size, 40, 8), mask = UINT64_C(0xfffffffffffe00);
    size_t n = 0;
    for (uint64_t i = 0; i < get_number(image, size, 36, 4) && l1 + 8 * i < size && n < 10000; i++) {
        uint64_t table = get_number(image, size, l1 + 8 * i, 8) & mask;
        if (table)
            offsets[n++] = table;
    }
    for (size_t i = 0, tables = n; i < tables; i++) {
        for (uint64_t j = 0; j < UINT64_C(1) << (bits - 3) && n < 20000; j++) {
            uint64_t entry = get_number(image, size, offsets[i] + 8 * j, 8);
            if (entry & mask && !(entry >> 62 & 1))
                offsets[n++] = entry & mask;
        }
    }
    qsort(offsets, n, sizeof *offsets, by_value);
    for (size_t i = 1; i < n; i++)
        if (offsets[i] == offsets[i - 1])
            return true;
    return n == 20000;
}

/* Refcounts for what is behind the end of the file mean nothing until the file gets longer. Were there any? */
static bool had_hidden_leaks(const uint8_t *data, size_t size)
{
    static fl_check before;
    struct stat st;
    CHECK(stat(path, &st) == 0, "%s", path);
    write_file(path, data + SCRIPT, size - SCRIPT, (uint64_t)st.st_size);
    return check(FL_REPAIR_NONE, &before) == 0 && before.leaks > 0;
}

static void phase_write(const uint8_t *script, size_t size, struct content *content, bool sound, bool repaired)
{
    static fl_check after;
    struct writer w = { .random = 0 };
    fl_image *image;
    fl_image_info info;
    if (open_image(script, true, &w.image, &info) < 0)
        return;
    w.size = info.size;
    w.cluster = info.cluster_size;
    bool bitmaps = info.bitmaps > 0;            /* a write makes them void, and what they occupy a leak */
    memcpy(&w.random, script + 2, 6);
    w.model = sound && content->bytes ? content : NULL;
    for (uint64_t n = w.size ? 1 + script[2] % MOST_OPERATIONS : 0; n > 0; n--)
        operate(&w);
    if (w.model)
        compare_content(w.image, w.model, "after writing");
    int rc = fl_image_close(w.image, NULL);
    fl_image_free(w.image);
    if (!sound || is_twisted(script + SCRIPT, size - SCRIPT))
        return;
    CHECK(rc == 0, "close: %d", rc);
    CHECK(check(FL_REPAIR_NONE, &after) == 0, "after writing it can't be checked");
    for (size_t i = 0; repaired && i < after.finding_count; i++)
        after.corruptions -= !!strstr(after.findings[i].text, "COPIED bit is clear") * (after.findings[i].length / info.cluster_size);
    CHECK(after.corruptions == 0 && after.check_errors == 0, "after writing: %s", after.finding_count ? after.findings[0].text : "");
    if (w.model && open_image(script, false, &image, &info) == 0) {
        compare_content(image, w.model, "after opening it again");
        fl_image_free(image);
    }
    CHECK(after.leaks == 0 || bitmaps || had_hidden_leaks(script, size), "%llu leaks after writing: %s", (ull)after.leaks, after.findings[0].text);
}

static void check_unchanged(const uint8_t *bytes, size_t size)
{
    uint8_t *now = malloc(size + 1);
    int fd = __real_open(path, O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0 && read(fd, now, size) == (ssize_t)size && !memcmp(now, bytes, size), "a check, or reading, changed the file");
    close(fd);
    free(now);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static fl_check result;
    struct content content = { 0 };
    if (size < SCRIPT)
        return -1;
    write_file(path, data + SCRIPT, size - SCRIPT, data[1] < 63 ? UINT64_C(1) << data[1] : 0);
    int rc = check(FL_REPAIR_NONE, &result);
    bool damaged = rc == 0 && result.corruptions;
    phase_read(data, &content);
    check_unchanged(data + SCRIPT, size - SCRIPT);
    if (rc == 0 && (data[0] & 3) && (data[0] & 3) <= FL_REPAIR_ALL)
        phase_repair(data, &content, &result);
    if (data[0] & 4)
        phase_write(data, size, &content, rc == 0 && !result.corruptions && !result.leaks && !result.check_errors, damaged);
    free_content(&content);
    return 0;
}
