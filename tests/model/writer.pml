/* writer.pml: a guest write, as csrc/cbw.c does it. Part of cbw.pml.

   Claims: where the two clusters are in one word of the bitmaps, the program claims both in one atomic instruction; FINE takes them for words of
   their own, and also tells the look at what is settled from the claim. */

#ifdef STALE_SNAPSHOTS  /* mutant: the list of snapshots is looked at once, and not again after a wait for room */
#define SEEN(s) seen[s]
#else
#define SEEN(s) live[s]
#endif
#define CONCERNS_ME(i) (SEEN(SNAPSHOT(i)) && CLUSTER(i) >= from && CLUSTER(i) <= to)
#if defined(BREAK_AFTER_WRITE) || defined(LOSE_AFTER_WRITE) || defined(NO_WRITER_FENCE)
#define LATER           /* mutants: flags that others see only after the write */
#define IN_HAND(i) (mine[i] && !SETTLED_FOR_ME(i) && !later[i])
#else
#define IN_HAND(i) (mine[i] && !SETTLED_FOR_ME(i))
#endif
#define SETTLED_FOR_ME(i) (saved[i] || lost[i] || released[i])

inline claim_one()
{
  if
#ifndef NO_CLAIM        /* mutant */
  :: claimed[i] -> skip
#endif
  :: else -> claimed[i] = true; mine[i] = true
  fi;
  i++
}

inline claim_all(s)     /* what nobody has saved or claimed; i is 0 before and after */
{
#if FINE
  i = s * NC;
  do
  :: i < (s + 1) * NC ->
     d_step { do :: i < (s + 1) * NC && (!CONCERNS_ME(i) || SETTLED(i)) -> i++ :: else -> break od };
     if
     :: i < (s + 1) * NC -> d_step { claim_one() }
     :: else -> skip
     fi
  :: else -> break
  od;
  i = 0
#else
  d_step {
    i = s * NC;
    do
    :: i < (s + 1) * NC && (!CONCERNS_ME(i) || SETTLED(i)) -> i++
    :: i < (s + 1) * NC && !(!CONCERNS_ME(i) || SETTLED(i)) -> claim_one()
    :: else -> break
    od;
    i = 0
  }
#endif
}

inline unclaim_one()
{
  if
  :: IN_HAND(i) -> claimed[i] = false
  :: else -> skip
  fi;
  mine[i] = false; i++
}

inline unclaim(s)       /* so that others can claim what I did not save; i is 0 before and after */
{
#if FINE
  i = s * NC;
  do
  :: i < (s + 1) * NC && mine[i] -> d_step { unclaim_one() }
  :: i < (s + 1) * NC && !mine[i] -> i++
  :: else -> break
  od;
  i = 0
#else
  d_step {
    i = s * NC;
    do
    :: i < (s + 1) * NC -> unclaim_one()
    :: else -> break
    od;
    i = 0
  }
#endif
}

inline see_that_i_may()         /* I2 */
{
  i = 0;
  do
  :: i < N -> INSIDE(!live[SNAPSHOT(i)] || CLUSTER(i) < from || CLUSTER(i) > to || SETTLED(i), write_ran_ahead); i++
  :: else -> break
  od;
  i = 0
}

inline see_that_it_is_there()   /* the write is acknowledged: its words are on the source, or those of a later write are */
{
  c = from;
  do
  :: c <= to ->
     MUST(!(words & 1) || src0[c] == VALUE(0) || src0[c] == VALUE(1), the_guest_lost);
     MUST(!(words & 2) || src1[c] == VALUE(0) || src1[c] == VALUE(1), the_guest_lost);
     c++
  :: else -> break
  od;
  c = 0
}

