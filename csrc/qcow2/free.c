/* free.c: from being taken out of the map to being free (Q3).
 *
 * Under `lock`, at the same instant as the entries change, the clusters are noted in q->freed. The commit that makes those entries durable moves
 * them to q->waiting, with a ticket of the epoch. When all transfers have left that may know of them, settle() drops the references, punches
 * what has none any more, and lets it be used again.
 */
#define _GNU_SOURCE
#include <stdlib.h>

#include "allocate.h"

typedef unsigned long long ull;

/* ---- runs ---- */

int runs_reserve(struct runs *runs, size_t more)
{
    if (runs->room - runs->count >= more)
        return 0;
    size_t room = MAX(runs->room * 2, runs->count + more);
    struct run *run = realloc(runs->run, room * sizeof *run);
    if (!run)
        return -ENOMEM;
    runs->run = run;
    runs->room = room;
    return 0;
}

void runs_add(struct runs *runs, uint64_t first, uint64_t count)
{
    struct run *last = runs->count ? &runs->run[runs->count - 1] : NULL;
    if (last && last->first + last->count == first)
        last->count += count;
    else
        runs->run[runs->count++] = (struct run){ first, count };
}

int freed_reserve(struct qcow2 *q, size_t more)
{
    if (!q->freed && !(q->freed = calloc(1, sizeof *q->freed)))
        return -ENOMEM;
    return runs_reserve(&q->freed->runs, more);
}

void freed_add(struct qcow2 *q, uint64_t first, uint64_t count)
{
    runs_add(&q->freed->runs, first, count);
    atomic_fetch_add(&q->freed_bytes, count << q->cluster_bits);
}

void freed_destroy(struct freed *list)
{
    for (struct freed *next; list; list = next) {
        next = list->next;
        free(list->runs.run);
        free(list);
    }
}

/* ---- freeing ---- */

/* One reference less. Those that nobody has any more are added to `dead` and keep their last one for now. Under `alloc`. */
static int drop_one(struct qcow2 *q, uint64_t cluster, struct runs *dead, fl_error *error)
{
    struct slice *slice;
    if (runs_reserve(dead, 1) < 0)
        return -ENOMEM;
    int rc = count_slice(q, cluster, &slice, error);
    if (rc < 0)
        return rc;
    uint64_t n = slice ? count_load(slice, q->refcount_order, in_region(q, cluster)) : 0;
    if (n > 1)
        count_set(q, slice, cluster, 1, n - 1);
    else if (n == 1)
        runs_add(dead, cluster, 1);
    if (slice)
        cache_put(q, slice);
    if (n == 0)
        qcow2_corrupt(q, UINT64_MAX, error, "cluster %llu of the file was in use, but its refcount is 0", (ull)cluster);
    return 0;
}

static int by_first(const void *a, const void *b)
{
    const struct run *x = a, *y = b;
    return (x->first > y->first) - (x->first < y->first);
}

/* Work off `freed`; what is left in it could not be done now. In two steps, as punching is not for a lock that others wait for: first those that lose
   their last reference are found, and keep it, so that nobody can have them; when they are punched, they are free. */
static void settle_one(struct qcow2 *q, struct freed *freed)
{
    struct runs dead = { 0 };
    size_t done = 0;
    int rc = 0;
    qsort(freed->runs.run, freed->runs.count, sizeof *freed->runs.run, by_first);
    pthread_mutex_lock(&q->alloc);
    for (; done < freed->runs.count; done++) {
        struct run *run = &freed->runs.run[done];
        for (; run->count > 0; run->first++, run->count--) {
            area_keep_out(q, run->first);
            if ((rc = drop_one(q, run->first, &dead, NULL)) < 0)
                break;
        }
        if (rc < 0)
            break;
    }
    pthread_mutex_unlock(&q->alloc);
    memmove(freed->runs.run, freed->runs.run + done, (freed->runs.count - done) * sizeof *freed->runs.run);
    freed->runs.count -= done;
    for (size_t i = 0; i < dead.count; i++)
        io_punch(&q->io, dead.run[i].count << q->cluster_bits, dead.run[i].first << q->cluster_bits);
    pthread_mutex_lock(&q->alloc);
    for (size_t i = 0; i < dead.count; i++)
        take_back(q, dead.run[i], NULL);
    pthread_mutex_unlock(&q->alloc);
    free(dead.run);
}

void settle(struct qcow2 *q)
{
    if (!atomic_load_explicit(&q->any_waiting, memory_order_relaxed) || pthread_mutex_trylock(&q->settling))
        return;
    for (;;) {
        pthread_mutex_lock(&q->lock);
        struct freed *freed = q->waiting;
        pthread_mutex_unlock(&q->lock);
        if (!freed || !epoch_passed(&q->epoch, freed->ticket))
            break;
        settle_one(q, freed);
        if (freed->runs.count)
            break;                              /* a table could not be read: later, perhaps */
        pthread_mutex_lock(&q->lock);
        q->waiting = freed->next;
        atomic_store(&q->any_waiting, q->waiting != NULL);
        pthread_mutex_unlock(&q->lock);
        freed->next = NULL;
        freed_destroy(freed);
    }
    pthread_mutex_unlock(&q->settling);
}
