/* test_image.c DIR: images, through the public calls and the ones for the layers above: what can be opened, odd sizes, vectors, extents,
 * space, truncation, closing, forks, and block devices. Locks, direct transfers and injected faults have programs of their own.
 */
#define _GNU_SOURCE
#include "image_kit.h"

#include <signal.h>
#include <sys/resource.h>

#include "image.h"

#define KiB 1024u

static unsigned char *pattern(size_t size, unsigned seed)
{
    unsigned char *p = malloc(size);
    CHECK(p);
    for (size_t i = 0; i < size; i++)
        p[i] = (unsigned char)((i * 7 + i / 251 + seed) | 1);
    return p;
}

/* ---- opening ---- */

static void test_what_can_be_opened(void)
{
    fl_image *image = NULL;
    fl_image_options o = raw_options(WRITABLE);
    EXPECT(EINVAL, fl_image_open(NULL, &o, &image, &why));
    EXPECT(EINVAL, fl_image_open("", &o, &image, &why));
    EXPECT(EINVAL, fl_image_open(in_directory("x"), NULL, &image, &why));
    o.format = NULL;
    EXPECT(EINVAL, fl_image_open(in_directory("x"), &o, &image, &why));
    o.format = "vhdx";
    EXPECT(FL_EFORMAT, fl_image_open(in_directory("x"), &o, &image, &why));
    CHECK(strstr(why.text, "'vhdx'"), "%s", why.text);
    EXPECT(FL_EFORMAT, fl_image_create(in_directory("x"), 1, &o, &image, &why));

    EXPECT(ENOENT, try_open(in_directory("missing"), READ_ONLY, &image));
    CHECK(strstr(why.text, "missing"), "%s", why.text);
    EXPECT(EISDIR, try_open(directory, READ_ONLY, &image));
    CHECK(strstr(why.text, "a directory"), "%s", why.text);
    EXPECT(EINVAL, try_open("/dev/null", WRITABLE, &image));
    CHECK(strstr(why.text, "a character device"), "%s", why.text);
    unlink(in_directory("pipe"));
    CHECK(mkfifo(in_directory("pipe"), 0600) == 0);
    alarm(20);                                  /* opening a pipe waits for the other end */
    EXPECT(EINVAL, try_open(in_directory("pipe"), READ_ONLY, &image));
    EXPECT(EINVAL, try_open(in_directory("pipe"), WRITABLE, &image));
    alarm(0);
    CHECK(strstr(why.text, "a pipe"), "%s", why.text);
    CHECK(image == NULL, "an output was touched on failure");
}

static void test_creating(void)
{
    const char *path = in_directory("new");
    fl_image_options o = raw_options(WRITABLE);
    fl_image *image = must_create(path, ODD_SIZE, WRITABLE), *other = NULL;
    fl_image_info info = info_of(image);
    CHECK(info.size == ODD_SIZE && info.allocated == 0 && info.writable && !info.direct && !info.block_device && info.alignment == 1);
    CHECK(is_power_of_two(info.cluster_size) && info.cluster_size >= 512);
    CHECK(!strcmp(info.format, "raw"));
    MUST(fl_image_pwrite(image, "kept", 4, 0, &why));
    EXPECT(EEXIST, fl_image_create(path, 1, &o, &other, &why));
    fl_image_free(image);
    image = must_open(path, READ_ONLY);
    char text[4];
    MUST(fl_image_pread(image, text, 4, 0, &why));
    CHECK(!memcmp(text, "kept", 4) && info_of(image).size == ODD_SIZE);
    fl_image_free(image);

    const uint64_t too_large[] = { (uint64_t)INT64_MAX + 1, UINT64_MAX };
    for (int i = 0; i < 2; i++) {
        EXPECT(EFBIG, fl_image_create(in_directory("huge"), too_large[i], &o, &other, &why));
        CHECK(access(in_directory("huge"), F_OK) != 0, "a failed creation left a file");
    }
    /* a size that the file system refuses, not we: after the file was made */
    int rc = fl_image_create(in_directory("huge"), INT64_MAX, &o, &other, &why);
    if (rc == 0)
        fl_image_free(other);
    else
        CHECK(access(in_directory("huge"), F_OK) != 0, "a failed creation left a file");
    unlink(in_directory("huge"));
    image = must_create(in_directory("empty"), 0, WRITABLE);
    CHECK(info_of(image).size == 0);
    MUST(fl_image_pread(image, text, 0, 0, &why));
    EXPECT(FL_ERANGE, fl_image_pread(image, text, 1, 0, &why));
    fl_image_free(image);
}

