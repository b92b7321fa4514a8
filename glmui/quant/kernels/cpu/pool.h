/* A small pool of threads that share out the items of one job at a time.
 *
 * Between the layers of one token a helper waits some tens of microseconds, so it spins that long before it
 * sleeps. Items are handed out in pieces that shrink towards the end: a thread whose core is busy with
 * another program takes fewer of them, and the caller never waits for a helper that has not begun.
 */
#ifndef GLMUI_POOL_H
#define GLMUI_POOL_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

#ifdef _WIN32
#include <windows.h>
typedef SRWLOCK Mutex;
typedef CONDITION_VARIABLE Condition;
typedef HANDLE Thread;
#define mutex_init(m) InitializeSRWLock(m)
#define mutex_lock(m) AcquireSRWLockExclusive(m)
#define mutex_unlock(m) ReleaseSRWLockExclusive(m)
#define mutex_end(m) ((void)(m))
#define condition_init(c) InitializeConditionVariable(c)
#define condition_wait(c, m) SleepConditionVariableSRW(c, m, INFINITE, 0)
#define condition_wake(c) WakeAllConditionVariable(c)
#define condition_end(c) ((void)(c))
#define thread_join(t) (WaitForSingleObject(t, INFINITE), CloseHandle(t))
#define THREAD_RESULT DWORD WINAPI
#else
#include <pthread.h>
#include <time.h>
typedef pthread_mutex_t Mutex;
typedef pthread_cond_t Condition;
typedef pthread_t Thread;
#define mutex_init(m) pthread_mutex_init(m, NULL)
#define mutex_lock(m) pthread_mutex_lock(m)
#define mutex_unlock(m) pthread_mutex_unlock(m)
#define mutex_end(m) pthread_mutex_destroy(m)
#define condition_init(c) pthread_cond_init(c, NULL)
#define condition_wait(c, m) pthread_cond_wait(c, m)
#define condition_wake(c) pthread_cond_broadcast(c)
#define condition_end(c) pthread_cond_destroy(c)
#define thread_join(t) pthread_join(t, NULL)
#define THREAD_RESULT void *
#endif

enum { MAX_THREADS = 256, SPIN_MICROSECONDS = 50 };

typedef void (*Work)(void *job, int first, int last);

typedef struct {
    Mutex mutex;              /* guards everything below that is not atomic */
    Condition work, finished; /* there is a job, or an end; the last helper has left the job */
    Thread threads[MAX_THREADS];
    int helpers; /* running threads, the caller not counted */
    bool open;   /* a job may be joined */
    bool ending;
    Work function;
    void *job;
    int items, grain;
    atomic_int next;    /* the first item nobody has taken */
    atomic_uint inside; /* helpers at work in the job */
    atomic_uint jobs;   /* jobs so far, and one more at the end: what a waiting helper watches */
} Pool;

static inline double now_microseconds(void) {
#ifdef _WIN32
    LARGE_INTEGER ticks, per_second;
    QueryPerformanceCounter(&ticks);
    QueryPerformanceFrequency(&per_second);
    return 1e6 * (double)ticks.QuadPart / (double)per_second.QuadPart;
#else
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e6 * (double)t.tv_sec + 1e-3 * (double)t.tv_nsec;
#endif
}

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Wait a little, without sleeping, until `value` equals `number`, or does so no longer. */
static inline void spin(atomic_uint *value, unsigned number, bool equal) {
    const double end = now_microseconds() + SPIN_MICROSECONDS;
    do {
        for (int i = 0; i < 32; i++) {
            if ((atomic_load_explicit(value, memory_order_acquire) == number) == equal) return;
            relax();
        }
    } while (now_microseconds() < end);
}

