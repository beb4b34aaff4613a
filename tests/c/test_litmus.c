/* test_litmus.c: two threads race through the few accesses that everything hangs on, millions of times (docs/memory-order.md says why each holds).
 *
 * test_litmus DIR [--seconds N] [--seed N] [--only NAME]          files are made in DIR; N seconds for each race (default 0.5)
 *
 * It is compiled together with gate.c and cbw.c, so that their own static functions run here, not copies of them. In each round both threads come
 * close to each other, off by a random moment of up to some 100 ns, and do their half on locations that the round has for itself; what they saw is its outcome.
 * Outcomes that the order of memory forbids end the program. Those that show that the halves overlapped are counted and printed: a race without any has
 * shown nothing (it goes on for longer then), and the tests demand some. `control` is a race without fences that is allowed to go wrong, and its overlaps
 * are the times it did: without any the machine, or its emulator, was not seen to reorder, and the other races show only that no interleaving is wrong.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <stdatomic.h>

#include "check.h"
#include "util/util.h"

/* A wait that should end, as the code under test makes them: counted, and a failure when nobody ends it. */
#define LOST_WAKEUP (20 * SLOWDOWN * SECOND)
static atomic_ulong sleeps[2], closer_sleeps;
static _Thread_local unsigned my_side;

static int counted_wait(pthread_cond_t *cond, pthread_mutex_t *mutex)
{
    atomic_fetch_add_explicit(&sleeps[my_side], 1, memory_order_relaxed);
    CHECK(cond_wait_until(cond, mutex, now_ns() + LOST_WAKEUP), "nobody woke side %u", my_side);
    return 0;
}

static bool counted_wait_until(pthread_cond_t *cond, pthread_mutex_t *mutex, uint64_t deadline)
{
    (void)deadline;
    atomic_fetch_add_explicit(&closer_sleeps, 1, memory_order_relaxed);
    CHECK(cond_wait_until(cond, mutex, now_ns() + LOST_WAKEUP), "nobody woke the closer");
    return true;
}

#define pthread_cond_wait counted_wait
#define cond_wait_until counted_wait_until
#include "gate.c"
#include "cbw.c"
#undef pthread_cond_wait
#undef cond_wait_until

/* ---- rounds ---- */

#define CHUNK 8192u                     /* rounds between two resets, at most */
#define OUTCOMES 4u                     /* of one side */
#define PATIENCE 20000u                 /* spins that a side waits for the other, at most: it may have no processor */
#define LONGER (10 * SECOND)            /* a race that did not overlap goes on for so long: the machine is busy */

struct race {
    const char *name;
    unsigned chunk;                     /* rounds for which there are fresh locations */
    void (*reset)(void);                /* all locations are as new: by side 0 while side 1 waits */
    void (*verify)(void);               /* after a chunk, likewise; or NULL */
    unsigned (*half[2])(uint64_t i);    /* what the side saw: below OUTCOMES. i is below chunk */
    uint16_t forbidden;                 /* bit OUTCOMES * (outcome of side 0) + (outcome of side 1) */
    uint16_t overlap;                   /* outcomes that happen only, or mostly, when the halves overlap */
    uint64_t (*overlaps)(void);         /* where the outcomes do not tell; or NULL */
    void (*end)(void);                  /* or NULL */
};

static const char *directory;
static uint64_t seed = 1, seconds_ns = SECOND / 2;

static struct { _Alignas(128) atomic_ulong at; } place[2];     /* the round that the side is in, counted over all chunks */
static unsigned char seen[2][CHUNK];
static uint64_t counts[OUTCOMES * OUTCOMES], rounds;
static bool over;
static pthread_barrier_t barrier;

/* Close to the other side, if that runs now; then off by a random moment. */
static void approach(uint64_t round, uint64_t *random)
{
    static _Thread_local unsigned patience = PATIENCE;
    unsigned spins = 0;
    atomic_store_explicit(&place[my_side].at, round, memory_order_relaxed);
    while (spins < patience && atomic_load_explicit(&place[1 - my_side].at, memory_order_relaxed) < round)
        spins++;
    patience = spins < patience ? PATIENCE : patience / 2 + 1;
    for (volatile unsigned n = (unsigned)below(random, 24); n; n--)
        ;
}

static void judge(const struct race *race)
{
    for (unsigned i = 0; i < race->chunk; i++) {
        unsigned outcome = seen[0][i] * OUTCOMES + seen[1][i];
        CHECK(!(race->forbidden >> outcome & 1), "%s, round %u of a chunk: side 0 saw %u, side 1 saw %u", race->name, i, seen[0][i], seen[1][i]);
        counts[outcome]++;
    }
    rounds += race->chunk;
}