static void test_nameless(void)
{
    fl_image *image = NULL;
    int entries = count_entries(directory);
    MUST(fl_image_create_nameless(directory, ODD_SIZE, &image, &why));
    CHECK(count_entries(directory) == entries, "the nameless image has a name");
    MUST(fl_image_pwrite(image, "x", 1, ODD_SIZE - 1, &why));
    CHECK(info_of(image).size == ODD_SIZE && info_of(image).allocated > 0);
    EXPECT(FL_ERANGE, fl_image_pwrite(image, "xy", 2, ODD_SIZE - 1, &why));
    CHECK(strstr(why.text, "nameless") && strstr(why.text, directory), "%s", why.text);
    fl_image_free(image);
    EXPECT(geteuid() == 0 ? EOPNOTSUPP : EACCES, fl_image_create_nameless("/proc", 1, &image, &why));
    EXPECT(ENOENT, fl_image_create_nameless(in_directory("missing"), 1, &image, &why));
    EXPECT(EFBIG, fl_image_create_nameless(directory, UINT64_MAX, &image, &why));
    EXPECT(EINVAL, fl_image_create_nameless(NULL, 1, &image, &why));
}

static void test_long_names_leave_room_for_the_message(void)
{
    char path[3000];
    size_t n = (size_t)snprintf(path, sizeof path, "%s", directory);
    while (n < 2500)
        n += (size_t)snprintf(path + n, sizeof path - n, "/.");
    snprintf(path + n, sizeof path - n, "/long");
    fl_image *image = must_create(path, 10, WRITABLE);
    EXPECT(FL_ERANGE, fl_image_pwrite(image, "x", 1, 77, &why));
    CHECK(strstr(why.text, "/long', 10 bytes"), "%s", why.text);
    fl_image_free(image);
}

/* ---- transfers ---- */

static void test_ranges_and_modes(void)
{
    const char *path = in_directory("ranges");
    char b[16] = "";
    size_t found = 77;
    fl_extent extents[2];
    fl_image *image = must_create(path, 1000, WRITABLE);
    MUST(fl_image_pwrite(image, b, 10, 990, &why));
    EXPECT(FL_ERANGE, fl_image_pwrite(image, b, 11, 990, &why));
    CHECK(why.offset == 990 && why.length == 11 && why.side == FL_SIDE_NONE && strstr(why.text, path), "%s", why.text);
    EXPECT(FL_ERANGE, fl_image_pread(image, b, 1, 1000, &why));
    MUST(fl_image_pread(image, b, 0, 1000, &why));
    EXPECT(FL_ERANGE, fl_image_pread(image, b, 0, 1001, &why));
    EXPECT(FL_ERANGE, fl_image_pread(image, b, 16, UINT64_MAX - 8, &why));      /* a sum that wraps */
    EXPECT(FL_ERANGE, fl_image_zero(image, UINT64_MAX, 1, &why));
    EXPECT(FL_ERANGE, fl_image_discard(image, 1, UINT64_MAX, &why));
    EXPECT(FL_ERANGE, fl_image_extents(image, 500, 501, extents, 2, &found, &why));
    EXPECT(EINVAL, fl_image_extents(image, 0, 1, extents, 0, &found, &why));
    EXPECT(EINVAL, fl_image_pread(image, NULL, 1, 0, &why));
    CHECK(found == 77);
    MUST(fl_image_extents(image, 1000, 0, extents, 2, &found, &why));
    CHECK(found == 0);
    fl_image_free(image);

    image = must_open(path, READ_ONLY);
    EXPECT(EROFS, fl_image_pwrite(image, b, 1, 0, &why));
    CHECK(strstr(why.text, path), "%s", why.text);
    EXPECT(EROFS, fl_image_zero(image, 1, 0, &why));
    EXPECT(EROFS, fl_image_discard(image, 1, 0, &why));
    MUST(fl_image_flush(image, &why));
    MUST(fl_image_pread(image, b, 16, 984, &why));
    fl_image_free(image);

    EXPECT(EINVAL, fl_image_pread(NULL, b, 1, 0, &why));
    EXPECT(EINVAL, fl_image_close(NULL, &why));
    CHECK(fl_image_pread(NULL, b, 1, 0, NULL) == -EINVAL);
    fl_image_free(NULL);
}

