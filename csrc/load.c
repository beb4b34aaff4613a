/* load.c: a guest that reads and writes a disk, for measuring: see fl_load_start in fleece.h.
 *
 * Threads take numbers from one counter; a number tells the block, and with a rate the moment when it is due. So what is done depends on the
 * seed alone, and the first n operations of a load touch the same blocks whenever it is repeated. Each thread counts for itself.
 */
#define _GNU_SOURCE
#include <stdlib.h>

#include "gate.h"
#include "util/latency.h"

#define MAX_BLOCK (UINT32_C(16) << 20)
#define MAX_THREADS 256u

struct fl_load {
    /* fixed after creation */
    fl_disk *disk;
    fl_load_options options;
    uint64_t blocks, stride;
    unsigned order_bits;                /* blocks is at most 2 to this */
    uint64_t begin;
    unsigned generation;                /* of the process that made it */

    /* atomic */
    atomic_uint_least64_t next;         /* the number of the next operation */
    atomic_uint_least64_t operations, bytes_read, bytes_written;
    atomic_bool stop;
    struct latency latency;

    pthread_mutex_t lock;               /* protects what follows */
    pthread_cond_t changed;             /* a thread ended; or shall stop waiting */
    unsigned running;
    uint64_t ended;                     /* when the last thread did */
    int rc;                             /* the first failure */
    fl_error error;
};

/* splitmix64: a number's own random bits. */
static uint64_t scatter(uint64_t n)
{
    n += UINT64_C(0x9e3779b97f4a7c15);
    n = (n ^ n >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    n = (n ^ n >> 27) * UINT64_C(0x94d049bb133111eb);
    return n ^ n >> 31;
}

/* A permutation of the blocks, without a table: each step is a bijection of the numbers below 2 to order_bits; those that are no blocks go on
   until they are. */
static uint64_t shuffled(const fl_load *load, uint64_t n)
{
    unsigned bits = load->order_bits;
    uint64_t mask = bits < 64 ? (UINT64_C(1) << bits) - 1 : UINT64_MAX, seed = scatter(load->options.seed);
    do {
        for (int round = 0; round < 3; round++) {
            n = (n * (scatter(seed + (uint64_t)round) | 1) + seed) & mask;
            n ^= n >> (bits / 2 + 1);
        }
    } while (n >= load->blocks);
    return n;
}

static uint64_t block_of(const fl_load *load, uint64_t number, uint64_t random)
{
    const fl_load_options *options = &load->options;
    if (options->order == FL_ORDER_SEQUENTIAL)
        return number % load->blocks;
    if (options->order == FL_ORDER_ONCE)
        return shuffled(load, number);
    uint64_t hot = load->blocks * options->hot_space_percent / 100, any = scatter(random);
    if (hot == 0 || hot == load->blocks)
        return any % load->blocks;
    return random % 100 < options->hot_percent ? any % hot : hot + any % (load->blocks - hot);
}

static void wait_until(fl_load *load, uint64_t due)
{
    pthread_mutex_lock(&load->lock);
    while (!atomic_load(&load->stop) && cond_wait_until(&load->changed, &load->lock, due))
        ;
    pthread_mutex_unlock(&load->lock);
}

static int operate(fl_load *load, uint64_t number, unsigned char *buffer, fl_error *error)
{
    const fl_load_options *options = &load->options;
    uint64_t random = scatter(options->seed ^ scatter(number)), start = now_ns();
    if (options->rate) {
        uint64_t due = load->begin + (uint64_t)((double)number / (double)options->rate * 1e9);
        if (due > start)
            wait_until(load, due);
        start = due;
    }
    if (atomic_load(&load->stop))
        return 0;
    uint64_t offset = block_of(load, number, random) * load->stride;
    bool read = random / 100 % 100 < options->read_percent;
    int rc;
    if (read) {
        rc = fl_disk_pread(load->disk, buffer, options->block, offset, error);
    } else {
        memcpy(buffer, &random, MIN(sizeof random, options->block));
        rc = fl_disk_pwrite(load->disk, buffer, options->block, offset, error);
    }
    if (rc)
        return rc;
    uint64_t now = now_ns();
    latency_add(&load->latency, now > start ? now - start : 0);
    atomic_fetch_add_explicit(read ? &load->bytes_read : &load->bytes_written, options->block, memory_order_relaxed);
    atomic_fetch_add_explicit(&load->operations, 1, memory_order_relaxed);
    return 0;
}

static void *load_main(void *argument)
{
    fl_load *load = argument;
    const fl_load_options *options = &load->options;
    uint64_t most = options->operations ? options->operations : UINT64_MAX;
    fl_error error = { 0 };
    int rc = 0;
    if (options->order == FL_ORDER_ONCE)
        most = MIN(most, load->blocks);
    unsigned char *buffer = malloc(options->block);
    if (!buffer)
        rc = fail(&error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for a load's buffer");
    for (uint32_t i = 0; rc == 0 && i + 8 <= options->block; i += 8) {
        uint64_t noise = scatter(i);
        memcpy(buffer + i, &noise, 8);
    }
    while (rc == 0 && !atomic_load_explicit(&load->stop, memory_order_relaxed)) {
        uint64_t number = atomic_fetch_add_explicit(&load->next, 1, memory_order_relaxed);
        if (number >= most)
            break;
        rc = operate(load, number, buffer, &error);
    }
    free(buffer);
    pthread_mutex_lock(&load->lock);
    if (rc && !load->rc) {
        load->rc = rc;
        load->error = error;
        atomic_store(&load->stop, true);
    }
    load->ended = now_ns();
    load->running--;
    pthread_cond_broadcast(&load->changed);     /* the last use of `load`: fl_load_free waits for the lock */
    pthread_mutex_unlock(&load->lock);
    return NULL;
}

static int check_options(fl_disk *disk, const fl_load_options *options, fl_error *error)
{
    if (options->block == 0 || options->block > MAX_BLOCK || options->block > fl_disk_size(disk))
        return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "a load's block has 1 byte to 16 MiB, and is not larger than the disk");
    if (options->threads == 0 || options->threads > MAX_THREADS)
        return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "a load has 1 to %u threads", MAX_THREADS);
    if (options->order < FL_ORDER_ONCE || options->order > FL_ORDER_SEQUENTIAL || options->read_percent > 100 || options->hot_percent > 100 ||
        options->hot_space_percent > 100)
        return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "the order of a load is not known, or its percentages are above 100");
    return 0;
}