/* How often the halves overlapped, as far as that can be told. */
static uint64_t count_overlaps(const struct race *race)
{
    uint64_t overlaps = 0;
    if (race->overlaps)
        return race->overlaps();
    for (unsigned n = 0; n < OUTCOMES * OUTCOMES; n++)
        if (race->overlap >> n & 1)
            overlaps += counts[n];
    return overlaps;
}

static void *race_side(void *argument)
{
    const struct race *race = ((void **)argument)[0];
    my_side = (unsigned)(uintptr_t)((void **)argument)[1];
    uint64_t random = seed * 2 + my_side, deadline = now_ns() + seconds_ns;
    for (uint64_t base = 0; !over; base += race->chunk) {
        if (my_side == 0)
            race->reset();
        pthread_barrier_wait(&barrier);
        for (unsigned i = 0; i < race->chunk; i++) {
            approach(base + i + 1, &random);
            seen[my_side][i] = (unsigned char)race->half[my_side](i);
        }
        pthread_barrier_wait(&barrier);
        if (my_side == 0) {
            judge(race);
            if (race->verify)
                race->verify();
            over = now_ns() >= deadline && (count_overlaps(race) || now_ns() >= deadline + LONGER);
        }
        pthread_barrier_wait(&barrier);
    }
    return NULL;
}

static void run(const struct race *race)
{
    pthread_t threads[2];
    void *arguments[2][2] = { { (void *)race, (void *)0 }, { (void *)race, (void *)1 } };
    memset(counts, 0, sizeof counts);
    rounds = 0;
    over = false;
    for (int i = 0; i < 2; i++) {
        atomic_store(&place[i].at, 0);
        atomic_store(&sleeps[i], 0);
    }
    atomic_store(&closer_sleeps, 0);
    for (int i = 0; i < 2; i++)
        CHECK(pthread_create(&threads[i], NULL, race_side, arguments[i]) == 0);
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    printf("%s_rounds %llu\n%s_overlaps %llu\n", race->name, (unsigned long long)rounds, race->name, (unsigned long long)count_overlaps(race));
    if (race->end)
        race->end();
    fflush(stdout);
}

#define O(a, b) (1u << ((a) * OUTCOMES + (b)))
enum { O_NONE = 0, O_SECOND = 1, O_FIRST = OUTCOMES };          /* indexes of counts: who of the two saw something */

/* ---- plain memory that stands for the source's bytes and for disk->snapshots: as the compiler's plain loads and stores, no order of their own ---- */

#define RELAXED memory_order_relaxed
static struct { _Alignas(CACHE_LINE) _Atomic uint32_t word; } mine[CHUNK], yours[CHUNK];
#define GET(x) atomic_load_explicit(&(x).word, RELAXED)
#define PUT(x, value) atomic_store_explicit(&(x).word, value, RELAXED)

static void reset_words(void)
{
    for (unsigned i = 0; i < CHUNK; i++) {
        PUT(mine[i], 0);
        PUT(yours[i], 0);
    }
}

/* ---- control: store, then load, no fence: 0 and 0 is what the fences forbid elsewhere ---- */

static unsigned control_0(uint64_t i) { PUT(mine[i], 1); return GET(yours[i]); }
static unsigned control_1(uint64_t i) { PUT(yours[i], 1); return GET(mine[i]); }

/* ---- gate: a write that passes and a cut that closes: exactly one of them is first, and the other sees all that it did ---- */

static struct gate gate;

static void reset_gate(void)
{
    static bool made;
    if (!made)
        CHECK(gate_init(&gate) == 0);
    made = true;
    reset_words();
}

static unsigned gate_user(uint64_t i)
{
    CHECK(gate_enter(&gate) == 0);
    unsigned saw = GET(yours[i]);       /* as disk->snapshots */
    PUT(mine[i], 1);                    /* as the source */
    gate_leave(&gate);
    return saw;
}

static unsigned gate_closer(uint64_t i)
{
    CHECK(gate_close(&gate, UINT64_MAX) == 0);
    PUT(yours[i], 1);
    unsigned saw = GET(mine[i]);
    gate_open(&gate);
    return saw;
}

/* One had to wait for the other. */
static uint64_t gate_overlaps(void) { return atomic_load(&sleeps[0]) + atomic_load(&closer_sleeps); }

/* ---- write: bit, fence, data; reader: data, fence, bit: new data without the bit would be a lie ---- */

