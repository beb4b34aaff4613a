/* test_image_locks.c DIR: who may open an image beside whom, in one process, across processes, and with QEMU's programs. */
#define _GNU_SOURCE
#include "image_kit.h"

#include <signal.h>
#include <sys/prctl.h>

#include "image.h"

static const char *path;

static void refused(int flags)
{
    fl_image *image = NULL;
    int fds = count_entries("/proc/self/fd");
    EXPECT(FL_ELOCKED, try_open(path, flags, &image));
    CHECK(image == NULL && strstr(why.text, path) && strstr(why.text, "share"), "%s", why.text);
    CHECK(count_entries("/proc/self/fd") == fds, "a refused open left the file open");
}

static void allowed(int flags)
{
    fl_image_free(must_open(path, flags));
}

static void test_in_one_process(void)
{
    fl_image *image = must_create(path, 1 << 20, WRITABLE);
    for (int turn = 0; turn < 2; turn++) {      /* created, then opened, for writing */
        refused(READ_ONLY);
        refused(WRITABLE);
        refused(WRITABLE | DIRECT);
        refused(READ_ONLY | DIRECT);
        allowed(SHARE);
        allowed(SHARE | WRITABLE);
        refused(READ_ONLY);                     /* and those who shared took nothing away */
        fl_image_free(image);
        image = must_open(path, turn ? WRITABLE | DIRECT : WRITABLE);
    }
    fl_image_free(image);

    image = must_open(path, READ_ONLY);
    fl_image *second = must_open(path, READ_ONLY);
    refused(WRITABLE);
    fl_image_free(image);
    refused(WRITABLE);
    CHECK(strstr(why.text, "has it open;"), "%s", why.text);
    allowed(READ_ONLY);                         /* the refused ones gave their locks back */
    fl_image_free(second);
    allowed(WRITABLE);

    image = must_open(path, WRITABLE | SHARE);
    allowed(WRITABLE);
    allowed(READ_ONLY);
    fl_image_free(image);
}

static void test_close_gives_back_with_the_last_user(void)
{
    fl_image *image = must_open(path, WRITABLE);
    MUST(image_use(image, &why));
    MUST(fl_image_close(image, &why));
    refused(READ_ONLY);
    image_unref(image);
    allowed(WRITABLE);                          /* though the handle is not freed yet */
    fl_image_free(image);

    image = must_open(path, WRITABLE);
    MUST(fl_image_close(image, &why));
    allowed(WRITABLE);
    fl_image_free(image);
}

/* Another open and close of the file in this process, by whatever code, drops nothing. */
static void test_not_the_locks_of_the_process(void)
{
    fl_image *image = must_open(path, WRITABLE);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    close(fd);
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        fl_image_free(image);                   /* a child's copy: gives nothing back either */
        refused(WRITABLE);
        refused(READ_ONLY);
        _exit(0);
    }
    int status;
    CHECK(waitpid(pid, &status, 0) == pid && status == 0, "status %x", status);
    refused(WRITABLE);
    fl_image_free(image);
}

/* A child that still has copies of the descriptors keeps no lock. */
static void test_forked_copies_keep_no_lock(void)
{
    fl_image *image = must_open(path, WRITABLE);
    int ready[2];
    CHECK(pipe(ready) == 0);
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        CHECK(write(ready[1], "x", 1) == 1);
        for (;;)
            pause();
    }
    char c;
    CHECK(read(ready[0], &c, 1) == 1);
    refused(WRITABLE);
    MUST(fl_image_close(image, &why));
    allowed(WRITABLE);
    fl_image_free(image);
    kill(pid, SIGKILL);
    CHECK(waitpid(pid, NULL, 0) == pid);
    close(ready[0]);
    close(ready[1]);
}

/* kill -9 leaves nothing locked. */
static void test_killed(void)
{
    int ready[2];
    CHECK(pipe(ready) == 0);
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        must_open(path, WRITABLE);
        CHECK(write(ready[1], "x", 1) == 1);
        for (;;)
            pause();
    }
    char c;
    CHECK(read(ready[0], &c, 1) == 1);
    refused(READ_ONLY);
    kill(pid, SIGKILL);
    CHECK(waitpid(pid, NULL, 0) == pid);
    allowed(WRITABLE);
    close(ready[0]);
    close(ready[1]);
}