int fl_load_start(fl_disk *disk, const fl_load_options *options, fl_load **out, fl_error *error)
{
    int rc = check_options(disk, options, error);
    if (rc)
        return rc;
    fl_load *load = calloc(1, sizeof *load);
    if (!load || pthread_mutex_init(&load->lock, NULL) || cond_init(&load->changed)) {
        free(load);
        return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for a load");
    }
    load->disk = disk;
    load->options = *options;
    load->stride = MAX(options->stride, options->block);
    load->blocks = (fl_disk_size(disk) - options->block) / load->stride + 1;
    load->order_bits = load->blocks > 1 ? 64u - (unsigned)__builtin_clzll(load->blocks - 1) : 1;
    load->generation = fl_generation;
    load->begin = now_ns();
    pthread_mutex_lock(&load->lock);
    for (unsigned i = 0; i < options->threads && rc == 0; i++) {
        rc = thread_start(load_main, load, "fl-load");
        load->running += rc == 0;
    }
    pthread_mutex_unlock(&load->lock);
    if (rc) {
        fail(error, -rc, FL_SIDE_NONE, 0, 0, "cannot start the threads of a load");
        fl_load_free(load);
        return rc;
    }
    *out = load;
    return 0;
}

int fl_load_stats_get(fl_load *load, fl_load_stats *out, fl_error *error)
{
    (void)error;
    fl_load_stats stats = { 0 };
    pthread_mutex_lock(&load->lock);
    stats.finished = load->running == 0;
    stats.elapsed_ns = (stats.finished ? load->ended : now_ns()) - load->begin;
    pthread_mutex_unlock(&load->lock);
    latency_read(&load->latency, stats.latency, &stats.latency_max);
    stats.operations = atomic_load(&load->operations);
    stats.bytes_read = atomic_load(&load->bytes_read);
    stats.bytes_written = atomic_load(&load->bytes_written);
    *out = stats;
    return 0;
}

int fl_load_wait(fl_load *load, uint64_t timeout, fl_error *error)
{
    uint64_t deadline = add_sat(now_ns(), timeout);
    pthread_mutex_lock(&load->lock);
    while (load->running && cond_wait_until(&load->changed, &load->lock, deadline))
        ;
    int rc = load->running ? -FL_ERUNNING : load->rc;
    if (rc == -FL_ERUNNING)
        fail(error, FL_ERUNNING, FL_SIDE_NONE, 0, 0, "the load still runs");
    else if (rc && error)
        *error = load->error;
    pthread_mutex_unlock(&load->lock);
    return rc;
}

int fl_load_stop(fl_load *load)
{
    pthread_mutex_lock(&load->lock);
    atomic_store(&load->stop, true);
    pthread_cond_broadcast(&load->changed);
    pthread_mutex_unlock(&load->lock);
    return 0;
}

void fl_load_free(fl_load *load)
{
    if (!load || load->generation != fl_generation)
        return;
    fl_load_stop(load);
    fl_load_wait(load, UINT64_MAX, NULL);
    pthread_cond_destroy(&load->changed);
    pthread_mutex_destroy(&load->lock);
    free(load);
}
