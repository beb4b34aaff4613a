/* cbw.pml: the protocol of the write path, as a model for spin. check.py runs it, in several configurations.
 *
 * Guest writers, a reader of snapshots, a release, a spiller and a cut run against each other, step by step, in every order that there is:
 * writer.pml, reader.pml and store.pml, and the cut and the end here. Every access to something shared is a step of its own; what the
 * program does under one hold of a lock, or in one atomic instruction, is one d_step. I1 to I7 are the invariants at the top of csrc/cbw.c.
 *
 * What is asserted, by the names that check.py shows:
 *   a_snapshot_lied     a reader saw something else than both words at its snapshot's cut, and did not raise
 *   the_guest_lost      an acknowledged write is not on the source, or one that failed touched it
 *   a_slot_leaked       everything is released and everybody is done, and a slot of memory or file is not free
 *   freed_twice         a slot was given back that was free, or that somebody still had pinned (I5)
 *   dirty_was_missed    a cluster changed between two cuts, and the dirty bitmap frozen by the second does not contain it (I6)
 *   policy_misfired     a snapshot broke or lost a cluster, or a write failed, without a timeout, or under another policy
 *   cause_is_missing    a broken snapshot without its first cause
 *   write_ran_ahead     I2 itself, looked at when the source changes
 *   store_is_confused   the store lacks what is saved and not released, or a cluster is both saved and lost
 * and that nobody waits for ever (I7): spin's invalid end states; and, in the configurations for it, that nobody runs in circles for
 * ever: spin's non-progress cycles, with weak fairness.
 *
 * How it is kept small, and why no error is lost by it:
 *   - The flags saved, zero, released, lost and broken only ever go from false to true (I4). Where the program looks at several of them in a
 *     row and goes one way if any is set, the model looks at all at once: it can do so at the moment of the last look when one was set, and
 *     at that of the first when none was. The same holds for passing over several clusters in a row that need nothing.
 *   - The source is written in two steps, a word each, but read in one: a reader in two steps that sees a wrong word sees it in one of its steps, and
 *     a reader in one step at that moment sees it too. The same holds for slots. Words never return to what they were.
 *   - Old data is read in the step that puts it into the map: later than in the program, so it is no older.
 *   - A slot that is freed is filled with garbage at once instead of when it is punched or used again: whoever still reads it is
 *     caught earlier.
 *   - A reader reads one cluster, any one: what it checks, it checks by cluster. The spiller takes any staged cluster, not only the oldest, and one
 *     at a time: what a batch has in common is only the hold of the lock. One spiller serves the stores of all snapshots: these have
 *     nothing in common but the writers.
 *   - When a snapshot breaks or is closed, its store is emptied at once; in the program the spiller does it, later.
 *   - Time is not modelled: a timeout, where TIMEOUTS allows it, can come at any moment of the wait. That covers writers that do not wait
 *     at all because an earlier one timed out.
 *   - Local variables go back to 0 when they are not needed any more.
 * Memory is sequentially consistent here. What the fences are for is shown the other way round: NO_WRITER_FENCE and NO_READER_FENCE
 * allow the very reorderings that they forbid, and spin then finds a lying snapshot.
 *
 * A name that stands alone in an #if and is marked "mutant" takes one check out, or puts one step in the wrong place; check.py
 * --mutants demands that spin finds an error for each.
 */

/* ---- configuration: each configuration of check.py sets some of these ---- */