#define POLLS 8                         /* a reader looks again while there is nothing to see: it rarely hits the moment at once */
static struct bitmap bits, other_bits;

static uint64_t bit_of(uint64_t i) { return i * 67; }   /* words are shared, pages change */

static void reset_bits(void)
{
    bitmap_destroy(&bits);
    bitmap_destroy(&other_bits);
    CHECK(bitmap_init(&bits, bit_of(CHUNK)) == 0 && bitmap_init(&other_bits, bit_of(CHUNK)) == 0);
    reset_words();
}

static unsigned write_writer(uint64_t i)
{
    bitmap_set(&bits, bit_of(i), 1);
    full_fence();
    PUT(mine[i], 1);
    return 0;
}

static unsigned write_reader(uint64_t i)
{
    unsigned saw = 0;
    for (int n = 0; n < POLLS && !saw; n++) {
        unsigned data = GET(mine[i]);
        full_fence();
        saw = data | (unsigned)bitmap_test(&bits, bit_of(i)) << 1;
    }
    return saw;
}

/* ---- the same, the data being bytes of a file ---- */

static int file;

static void reset_file(void)
{
    if (!file)
        CHECK((file = open(directory, O_TMPFILE | O_RDWR, 0600)) > 0);
    CHECK(ftruncate(file, 0) == 0);
    static char zeros[65536];
    for (unsigned at = 0; at < CHUNK * 64; at += sizeof zeros)
        CHECK(pwrite(file, zeros, sizeof zeros, at) == sizeof zeros);
    reset_bits();
}

static unsigned file_writer(uint64_t i)
{
    bitmap_set(&bits, bit_of(i), 1);
    full_fence();
    CHECK(pwrite(file, "\1", 1, (off_t)i * 64) == 1);
    return 0;
}

static unsigned file_reader(uint64_t i)
{
    unsigned saw = 0;
    for (int n = 0; n < POLLS && !saw; n++) {
        unsigned char data;
        CHECK(pread(file, &data, 1, (off_t)i * 64) == 1);
        full_fence();
        saw = data | (unsigned)bitmap_test(&bits, bit_of(i)) << 1;
    }
    return saw;
}

/* ---- relay: a third writer sees `saved` set by another, and writes: here the side that saw passes the news on ---- */

static unsigned relay_saver(uint64_t i)
{
    unsigned old = GET(mine[i]);        /* the old data is read before `saved` is set: it can't be what a writer that saw the bit put there */
    bitmap_set(&bits, bit_of(i), 1);
    return old;
}

static unsigned relay_writer(uint64_t i)
{
    bool saved = bitmap_test(&bits, bit_of(i));
    if (saved)
        PUT(mine[i], 1);
    return saved;
}

/* Both orders happened. */
static uint64_t both_orders(void) { return MIN(counts[O_SECOND], counts[O_NONE] + counts[O_FIRST]); }

/* ---- release: `released` then look at `saved`, against `saved` then look at `released`: one of them frees it ---- */

static unsigned release_releaser(uint64_t i)
{
    bitmap_set(&other_bits, bit_of(i), 1);
    full_fence();
    return bitmap_test(&bits, bit_of(i));
}

static unsigned release_saver(uint64_t i)
{
    bitmap_set(&bits, bit_of(i), 1);
    full_fence();
    return bitmap_test(&other_bits, bit_of(i));
}

/* ---- claim: two writers want the same cluster: exactly one gets it ---- */

static unsigned claim_half(uint64_t i)
{
    uint64_t word = bit_of(i) / 64, mask = UINT64_C(1) << bit_of(i) % 64;
    return bitmap_fetch_or(&bits, word, mask) & mask ? 0 : 1;
}

/* ---- pages: an untouched page becomes mixed or "ones" under two threads at once; what was set is seen at once, and for ever ---- */

#define PAGES 1024u
static uint64_t page_seed;

static void reset_pages(void)
{
    bitmap_destroy(&bits);
    CHECK(bitmap_init(&bits, (uint64_t)PAGES << BITMAP_PAGE_SHIFT) == 0);
    page_seed++;
    reset_words();
}

static uint64_t page_first(uint64_t i) { return i << BITMAP_PAGE_SHIFT; }

static uint64_t page_bit(uint64_t i, unsigned side)
{
    uint64_t random = (page_seed << 32) + i;
    uint64_t both = next_random(&random);
    return page_first(i) + ((both >> 16 * side) & ((1u << BITMAP_PAGE_SHIFT) - 1));
}