/* Take pieces of the open job until none is left. */
static void pool_share(Pool *pool) {
    const int parts = 4 * (pool->helpers + 1);
    int first = atomic_load(&pool->next);
    while (first < pool->items) {
        int count = (pool->items - first) / parts;
        count = count < pool->grain ? pool->grain : count;
        count = count > pool->items - first ? pool->items - first : count;
        if (atomic_compare_exchange_weak(&pool->next, &first, first + count)) {
            pool->function(pool->job, first, first + count);
            first = atomic_load(&pool->next);
        }
    }
}

static THREAD_RESULT pool_helper(void *argument) {
    Pool *pool = argument;
    unsigned seen = 0;
    mutex_lock(&pool->mutex);
    while (!pool->ending) {
        if (pool->open && seen != atomic_load(&pool->jobs)) {
            seen = atomic_load(&pool->jobs);
            atomic_fetch_add(&pool->inside, 1);
            mutex_unlock(&pool->mutex);
            pool_share(pool);
            mutex_lock(&pool->mutex);
            if (atomic_fetch_sub(&pool->inside, 1) == 1) condition_wake(&pool->finished);
        }
        const unsigned jobs = atomic_load(&pool->jobs);
        mutex_unlock(&pool->mutex);
        spin(&pool->jobs, jobs, false);
        mutex_lock(&pool->mutex);
        while (!pool->ending && atomic_load(&pool->jobs) == jobs) condition_wait(&pool->work, &pool->mutex);
    }
    mutex_unlock(&pool->mutex);
    return 0;
}

static bool pool_add(Pool *pool) {
    Thread *thread = &pool->threads[pool->helpers];
#ifdef _WIN32
    *thread = CreateThread(NULL, 0, pool_helper, pool, 0, NULL);
    return *thread != NULL;
#else
    return pthread_create(thread, NULL, pool_helper, pool) == 0;
#endif
}

static void pool_init(Pool *pool) {
    mutex_init(&pool->mutex);
    condition_init(&pool->work);
    condition_init(&pool->finished);
    pool->helpers = 0;
    pool->open = pool->ending = false;
    atomic_init(&pool->next, 0);
    atomic_init(&pool->inside, 0);
    atomic_init(&pool->jobs, 0);
}

static void pool_stop(Pool *pool) {
    mutex_lock(&pool->mutex);
    pool->ending = true;
    atomic_fetch_add(&pool->jobs, 1);
    condition_wake(&pool->work);
    mutex_unlock(&pool->mutex);
    for (int i = 0; i < pool->helpers; i++) thread_join(pool->threads[i]);
    pool->helpers = 0;
    pool->ending = false;
}

static void pool_end(Pool *pool) {
    pool_stop(pool);
    condition_end(&pool->work);
    condition_end(&pool->finished);
    mutex_end(&pool->mutex);
}

/* Run on `threads` threads, the caller among them, or on as many as the system grants. */
static void pool_resize(Pool *pool, int threads) {
    threads = threads > MAX_THREADS ? MAX_THREADS : threads;
    if (threads < pool->helpers + 1) pool_stop(pool);
    while (pool->helpers < threads - 1 && pool_add(pool)) pool->helpers++;
}

/* function(job, first, last) over all items, at least `grain` at a time; returns when all are done.
 * One call at a time. */
static void pool_run(Pool *pool, Work function, void *job, int items, int grain) {
    if (pool->helpers == 0 || items <= grain) {
        if (items > 0) function(job, 0, items);
        return;
    }
    mutex_lock(&pool->mutex);
    pool->function = function, pool->job = job, pool->items = items, pool->grain = grain;
    atomic_store(&pool->next, 0);
    pool->open = true;
    atomic_fetch_add(&pool->jobs, 1);
    condition_wake(&pool->work);
    mutex_unlock(&pool->mutex);

    pool_share(pool);

    mutex_lock(&pool->mutex);
    pool->open = false; /* who comes now comes too late */
    mutex_unlock(&pool->mutex);
    spin(&pool->inside, 0, true);
    mutex_lock(&pool->mutex);
    while (atomic_load(&pool->inside) > 0) condition_wait(&pool->finished, &pool->mutex);
    mutex_unlock(&pool->mutex);
}

#endif