#ifndef NC
#define NC 2            /* clusters of the disk, of two words each */
#endif
#ifndef NS
#define NS 1            /* snapshots; NS * NC is at most 4 */
#endif
#ifndef CUTS
#define CUTS 0          /* how many of them are cut while everything runs; the others are there from the start */
#endif
#ifndef NR
#define NR 2            /* memory slots of each snapshot's stage */
#endif
#ifndef NF
#define NF 2            /* file slots of each snapshot's fleecing image: 1 or 2; 0: there is none, nothing spills */
#endif
#ifndef READ
#define READ 1          /* is there a reader */
#endif
#ifndef RELEASE
#define RELEASE 0       /* which clusters may be released: bits by snapshot and cluster */
#endif
#ifndef TIMEOUTS
#define TIMEOUTS 0      /* a wait for room may end by itself */
#endif
#ifndef HANG
#define HANG 0          /* the fleecing storage may hang for ever; without TIMEOUTS, writers may then wait for room for ever (and nobody else) */
#endif
#ifndef PROGRESS
#define PROGRESS 0      /* for the search for circles: spills do not fail, or they would be tried again for ever */
#endif
#ifndef CLOSE
#define CLOSE 0         /* the first snapshot is closed while everything runs (after the cuts, if there are any) */
#endif
#ifndef FINE
#define FINE 0          /* finer steps of the writers: see writer.pml */
#endif
#ifndef INCREMENTAL
#define INCREMENTAL 0   /* snapshots hold the dirty bitmap that their cut froze: what it does not contain is outside */
#endif
#define BREAK_SNAPSHOT 1
#define BREAK_GUEST_WRITE 2
#define LOSE_RANGE 3
#ifndef POLICY0
#define POLICY0 BREAK_SNAPSHOT
#endif
#ifndef POLICY1
#define POLICY1 POLICY0
#endif
#ifndef OLD0
#define OLD0 3          /* what clusters 0, 2 hold at first, and clusters 1, 3; 0 takes the way of zero clusters */
#endif
#ifndef OLD1
#define OLD1 4
#endif
#ifndef W0              /* which clusters the writers write, from and to, and which words of each: 1, 2, or 3 for both */
#define W0 0, 1, 3
#endif
#ifndef W1
#define W1 0, 1, 3
#endif

#define N (NS * NC)
#define SNAPSHOT(i) ((i) / NC)
#define CLUSTER(i) ((i) % NC)
#define POLICY(s) ((s) == 0 -> POLICY0 : POLICY1)
#define VALUE(w) ((w) + 1)      /* what writer w writes */
#define ACTORS (2 + READ + (RELEASE > 0) + (CUTS || CLOSE))

/* ---- what is asserted ---- */

#ifndef IGNORE_LEAKS
#define IGNORE_LEAKS 0  /* for mutants that leak as well as lie */
#endif
hidden byte a_snapshot_lied, the_guest_lost, a_slot_leaked = IGNORE_LEAKS, freed_twice = IGNORE_LEAKS, dirty_was_missed, policy_misfired,
            cause_is_missing, write_ran_ahead, store_is_confused;       /* only name what was violated: 0, unless it is to be ignored */
#define MUST(condition, name) assert((condition) || name)
#ifdef VISIBLE          /* only what can be seen from outside: for mutants, to see what comes of them */
#define INSIDE(condition, name) skip
#else
#define INSIDE(condition, name) MUST(condition, name)
#endif

/* ---- the state ---- */

byte src0[NC], src1[NC];                        /* the source: two words a cluster */
byte cut0[N], cut1[N];                          /* ghost: the source at each snapshot's cut */

bool live[NS];                                  /* on the disk's list */
bool broken[NS], ended[NS];
byte cause[NS];                                 /* the first cause; 0: none */
bool claimed[N], saved[N], zero[N], released[N], lost[N];       /* by snapshot and cluster */
#if INCREMENTAL
bool dirty[NC], frozen[N];
byte last0[NC], last1[NC];                      /* ghost: the source when `dirty` was empty */
#define OUTSIDE(i) (!frozen[i])
#else
#define OUTSIDE(i) false
#endif
#define STOPPED(s) (broken[s] || ended[s])
#define DEAD(i) (STOPPED(SNAPSHOT(i)) || released[i] || lost[i] || OUTSIDE(i))   /* a read of it raises */
#define SETTLED(i) (saved[i] || DEAD(i))                                        /* a writer need do nothing about it */

bool closed;                                    /* the gate */
byte inside;

byte finished;                                  /* actors that are done */
bool failed[2];                                 /* writer w's write: an error */
bool late[2];                                   /* writer w waited for cbw_timeout in all */
hidden byte tmp;                                /* of use within a d_step only */

#include "store.pml"
#include "writer.pml"
#include "reader.pml"

/* ---- the cut, and the end of a snapshot ---- */

