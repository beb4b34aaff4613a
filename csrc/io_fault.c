/* io_fault.c: an image around another one that fails, shortens, delays or hangs chosen operations.
 *
 * Each operation looks at the rules in the order in which they were added. Every rule that it matches counts it, and the first one that
 * hits acts on it; so what a rule does depends on its own count and its own random numbers alone, not on the other rules. Nothing random
 * comes from anywhere but a rule's seed.
 *
 * Operations that hang wait for the next fl_fault_resume or fl_fault_clear, whatever happens to the rule. They stand for a hang inside the
 * kernel, so nothing else ends them: no interrupt, no close (which waits for the public calls, and not for the layers above: these hold
 * references of their own).
 */
#define _GNU_SOURCE
#include "image.h"

#include <stdlib.h>

#include "io.h"

#define OPS 6                   /* the bits of FL_OP_ANY */

struct rule {
    fl_fault fault;             /* fixed */
    uint64_t matched;           /* protected by the image's lock, as is the next */
    uint64_t random;            /* the state of the generator */
    struct rule *next;
};

struct faulty {
    fl_image image;
    fl_image *inner;            /* fixed: our reference */

    pthread_mutex_t lock;       /* protects all that follows; not held while an operation runs. Leaf. Never destroyed (there is nothing to
                                   free), as the counters may be asked for after the last reference is gone */
    pthread_cond_t resumed;     /* `resumes` changed */
    struct rule *rules;
    uint64_t resumes;           /* how often what hung was let go */
    uint64_t hanging;
    uint64_t seen[OPS];
};

static const char *const op_names[OPS] = { "read", "write", "zero", "discard", "flush", "map" };

static int op_index(int op)
{
    return __builtin_ctz((unsigned)op);
}

/* splitmix64: every seed is a good one, 0 too. */
static uint64_t next_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static bool matches(const fl_fault *f, int op, uint64_t offset, uint64_t length)
{
    if (!(f->ops & op))
        return false;
    return f->length == 0 || (offset < add_sat(f->offset, f->length) && f->offset < offset + length);
}

/* Count a matching operation; is it hit? */
static bool hits(struct rule *rule)
{
    const fl_fault *f = &rule->fault;
    uint64_t n = ++rule->matched;
    if (n < f->nth || (f->times != 0 && n - f->nth >= f->times))
        return false;
    if (f->probability == 0 || f->probability == 1)
        return true;
    return (double)(next_random(&rule->random) >> 11) * 0x1p-53 < f->probability;
}

/* Count the operation, and find what is to be done to it. false: nothing. */
static bool consult(struct faulty *w, int op, uint64_t offset, uint64_t length, fl_fault *fault, uint64_t *resumes)
{
    bool hit = false;
    pthread_mutex_lock(&w->lock);
    w->seen[op_index(op)]++;
    for (struct rule *rule = w->rules; rule; rule = rule->next) {
        if (matches(&rule->fault, op, offset, length) && hits(rule) && !hit) {
            *fault = rule->fault;
            hit = true;
        }
    }
    *resumes = w->resumes;
    pthread_mutex_unlock(&w->lock);
    return hit;
}

/* Unless it was let go since it was hit, when there had been `resumes`. */
static void hang(struct faulty *w, uint64_t resumes)
{
    pthread_mutex_lock(&w->lock);
    w->hanging++;
    while (w->resumes == resumes)
        pthread_cond_wait(&w->resumed, &w->lock);
    w->hanging--;
    pthread_mutex_unlock(&w->lock);
}

static void delay(uint64_t ns)
{
    uint64_t deadline = add_sat(now_ns(), ns);
    struct timespec t = { .tv_sec = (time_t)(deadline / 1000000000u), .tv_nsec = (long)(deadline % 1000000000u) };
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR)
        ;
}

/* One operation, of any kind: the fields that the kind does not have are 0. */
struct call {
    int op;
    const struct iovec *iov;
    int count;
    uint64_t offset, length;
    fl_extent *extents;
    size_t max, *found;
    bool compressed;            /* a write of one entry, compressed. What is left of it after a fault is not */
};

