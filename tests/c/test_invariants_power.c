/* test_invariants_power.c: the machine loses power at any moment: S1 in write-intent mode, S3.
 *
 * The system calls by which the image and the file of its dirty bitmaps are changed are replaced by ones that look on. Of each page of both files the test
 * knows what it held when it was last synced, and what it held at each look since; stores into the mapping, which nobody sees, are found by comparing. At
 * any look the power may fail: then each page holds one of these contents, whichever, and a page of the header perhaps a mixture of sectors of two. The
 * files that come out are opened as after a reboot, and where a bitmap is said to be good, every page of the image that is not what it was when the bitmap
 * began must be dirty in it.
 *
 * POWER_LOSSES in the environment: how many (by default fewer under the sanitizers). POWER_SEED: begin with another random state.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "rig.h"
#include "sidecar.h"

#define PAGE 4096u
#define GRAIN 65536ull
#define UNITS 40u
#define SIZE (UNITS * GRAIN)
#define PAGES (SIZE / PAGE)
#define MAX_VERSIONS 6

/* ---- what may be on stable storage ---- */

struct version { unsigned char bytes[PAGE]; };

struct page {
    unsigned versions;                  /* at least one: versions[0] is what was last synced, the last one what the kernel has */
    struct version *version[MAX_VERSIONS];
};

struct file {
    char path[420];
    int fd;                             /* of our own, to look with */
    ino_t inode;
    size_t pages;
    struct page *page;
};

static struct file image, side;
static bool closely;                    /* look more often: opening, closing, the end of a snapshot */
static bool looking;                    /* our own calls are not recorded */
static uint64_t random_state;
static unsigned losses, wanted, refused;

static void push(struct page *page, const unsigned char *bytes)
{
    if (page->versions == MAX_VERSIONS) {       /* forget one in the middle: the oldest and the newest are the most telling */
        free(page->version[1]);
        memmove(&page->version[1], &page->version[2], (MAX_VERSIONS - 2) * sizeof page->version[0]);
        page->versions--;
    }
    struct version *version = malloc(sizeof *version);
    CHECK(version);
    memcpy(version->bytes, bytes, PAGE);
    page->version[page->versions++] = version;
}

static void look_at(struct file *file)
{
    static unsigned char bytes[PAGE];
    struct stat st;
    CHECK(!fstat(file->fd, &st));
    size_t pages = ((size_t)st.st_size + PAGE - 1) / PAGE;
    if (pages > file->pages) {
        file->page = realloc(file->page, pages * sizeof *file->page);
        CHECK(file->page);
        memset(file->page + file->pages, 0, (pages - file->pages) * sizeof *file->page);
        memset(bytes, 0, PAGE);
        for (; file->pages < pages; file->pages++)
            push(&file->page[file->pages], bytes);
    }
    for (size_t i = 0; i < file->pages; i++) {
        struct page *page = &file->page[i];
        ssize_t n = pread(file->fd, bytes, PAGE, (off_t)(i * PAGE));
        CHECK(n >= 0);
        memset(bytes + n, 0, PAGE - (size_t)n);
        if (memcmp(bytes, page->version[page->versions - 1]->bytes, PAGE))
            push(page, bytes);
    }
}

static void synced(struct file *file)
{
    for (size_t i = 0; i < file->pages; i++) {
        struct page *page = &file->page[i];
        struct version *last = page->version[page->versions - 1];
        for (unsigned v = 0; v + 1 < page->versions; v++)
            free(page->version[v]);
        page->version[0] = last;
        page->versions = 1;
    }
}

/* ---- what the bitmaps must have ---- */

enum { PLAIN, INTENT, BITMAPS };
static const char *const names[BITMAPS] = { "plain", "intent" };

/* Contents of the image that a bitmap may have begun with: what is not as there must be dirty. While it begins anew: either. */
static struct wanted {
    unsigned bases;                     /* 0: nothing is demanded */
    unsigned char *base[2];             /* SIZE bytes each */
    unsigned char *at_cut;
    bool being_added;
    unsigned good, bad;                 /* how often it was said to be, after a loss */
} demands[BITMAPS];

static void current_image(unsigned char *to)
{
    CHECK(pread(image.fd, to, SIZE, 0) == (ssize_t)SIZE);
}

/* ---- the power fails ---- */

/* Of what is on its way: anything, or what looks worst: a side is all there, the other one is not yet. */
enum style { ANY, DATA_NEW, HEADER_AND_DATA_NEW, FILE_NEW, STYLES };
enum part { IMAGE, HEADER, MARKS };

