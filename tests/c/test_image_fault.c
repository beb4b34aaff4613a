/* test_image_fault.c DIR: injected faults do exactly what was asked for, to exactly the operations that were meant. */
#define _GNU_SOURCE
#include "image_kit.h"

#include "image.h"

static fl_image *inner, *image;

static void set_up(void)
{
    inner = must_create(in_directory("faulty"), ODD_SIZE, WRITABLE);
    MUST(fl_image_faulty(inner, &image, &why));
}

static void tear_down(void)
{
    fl_image_free(image);
    fl_image_free(inner);
}

static void add(fl_fault fault)
{
    if (fault.nth == 0)
        fault.nth = 1;
    MUST(fl_fault_add(image, &fault, &why));
}

static int read1(uint64_t offset)
{
    char b;
    return fl_image_pread(image, &b, 1, offset, &why);
}

static int write1(uint64_t offset)
{
    return fl_image_pwrite(image, "x", 1, offset, &why);
}

static int map1(uint64_t offset)
{
    fl_extent e;
    size_t found;
    return fl_image_extents(image, offset, 1, &e, 1, &found, &why);
}

/* ---- what it is ---- */

static void test_is_the_image_inside(void)
{
    char b[5];
    fl_image_info a = info_of(image), i = info_of(inner);
    CHECK(a.size == i.size && a.cluster_size == i.cluster_size && a.alignment == i.alignment && a.writable && !a.block_device && !a.direct);
    MUST(fl_image_pwrite(image, "hello", 5, 1000, &why));
    MUST(fl_image_pread(inner, b, 5, 1000, &why));
    CHECK(!memcmp(b, "hello", 5) && info_of(image).allocated == info_of(inner).allocated && image->punches);
    MUST(fl_image_zero(image, 3, 1000, &why));
    MUST(fl_image_pread(image, b, 5, 1000, &why));
    CHECK(!memcmp(b, "\0\0\0lo", 5));
    EXPECT(FL_ERANGE, read1(ODD_SIZE));

    struct model m;
    MUST(fl_image_zero(image, ODD_SIZE, 0, &why));
    model_init(&m, image, 6);
    for (int k = 0; k < 500; k++)
        model_step(&m);
    model_check_all(&m);
    model_free(&m);
}

static void test_seen(void)
{
    MUST(read1(0));
    MUST(read1(0));
    MUST(write1(0));
    MUST(fl_image_zero(image, 1, 0, &why));
    MUST(fl_image_discard(image, 1, 0, &why));
    MUST(fl_image_flush(image, &why));
    MUST(map1(0));
    MUST(fl_image_pread(image, NULL, 0, 0, &why));      /* nothing to do: not an operation */
    EXPECT(FL_ERANGE, read1(ODD_SIZE));                 /* nor this */
    CHECK(fl_fault_seen(image, FL_OP_READ) == 2 && fl_fault_seen(image, FL_OP_WRITE) == 1 && fl_fault_seen(image, FL_OP_ANY) == 7);
    CHECK(fl_fault_seen(image, FL_OP_FLUSH | FL_OP_EXTENTS) == 2 && fl_fault_seen(image, FL_OP_ZERO | FL_OP_DISCARD) == 2);
    add((fl_fault){ .ops = FL_OP_READ, .action = FL_FAULT_ERROR, .err = EIO });
    EXPECT(EIO, read1(0));
    CHECK(fl_fault_seen(image, FL_OP_READ) == 3, "hit operations are seen too");
}