static int run(fl_image *inner, const struct call *c, fl_error *error)
{
    switch (c->op) {
    case FL_OP_READ:
        return image_readv(inner, c->iov, c->count, c->offset, error);
    case FL_OP_WRITE:
        if (c->compressed)
            return image_write_compressed(inner, c->iov->iov_base, c->iov->iov_len, c->offset, error);
        return image_writev(inner, c->iov, c->count, c->offset, error);
    case FL_OP_ZERO:
        return image_zero(inner, c->length, c->offset, error);
    case FL_OP_DISCARD:
        return image_discard(inner, c->length, c->offset, error);
    case FL_OP_FLUSH:
        return image_flush(inner, error);
    default:
        return image_extents(inner, c->offset, c->length, c->extents, c->max, c->found, error);
    }
}

/* [skip, skip + length) of a read or write. */
static int run_part(fl_image *inner, const struct call *c, size_t skip, size_t length, fl_error *error)
{
    struct iov_cursor cursor = { c->iov, c->count, 0 };
    struct iovec *part = malloc((size_t)c->count * sizeof *part);
    struct call sub = *c;
    size_t bytes;
    if (!part)
        return fail(error, ENOMEM, FL_SIDE_NONE, c->offset, c->length, "no memory to inject a fault into image '%s'", inner->name);
    iov_advance(&cursor, skip);
    sub.count = iov_next(&cursor, length, part, c->count, &bytes);
    sub.iov = part;
    sub.offset = c->offset + skip;
    sub.length = length;
    sub.compressed = false;
    int rc = run(inner, &sub, error);
    free(part);
    return rc;
}

static int fail_injected(struct faulty *w, const struct call *c, int err, fl_error *error)
{
    const char *name = op_names[op_index(c->op)];
    if (c->op == FL_OP_FLUSH)
        return fail(error, err, FL_SIDE_NONE, 0, 0, "injected fault: %s of image '%s'", name, w->image.name);
    return fail(error, err, FL_SIDE_NONE, c->offset, c->length, "injected fault: %s of %llu bytes at %llu of image '%s'",
                name, (unsigned long long)c->length, (unsigned long long)c->offset, w->image.name);
}

static int run_short(struct faulty *w, const struct call *c, int err, fl_error *error)
{
    size_t half = (size_t)c->length / 2;
    int rc = half ? run_part(w->inner, c, 0, half, error) : 0;
    if (rc < 0)
        return rc;
    if (err)
        return fail_injected(w, c, err, error);
    return run_part(w->inner, c, half, (size_t)c->length - half, error);
}

static int operate(fl_image *image, const struct call *c, fl_error *error)
{
    struct faulty *w = (struct faulty *)image;
    fl_fault fault = { 0 };
    uint64_t resumes;
    int rc;
    if (!consult(w, c->op, c->offset, c->length, &fault, &resumes))
        return run(w->inner, c, error);
    switch (fault.action) {
    case FL_FAULT_ERROR:
        return fail_injected(w, c, fault.err, error);
    case FL_FAULT_SHORT:
        return run_short(w, c, fault.err, error);
    case FL_FAULT_DELAY:
        delay(fault.delay_ns);
        return run(w->inner, c, error);
    case FL_FAULT_HANG:
        hang(w, resumes);
        return run(w->inner, c, error);
    default:
        rc = run(w->inner, c, error);
        hang(w, resumes);
        return rc;
    }
}

/* ---- the driver ---- */

static int faulty_readv(fl_image *image, const struct iovec *iov, int count, uint64_t offset, size_t length, fl_error *error)
{
    struct call c = { .op = FL_OP_READ, .iov = iov, .count = count, .offset = offset, .length = length };
    return operate(image, &c, error);
}

static int faulty_writev(fl_image *image, const struct iovec *iov, int count, uint64_t offset, size_t length, fl_error *error)
{
    struct call c = { .op = FL_OP_WRITE, .iov = iov, .count = count, .offset = offset, .length = length };
    return operate(image, &c, error);
}

static int faulty_write_compressed(fl_image *image, const void *buffer, size_t length, uint64_t offset, fl_error *error)
{
    struct iovec iov = { (void *)(uintptr_t)buffer, length };
    struct call c = { .op = FL_OP_WRITE, .iov = &iov, .count = 1, .offset = offset, .length = length, .compressed = true };
    return operate(image, &c, error);
}