/* More entries than one system call takes, empty ones among them (and more empty ones in a row than it takes). */
static void test_vectors(void)
{
    enum { ENTRIES = 5000, EMPTY = 1500 };
    static struct iovec iov[ENTRIES];
    uint64_t random = 5;
    size_t length = 0;
    fl_image *image = must_create(in_directory("vectors"), ODD_SIZE, WRITABLE);
    unsigned char *data = pattern(ODD_SIZE, 1), *back = calloc(1, ODD_SIZE);
    CHECK(back);
    for (int i = 0; i < ENTRIES; i++) {
        size_t n = i >= EMPTY && chance(&random, 80) ? below(&random, 300) : 0;
        iov[i] = (struct iovec){ data + length, n };
        length += n;
    }
    MUST(image_writev(image, iov, ENTRIES, 77, &why));
    MUST(image_read(image, back, length, 77, &why));
    CHECK(!memcmp(back, data, length));
    memset(back, 0, ODD_SIZE);
    for (int i = 0; i < ENTRIES; i++)
        iov[i].iov_base = back + ((unsigned char *)iov[i].iov_base - data);
    MUST(image_readv(image, iov, ENTRIES, 77, &why));
    CHECK(!memcmp(back, data, length));
    for (int i = 0; i < ENTRIES; i++)
        CHECK(i == 0 || (char *)iov[i].iov_base == (char *)iov[i - 1].iov_base + iov[i - 1].iov_len, "the vector was changed");

    iov[0].iov_len = SIZE_MAX;
    EXPECT(EINVAL, image_readv(image, iov, ENTRIES, 0, &why));
    EXPECT(EINVAL, image_readv(image, iov, -1, 0, &why));
    EXPECT(FL_ERANGE, image_readv(image, iov, 1, 0, &why));
    MUST(image_readv(image, NULL, 0, 0, &why));
    fl_image_free(image);
    free(data);
    free(back);
}

/* A write that the kernel does in part is continued, and its real error told. */
static void test_partial_write(void)
{
    struct rlimit old, limit;
    unsigned char *data = pattern(64 * KiB, 3), back[100];
    fl_image *image = must_create(in_directory("limit"), ODD_SIZE, WRITABLE);
    CHECK(getrlimit(RLIMIT_FSIZE, &old) == 0);
    signal(SIGXFSZ, SIG_IGN);
    limit = old;
    limit.rlim_cur = 10100;
    CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    int rc = fl_image_pwrite(image, data, 64 * KiB, 0, &why);
    CHECK(setrlimit(RLIMIT_FSIZE, &old) == 0);
    CHECK(rc == -EFBIG && why.cause == EFBIG && why.offset == 0 && why.length == 64 * KiB, "%d", rc);
    MUST(fl_image_pread(image, back, 100, 10000, &why));
    CHECK(!memcmp(back, data + 10000, 100));
    MUST(fl_image_pwrite(image, data, 64 * KiB, 0, &why));
    fl_image_free(image);
    free(data);
}

static void test_model(void)
{
    struct model m;
    fl_image *image = must_create(in_directory("model"), ODD_SIZE, WRITABLE);
    model_init(&m, image, 42);
    for (int i = 0; i < 3000; i++)
        model_step(&m);
    model_check_all(&m);
    MUST(fl_image_flush(image, &why));
    fl_image_free(image);
    model_free(&m);
}

/* ---- space ---- */

