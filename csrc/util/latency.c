/* latency.c: see latency.h. */
#define _GNU_SOURCE
#include "latency.h"

void latency_add(struct latency *latency, uint64_t ns)
{
    unsigned bucket = (unsigned)ns;
    if (ns >= 8) {
        unsigned top = 63 - (unsigned)__builtin_clzll(ns);
        bucket = MIN((top - 2) * 8 + (unsigned)(ns >> (top - 3) & 7), FL_LATENCY_BUCKETS - 1u);
    }
    atomic_fetch_add_explicit(&latency->counts[bucket], 1, memory_order_relaxed);
    uint_least64_t max = atomic_load_explicit(&latency->max, memory_order_relaxed);
    while (ns > max && !atomic_compare_exchange_weak_explicit(&latency->max, &max, ns, memory_order_relaxed, memory_order_relaxed))
        ;
}

uint64_t latency_read(struct latency *latency, uint64_t *counts, uint64_t *max)
{
    uint64_t sum = 0;
    *max = atomic_load_explicit(&latency->max, memory_order_relaxed);
    for (unsigned i = 0; i < FL_LATENCY_BUCKETS; i++)
        sum += counts[i] = atomic_load_explicit(&latency->counts[i], memory_order_relaxed);
    return sum;
}

uint64_t fl_latency_bound(unsigned bucket)
{
    if (bucket >= FL_LATENCY_BUCKETS - 1)
        return UINT64_MAX;
    return bucket < 8 ? bucket : ((UINT64_C(9) + bucket % 8) << (bucket / 8 - 1)) - 1;
}