/* What a zero or a discard may have taught the inner image. */
static int learn(fl_image *image, int rc)
{
    if (!atomic_load_explicit(&((struct faulty *)image)->inner->punches, memory_order_relaxed))
        atomic_store_explicit(&image->punches, false, memory_order_relaxed);
    return rc;
}

static int faulty_zero(fl_image *image, uint64_t count, uint64_t offset, fl_error *error)
{
    struct call c = { .op = FL_OP_ZERO, .offset = offset, .length = count };
    return learn(image, operate(image, &c, error));
}

static int faulty_discard(fl_image *image, uint64_t count, uint64_t offset, fl_error *error)
{
    struct call c = { .op = FL_OP_DISCARD, .offset = offset, .length = count };
    return learn(image, operate(image, &c, error));
}

static int faulty_flush(fl_image *image, fl_error *error)
{
    struct call c = { .op = FL_OP_FLUSH };
    return operate(image, &c, error);
}

static int faulty_extents(fl_image *image, uint64_t offset, uint64_t length, fl_extent *extents, size_t max, size_t *found, fl_error *error)
{
    struct call c = { .op = FL_OP_EXTENTS, .offset = offset, .length = length, .extents = extents, .max = max, .found = found };
    return operate(image, &c, error);
}

static uint64_t faulty_ends_at(fl_image *image)
{
    return image_ends_at(((struct faulty *)image)->inner);
}

static void faulty_info(fl_image *image, fl_image_info *info)
{
    fl_image *inner = ((struct faulty *)image)->inner;
    if (inner->ops->info)
        inner->ops->info(inner, info);
}

/* It counts as a flush, and then the inner one does what it has to. */
static int faulty_settle(fl_image *image, fl_error *error)
{
    int rc = image_flush(image, error);
    return rc ? rc : image_settle(((struct faulty *)image)->inner, error);
}

static int faulty_bitmap_load(fl_image *image, size_t index, struct image_bitmap *bitmap, fl_error *error)
{
    return image_bitmap_load(((struct faulty *)image)->inner, index, bitmap, error);
}

static int faulty_bitmap_store(fl_image *image, const struct image_bitmap *list, size_t count, fl_error *error)
{
    return image_bitmap_store(((struct faulty *)image)->inner, list, count, error);
}

static int faulty_descriptor(fl_image *image)
{
    return image_descriptor(((struct faulty *)image)->inner);
}

static bool faulty_reserve(fl_image *image, uint64_t count, uint64_t offset)
{
    return image_reserve(((struct faulty *)image)->inner, count, offset);
}

static uint64_t faulty_allocated(fl_image *image)
{
    fl_image *inner = ((struct faulty *)image)->inner;
    return inner->ops->allocated(inner);
}

static void forget(struct rule *rules)
{
    while (rules) {
        struct rule *next = rules->next;
        free(rules);
        rules = next;
    }
}

static void faulty_destroy(fl_image *image)
{
    struct faulty *w = (struct faulty *)image;
    struct rule *rules;
    bool mine = image->gate.generation == fl_generation;
    if (mine)
        pthread_mutex_lock(&w->lock);
    rules = w->rules;
    w->rules = NULL;
    if (mine)
        pthread_mutex_unlock(&w->lock);
    forget(rules);
    image_unref(w->inner);
}

static const struct image_ops faulty_ops = {
    .format = "faulty",
    .readv = faulty_readv, .writev = faulty_writev, .zero = faulty_zero, .discard = faulty_discard, .flush = faulty_flush,
    .write_compressed = faulty_write_compressed, .info = faulty_info, .extents = faulty_extents, .allocated = faulty_allocated, .reserve = faulty_reserve,
    .ends_at = faulty_ends_at, .descriptor = faulty_descriptor, .settle = faulty_settle,
    .bitmap_load = faulty_bitmap_load, .bitmap_store = faulty_bitmap_store, .destroy = faulty_destroy,
};