static size_t map_all(fl_image *image, uint64_t offset, uint64_t length, fl_extent *all, size_t room, size_t max)
{
    size_t n = 0, found;
    uint64_t at = offset;
    while (at < offset + length) {
        fl_extent some[8];
        MUST(fl_image_extents(image, at, offset + length - at, some, max, &found, &why));
        CHECK(found >= 1 && found <= max);
        for (size_t i = 0; i < found; i++) {
            CHECK(some[i].offset == at && some[i].length > 0 && (some[i].kind == FL_DATA || some[i].kind == FL_ZERO));
            CHECK(i == 0 || some[i].kind != some[i - 1].kind, "neighbours of one kind");
            at += some[i].length;
            if (n > 0 && all[n - 1].kind == some[i].kind) {
                all[n - 1].length += some[i].length;
            } else {
                CHECK(n < room);
                all[n++] = some[i];
            }
        }
    }
    CHECK(at == offset + length, "the map goes beyond the range");
    return n;
}

static void test_extents(void)
{
    const uint64_t unit = 64 * KiB, size = 16 * unit + 513;
    fl_image *image = must_create(in_directory("extents"), size, WRITABLE);
    unsigned char *data = pattern(4 * unit, 9);
    fl_extent e[32];
    CHECK(map_all(image, 0, size, e, 32, 8) == 1 && e[0].kind == FL_ZERO && e[0].length == size);
    MUST(fl_image_pwrite(image, data, 2 * unit, 4 * unit, &why));
    MUST(fl_image_pwrite(image, data, 513, 16 * unit, &why));
    for (size_t max = 1; max <= 8; max++) {
        CHECK(map_all(image, 0, size, e, 32, max) == 4);
        CHECK(e[0].kind == FL_ZERO && e[0].length == 4 * unit);
        CHECK(e[1].kind == FL_DATA && e[1].offset == 4 * unit && e[1].length == 2 * unit);
        CHECK(e[2].kind == FL_ZERO && e[2].length == 10 * unit);
        CHECK(e[3].kind == FL_DATA && e[3].offset == 16 * unit && e[3].length == 513);
    }
    CHECK(map_all(image, 4 * unit + 5, 7, e, 32, 8) == 1 && e[0].kind == FL_DATA && e[0].length == 7);      /* clamped */
    CHECK(map_all(image, 3 * unit, 2 * unit, e, 32, 8) == 2 && e[0].length == unit && e[1].length == unit);
    CHECK(map_all(image, size - 1, 1, e, 32, 8) == 1 && e[0].kind == FL_DATA);
    MUST(fl_image_zero(image, 513, 16 * unit, &why));
    CHECK(map_all(image, 0, size, e, 32, 8) == 3 && e[2].kind == FL_ZERO && e[2].length == 10 * unit + 513);
    fl_image_free(image);
    free(data);
}

/* Whatever the map calls zero reads as zeros, after any history. */
static void test_extents_never_lie(void)
{
    struct model m;
    fl_extent *e = malloc(4096 * sizeof *e);
    fl_image *image = must_create(in_directory("map"), ODD_SIZE, WRITABLE);
    CHECK(e);
    model_init(&m, image, 4711);
    for (int i = 0; i < 150; i++) {
        for (int k = 0; k < 5; k++)
            model_step(&m);
        size_t n = map_all(image, 0, ODD_SIZE, e, 4096, 8);
        for (size_t k = 0; k < n; k++)
            CHECK(e[k].kind == FL_DATA || is_zero(m.bytes + e[k].offset, e[k].length));
    }
    fl_image_free(image);
    model_free(&m);
    free(e);
}