static const unsigned char *pick(const struct page *page, enum style style, enum part part)
{
    bool newest = style == FILE_NEW ? part != IMAGE : part == IMAGE || (part == HEADER && style == HEADER_AND_DATA_NEW);
    unsigned v = style == ANY ? (unsigned)below(&random_state, page->versions) : newest ? page->versions - 1 : 0;
    return page->version[v]->bytes;
}

static void copy_out(const struct file *file, const char *path, enum style style, bool is_image)
{
    unsigned char bytes[PAGE], other[PAGE];
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(fd >= 0 && !ftruncate(fd, (off_t)(file->pages * PAGE)));
    for (size_t i = 0; i < file->pages; i++) {
        enum part part = is_image ? IMAGE : i * PAGE < SIDECAR_ALIVE_AT ? HEADER : MARKS;
        memcpy(bytes, pick(&file->page[i], style, part), PAGE);
        if (style == ANY && part == HEADER && chance(&random_state, 30)) {
            memcpy(other, pick(&file->page[i], style, part), PAGE);             /* torn */
            for (unsigned sector = 0; sector < PAGE; sector += 512)
                if (chance(&random_state, 50))
                    memcpy(bytes + sector, other + sector, 512);
        }
        if (!is_zero(bytes, PAGE))
            CHECK(pwrite(fd, bytes, PAGE, (off_t)(i * PAGE)) == (ssize_t)PAGE);
    }
    close(fd);
}

/* The copies have other inodes and times: write into each header that is whole what it would say of them, had it been about them all the time. As if
   times told nothing: that a write is noticed by its time is an extra. */
static void make_its_own(const char *image_path, const char *side_path)
{
    struct sidecar_identity now;
    struct stat st;
    int image_fd = open(image_path, O_RDONLY), fd = open(side_path, O_RDWR);
    CHECK(image_fd >= 0 && fd >= 0 && !sidecar_identify(image_fd, SIZE, &now) && !fstat(fd, &st));
    for (unsigned slot = 0; slot < 2; slot++) {
        static unsigned char buffer[SIDECAR_HEADER_BYTES + 8 * SIDECAR_RECORD_BYTES];
        struct sidecar_header header;
        struct sidecar_record records[8];
        const struct sidecar_record *list[8];
        uint32_t version;
        if (read_whole(fd, buffer, SIDECAR_HEADER_BYTES, slot * SIDECAR_SLOT_BYTES))
            continue;
        size_t length = sidecar_decode_length(buffer, &version);
        if (!length || length > sizeof buffer || read_whole(fd, buffer, length, slot * SIDECAR_SLOT_BYTES) || !sidecar_decode(buffer, length, &header, records))
            continue;
        for (unsigned i = 0; i < 8; i++)
            list[i] = &records[i];
        header.disk = now;
        header.own_inode = st.st_ino;
        memset(header.boot, 0x5a, 16);
        sidecar_encode(&header, list, buffer);
        CHECK(!write_whole(fd, buffer, length, slot * SIDECAR_SLOT_BYTES));
    }
    close(fd);
    close(image_fd);
}

static void check_bitmap(fl_disk *disk, const unsigned char *content, struct wanted *demand, const char *name)
{
    fl_bitmap_state state;
    bool ok = false;
    size_t missed = 0;
    if (fl_disk_bitmap_state(disk, name, &state, &why) != 0 || state.inconsistent) {
        demand->bad += !demand->being_added;
        return;
    }
    demand->good++;
    for (unsigned b = 0; b < demand->bases && !ok; b++) {
        ok = true;
        for (size_t page = 0; page < PAGES; page++) {
            fl_extent e;
            size_t found;
            if (!memcmp(content + page * PAGE, demand->base[b] + page * PAGE, PAGE))
                continue;
            MUST(fl_disk_bitmap_extents(disk, name, page * PAGE, 1, &e, 1, &found, &why));
            if (e.kind != FL_DATA) {
                ok = false;
                missed = page;
            }
        }
    }
    CHECK(ok || !demand->bases, "the power failed (%u): '%s' is said to be good, and misses page %zu", losses, name, missed);
}