int faulty_new(fl_image *inner, fl_image **image, fl_error *error)
{
    struct faulty *w = image_alloc(sizeof *w);
    int rc = w ? 0 : -ENOMEM;
    if (rc == 0)
        rc = -pthread_mutex_init(&w->lock, NULL);
    if (rc == 0)
        rc = cond_init(&w->resumed);
    if (rc == 0)
        rc = image_init(&w->image, &faulty_ops, inner->name);
    if (rc < 0) {
        free(w);
        return fail(error, -rc, FL_SIDE_NONE, 0, 0, "cannot make a faulty image around '%s'", inner->name);
    }
    w->inner = image_ref(inner);
    w->image.size = inner->size;
    w->image.cluster_size = inner->cluster_size;
    w->image.alignment = inner->alignment;
    w->image.writable = inner->writable;
    w->image.block_device = inner->block_device;
    w->image.direct = inner->direct;
    atomic_store(&w->image.punches, atomic_load(&inner->punches));
    *image = &w->image;
    return 0;
}

/* ---- the public calls. They pass no gate: what the layers above left hanging must be let go after close(), too. ---- */

static struct faulty *faulty_of(fl_image *image)
{
    return image && image->ops == &faulty_ops && image->gate.generation == fl_generation ? (struct faulty *)image : NULL;
}

static int fail_not_faulty(fl_image *image, fl_error *error)
{
    if (image && image->ops == &faulty_ops)
        return fail(error, FL_EFORKED, FL_SIDE_NONE, 0, 0, "image '%s' belongs to the parent process", image->name);
    return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "faults can be injected only into an image that was made for it");
}

static const char *what_is_wrong(const fl_fault *f)
{
    if (!f)
        return "there is none";
    if (f->ops <= 0 || f->ops & ~FL_OP_ANY)
        return "unknown operations";
    if (f->action < FL_FAULT_ERROR || f->action > FL_FAULT_HANG_AFTER)
        return "unknown action";
    if (f->err < 0 || (f->action == FL_FAULT_ERROR && f->err == 0))
        return "it needs a positive errno";
    if (f->action == FL_FAULT_SHORT && f->ops & ~(FL_OP_READ | FL_OP_WRITE))
        return "only reads and writes can be short";
    if (f->nth == 0)
        return "nth counts from 1";
    if (!(f->probability >= 0 && f->probability <= 1))
        return "the probability is not between 0 and 1";
    return NULL;
}

int fl_fault_add(fl_image *image, const fl_fault *fault, fl_error *error)
{
    struct faulty *w = faulty_of(image);
    const char *wrong;
    struct rule *rule, **end;
    if (!w)
        return fail_not_faulty(image, error);
    if ((wrong = what_is_wrong(fault)))
        return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "this fault cannot be injected: %s", wrong);
    if (!(rule = calloc(1, sizeof *rule)))
        return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for another fault");
    rule->fault = *fault;
    rule->random = fault->seed;
    pthread_mutex_lock(&w->lock);
    for (end = &w->rules; *end; end = &(*end)->next)
        ;
    *end = rule;
    pthread_mutex_unlock(&w->lock);
    return 0;
}

static void let_go(struct faulty *w)            /* with the lock */
{
    w->resumes++;
    pthread_cond_broadcast(&w->resumed);
}

int fl_fault_clear(fl_image *image)
{
    struct faulty *w = faulty_of(image);
    if (!w)
        return fail_not_faulty(image, NULL);
    pthread_mutex_lock(&w->lock);
    struct rule *rules = w->rules;
    w->rules = NULL;
    let_go(w);
    pthread_mutex_unlock(&w->lock);
    forget(rules);
    return 0;
}

int fl_fault_resume(fl_image *image)
{
    struct faulty *w = faulty_of(image);
    if (!w)
        return fail_not_faulty(image, NULL);
    pthread_mutex_lock(&w->lock);
    let_go(w);
    pthread_mutex_unlock(&w->lock);
    return 0;
}

uint64_t fl_fault_seen(fl_image *image, int ops)
{
    struct faulty *w = faulty_of(image);
    uint64_t sum = 0;
    if (!w)
        return 0;
    pthread_mutex_lock(&w->lock);
    for (int i = 0; i < OPS; i++)
        if (ops & (1 << i))
            sum += w->seen[i];
    pthread_mutex_unlock(&w->lock);
    return sum;
}

uint64_t fl_fault_hanging(fl_image *image)
{
    struct faulty *w = faulty_of(image);
    if (!w)
        return 0;
    pthread_mutex_lock(&w->lock);
    uint64_t hanging = w->hanging;
    pthread_mutex_unlock(&w->lock);
    return hanging;
}
