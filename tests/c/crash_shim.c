/* crash_shim.c: for LD_PRELOAD: a process that ends right before the Nth operation that gives a directory another state on stable storage, and
 * what of the directory was on stable storage then, at least. For test_chain_crash.py.
 *
 * Such operations are: rename and unlink in the directory, fsync and fdatasync of it or of a file in it. Nothing is really synced, here or
 * elsewhere. What is on stable storage, at least, is in another directory:
 *
 *   content.INODE    a file as it was when it was synced last; missing: it never was
 *   names            "INODE NAME" of each file when the directory was synced last
 *   pending          what was done to names since: "unlink NAME", or "rename INODE OLD NEW"
 *   kept.N           what was unlinked or replaced, so that no inode gets a number that is in use here
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static char directory[4096], shadow[4096], deaf[64];
static long left, kept;
static int armed;

/* Watch a directory from now on. `ignore`, if not empty: a sync of files with names that end so is not made. */
void crash_watch(const char *name, const char *storage, const char *ignore, long number)
{
    snprintf(directory, sizeof directory, "%s", name);
    snprintf(shadow, sizeof shadow, "%s", storage);
    snprintf(deaf, sizeof deaf, "%s", ignore);
    left = number;
}

/* Do operations count? The Nth that does ends the process with status 77. */
void crash_arm(int on) { armed = on; }

static void check(int ok, const char *what)
{
    if (!ok) {
        perror(what);
        _exit(78);
    }
}

/* The file's name in the directory; "": the directory itself; NULL: neither. */
static const char *name_of(const char *path)
{
    size_t length = strlen(directory);
    if (!length || strncmp(path, directory, length))
        return NULL;
    return path[length] == '/' ? path + length + 1 : path[length] ? NULL : path + length;
}

static void step(void)
{
    if (armed && --left == 0)
        _exit(77);
}

static FILE *open_shadow(const char *name, const char *mode)
{
    char path[4200];
    snprintf(path, sizeof path, "%s/%s", shadow, name);
    FILE *file = fopen(path, mode);
    check(file != NULL, path);
    return file;
}

static void keep(const char *path)
{
    char to[4200];
    snprintf(to, sizeof to, "%s/kept.%ld", shadow, ++kept);
    check(link(path, to) == 0 || access(path, F_OK) != 0, to);
}

static void save_names(void)
{
    DIR *entries = opendir(directory);
    FILE *names = open_shadow("names", "w");
    check(entries != NULL, directory);
    for (struct dirent *entry; (entry = readdir(entries));)
        if (entry->d_type == DT_REG)
            fprintf(names, "%lu %s\n", (unsigned long)entry->d_ino, entry->d_name);
    closedir(entries);
    fclose(names);
    fclose(open_shadow("pending", "w"));
}

static void save_content(int fd)
{
    char path[64], name[64], block[65536];
    struct stat st;
    check(fstat(fd, &st) == 0, "fstat");
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    snprintf(name, sizeof name, "content.%lu", (unsigned long)st.st_ino);
    FILE *from = fopen(path, "r"), *to = open_shadow(name, "w");
    check(from != NULL, path);
    for (size_t n; (n = fread(block, 1, sizeof block, from)) > 0;)
        fwrite(block, 1, n, to);
    fclose(from);
    fclose(to);
}

static int note_sync(int fd)
{
    char path[64], target[4096];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(path, target, sizeof target - 1);
    if (n < 0)
        return -1;
    target[n] = 0;
    const char *name = name_of(target);
    if (!name)
        return 0;
    pthread_mutex_lock(&turn);
    step();
    size_t length = strlen(name), end = strlen(deaf);
    if (!*name)
        save_names();
    else if (!end || length < end || strcmp(name + length - end, deaf))
        save_content(fd);
    pthread_mutex_unlock(&turn);
    return 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int fsync(int fd) { return note_sync(fd); }

int fdatasync(int fd) { return note_sync(fd); }

int unlink(const char *path)
{
    const char *name = name_of(path);
    if (!name || access(path, F_OK))
        return REAL(unlink)(path);
    pthread_mutex_lock(&turn);
    step();
    keep(path);
    FILE *pending = open_shadow("pending", "a");
    fprintf(pending, "unlink %s\n", name);
    fclose(pending);
    int rc = REAL(unlink)(path);
    pthread_mutex_unlock(&turn);
    return rc;
}

int rename(const char *from, const char *to)
{
    const char *old = name_of(from), *new = name_of(to);
    struct stat st;
    if (!old || !new || stat(from, &st))
        return REAL(rename)(from, to);
    pthread_mutex_lock(&turn);
    step();
    keep(to);
    FILE *pending = open_shadow("pending", "a");
    fprintf(pending, "rename %lu %s %s\n", (unsigned long)st.st_ino, old, new);
    fclose(pending);
    int rc = REAL(rename)(from, to);
    pthread_mutex_unlock(&turn);
    return rc;
}