static unsigned pages_half(uint64_t i, unsigned side, bool ones)
{
    uint64_t own = page_bit(i, side), other = page_bit(i, 1 - side);
    if (ones)
        bitmap_set(&bits, page_first(i), UINT64_C(1) << BITMAP_PAGE_SHIFT);
    else
        bitmap_fetch_or(&bits, own / 64, UINT64_C(1) << own % 64);
    CHECK(bitmap_test(&bits, own), "a bit that was just set reads as clear");
    CHECK(bitmap_next_set(&bits, own, own + 1) == own, "a scan does not find a bit that was just set");
    CHECK(bitmap_next_clear(&bits, own, own + 1) == own + 1, "a scan finds a bit clear that was just set");
    full_fence();
    return bitmap_test(&bits, other);
}

static unsigned pages_0(uint64_t i) { return pages_half(i, 0, false); }
static unsigned pages_1(uint64_t i) { return pages_half(i, 1, false); }

static unsigned ones_0(uint64_t i)
{
    uint64_t other = page_bit(i, 1);
    pages_half(i, 0, true);
    /* Did the single bit's setter get to the page first? */
    return (unsigned)(atomic_load_explicit(&bits.words[other / 64], RELAXED) >> (other % 64) & 1);
}

static unsigned ones_1(uint64_t i) { return pages_half(i, 1, false); }

static void check_pages(void)
{
    for (unsigned i = 0; i < PAGES; i++)
        CHECK(bitmap_test(&bits, page_bit(i, 0)) && bitmap_test(&bits, page_bit(i, 1)), "page %u lost a bit", i);
}

static void check_ones(void)
{
    CHECK(bitmap_next_clear(&bits, 0, bits.bits) == bits.bits, "a page that was set whole has a clear bit");
}

/* ---- waiters: a claim ends while another writer goes to sleep for it: it is never forgotten ---- */

#define CLUSTERS CHUNK
static fl_image *source;
static fl_disk *disk;
static fl_snapshot *snapshot;

static void reset_snapshot(void)
{
    static const fl_snapshot_options options = { .cluster_size = 4096, .on_cbw_error = FL_BREAK_SNAPSHOT, .cbw_timeout = SECOND,
                                                 .stage_size = CLUSTERS * UINT64_C(4096) };
    static char old[65536];
    memset(old, 0xaa, sizeof old);
    if (snapshot)
        fl_snapshot_free(snapshot);
    if (!disk) {
        MUST(fl_image_create_nameless(directory, CLUSTERS * UINT64_C(4096), &source, &why));
        MUST(fl_disk_open(source, &disk, &why));
    }
    for (uint64_t at = 0; at < CLUSTERS * UINT64_C(4096); at += sizeof old)
        MUST(fl_disk_pwrite(disk, old, sizeof old, at, &why));
    MUST(fl_snapshot_cut(&disk, &options, 1, &snapshot, &why));
}

static void let_go_of_snapshot(void)
{
    fl_snapshot_free(snapshot);
    fl_disk_free(disk);
    fl_image_free(source);
    snapshot = NULL;
    disk = NULL;
    source = NULL;
}

static struct saving holder[CLUSTERS], waiting[CLUSTERS];

static void hold_claims(void)
{
    reset_snapshot();
    for (uint64_t i = 0; i < CLUSTERS; i++) {
        holder[i].snapshot = waiting[i].snapshot = snapshot;
        holder[i].first = waiting[i].first = i;
        holder[i].end = waiting[i].end = i + 1;
        claim(&holder[i]);
        claim(&waiting[i]);
        CHECK(holder[i].count == 1 && !holder[i].others && waiting[i].count == 0 && waiting[i].others);
    }
}

static unsigned claims_holder(uint64_t i)
{
    if (i & 1)
        bitmap_set(&snapshot->zero, i, 1);
    if (i & 1)
        bitmap_set(&snapshot->saved, i, 1);
    end_claims(&holder[i]);              /* an even one is given up */
    return 0;
}

static unsigned claims_waiter(uint64_t i)
{
    bool dealt_with = wait_for_others(&waiting[i]);
    CHECK(dealt_with == (i & 1), "round %llu", (unsigned long long)i);
    return dealt_with;
}

static uint64_t claims_overlaps(void) { return atomic_load(&sleeps[1]); }

/* ---- all of it: a guest writes what a backup reads, or releases ---- */

static uint64_t repeated, saved_first, released_first;          /* clusters */

static void count_repeated(void)
{
    fl_stats stats;
    MUST(fl_snapshot_stats(snapshot, &stats, &why));
    repeated += stats.reads_repeated;
}

