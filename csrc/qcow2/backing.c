/* backing.c: may the backing file that an image names be opened, and where is it?
 *
 * The name stands in the image, so whoever could write the image chose it: a guest with a raw disk that is taken for qcow2, or somebody who
 * hands in an image. Opened without care it is a way to read any file of this machine. So:
 *
 *   - its format must be told by the image too. To find out by looking would make a raw backing file that begins with a qcow2 header, which
 *     its guest can write, into an image that names files;
 *   - the name is a path, whatever it looks like to others: no protocols, no "json:", no options; what would be one elsewhere is refused;
 *   - it must be below a directory that the caller allows, and that is found out after symbolic links are resolved. Whoever can rename or
 *     replace directories there meanwhile is not kept out: that takes more rights than to hand in an image;
 *   - a chain ends: at MAX_CHAIN images, or at the first that is met for the second time.
 */
#define _GNU_SOURCE
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "qcow2.h"

/* The images that this thread is in the middle of opening, from the newest to the first: opening a backing file opens its backing file, and
   so on, on one stack. */
struct link {
    const struct link *overlay;
    dev_t device; ino_t inode;
    unsigned depth;
};
static _Thread_local const struct link *opening;

static struct link identify(const struct stat *st)
{
    if (S_ISBLK(st->st_mode))                   /* a device may have several nodes */
        return (struct link){ .device = st->st_rdev };
    return (struct link){ .device = st->st_dev, .inode = st->st_ino };
}

static bool is_open_already(const struct link *link, const struct stat *st)
{
    const struct link wanted = identify(st);
    while (link && (link->device != wanted.device || link->inode != wanted.inode))
        link = link->overlay;
    return link != NULL;
}

/* For messages, which are bounded: of a long path the end tells most. */
static const char *tail(const char *path)
{
    const size_t length = strlen(path), most = 120;
    return length > most ? path + length - most : path;
}

/* Does it begin with what other programs take for a protocol, "nbd:" or "json:"? As they do: a colon before the first slash. */
static bool has_protocol(const char *name)
{
    return name[strcspn(name, ":/")] == ':';
}

/* Control characters could forge messages; a path that we can't show is refused. */
static bool is_printable(const char *name)
{
    while ((unsigned char)*name >= ' ' && *name != 0x7f)
        name++;
    return *name == '\0';
}

/* "image 'a' names the backing file 'b', WHY": every refusal has these two names. */
__attribute__((format(printf, 5, 6)))
static int refuse(const struct header *h, const char *image, int code, fl_error *error, const char *format, ...)
{
    char why[300];
    va_list args;
    va_start(args, format);
    vsnprintf(why, sizeof why, format, args);
    va_end(args);
    return fail(error, code, FL_SIDE_NONE, 0, 0, "image '%s' names the backing file '%s', %s", tail(image),
                is_printable(h->backing) ? tail(h->backing) : "?", why);
}

static int check_name(const struct header *h, const char *image, fl_error *error)
{
    if (!is_printable(h->backing))
        return refuse(h, image, FL_EFORMAT, error, "with control characters in its name, which is refused");
    if (has_protocol(h->backing))
        return refuse(h, image, FL_EFORMAT, error, "which is not a plain path but a protocol or options; only files are opened: if "
                      "it is one, name it './...' with qemu-img rebase -u");
    if (!*h->backing_format)
        return refuse(h, image, FL_EFORMAT, error, "but not its format (header extension 0xe2792aca), and nothing is guessed; tell it with "
                      "qemu-img rebase -u -b FILE -F FORMAT");
    if (strcmp(h->backing_format, "raw") && strcmp(h->backing_format, "qcow2"))
        return refuse(h, image, FL_EFORMAT, error, "of format '%s'; raw and qcow2 are supported",
                      is_printable(h->backing_format) ? h->backing_format : "?");
    return 0;
}

static int fail_memory(const char *image, fl_error *error)
{
    return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory to open the backing file of image '%s'", tail(image));
}

static int fail_unresolved(const char *image, const char *what, const char *path, int code, fl_error *error)
{
    return fail(error, code, FL_SIDE_NONE, 0, 0, "%s '%s' of image '%s' cannot be found", what, tail(path), tail(image));
}

/* The directory that the image is in, as its path says (a link to an image is where the link is), ended by no slash but that of "/". */
static int directory_of(const char *image, char **directory, fl_error *error)
{
    char *copy = strdup(image);
    if (!copy)
        return fail_memory(image, error);
    char *slash = strrchr(copy, '/');
    if (slash)
        slash[slash == copy ? 1 : 0] = '\0';
    *directory = realpath(slash ? copy : ".", NULL);
    int code = errno;
    free(copy);
    return *directory ? 0 : fail_unresolved(image, "the directory", slash ? "of it" : ".", code, error);
}