static void test_bad_rules(void)
{
    const struct { fl_fault fault; const char *says; } bad[] = {
        { { .ops = 0, .err = EIO, .nth = 1 }, "operations" },
        { { .ops = 64, .err = EIO, .nth = 1 }, "operations" },
        { { .ops = 1, .err = EIO, .nth = 1, .action = 5 }, "action" },
        { { .ops = 1, .err = 0, .nth = 1 }, "errno" },
        { { .ops = 1, .err = -5, .nth = 1 }, "errno" },
        { { .ops = 1, .err = EIO, .nth = 0 }, "nth" },
        { { .ops = FL_OP_ANY, .err = EIO, .nth = 1, .action = FL_FAULT_SHORT }, "short" },
        { { .ops = 1, .err = EIO, .nth = 1, .probability = 1.5 }, "probability" },
        { { .ops = 1, .err = EIO, .nth = 1, .probability = 0.0 / 0.0 }, "probability" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        EXPECT(EINVAL, fl_fault_add(image, &bad[i].fault, &why));
        CHECK(strstr(why.text, bad[i].says), "%s", why.text);
    }
    EXPECT(EINVAL, fl_fault_add(image, NULL, &why));
    EXPECT(EINVAL, fl_fault_add(inner, &bad[0].fault, &why));
    CHECK(fl_fault_clear(inner) == -EINVAL && fl_fault_resume(inner) == -EINVAL && fl_fault_clear(NULL) == -EINVAL);
    CHECK(fl_fault_seen(inner, FL_OP_ANY) == 0 && fl_fault_hanging(inner) == 0 && fl_fault_seen(NULL, 1) == 0);
}

/* ---- which operations ---- */

static void test_nth_and_times(void)
{
    for (int i = 0; i < 5; i++)
        MUST(read1(0));                         /* before the rule: not counted */
    add((fl_fault){ .ops = FL_OP_READ, .err = EIO, .nth = 3, .times = 2 });
    for (int i = 1; i <= 10; i++) {
        MUST(write1(0));
        EXPECT(i == 3 || i == 4 ? EIO : 0, read1(0));
    }
    MUST(fl_fault_clear(image));
    add((fl_fault){ .ops = FL_OP_READ | FL_OP_FLUSH, .err = ENOSPC, .nth = 2, .times = 0 });
    EXPECT(0, fl_image_flush(image, &why));
    EXPECT(ENOSPC, read1(0));
    EXPECT(ENOSPC, fl_image_flush(image, &why));
    CHECK(why.length == 0 && strstr(why.text, "injected fault: flush"), "%s", why.text);
    for (int i = 0; i < 20; i++)
        EXPECT(ENOSPC, read1(0));
    MUST(fl_fault_clear(image));
    MUST(read1(0));
}

static void test_every_operation(void)
{
    for (int op = 1; op <= FL_OP_ANY; op *= 2) {
        add((fl_fault){ .ops = op, .err = EIO });
        EXPECT(op == FL_OP_READ ? EIO : 0, read1(9));
        EXPECT(op == FL_OP_WRITE ? EIO : 0, write1(9));
        EXPECT(op == FL_OP_ZERO ? EIO : 0, fl_image_zero(image, 10, 9, &why));
        EXPECT(op == FL_OP_DISCARD ? EIO : 0, fl_image_discard(image, 10, 9, &why));
        EXPECT(op == FL_OP_FLUSH ? EIO : 0, fl_image_flush(image, &why));
        EXPECT(op == FL_OP_EXTENTS ? EIO : 0, map1(9));
        MUST(fl_fault_clear(image));
    }
    MUST(fl_image_pwrite(image, "before", 6, 50, &why));
    add((fl_fault){ .ops = FL_OP_WRITE, .err = EIO });
    EXPECT(EIO, fl_image_pwrite(image, "after!", 6, 50, &why));
    CHECK(why.cause == EIO && why.offset == 50 && why.length == 6 && why.side == FL_SIDE_NONE);
    CHECK(strstr(why.text, "injected fault: write of 6 bytes at 50") && strstr(why.text, in_directory("faulty")), "%s", why.text);
    char b[6];
    MUST(fl_image_pread(image, b, 6, 50, &why));
    CHECK(!memcmp(b, "before", 6), "a failed write wrote");
}

static void test_ranges(void)
{
    char b[100];
    add((fl_fault){ .ops = FL_OP_ANY, .err = EIO, .offset = 1000, .length = 100 });
    MUST(read1(999));
    EXPECT(EIO, read1(1000));
    EXPECT(EIO, read1(1099));
    MUST(read1(1100));
    EXPECT(EIO, fl_image_pread(image, b, 100, 901, &why));
    MUST(fl_image_pread(image, b, 100, 900, &why));
    EXPECT(EIO, fl_image_zero(image, ODD_SIZE, 0, &why));
    MUST(fl_image_flush(image, &why));          /* has no range: only rules for everything match it */
    MUST(fl_fault_clear(image));
    add((fl_fault){ .ops = FL_OP_ANY, .err = EIO, .offset = 1000, .length = UINT64_MAX });
    MUST(read1(999));
    EXPECT(EIO, read1(ODD_SIZE - 1));
    MUST(fl_fault_clear(image));
    add((fl_fault){ .ops = FL_OP_READ, .err = EIO, .offset = 1000, .length = 1, .nth = 2 });
    MUST(read1(1000));
    MUST(read1(5));                             /* not in the range: not counted */
    EXPECT(EIO, read1(1000));
}

/* Every rule that matches counts; the first that hits acts. */
static void test_several_rules(void)
{
    add((fl_fault){ .ops = FL_OP_READ, .err = EIO, .nth = 2, .times = 1 });
    add((fl_fault){ .ops = FL_OP_READ, .err = ENOSPC, .nth = 2, .times = 2 });
    EXPECT(0, read1(0));
    EXPECT(EIO, read1(0));
    EXPECT(ENOSPC, read1(0));
    EXPECT(0, read1(0));
}

static unsigned hit_pattern(uint64_t seed, double probability, int *hits)
{
    unsigned pattern = 0;
    *hits = 0;
    add((fl_fault){ .ops = FL_OP_READ, .err = EIO, .probability = probability, .seed = seed });
    for (int i = 0; i < 2000; i++) {
        int hit = read1(0) != 0;
        pattern = pattern * 31 + (unsigned)hit;
        *hits += hit;
    }
    MUST(fl_fault_clear(image));
    return pattern;
}

static void test_probability(void)
{
    int a, b, c, always;
    unsigned first = hit_pattern(7, 0.25, &a), again = hit_pattern(7, 0.25, &b), other = hit_pattern(8, 0.25, &c);
    CHECK(first == again && a == b, "one seed, two patterns");
    CHECK(first != other);
    CHECK(a > 400 && a < 600, "%d of 2000 at 0.25", a);
    hit_pattern(7, 0, &always);
    CHECK(always == 2000);
    hit_pattern(7, 1, &always);
    CHECK(always == 2000);
}

/* ---- what is done to them ---- */

static void test_short(void)
{
    char b[11], zero[11] = "";
    add((fl_fault){ .ops = FL_OP_WRITE | FL_OP_READ, .action = FL_FAULT_SHORT, .err = ENOSPC });
    EXPECT(ENOSPC, fl_image_pwrite(image, "hello world", 11, 300, &why));
    CHECK(strstr(why.text, "injected") && why.offset == 300 && why.length == 11);
    MUST(fl_image_pread(inner, b, 11, 300, &why));
    CHECK(!memcmp(b, "hello", 5) && !memcmp(b + 5, zero, 6), "the first half and no more");
    MUST(fl_image_pwrite(inner, "hello world", 11, 300, &why));
    memset(b, 'z', 11);
    EXPECT(ENOSPC, fl_image_pread(image, b, 11, 300, &why));
    CHECK(!memcmp(b, "hellozzzzzz", 11));
    EXPECT(ENOSPC, write1(300));                /* half of one byte is none */
    MUST(fl_image_pread(inner, b, 1, 300, &why));
    CHECK(b[0] == 'h');

    MUST(fl_fault_clear(image));
    add((fl_fault){ .ops = FL_OP_WRITE | FL_OP_READ, .action = FL_FAULT_SHORT });
    struct iovec out[4] = { { "abc", 3 }, { "", 0 }, { "defgh", 5 }, { "ijk", 3 } };
    MUST(image_writev(image, out, 4, 300, &why));
    struct iovec in[3] = { { b, 1 }, { b + 1, 8 }, { b + 9, 2 } };
    MUST(image_readv(image, in, 3, 300, &why));
    CHECK(!memcmp(b, "abcdefghijk", 11));
    MUST(write1(300));
}

static void test_delay(void)
{
    add((fl_fault){ .ops = FL_OP_WRITE, .action = FL_FAULT_DELAY, .delay_ns = 60 * MILLISECOND, .times = 1 });
    uint64_t start = clock_ns();
    MUST(read1(0));
    MUST(write1(0));
    CHECK(clock_ns() - start >= 60 * MILLISECOND);
    start = clock_ns();
    MUST(write1(0));
    CHECK(clock_ns() - start < 60 * MILLISECOND, "delayed twice");
}

static void *write_in_thread(void *rc)
{
    *(int *)rc = write1(700);
    return NULL;
}

static void *use_in_thread(void *rc)            /* as a layer above, on its own reference */
{
    *(int *)rc = image_write(image, "x", 1, 700, &why);
    image_unref(image);
    return NULL;
}

static void *close_in_thread(void *rc)
{
    *(int *)rc = fl_image_close(image, &why);
    return NULL;
}

static pthread_t start(void *(*body)(void *), int *rc)
{
    pthread_t thread;
    *rc = 99;
    CHECK(pthread_create(&thread, NULL, body, rc) == 0);
    return thread;
}

static void wait_hanging(uint64_t n)
{
    for (int i = 0; fl_fault_hanging(image) != n; i++) {
        CHECK(i < 10000, "%" PRIu64 " hang, not %" PRIu64, fl_fault_hanging(image), n);
        sleep_ns(MILLISECOND);
    }
}

static void byte_is(char wanted)
{
    char b;
    MUST(fl_image_pread(inner, &b, 1, 700, &why));
    CHECK(b == wanted, "%d", b);
}

static void test_hang(void)
{
    int rc[3];
    pthread_t threads[3];
    add((fl_fault){ .ops = FL_OP_WRITE, .action = FL_FAULT_HANG, .times = 2 });
    threads[0] = start(write_in_thread, &rc[0]);
    wait_hanging(1);
    threads[1] = start(write_in_thread, &rc[1]);
    wait_hanging(2);
    byte_is(0);                                 /* not done yet */
    MUST(read1(0));                             /* others pass */
    MUST(fl_fault_resume(image));
    pthread_join(threads[0], NULL);
    pthread_join(threads[1], NULL);
    CHECK(rc[0] == 0 && rc[1] == 0 && fl_fault_hanging(image) == 0);
    byte_is('x');
    MUST(fl_image_zero(image, 1, 700, &why));

    /* after it was done; clear lets go, too; the rule holds on after a resume */
    MUST(fl_fault_clear(image));
    add((fl_fault){ .ops = FL_OP_WRITE, .action = FL_FAULT_HANG_AFTER });
    threads[0] = start(write_in_thread, &rc[0]);
    wait_hanging(1);
    byte_is('x');
    MUST(fl_fault_resume(image));
    pthread_join(threads[0], NULL);
    threads[1] = start(write_in_thread, &rc[1]);
    wait_hanging(1);
    MUST(fl_fault_clear(image));
    pthread_join(threads[1], NULL);
    CHECK(rc[0] == 0 && rc[1] == 0 && fl_fault_hanging(image) == 0);
    MUST(write1(700));
}

/* close() waits for public calls, as for any image, and not for the layers above. */
static void test_closing_while_something_hangs(void)
{
    int rc[2];
    add((fl_fault){ .ops = FL_OP_WRITE, .action = FL_FAULT_HANG });
    pthread_t writer = start(write_in_thread, &rc[0]);
    wait_hanging(1);
    pthread_t closer = start(close_in_thread, &rc[1]);
    while (read1(0) != -FL_ECLOSED)
        sleep_ns(MILLISECOND);
    CHECK(rc[0] == 99, "a call that hung was let go by a close");
    MUST(fl_fault_resume(image));
    pthread_join(writer, NULL);
    pthread_join(closer, NULL);
    CHECK(rc[0] == 0 && rc[1] == 0);
    CHECK(fl_fault_seen(image, FL_OP_WRITE) == 1, "the counters outlive close()");
    fl_image_free(image);

    MUST(fl_image_faulty(inner, &image, &why));
    add((fl_fault){ .ops = FL_OP_WRITE, .action = FL_FAULT_HANG });
    MUST(fl_image_zero(inner, 1, 700, &why));
    MUST(image_use(image, &why));
    pthread_t user = start(use_in_thread, &rc[0]);
    wait_hanging(1);
    MUST(fl_image_close(image, &why));
    byte_is(0);
    MUST(fl_fault_clear(image));                /* works on a closed image */
    pthread_join(user, NULL);
    CHECK(rc[0] == 0);
    byte_is('x');
}

static void test_image_inside_stays_usable(void)
{
    fl_image *second, *closed = NULL;
    MUST(fl_image_faulty(inner, &second, &why));
    MUST(fl_image_close(inner, &why));
    MUST(write1(3));                            /* the wrappers have references of their own */
    EXPECT(FL_ECLOSED, fl_image_faulty(inner, &closed, &why));
    EXPECT(EINVAL, fl_image_faulty(NULL, &closed, &why));
    fl_image_free(second);
    fl_image_free(image);
    image = must_open(in_directory("faulty"), WRITABLE);        /* locks given back by the last of them */
}

static void test_reading_only(void)
{
    fl_image *read_only, *wrapper;
    fl_image_free(image);
    fl_image_free(inner);
    read_only = must_open(in_directory("faulty"), READ_ONLY);
    MUST(fl_image_faulty(read_only, &wrapper, &why));
    EXPECT(EROFS, fl_image_pwrite(wrapper, "x", 1, 0, &why));
    CHECK(!info_of(wrapper).writable && fl_fault_seen(wrapper, FL_OP_ANY) == 0);
    inner = read_only;
    image = wrapper;
}

/* At the fork one thread hangs in a write and another waits in close(): the child waits for neither. */
static void test_fork(void)
{
    int rc[2];
    add((fl_fault){ .ops = FL_OP_WRITE, .action = FL_FAULT_HANG });
    pthread_t writer = start(write_in_thread, &rc[0]);
    wait_hanging(1);
    pthread_t closer = start(close_in_thread, &rc[1]);
    while (read1(0) != -FL_ECLOSED)
        sleep_ns(MILLISECOND);
    sleep_ns(20 * MILLISECOND);                 /* for it to wait */
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        alarm(20);
        fl_fault fault = { .ops = 1, .err = EIO, .nth = 1 };
        EXPECT(FL_EFORKED, read1(0));
        EXPECT(FL_EFORKED, fl_fault_add(image, &fault, &why));
        CHECK(fl_fault_clear(image) == -FL_EFORKED && fl_fault_resume(image) == -FL_EFORKED);
        CHECK(fl_fault_seen(image, FL_OP_ANY) == 0 && fl_fault_hanging(image) == 0);
        fl_image_free(image);
        fl_image_free(inner);
        _exit(0);
    }
    int status;
    CHECK(waitpid(pid, &status, 0) == pid && status == 0, "status %x", status);
    MUST(fl_fault_resume(image));
    pthread_join(writer, NULL);
    pthread_join(closer, NULL);
    CHECK(rc[0] == 0 && rc[1] == 0);
}

int main(int argc, char **argv)
{
    static void (*const tests[])(void) = {
        test_is_the_image_inside, test_seen, test_bad_rules, test_nth_and_times, test_every_operation, test_ranges, test_several_rules,
        test_probability, test_short, test_delay, test_hang, test_closing_while_something_hangs, test_image_inside_stays_usable,
        test_reading_only, test_fork,
    };
    CHECK(argc == 2, "usage: test_image_fault DIR");
    directory = argv[1];
    int fds = count_entries("/proc/self/fd");
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        set_up();
        tests[i]();
        tear_down();
    }
    CHECK(count_entries("/proc/self/fd") == fds, "files were left open");
    printf("ok\n");
    return 0;
}