static void test_space_is_given_back(void)
{
    for (int discard = 0; discard < 2; discard++) {
        fl_image *image = must_create(in_directory("space"), ODD_SIZE, WRITABLE);
        unsigned char *data = pattern(ODD_SIZE, 5), *back = malloc(ODD_SIZE);
        CHECK(back && image->punches);
        MUST(fl_image_pwrite(image, data, ODD_SIZE, 0, &why));
        MUST(fl_image_flush(image, &why));
        CHECK(info_of(image).allocated >= ODD_SIZE);
        MUST((discard ? fl_image_discard : fl_image_zero)(image, ODD_SIZE - 100, 77, &why));
        MUST(fl_image_pread(image, back, ODD_SIZE, 0, &why));
        CHECK(!memcmp(back, data, 77) && !memcmp(back + ODD_SIZE - 23, data + ODD_SIZE - 23, 23) && is_zero(back + 77, ODD_SIZE - 100));
        CHECK(info_of(image).allocated <= 3 * info_of(image).cluster_size, "%" PRIu64, info_of(image).allocated);
        MUST((discard ? fl_image_discard : fl_image_zero)(image, ODD_SIZE, 0, &why));
        CHECK(info_of(image).allocated == 0, "%" PRIu64, info_of(image).allocated);
        CHECK(image->punches && info_of(image).size == ODD_SIZE);
        fl_image_free(image);
        free(data);
        free(back);
    }
}

/* A file system that can't punch: zeros are written, discards do nothing and succeed, and the image says that it does not punch. */
static void test_file_system_without_holes(void)
{
    const char *mountpoint = in_directory("ram");
    fl_image *image = NULL;
    char path[600];
    mkdir(mountpoint, 0700);
    if (shell("mount -t ramfs none '%s'", mountpoint) != 0) {
        printf("SKIP: a file system without holes (needs root, to mount a ramfs)\n");
        return;
    }
    snprintf(path, sizeof path, "%s/image", mountpoint);
    fl_image_options o = raw_options(WRITABLE);
    int rc = fl_image_create(path, ODD_SIZE, &o, &image, &why);
    CHECK(shell("umount -l '%s'", mountpoint) == 0);    /* gone with the image */
    CHECK(rc == 0, "%s", why.text);
    unsigned char *data = pattern(ODD_SIZE, 5), *back = malloc(ODD_SIZE);
    CHECK(back);
    MUST(fl_image_pwrite(image, data, ODD_SIZE, 0, &why));
    for (int again = 0; again < 2; again++) {
        MUST(fl_image_zero(image, 300001, 700, &why));
        MUST(fl_image_pread(image, back, ODD_SIZE, 0, &why));
        CHECK(is_zero(back + 700, 300001) && !memcmp(back, data, 700) && !memcmp(back + 300701, data + 300701, ODD_SIZE - 300701));
        CHECK(!image->punches);
        MUST(fl_image_discard(image, 1000, 400000, &why));
    }
    fl_image_free(image);
    free(data);
    free(back);
}

static void test_truncation(void)
{
    const char *path = in_directory("truncated");
    char b[200];
    fl_extent e[4];
    size_t found;
    fl_image *image = must_create(path, ODD_SIZE, WRITABLE);
    CHECK(truncate(path, 5000) == 0);
    MUST(fl_image_pread(image, b, 100, 4900, &why));
    EXPECT(FL_ETRUNCATED, fl_image_pread(image, b, 200, 4900, &why));
    CHECK(strstr(why.text, "5000") && strstr(why.text, "1049089") && strstr(why.text, path), "%s", why.text);
    EXPECT(FL_ETRUNCATED, fl_image_pread(image, b, 1, 50000, &why));
    EXPECT(FL_ETRUNCATED, fl_image_extents(image, 4096, ODD_SIZE - 4096, e, 4, &found, &why));      /* what is gone is not zeros */
    EXPECT(FL_ETRUNCATED, fl_image_extents(image, 50000, 1, e, 4, &found, &why));
    fl_image_free(image);
}

/* ---- lives ---- */

struct reader { fl_image *image; uint64_t reads; };

static void *read_until_closed(void *argument)
{
    struct reader *r = argument;
    char b[512];
    int rc;
    while ((rc = fl_image_pread(r->image, b, sizeof b, 100, &why)) == 0)
        __atomic_fetch_add(&r->reads, 1, __ATOMIC_RELAXED);
    CHECK(rc == -FL_ECLOSED && why.code == rc, "%d", rc);
    return NULL;
}

