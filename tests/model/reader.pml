/* reader.pml: a read of a snapshot, without any lock of the writers, and a release. Part of cbw.pml. */

#if READ

/* What raises after the source was read, and after the store was read (a cluster that is saved is never lost). */
#ifdef NO_SECOND_LOOK_AT_BROKEN /* mutants */
#define SECOND_LOOK (released[i] || lost[i] || OUTSIDE(i))
#elif defined(NO_SECOND_LOOK_AT_LOST)
#define SECOND_LOOK (STOPPED(SNAPSHOT(i)) || released[i] || OUTSIDE(i))
#elif defined(NO_SECOND_LOOK_AT_RELEASED)
#define SECOND_LOOK (STOPPED(SNAPSHOT(i)) || lost[i] || OUTSIDE(i))
#else
#define SECOND_LOOK DEAD(i)
#endif
#ifdef NO_RELEASED_AFTER_STORE
#define LOOK_AFTER_STORE STOPPED(SNAPSHOT(i))
#elif defined(NO_STOPPED_AFTER_STORE)
#define LOOK_AFTER_STORE released[i]
#else
#define LOOK_AFTER_STORE (STOPPED(SNAPSHOT(i)) || released[i])
#endif

inline end_of_read()    /* within a d_step */
{
  MUST(raised || (a == cut0[i] && b == cut1[i]), a_snapshot_lied);
  MUST(!(raised && broken[SNAPSHOT(i)]) || cause[SNAPSHOT(i)], cause_is_missing);
  finished++; i = 0; a = 0; b = 0; p = 0; raised = false
}

proctype Reader()
{
  byte i, a, b, p;
  bool raised;
#ifdef READS
  i = READS;
#else
  if
  :: i = 0
#if N > 1
  :: i = 1
#endif
#if N > 2
  :: i = 2
#endif
#if N > 3
  :: i = 3
#endif
  fi;
#endif
  live[SNAPSHOT(i)] || ended[SNAPSHOT(i)];
  if
  :: DEAD(i) -> raised = true; goto done
  :: else -> skip
  fi;
  if
  :: saved[i] -> goto store
  :: else -> skip
  fi;
  d_step { a = src0[CLUSTER(i)]; b = src1[CLUSTER(i)] };
  /* here is the full fence, and then the second look (I3) */
#ifdef NO_SECOND_LOOK   /* mutant */
  goto done;
#elif defined(NO_READER_FENCE) /* mutant: what the second look sees is older than the data */
  if
  :: SECOND_LOOK -> raised = true; goto done
  :: !(SECOND_LOOK) && saved[i] -> goto store
  :: else -> d_step { a = src0[CLUSTER(i)]; b = src1[CLUSTER(i)] }; goto done
  fi;
#elif defined(NO_SECOND_LOOK_AT_SAVED) /* mutant */
  if
  :: SECOND_LOOK -> raised = true; goto done
  :: else -> goto done
  fi;
#else
  if
  :: SECOND_LOOK -> raised = true; goto done
  :: !(SECOND_LOOK) && saved[i] -> goto store
  :: else -> goto done
  fi;
#endif

store:
  skip;
  d_step {
    a = 0; b = 0; p = 0;
    if
    :: zero[i] -> skip
    :: else ->
       p = place[i];
       if
       :: !p -> INSIDE(LOOK_AFTER_STORE, store_is_confused); a = GARBAGE
#ifndef NO_PIN          /* mutant */
       :: IS_RAM(p) -> pins[p - 1]++
#endif
       :: else -> skip
       fi
    fi
  };
  if
  :: IS_RAM(p) ->
     d_step { a = ram0[p - 1]; b = ram1[p - 1] };
#ifndef NO_PIN
     d_step { unpin((p - 1)) }
#endif
#if NF
  :: IS_FILE(p) -> d_step { a = file0[p - FILE(0)]; b = file1[p - FILE(0)] }
#endif
  :: else -> skip
  fi;
  if
  :: LOOK_AFTER_STORE -> raised = true
  :: else -> skip
  fi;

done:
  skip;
  d_step { end_of_read() }
}
#endif

#if RELEASE
proctype Releaser()     /* a backup has copied a cluster, and maybe others later */
{
  byte i;
  do
  :: i < N && !(RELEASE & (1 << i)) -> i++
  :: i < N && (RELEASE & (1 << i)) && (live[SNAPSHOT(i)] || ended[SNAPSHOT(i)]) ->
#ifdef FREE_BEFORE_RELEASED /* mutant */
     d_step { forget(i) };
     released[i] = true;
#elif defined(NO_RELEASE_FENCE) /* mutant: what the look sees is older than the mark */
     if
     :: saved[i] -> released[i] = true; d_step { forget(i) }
     :: else -> released[i] = true
     fi;
#else
     released[i] = true;
     /* a fence: either a writer that is saving it sees the mark after it set saved, and frees it, or I see saved */
     if
#ifndef NO_FREE         /* mutant */
     :: saved[i] -> d_step { forget(i) }
#endif
     :: else -> skip
     fi;
#endif
     i++
  :: i == N -> break
  od;
  skip;
  d_step { finished++; i = 0 }
}
#endif