static void power_fails(enum style style)
{
    char image_path[440], side_path[440];
    static unsigned char content[SIZE];
    fl_image_options options = { .format = "raw", .writable = 1 };
    fl_image *opened;
    fl_disk *disk;
    losses++;
    snprintf(image_path, sizeof image_path, "%s/after.raw", directory);
    snprintf(side_path, sizeof side_path, "%s/after.bitmaps", directory);
    unlink(image_path);
    unlink(side_path);
    copy_out(&image, image_path, style, true);
    copy_out(&side, side_path, style, false);
    make_its_own(image_path, side_path);
    MUST(fl_image_open(image_path, &options, &opened, &why));
    MUST(fl_image_pread(opened, content, SIZE, 0, &why));
    MUST(fl_disk_open(opened, &disk, &why));
    int rc = fl_disk_bitmap_file(disk, side_path, 0, &why);
    CHECK(rc == 0 || rc == -FL_EFORMAT, "%d: %s", rc, why.text);
    if (rc)
        refused++;
    for (int b = 0; b < BITMAPS && rc == 0; b++)
        if (demands[b].bases)
            check_bitmap(disk, content, &demands[b], names[b]);
    fl_disk_free(disk);
    fl_image_free(opened);
}

/* Something was done, or is going to be. */
static void look(unsigned percent)
{
    if (looking || !side.fd)
        return;
    int saved = errno;
    looking = true;
    look_at(&image);
    look_at(&side);
    if (losses < wanted && chance(&random_state, percent * (closely ? 5 : 1)))
        for (int style = ANY; style < STYLES; style++)
            power_fails((enum style)style);
    looking = false;
    errno = saved;
}

/* ---- the system calls ---- */

static struct file *file_of(int fd)
{
    struct stat st;
    if (looking || !side.fd || fstat(fd, &st))
        return NULL;
    return st.st_ino == side.inode ? &side : st.st_ino == image.inode ? &image : NULL;
}

ssize_t pwrite(int fd, const void *data, size_t count, off_t offset)
{
    struct file *file = file_of(fd);
    if (file == &image)
        look(0);                /* what is marked by now */
    ssize_t n = syscall(SYS_pwrite64, fd, data, count, offset);
    if (file)
        look(file == &image ? 15 : 3);
    return n;
}

int fallocate(int fd, int mode, off_t offset, off_t length)
{
    struct file *file = file_of(fd);
    int rc = (int)syscall(SYS_fallocate, fd, mode, offset, length);
    if (file)
        look(file == &image ? 15 : 3);
    return rc;
}

/* What is synced is noted, which is all that counts here; the storage under the test is spared. */
int fdatasync(int fd)
{
    struct file *file = file_of(fd);
    if (file) {
        look(10);
        synced(file);
        look(10);
    }
    return 0;
}

/* ---- the life of a disk ---- */

static fl_image *source;
static fl_disk *disk;

static void start_looking(struct file *file)
{
    struct stat st;
    int fd = open(file->path, O_RDONLY);
    CHECK(fd >= 0 && !fstat(fd, &st));
    file->inode = st.st_ino;
    file->fd = fd;
    look_at(file);
    synced(file);
}

static void open_disk(int create)
{
    fl_image_options options = { .format = "raw", .writable = 1 };
    closely = true;
    MUST(fl_image_open(image.path, &options, &source, &why));
    MUST(fl_disk_open(source, &disk, &why));
    MUST(fl_disk_bitmap_file(disk, side.path, create, &why));
    closely = false;
}

static void close_disk(void)
{
    closely = true;
    MUST(fl_disk_close(disk, &why));
    fl_disk_free(disk);
    fl_image_free(source);
    closely = false;
}

static void change(void)
{
    static uint64_t counter;
    uint64_t page = below(&random_state, PAGES), words[PAGE / 8];
    counter++;
    for (size_t i = 0; i < PAGE / 8; i++)
        words[i] = counter;
    if (chance(&random_state, 10))
        MUST(fl_disk_discard(disk, PAGE, page * PAGE, &why));
    else
        MUST(fl_disk_pwrite(disk, words, PAGE, page * PAGE, &why));
}

/* From now on the bitmap may have begun with `base` as well; and when `done`: only with that. */
static void begins_with(int bitmap, const unsigned char *base, bool done)
{
    struct wanted *demand = &demands[bitmap];
    if (done) {
        memcpy(demand->base[0], base, SIZE);
        demand->bases = 1;
    } else {
        memcpy(demand->base[demand->bases], base, SIZE);
        demand->bases++;
    }
}

static void cut_and_settle(int bitmap, unsigned commits)
{
    struct wanted *demand = &demands[bitmap];
    fl_snapshot_options options = { .cluster_size = PAGE, .cbw_timeout = SECOND, .stage_size = 4 << 20, .bitmap = names[bitmap] };
    fl_snapshot *snapshot;
    current_image(demand->at_cut);
    MUST(fl_snapshot_cut(&disk, &options, 1, &snapshot, &why));
    for (uint64_t n = below(&random_state, 4); n; n--)
        change();
    closely = true;
    if (chance(&random_state, commits)) {
        begins_with(bitmap, demand->at_cut, false);
        MUST(fl_snapshot_commit(snapshot, &why));
        begins_with(bitmap, demand->at_cut, true);
        change();
    }
    fl_snapshot_free(snapshot);
    closely = false;
}