proctype Writer(byte w; byte from; byte to; byte words)
{
  byte s, i, c, a, b;
  byte missing;                 /* slots that I need and can't get from store s */
  byte credit[NS];              /* slots that each store promised me */
  bool mine[N];                 /* claims of mine */
  byte slot[N];                 /* RAM(slot) for each of them that is not saved yet */
#ifdef STALE_SNAPSHOTS
  bool seen[NS];
  d_step { seen[0] = live[0]; seen[NS - 1] = live[NS - 1] };
#endif
#ifdef LATER
  bool later[N];
#endif
#ifdef MARK_BEFORE_GATE /* mutant */
  c = from; do :: c <= to -> dirty[c] = true; c++ :: else -> c = 0; break od;
#endif

enter:
#if CUTS || CLOSE
#ifdef LOOK_BEFORE_COUNT /* mutant */
  !closed; inside++;
#else
  inside++;
  if
  :: closed -> inside--; !closed; goto enter
  :: else -> skip
  fi;
#endif
#endif

claim:
  if
  :: s == NS -> s = 0; goto save
  :: s < NS && !SEEN(s) -> s++; goto claim
  :: else -> skip
  fi;
  claim_all(s);
  skip;
  d_step { take_room(s, missing) };
  if
  :: !missing -> s++; goto claim
  :: missing && !late[w] -> goto back
  :: else -> missing = 0
  fi;
  if
#ifdef GUEST_GOES_ON    /* mutant */
  :: POLICY(s) == BREAK_GUEST_WRITE -> failed[w] = true; unclaim(s)
#else
  :: POLICY(s) == BREAK_GUEST_WRITE -> failed[w] = true; goto back
#endif
  :: POLICY(s) == LOSE_RANGE ->         /* the claims stay */
     i = s * NC;
     do
     :: i < (s + 1) * NC && mine[i] ->
#ifdef LOSE_AFTER_WRITE
        later[i] = true;
#else
        lost[i] = true;
#endif
        mine[i] = false; i++
     :: i < (s + 1) * NC && !mine[i] -> i++
     :: else -> break
     od;
     i = 0
  :: POLICY(s) == BREAK_SNAPSHOT ->
#ifdef BREAK_AFTER_WRITE
     i = s * NC;
     do
     :: i < (s + 1) * NC -> later[i] = later[i] || mine[i]; i++
     :: else -> break
     od;
     i = 0;
#elif defined(CAUSE_AFTER_MARK) /* mutant */
     broken[s] = true; cause[s] = VALUE(w);
     d_step { abort_store(s, i) };
#else
     d_step { if :: !broken[s] -> cause[s] = VALUE(w) :: else -> skip fi; broken[s] = true };
     d_step { abort_store(s, i) };
#endif
     unclaim(s)
  fi;
  s++;
  goto claim;

back:   /* no room, or the write fails: nobody waits with a claim, a slot or the gate in hand */
  c = s;                                /* of this one I have no slots */
  d_step { return_credit(s) };
#ifndef KEEP_CLAIMS     /* mutant */
  s = c;
  unclaim(s);
#endif
  s = 0;
  do
  :: s < c -> d_step { give_back(s) }; unclaim(s); s++
  :: else -> break
  od;
  c = 0;
  if
  :: failed[w] -> missing = 0; goto done
  :: else -> skip
  fi;
#ifdef KEEP_CLAIMS
  i = 0; do :: i < N -> mine[i] = false; i++ :: else -> i = 0; break od;
  skip;
#endif
#if (CUTS || CLOSE) && !defined(WAIT_INSIDE) /* mutant */
  inside--;
#endif
  d_step { need[w] = missing; missing = 0; enqueue(s, w) };
#if HANG && !TIMEOUTS
end_room:
#endif
  if
  :: granted[w] || aborted[s]
#if TIMEOUTS
  :: late[w] = true
#endif
  fi;
  d_step { dequeue(s, w); s = 0 };
#ifdef WAIT_INSIDE
  goto claim;
#else
  goto enter;
#endif

save:
  do
  :: s < NS ->
     i = s * NC;
     do
     :: i < (s + 1) * NC && mine[i] && slot[i] ->
#ifdef SAVED_TOO_EARLY  /* mutant */
        saved[i] = true;
#endif
        d_step {                        /* read the old data and put it into the map */
          tmp = slot[i] - 1; slot[i] = 0; a = src0[CLUSTER(i)]; b = src1[CLUSTER(i)];
          if
          :: a == 0 && b == 0 -> zero[i] = true; free_ram(tmp)
          :: !(a == 0 && b == 0) && aborted[s] -> free_ram(tmp); c = 1
          :: else -> ram0[tmp] = a; ram1[tmp] = b; ramstate[tmp] = MAPPED; place[i] = RAM(tmp)
          fi;
          a = 0; b = 0
        };
        if
        :: c -> c = 0                   /* the store is aborted: it is not saved */
#ifdef NO_WRITER_FENCE  /* mutant: the mark is made here, but seen by others after the write */
        :: else -> later[i] = true
#else
        :: else -> saved[i] = true      /* I1 */
#endif
        fi;
        i++
     :: i < (s + 1) * NC && !(mine[i] && slot[i]) -> i++
     :: else -> break
     od;
     /* a fence, and then: what was released while it was being saved is freed by me */
#ifndef NO_LOOK_AT_RELEASED /* mutant */
     skip;
     d_step { i = s * NC; do :: i < (s + 1) * NC && !(mine[i] && saved[i] && released[i]) -> i++ :: else -> break od };
     do
     :: i < (s + 1) * NC -> d_step { forget(i); i++; do :: i < (s + 1) * NC && !(mine[i] && saved[i] && released[i]) -> i++ :: else -> break od }
     :: else -> break
     od;
#endif
     i = 0;
     unclaim(s);
     s++
  :: else -> break
  od;
  s = 0;

#ifndef NO_WAIT_FOR_CLAIMS /* mutant */
others: /* wait for those who save clusters of my range */
  skip;
  d_step { do :: i < N && (!CONCERNS_ME(i) || SETTLED(i)) -> i++ :: else -> break od };
  if
  :: i == N -> skip
#ifdef LATER
  :: i < N && later[i] -> i++; goto others
#endif
#ifdef WAIT_IGNORES_LOST /* mutant */
  :: i < N && (saved[i] || STOPPED(SNAPSHOT(i)) || released[i] || OUTSIDE(i)) -> goto others
#else
  :: i < N && SETTLED(i) -> goto others
#endif
#ifdef NO_RESTART       /* mutant: a claim that is gone is taken for a cluster that is saved */
  :: i < N && !SETTLED(i) && !claimed[i] -> i++; goto others
#else
  :: i < N && !SETTLED(i) && !claimed[i] -> i = 0; goto claim
#endif
  fi;
  i = 0;
#endif

#if INCREMENTAL && !defined(MARK_BEFORE_GATE) && !defined(MARK_AFTER_GATE)
  c = from;
  do :: c <= to -> dirty[c] = true; c++ :: else -> break od;            /* I6 */
#endif
  /* here is the full fence */
  c = from;
  do
  :: c <= to && (words & 1) -> d_step { see_that_i_may(); src0[c] = VALUE(w) }; if :: words & 2 -> src1[c] = VALUE(w) :: else -> skip fi; c++
  :: c <= to && !(words & 1) -> d_step { see_that_i_may(); src1[c] = VALUE(w) }; c++
  :: else -> break
  od;
  c = 0;
#ifdef LATER
  do
  :: i < N ->
     if
#ifdef NO_WRITER_FENCE
     :: later[i] -> saved[i] = true
#elif defined(BREAK_AFTER_WRITE)
     :: later[i] -> cause[SNAPSHOT(i)] = VALUE(w); broken[SNAPSHOT(i)] = true
#else
     :: later[i] -> lost[i] = true
#endif
     :: else -> skip
     fi;
     later[i] = false; i++
  :: else -> break
  od;
  i = 0;
#endif
#ifdef MARK_AFTER_GATE  /* mutant */
  inside--;
  c = from; do :: c <= to -> dirty[c] = true; c++ :: else -> c = 0; break od;
  inside++;
#endif
  d_step { see_that_it_is_there() };
done:
  skip;
  d_step {
#if CUTS || CLOSE
    inside--;
#endif
#ifndef KEEP_GRANT      /* mutant */
    return_credit(s);
#endif
    s = 0; finished++
  }
}