static void test_closing(void)
{
    char b[16];
    fl_extent e;
    size_t found;
    fl_image_info info;
    int fds = count_entries("/proc/self/fd");
    struct reader readers[3];
    pthread_t threads[3];
    fl_image *image = must_create(in_directory("closing"), 4096, WRITABLE);
    for (int i = 0; i < 3; i++) {
        readers[i] = (struct reader){ image, 0 };
        CHECK(pthread_create(&threads[i], NULL, read_until_closed, &readers[i]) == 0);
    }
    for (int i = 0; i < 3; i++)
        while (__atomic_load_n(&readers[i].reads, __ATOMIC_RELAXED) < 100)
            sched_yield();
    MUST(fl_image_close(image, &why));
    CHECK(count_entries("/proc/self/fd") == fds, "close() left the file open");
    for (int i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
    MUST(fl_image_close(image, &why));
    EXPECT(FL_ECLOSED, fl_image_pread(image, b, 1, 0, &why));
    EXPECT(FL_ECLOSED, fl_image_pwrite(image, b, 1, 0, &why));
    EXPECT(FL_ECLOSED, fl_image_zero(image, 1, 0, &why));
    EXPECT(FL_ECLOSED, fl_image_discard(image, 1, 0, &why));
    EXPECT(FL_ECLOSED, fl_image_flush(image, &why));
    EXPECT(FL_ECLOSED, fl_image_extents(image, 0, 1, &e, 1, &found, &why));
    EXPECT(FL_ECLOSED, fl_image_info_get(image, &info, &why));
    EXPECT(FL_ECLOSED, image_use(image, &why));
    fl_image_free(image);

    /* whoever has a reference goes on, in any order of endings */
    for (int free_first = 0; free_first < 2; free_first++) {
        image = must_open(in_directory("closing"), WRITABLE);
        MUST(image_use(image, &why));
        if (free_first)
            fl_image_free(image);
        else
            MUST(fl_image_close(image, &why));
        MUST(image_write(image, "still", 5, 0, &why));
        MUST(image_read(image, b, 5, 0, &why));
        CHECK(!memcmp(b, "still", 5));
        image_unref(image);
        CHECK(count_entries("/proc/self/fd") == fds);
        if (!free_first)
            fl_image_free(image);
    }
}

static void *read_slowly(void *argument)        /* keeps the gate busy while the process forks */
{
    struct reader *r = argument;
    static unsigned char b[1 << 20];
    int rc;
    while ((rc = fl_image_pread(r->image, b, sizeof b, 0, NULL)) == 0)
        __atomic_fetch_add(&r->reads, 1, __ATOMIC_RELAXED);
    CHECK(rc == -FL_ECLOSED);
    return NULL;
}

static void in_child(fl_image *image, fl_image *closed)
{
    char b[1];
    fl_extent e;
    size_t found;
    fl_image_info info;
    alarm(20);
    EXPECT(FL_EFORKED, fl_image_pread(image, b, 1, 0, &why));
    CHECK(strstr(why.text, "parent"), "%s", why.text);
    EXPECT(FL_EFORKED, fl_image_pwrite(image, b, 1, 0, &why));
    EXPECT(FL_EFORKED, fl_image_zero(image, 1, 0, &why));
    EXPECT(FL_EFORKED, fl_image_discard(image, 1, 0, &why));
    EXPECT(FL_EFORKED, fl_image_flush(image, &why));
    EXPECT(FL_EFORKED, fl_image_extents(image, 0, 1, &e, 1, &found, &why));
    EXPECT(FL_EFORKED, fl_image_info_get(image, &info, &why));
    EXPECT(FL_EFORKED, fl_image_close(image, &why));
    EXPECT(FL_EFORKED, fl_image_faulty(image, &closed, &why));
    fl_image_free(image);
    fl_image_free(closed);
    _exit(0);
}

static void test_fork(void)
{
    fl_image *image = must_create(in_directory("fork"), ODD_SIZE, WRITABLE);
    fl_image *closed = must_create(in_directory("fork2"), ODD_SIZE, WRITABLE), *other = NULL;
    struct reader reader = { image, 0 };
    pthread_t thread;
    MUST(fl_image_close(closed, &why));
    CHECK(pthread_create(&thread, NULL, read_slowly, &reader) == 0);
    while (__atomic_load_n(&reader.reads, __ATOMIC_RELAXED) < 3)
        sched_yield();
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0)
        in_child(image, closed);
    int status;
    CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0, "status %x", status);
    EXPECT(FL_ELOCKED, try_open(in_directory("fork"), WRITABLE, &other));       /* the child gave nothing back */
    MUST(fl_image_pwrite(image, "x", 1, 0, &why));
    MUST(fl_image_close(image, &why));
    pthread_join(thread, NULL);
    fl_image_free(image);
    fl_image_free(closed);
}

