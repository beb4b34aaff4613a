/* backing.c: may the backing file that an image names be opened, and where is it?
 *
 * The name stands in the image, so whoever could write the image chose it: a guest with a raw disk that is taken for qcow2, or somebody who
 * hands in an image. Opened without care it is a way to read any file of this machine. So:
 *
 *   - its format must be told by the image too. To find out by looking would make a raw backing file that begins with a qcow2 header, which its
 *     guest can write, into an image that names files;
 *   - the name is a path, whatever it looks like to others: no protocols, no "json:", no options; what would be one elsewhere is refused;
 *   - it must be below a directory that the caller allows, and that is found out after symbolic links are resolved. Whoever can rename or
 *     replace directories there meanwhile is not kept out: that takes more rights than to hand in an image;
 *   - a chain ends: at MAX_CHAIN images, or at the first that is met for the second time.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "qcow2.h"

/* The images that this thread is in the middle of opening, from the newest to the first: opening a backing file opens its backing file, and so
   on, on one stack. */
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

#define SHOWN "'%.120s'"        /* names from the file, in messages of bounded length */

/* Does it begin with what other programs take for a protocol, "nbd:" or "json:"? As they do: a colon before the first slash. */
static bool has_protocol(const char *name)
{
    const char *end = name + strcspn(name, ":/");
    return *end == ':';
}

/* Control characters could forge messages; a path that we can't show is refused. */
static bool is_printable(const char *name)
{
    while ((unsigned char)*name >= ' ' && *name != 0x7f)
        name++;
    return *name == '\0';
}

static int check_name(const struct header *h, const char *image, fl_error *error)
{
    if (!is_printable(h->backing))
        return fail(error, FL_EFORMAT, FL_SIDE_NONE, 0, 0, "image '%.120s' names a backing file with control characters in its name, which is refused",
                    image);
    if (has_protocol(h->backing))
        return fail(error, FL_EFORMAT, FL_SIDE_NONE, 0, 0, "image '%.100s' names the backing file " SHOWN ", which is not a plain path but a protocol or "
                    "options; only files are opened: if it is a file, name it './...' with qemu-img rebase -u", image, h->backing);
    if (!*h->backing_format)
        return fail(error, FL_EFORMAT, FL_SIDE_NONE, 0, 0, "image '%.100s' names the backing file " SHOWN " but not its format (header extension "
                    "0xe2792aca), and nothing is guessed; tell it with qemu-img rebase -u -b FILE -F FORMAT", image, h->backing);
    if (strcmp(h->backing_format, "raw") && strcmp(h->backing_format, "qcow2"))
        return fail(error, FL_EFORMAT, FL_SIDE_NONE, 0, 0, "image '%.100s' names the backing file " SHOWN " of format '%.15s'; raw and qcow2 are supported",
                    image, h->backing, is_printable(h->backing_format) ? h->backing_format : "?");
    return 0;
}

static int fail_memory(const char *image, fl_error *error)
{
    return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory to open the backing file of image '%.120s'", image);
}

static int fail_unresolved(const char *image, const char *what, const char *path, int code, fl_error *error)
{
    return fail(error, code, FL_SIDE_NONE, 0, 0, "%s '%.120s' of image '%.120s' cannot be found", what, path, image);
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
        rc = fail(error, EACCES, FL_SIDE_NONE, 0, 0, "image '%.80s' names the backing file '%.80s', which is not below '%.80s'%s; to allow it, pass a "
                  "directory above both as backing_root", image, h->backing, allowed, root ? "" : ", the image's directory");
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

#define OF_WHICH "backing file of image '"

/* A failure further down the chain says whose backing file it was about. */
static void tell_of_which(const char *image, fl_error *error)
{
    char text[sizeof error->text];
    if (!error || !strncmp(error->text, OF_WHICH, strlen(OF_WHICH)))
        return;
    memcpy(text, error->text, sizeof text);
    snprintf(error->text, sizeof error->text, OF_WHICH "%.60s': %.*s", image, 280, text);
}

/* Open the file that was found; a loop, or a chain that is too long, ends here. */
static int open_link(const struct header *h, const char *image, const char *path, const fl_image_options *options, fl_image **backing, fl_error *error)
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
        return fail(error, FL_EFORMAT, FL_SIDE_NONE, 0, 0, "image '%.120s' names the backing file " SHOWN ", which is this image itself or has it as a backing "
                    "file: the chain is a loop", image, h->backing);
    if (self.depth >= MAX_CHAIN)
        return fail(error, FL_EFORMAT, FL_SIDE_NONE, 0, 0, "image '%.120s' names the backing file " SHOWN ", which would be image %u of the chain; %u are the most",
                    image, h->backing, self.depth + 1, MAX_CHAIN);

    fl_image_options how = *options;
    how.format = h->backing_format;
    how.writable = 0;
    how.cluster_size = 0;
    how.backing = how.backing_format = how.compression = NULL;
    opening = &self;
    int rc = image_open(path, &how, backing, error);
    opening = self.overlay;
    if (rc < 0)
        tell_of_which(image, error);
    return rc;
}

int backing_open(const struct header *header, const char *path, const fl_image_options *options, fl_image **backing, fl_error *error)
{
    char *resolved = NULL;
    *backing = NULL;
    if (!*header->backing)
        return 0;
    const char *root = options->backing_root;
    if (root && !strcmp(root, "-"))
        return fail(error, EACCES, FL_SIDE_NONE, 0, 0, "image '%.120s' names the backing file " SHOWN ", and backing files were not allowed", path,
                    is_printable(header->backing) ? header->backing : "?");
    int rc = check_name(header, path, error);
    if (rc == 0)
        rc = resolve(header, path, root, &resolved, error);
    if (rc < 0)
        return rc;
    rc = open_link(header, path, resolved, options, backing, error);
    free(resolved);
    return rc;
}
