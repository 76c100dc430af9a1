// A few threads that run one function together and meet at barriers. Between two meetings lie microseconds, so they spin;
// who waits longer gives the processor away, because another process may have taken it from the one waited for.
#pragma once
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <unistd.h>

enum { MOST_THREADS = 64, SPINS_IN_STEP = 4000, SPINS_BETWEEN_STEPS = 20000 };

typedef void (*Work)(void *argument, int thread, int threads);

static struct {
    pthread_mutex_t busy, lock;  // busy: held while a step runs; lock: guards sleeping
    pthread_cond_t wake;
    int workers;  // started so far, as threads 1, 2, …
    pid_t process;
    Work work;
    void *argument;
    _Atomic uint32_t order;  // a step's number · 256 + its threads: workers read both at once
    uint32_t hired[MOST_THREADS];  // the order that was standing when each worker was started
    _Atomic int sleeping;
    _Atomic int arrived;
    _Atomic uint32_t meeting;
} pool = {.busy = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static inline void rest(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Nobody passes before all `threads` have come.
static void meet(int threads) {
    if (threads == 1) return;
    uint32_t now = atomic_load_explicit(&pool.meeting, memory_order_acquire);
    if (atomic_fetch_add_explicit(&pool.arrived, 1, memory_order_acq_rel) == threads - 1) {
        atomic_store_explicit(&pool.arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&pool.meeting, now + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&pool.meeting, memory_order_acquire) == now; spins++)
        if (spins < SPINS_IN_STEP)
            rest();
        else
            sched_yield();
}

static void *serve(void *which) {
    int thread = (int)(intptr_t)which;
    uint32_t seen = pool.hired[thread];
    for (;;) {
        int spins = 0;
        while (atomic_load_explicit(&pool.order, memory_order_acquire) == seen) {
            if (spins++ < SPINS_BETWEEN_STEPS) {
                rest();
                continue;
            }
            pthread_mutex_lock(&pool.lock);
            atomic_fetch_add(&pool.sleeping, 1);
            while (atomic_load(&pool.order) == seen) pthread_cond_wait(&pool.wake, &pool.lock);
            atomic_fetch_sub(&pool.sleeping, 1);
            pthread_mutex_unlock(&pool.lock);
        }
        seen = atomic_load(&pool.order);
        int threads = seen % 256;
        if (thread < threads) {
            pool.work(pool.argument, thread, threads);
            meet(threads);
        }
    }
    return NULL;
}

// As many workers as are wanted and can be started. A fork leaves them behind.
static int hire(int wanted) {
    if (pool.process != getpid()) {
        pool.process = getpid();
        pool.workers = 0;
        atomic_store(&pool.arrived, 0);
        atomic_store(&pool.sleeping, 0);
    }
    while (pool.workers < wanted) {
        pthread_t thread;
        int next = pool.workers + 1;
        pool.hired[next] = atomic_load(&pool.order);
        if (pthread_create(&thread, NULL, serve, (void *)(intptr_t)next)) break;
        pthread_detach(thread);
        pool.workers = next;
    }
    return pool.workers < wanted ? pool.workers : wanted;
}

// Run work(argument, thread, threads) on `threads` threads, this one being thread 0. Where another step has the workers, or
// none can be started, this thread does it alone.
static void run_together(Work work, void *argument, int threads) {
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (threads <= 1 || pthread_mutex_trylock(&pool.busy)) {
        work(argument, 0, 1);
        return;
    }
    threads = 1 + hire(threads - 1);
    pool.work = work;
    pool.argument = argument;
    atomic_store(&pool.order, (atomic_load(&pool.order) / 256 + 1) * 256 + threads);
    if (atomic_load(&pool.sleeping)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.lock);
    }
    work(argument, 0, threads);
    meet(threads);
    pthread_mutex_unlock(&pool.busy);
}