/* ---- block devices ---- */

static void test_block_device(const char *options, uint64_t size, uint32_t sector)
{
    const char *file = in_directory("device.img");
    char device[64];
    struct model m;
    fl_extent e;
    size_t found;
    CHECK(shell("rm -f '%s' && truncate -s %" PRIu64 " '%s'", file, size, file) == 0);
    int loop = loop_device(file, options, device, sizeof device);
    if (loop < 0) {
        printf("SKIP: loop device with '%s' (needs root and losetup)\n", options);
        return;
    }
    fl_image *image = must_open(device, WRITABLE), *other = NULL;
    fl_image_info info = info_of(image);
    CHECK(info.size == (size & ~511ull) && info.block_device && info.allocated == info.size, "%" PRIu64, info.size);
    CHECK(info.cluster_size == sector, "%u", info.cluster_size);
    EXPECT(FL_ELOCKED, try_open(device, READ_ONLY, &other));
    MUST(fl_image_extents(image, 100, 1000, &e, 1, &found, &why));
    CHECK(found == 1 && e.kind == FL_DATA && e.offset == 100 && e.length == 1000);
    model_init(&m, image, 99);
    m.discards_zero = 0;
    for (int i = 0; i < 800; i++)
        model_step(&m);
    MUST(fl_image_flush(image, &why));
    model_check_all(&m);
    /* a discard changes nothing outside its range, however the device rounds */
    MUST(fl_image_discard(image, 300000, 70001, &why));
    MUST(fl_image_pread(image, m.scratch, m.size, 0, &why));
    CHECK(!memcmp(m.scratch, m.bytes, 70001) && !memcmp(m.scratch + 370001, m.bytes + 370001, m.size - 370001));
    MUST(fl_image_discard(image, m.size, 0, &why));
    struct stat st;
    CHECK(stat(file, &st) == 0 && st.st_blocks * 512 < 65536, "the discard freed nothing: %ld blocks", (long)st.st_blocks);
    fl_image_free(image);
    model_free(&m);
    close(loop);
}

static void test_read_only_device(void)
{
    const char *file = in_directory("device.img");
    char device[64], b[512];
    CHECK(shell("truncate -s 1M '%s'", file) == 0);
    int loop = loop_device(file, "-r", device, sizeof device);
    if (loop < 0) {
        printf("SKIP: read-only loop device (needs root and losetup)\n");
        return;
    }
    fl_image *image = NULL;
    EXPECT(EROFS, try_open(device, WRITABLE, &image));
    CHECK(strstr(why.text, device) && strstr(why.text, "read-only"), "%s", why.text);
    image = must_open(device, READ_ONLY);
    MUST(fl_image_pread(image, b, 512, 0, &why));
    fl_image_free(image);
    close(loop);
}

int main(int argc, char **argv)
{
    CHECK(argc == 2, "usage: test_image DIR");
    directory = argv[1];
    int fds = count_entries("/proc/self/fd");
    test_what_can_be_opened();
    test_creating();
    test_nameless();
    test_long_names_leave_room_for_the_message();
    test_ranges_and_modes();
    test_vectors();
    test_partial_write();
    test_model();
    test_extents();
    test_extents_never_lie();
    test_space_is_given_back();
    test_file_system_without_holes();
    test_truncation();
    test_closing();
    test_fork();
    test_block_device("", ODD_SIZE + 512, 512);
    test_block_device("-b 4096", 2u << 20, 4096);
    test_read_only_device();
    CHECK(count_entries("/proc/self/fd") == fds, "files were left open");
    printf("ok\n");
    return 0;
}