static void clear_it(int bitmap)
{
    static unsigned char now[SIZE];
    current_image(now);
    begins_with(bitmap, now, false);
    MUST(fl_disk_bitmap_clear(disk, names[bitmap], &why));
    begins_with(bitmap, now, true);
}

static void add_it(int bitmap)
{
    static unsigned char now[SIZE];
    current_image(now);
    begins_with(bitmap, now, true);
    demands[bitmap].being_added = true;
    MUST(fl_disk_bitmap_add_persistent(disk, names[bitmap], GRAIN, bitmap == INTENT, &why));
    demands[bitmap].being_added = false;
}

/* Open it again. All is good then. */
static void reopen(void)
{
    close_disk();
    look(10);
    open_disk(0);
    for (int b = 0; b < BITMAPS; b++) {
        fl_bitmap_state state;
        if (!demands[b].bases)
            continue;
        MUST(fl_disk_bitmap_state(disk, names[b], &state, &why));
        CHECK(!state.inconsistent, "%s: %s", names[b], state.problem);
    }
    look(10);
}

/* For a while there is none in write-intent mode, whose syncs the others profit from. */
static void only_the_plain_one(void)
{
    demands[INTENT].bases = 0;
    MUST(fl_disk_bitmap_remove(disk, names[INTENT], &why));
    for (int i = 0; i < 2; i++) {
        change();
        cut_and_settle(PLAIN, 50);
        reopen();
    }
    add_it(INTENT);
}

static void begin(unsigned number)
{
    const char *losses_wanted = getenv("POWER_LOSSES"), *seed = getenv("POWER_SEED");
    wanted = losses_wanted ? (unsigned)atoi(losses_wanted) : number / (unsigned)SLOWDOWN;
    random_state = seed ? strtoull(seed, NULL, 10) : 1;         /* the same each time: so the mutants are noticed each time */
    printf("POWER_SEED=%" PRIu64 "\n", random_state);
    fflush(stdout);
    alarm(TIME_LIMIT + wanted / 2);
    snprintf(image.path, sizeof image.path, "%s/disk.raw", directory);
    snprintf(side.path, sizeof side.path, "%s/disk.bitmaps", directory);
    for (int b = 0; b < BITMAPS; b++) {
        demands[b].base[0] = malloc(SIZE);
        demands[b].base[1] = malloc(SIZE);
        demands[b].at_cut = malloc(SIZE);
        CHECK(demands[b].base[0] && demands[b].base[1] && demands[b].at_cut);
    }
    int fd = open(image.path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(fd >= 0 && !ftruncate(fd, (off_t)SIZE) && !fsync(fd));
    close(fd);
    unlink(side.path);
    open_disk(1);
    start_looking(&image);
    start_looking(&side);
    add_it(PLAIN);
    add_it(INTENT);
}

/* What was frozen is in the area that counts before the other one does not count any more. */
TEST(i6_power_loss_at_an_abort)
{
    begin(120);
    while (losses < wanted) {
        for (int i = 0; i < 4; i++)
            change();
        MUST(fl_disk_flush(disk, &why));
        cut_and_settle(INTENT, 0);
    }
    CHECK(demands[INTENT].bad == 0);
    close_disk();
}

TEST(i6_power_loss)
{
    begin(320);
    while (losses < wanted) {
        unsigned what = (unsigned)below(&random_state, 100);
        int bitmap = (int)below(&random_state, BITMAPS);
        if (what < 60) {
            change();
        } else if (what < 70) {
            MUST(fl_disk_flush(disk, &why));
        } else if (what < 82) {
            cut_and_settle(bitmap, 50);
        } else if (what < 88) {
            clear_it(bitmap);
        } else if (what < 94) {
            only_the_plain_one();
        } else if (what < 96) {
            demands[bitmap].bases = 0;
            MUST(fl_disk_bitmap_remove(disk, names[bitmap], &why));
            add_it(bitmap);
        } else {
            reopen();
        }
    }
    printf("%u power losses; in write-intent mode %u were good, %u not; else %u were good, %u not; %u files were refused\n", losses, demands[INTENT].good,
           demands[INTENT].bad, demands[PLAIN].good, demands[PLAIN].bad, refused);
    CHECK(demands[INTENT].bad == 0);
    CHECK(losses < 300 || (demands[INTENT].good > losses / 10 && demands[PLAIN].good > losses / 20), "too few were good to prove anything");
    close_disk();
}