static unsigned disk_writer(uint64_t i)
{
    static char new_data[4096];
    memset(new_data, 0x55, sizeof new_data);
    MUST(fl_disk_pwrite(disk, new_data, sizeof new_data, i * 4096, &why));
    return 0;
}

static unsigned snapshot_reader(uint64_t i)
{
    unsigned char data[4096];
    for (int reads = 0; reads < POLLS; reads++) {
        MUST(fl_snapshot_pread(snapshot, data, sizeof data, i * 4096, &why));
        for (unsigned n = 0; n < sizeof data; n++)
            CHECK(data[n] == 0xaa, "cluster %llu, byte %u", (unsigned long long)i, n);
    }
    return 0;
}

static uint64_t reads_overlaps(void) { return repeated; }

static void check_nothing_stored(void)
{
    fl_stats stats;
    MUST(fl_snapshot_stats(snapshot, &stats, &why));
    CHECK(stats.staged_bytes == 0, "%llu bytes of released clusters are still in the store", (unsigned long long)stats.staged_bytes);
    saved_first += stats.clusters_saved;
    released_first += stats.clusters_discarded - stats.clusters_saved;
}

static unsigned releaser(uint64_t i)
{
    MUST(fl_snapshot_discard(snapshot, 4096, i * 4096, &why));
    return 0;
}

static uint64_t frees_overlaps(void) { return MIN(saved_first, released_first); }

/* ---- main ---- */

static const struct race races[] = {
    { "control", CHUNK, reset_words, NULL, { control_0, control_1 }, 0, O(0, 0), NULL, NULL },
    { "gate", CHUNK, reset_gate, NULL, { gate_user, gate_closer }, O(0, 0) | O(1, 1), 0, gate_overlaps, NULL },
    { "write", CHUNK, reset_bits, NULL, { write_writer, write_reader }, O(0, 1), O(0, 2), NULL, NULL },
    { "file", CHUNK, reset_file, NULL, { file_writer, file_reader }, O(0, 1), O(0, 2), NULL, NULL },
    { "relay", CHUNK, reset_bits, NULL, { relay_saver, relay_writer }, O(1, 0) | O(1, 1), 0, both_orders, NULL },
    { "release", CHUNK, reset_bits, NULL, { release_releaser, release_saver }, O(0, 0), O(1, 1), NULL, NULL },
    { "claim", CHUNK, reset_bits, NULL, { claim_half, claim_half }, O(0, 0) | O(1, 1), 0, both_orders, NULL },
    { "pages", PAGES, reset_pages, check_pages, { pages_0, pages_1 }, O(0, 0), O(1, 1), NULL, NULL },
    { "ones", PAGES, reset_pages, check_ones, { ones_0, ones_1 }, 0, O(1, 1), NULL, NULL },
    { "claims", CLUSTERS, hold_claims, NULL, { claims_holder, claims_waiter }, 0, 0, claims_overlaps, let_go_of_snapshot },
    { "reads", CLUSTERS, reset_snapshot, count_repeated, { disk_writer, snapshot_reader }, 0, 0, reads_overlaps, let_go_of_snapshot },
    { "frees", CLUSTERS, reset_snapshot, check_nothing_stored, { releaser, disk_writer }, 0, 0, frees_overlaps, let_go_of_snapshot },
};

int main(int argc, char **argv)
{
    static const struct option names[] = {
        { "seconds", required_argument, NULL, 's' }, { "seed", required_argument, NULL, 'r' }, { "only", required_argument, NULL, 'o' }, { 0 }
    };
    const char *only = NULL;
    for (int c; (c = getopt_long(argc, argv, "", names, NULL)) != -1; ) {
        if (c == 's')
            seconds_ns = (uint64_t)(atof(optarg) * (double)SECOND);
        else if (c == 'r')
            seed = strtoull(optarg, NULL, 0);
        else if (c == 'o')
            only = optarg;
        else
            return 2;
    }
    if (optind + 1 != argc) {
        fprintf(stderr, "usage: %s DIR [--seconds N] [--seed N] [--only NAME]\n", argv[0]);
        return 2;
    }
    directory = argv[optind];
    printf("seed %llu\n", (unsigned long long)seed);
    CHECK(pthread_barrier_init(&barrier, NULL, 2) == 0);
    for (unsigned n = 0; n < sizeof races / sizeof *races; n++)
        if (!only || !strcmp(only, races[n].name))
            run(&races[n]);
    puts("done");
    return 0;
}