/* Both are canonical. */
static bool is_below(const char *path, const char *directory)
{
    size_t length = strlen(directory);
    return !strcmp(directory, "/") || !strcmp(path, directory) || (!strncmp(path, directory, length) && path[length] == '/');
}

/* Is the nearest directory that exists above `path`, which does not exist, allowed? Changes `path`. */
static bool would_be_below(char *path, const char *allowed)
{
    char *slash, *found = NULL;
    while (!found && (slash = strrchr(path, '/')) != NULL) {
        slash[slash == path ? 1 : 0] = '\0';
        found = realpath(path, NULL);
        if (slash == path)
            break;
    }
    bool below = found && is_below(found, allowed);
    free(found);
    return below;
}

/* The canonical path of the backing file, if it is allowed. */
static int resolve(const struct header *h, const char *image, const char *root, char **resolved, fl_error *error)
{
    char *directory = NULL, *joined = NULL, *allowed = NULL, *found = NULL;
    int code, rc = directory_of(image, &directory, error);
    if (rc < 0)
        return rc;
    if (*h->backing == '/')
        joined = strdup(h->backing);
    else if (asprintf(&joined, "%s/%s", directory, h->backing) < 0)
        joined = NULL;
    if (!joined) {
        rc = fail_memory(image, error);
        goto out;
    }
    allowed = realpath(root ? root : directory, NULL);
    if (!allowed) {
        rc = fail_unresolved(image, "the directory that is allowed for the backing file,", root ? root : directory, errno, error);
        goto out;
    }
    found = realpath(joined, NULL);
    code = errno;
    /* That it is missing is told only where one may look: else the answer would tell what there is elsewhere. */
    if (found ? !is_below(found, allowed) : !would_be_below(joined, allowed)) {
        rc = refuse(h, image, EACCES, error, "which is not below '%s'%s; to allow it, pass a directory above both as backing_root",
                    tail(allowed), root ? "" : ", the image's directory");
    } else if (!found) {
        rc = fail_unresolved(image, "the backing file", h->backing, code, error);
    } else {
        *resolved = found;
        found = NULL;
    }
out:
    free(found);
    free(allowed);
    free(joined);
    free(directory);
    return rc;
}

/* A failure further down the chain says which image was to be opened. */
static void tell_of_which(const char *image, fl_error *error)
{
    char text[sizeof error->text];
    if (!error)
        return;
    memcpy(text, error->text, sizeof text);
    snprintf(error->text, sizeof error->text, "backing file of image '%s': %.*s", tail(image), (int)sizeof text - 160, text);
}

/* Open the file that was found; a loop, or a chain that is too long, ends here. */
static int open_link(const struct header *h, const char *image, const char *path, const fl_image_options *options, fl_image **backing,
                     fl_error *error)
{
    struct stat st;
    if (stat(image, &st) < 0)
        return fail_unresolved(image, "the file", image, errno, error);
    struct link self = identify(&st);
    self.overlay = opening;
    self.depth = opening ? opening->depth + 1 : 1;
    if (stat(path, &st) < 0)
        return fail_unresolved(image, "the backing file", path, errno, error);
    if (is_open_already(&self, &st))
        return refuse(h, image, FL_EFORMAT, error, "which is this image itself or has it as a backing file: the chain is a loop");
    if (self.depth >= MAX_CHAIN)
        return refuse(h, image, FL_EFORMAT, error, "which would be image %u of the chain; %u are the most", self.depth + 1, MAX_CHAIN);

    fl_image_options how = *options;
    how.format = h->backing_format;
    how.writable = 0;
    how.cluster_size = 0;
    how.backing = how.backing_format = how.compression = NULL;
    opening = &self;
    int rc = image_open(path, &how, backing, error);
    opening = self.overlay;
    if (rc < 0 && !opening)
        tell_of_which(image, error);
    return rc;
}

int backing_open(const struct header *header, const char *path, const fl_image_options *options, fl_image **backing, fl_error *error)
{
    char *resolved = NULL;
    *backing = NULL;
    if (!*header->backing || options->inspect)
        return 0;
    const char *root = options->backing_root;
    if (root && !strcmp(root, "-"))
        return refuse(header, path, EACCES, error, "and backing files were not allowed");
    int rc = check_name(header, path, error);
    if (rc == 0)
        rc = resolve(header, path, root, &resolved, error);
    if (rc < 0)
        return rc;
    rc = open_link(header, path, resolved, options, backing, error);
    free(resolved);
    return rc;
}