#if CUTS || CLOSE
inline install(s)       /* within a d_step: the gate keeps all writers out, and nobody else knows the snapshot yet */
{
  tmp = 0;
  do
  :: tmp < NC ->
     cut0[s * NC + tmp] = src0[tmp]; cut1[s * NC + tmp] = src1[tmp];
#if INCREMENTAL
     MUST(dirty[tmp] || (src0[tmp] == last0[tmp] && src1[tmp] == last1[tmp]), dirty_was_missed);
     last0[tmp] = src0[tmp]; last1[tmp] = src1[tmp];
     frozen[s * NC + tmp] = dirty[tmp]; dirty[tmp] = false;
#endif
     tmp++
  :: else -> break
  od;
  live[s] = true
}

proctype Cutter()
{
  byte s = NS - CUTS, c;
  do
  :: s < NS ->
     closed = true;
#ifndef NO_WAIT_FOR_WRITERS /* mutant */
     inside == 0;
#endif
#ifdef OPEN_TOO_EARLY   /* mutant */
     closed = false;
#endif
     d_step { install(s) };
     d_step { closed = false; s++ }
  :: else -> break
  od;
#if CLOSE
  ended[0] = true;
  closed = true; inside == 0; live[0] = false; closed = false;
#ifndef NO_WAKE_AT_CLOSE /* mutant */
  d_step { abort_store(0, c) };
#endif
#endif
  skip;
  d_step { finished++; s = 0 }
}
#endif

/* ---- the end: everybody is done. What is left is released, and then nothing may be left. ---- */

proctype Finisher()
{
  byte i;
#if HANG
end_wait:
#endif
  d_step {
    (finished == ACTORS && (!spilling || hung)) ->
    do
    :: i < N ->
       INSIDE(!(saved[i] && lost[i]), store_is_confused);
       MUST(!lost[i] || (POLICY(SNAPSHOT(i)) == LOSE_RANGE && (late[0] || late[1])), policy_misfired);
       MUST(!broken[SNAPSHOT(i)] || (POLICY(SNAPSHOT(i)) == BREAK_SNAPSHOT && (late[0] || late[1])), policy_misfired);
       MUST(!broken[SNAPSHOT(i)] || cause[SNAPSHOT(i)], cause_is_missing);
       if :: !released[i] -> forget(i) :: else -> skip fi;     /* what was released before must be gone by now */
       i++
    :: else -> break
    od;
    i = 0;
    do
    :: i < NC ->
       MUST(!failed[0] || (src0[i] != VALUE(0) && src1[i] != VALUE(0)), the_guest_lost);
       MUST(!failed[1] || (src0[i] != VALUE(1) && src1[i] != VALUE(1)), the_guest_lost);
       i++
    :: else -> break
    od;
    MUST(!failed[0] || (late[0] && (POLICY0 == BREAK_GUEST_WRITE || POLICY1 == BREAK_GUEST_WRITE)), policy_misfired);
    MUST(!failed[1] || (late[1] && (POLICY0 == BREAK_GUEST_WRITE || POLICY1 == BREAK_GUEST_WRITE)), policy_misfired);
    everything_is_free(i)
  }
}

init
{
  d_step {
    tmp = 0;
    do
    :: tmp < NC ->
       src0[tmp] = (tmp % 2 -> OLD1 : OLD0); src1[tmp] = src0[tmp];
#if INCREMENTAL
       last0[tmp] = src0[tmp]; last1[tmp] = src1[tmp];
#endif
       tmp++
    :: else -> break
    od;
    tmp = 0;
    do
    :: tmp < NS -> room[tmp] = NR; live[tmp] = (tmp < NS - CUTS); tmp++
    :: else -> break
    od;
    tmp = 0;
    do
    :: tmp < (NS - CUTS) * NC -> cut0[tmp] = src0[CLUSTER(tmp)]; cut1[tmp] = src1[CLUSTER(tmp)]; tmp++
    :: else -> break
    od
  };
  atomic {
    run Writer(0, W0);
    run Writer(1, W1);
#if NF
    run Spiller();
#endif
#if RELEASE
    run Releaser();
#endif
#if CUTS || CLOSE
    run Cutter();
#endif
#if READ
    run Reader();
#endif
    run Finisher()
  }
}