/* ---- beside QEMU ---- */

/* A QEMU program that keeps the image open until it is killed. It opens its socket before the image, and writes its pid after that. */
static pid_t qemu_start(const char *mode, const char *format)
{
    const char *file = path, *socket = in_directory("nbd.sock"), *ready = in_directory("nbd.pid");
    fflush(NULL);
    unlink(socket);
    unlink(ready);
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);       /* not left behind by a check that fails */
        const char *arguments[] = { "qemu-nbd", "-t", "-f", format, "-k", socket, "--pid-file", ready, file, *mode ? mode : NULL, NULL };
        execvp(arguments[0], (char **)(uintptr_t)arguments);
        _exit(127);
    }
    for (int i = 0; access(ready, F_OK) != 0; i++) {
        CHECK(i < 5000 && waitpid(pid, NULL, WNOHANG) == 0, "qemu-nbd did not start");
        sleep_ns(2 * MILLISECOND);
    }
    return pid;
}

static void qemu_stop(pid_t pid)
{
    kill(pid, SIGKILL);
    CHECK(waitpid(pid, NULL, 0) == pid);
}

static void test_qemu_has_it(void)
{
    pid_t pid = qemu_start("", "raw");
    refused(READ_ONLY);
    CHECK(strstr(why.text, "for writing"), "%s", why.text);
    refused(WRITABLE);
    allowed(SHARE);
    qemu_stop(pid);
    pid = qemu_start("-r", "raw");
    allowed(READ_ONLY);
    refused(WRITABLE);
    qemu_stop(pid);
    allowed(WRITABLE);
}

#define QEMU_READS "qemu-img convert -f raw -O raw '%s' '%s'", path, in_directory("copy")
#define QEMU_WRITES "qemu-io -f raw -c 'write 0 512' '%s'", path

static void test_qemu_comes(void)
{
    fl_image *image = must_open(path, WRITABLE);
    CHECK(shell(QEMU_READS) != 0, "QEMU reads what we write");
    CHECK(shell(QEMU_WRITES) != 0, "QEMU writes what we write");
    CHECK(shell("qemu-img convert -U -f raw -O raw '%s' '%s'", path, in_directory("copy")) == 0);
    fl_image_free(image);

    image = must_open(path, READ_ONLY);
    CHECK(shell(QEMU_READS) == 0);
    CHECK(shell("qemu-img info '%s'", path) == 0);
    CHECK(shell(QEMU_WRITES) != 0, "QEMU writes what we read");
    fl_image_free(image);

    image = must_open(path, WRITABLE | SHARE);
    CHECK(shell(QEMU_READS) == 0);
    CHECK(shell(QEMU_WRITES) == 0);
    fl_image_free(image);
    CHECK(shell(QEMU_WRITES) == 0);

    /* qcow2, where info looks into the image */
    const char *raw = path;
    path = in_directory("locked.qcow2");
    CHECK(shell("qemu-img create -f qcow2 '%s' 1M", path) == 0);
    image = must_open(path, WRITABLE);
    CHECK(shell("qemu-img info -U '%s'", path) == 0);
    int with_data = shell("qemu-img check '%s'", path);
    CHECK(with_data != 0, "QEMU checks what we write");
    fl_image_free(image);
    image = must_open(path, READ_ONLY);
    CHECK(shell("qemu-img check '%s'", path) == 0);
    fl_image_free(image);
    pid_t pid = qemu_start("", "qcow2");
    refused(READ_ONLY);
    refused(WRITABLE);
    qemu_stop(pid);
    path = raw;
}

int main(int argc, char **argv)
{
    CHECK(argc == 2, "usage: test_image_locks DIR");
    directory = argv[1];
    char own[512];
    snprintf(own, sizeof own, "%s/locked", directory);
    path = own;
    test_in_one_process();
    test_close_gives_back_with_the_last_user();
    test_not_the_locks_of_the_process();
    test_forked_copies_keep_no_lock();
    test_killed();
    if (shell("qemu-img --version && qemu-io --version && qemu-nbd --version") == 0) {
        test_qemu_has_it();
        test_qemu_comes();
    } else {
        printf("SKIP: locks beside QEMU (needs qemu-img, qemu-io and qemu-nbd)\n");
    }
    printf("ok\n");
    return 0;
}
