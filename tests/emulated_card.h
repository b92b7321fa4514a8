/* A card made of a processor: what CUDA gives the kernels beside the language, so that the very same .cu can be
 * compiled by a C++ compiler and tested where there is no card. device.cuh includes this; emulated_card.py builds it.
 *
 * Blocks run one after another. The threads of a block are fibers: each runs until it has to wait for others, in
 * __syncthreads or where lanes exchange values, and goes on once all of them have come there; a warp goes as far as it
 * can before the next one begins. Whatever a card would punish by a hang or by chance is an error, told in words:
 *   - threads that wait at different barriers, or for one that has returned;
 *   - arguments that differ from the parameters in number or size;
 *   - writing beyond the dynamic shared memory of a launch;
 *   - touching memory that nobody has, as beyond a tensor of FencedModule.
 * Shared memory is full of NaN before each block, and the order of threads turns round from block to block, so that
 * what was never written, or is read or written without a barrier, shows in the results. */
#pragma once
#include <math.h> /* C's headers only, for every C++ compiler finds them, the stand-in of the launchers too */
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define INLINE inline
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
    word x, y, z;
};
struct alignas(8) uint2 {
    word x, y;
};
struct alignas(16) uint4 {
    word x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

template <class Number> Number min(Number a, Number b) { return b < a ? b : a; }
template <class Number> Number max(Number a, Number b) { return a < b ? b : a; }

namespace card {

enum { WARP = 32, MOST_THREADS = 1024, MOST_SHARED = 48 << 10, BEYOND = 4 << 10, STACK = 128 << 10 };
enum { POISON = 0xff }; /* in every byte: NaN as a float, a half or a bfloat16, -1 as an integer */
enum State { READY, WAITS_FOR_WARP, WAITS_FOR_BLOCK, RETURNED };

struct Thread {
    uint3 place;
    word number, size_of_warp;
    State state;
    const char *where; /* it waits */
    word exchanged[2]; /* what it shows the other lanes: by turns, for they may be one exchange behind, not two */
    word turn;
    bool begun;
    jmp_buf here;
    ucontext_t start;
};

static Thread threads[MOST_THREADS];
static Thread *volatile running;
static jmp_buf scheduler;
static uint3 grid, block, place_of_block;
static word thread_count;
static void (*kernel)(const void *arguments); /* of the launch */
static const void *kernel_arguments;
static volatile sig_atomic_t faulted;
static char message[400];

/* Shared memory: the dynamic part, and the arrays that kernels declare, each known from its first use on. */
static struct alignas(16) {
    char bytes[MOST_SHARED + BEYOND];
} dynamic;
static struct {
    void *memory;
    size_t size;
} arrays[64];
static word array_count;

static bool remember(void *memory, size_t size) {
    arrays[array_count++] = {memory, size};
    memset(memory, POISON, size);
    return true;
}

template <class Array> Array &array() {
    alignas(16) static Array memory;
    static const bool known = remember(&memory, sizeof memory);
    (void)known;
    return memory;
}

static void poison() {
    memset(dynamic.bytes, POISON, sizeof dynamic.bytes);
    for (word i = 0; i < array_count; i++) memset(arrays[i].memory, POISON, arrays[i].size);
}

static bool is_beyond_clean(word size) {
    for (word i = size; i < sizeof dynamic.bytes; i++)
        if ((unsigned char)dynamic.bytes[i] != POISON) return false;
    return true;
}

/* Fibers. A context is made once for each; after that, the processor's state is all that has to be exchanged. */
static void leave() {
    if (!_setjmp(running->here)) _longjmp(scheduler, 1);
}

static void live() {
    for (;;) {
        kernel(kernel_arguments);
        running->state = RETURNED;
        leave();
    }
}

static void begin(Thread &thread) {
    static char *const stacks = (char *)malloc((size_t)MOST_THREADS * STACK);
    thread.begun = true;
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = stacks + (size_t)(&thread - threads) * STACK;
    thread.start.uc_stack.ss_size = STACK;
    makecontext(&thread.start, live, 0);
    setcontext(&thread.start);
}

static void enter(Thread &thread) {
    running = &thread;
    if (_setjmp(scheduler)) return;
    if (thread.begun) _longjmp(thread.here, 1);
    begin(thread);
}

static void wait(State state, const char *where) {
    running->state = state, running->where = where;
    leave();
}

/* Let threads go on that all wait in the same place; whether there was any to let go. */
static bool release(Thread *first, word count, State state) {
    for (word i = 0; i < count; i++)
        if (first[i].state != state || strcmp(first[i].where, first->where)) return false;
    for (word i = 0; i < count; i++) first[i].state = READY;
    return true;
}

static bool have_all_returned() {
    for (word i = 0; i < thread_count; i++)
        if (threads[i].state != RETURNED) return false;
    return true;
}

/* The threads stay where they are, and new ones are made for the next launch. */
static void abandon() {
    for (Thread &thread : threads) thread.begun = false;
}

static const char *stuck() {
    int length = snprintf(message, sizeof message, "block (%u, %u, %u) does not end:", place_of_block.x,
                          place_of_block.y, place_of_block.z);
    const char *last = "";
    for (word i = 0; i < thread_count && length < (int)sizeof message; i++) {
        const char *where = threads[i].state == RETURNED ? "has returned" : threads[i].where;
        if (strcmp(where, last))
            length += snprintf(message + length, sizeof message - length, " thread %u %s;", i, where);
        last = where;
    }
    abandon();
    return message;
}

/* Of a thread, while the processor's own protection stops it. */
static void fault(int) {
    faulted = true;
    _longjmp(scheduler, 1);
}

static const char *out_of_bounds() {
    faulted = false;
    snprintf(message, sizeof message, "thread %u of block (%u, %u, %u) left its memory", running->number,
             place_of_block.x, place_of_block.y, place_of_block.z);
    abandon();
    return message;
}

/* Until all lanes of a warp wait for other warps or have returned. Whether they are still within their memory. */
static bool run_warp(Thread *first, word count, bool backwards) {
    do {
        for (word i = 0; i < count; i++) {
            Thread &thread = first[backwards ? count - 1 - i : i];
            if (thread.state == READY) enter(thread);
            if (faulted) return false;
        }
    } while (release(first, count, WAITS_FOR_WARP));
    return true;
}

static const char *run_block(word shared, bool backwards) {
    poison();
    for (word i = 0; i < thread_count; i++) threads[i].state = READY, threads[i].turn = 0;
    const word warps = (thread_count + WARP - 1) / WARP;
    do {
        for (word i = 0; i < warps; i++) {
            Thread *const first = threads + WARP * (backwards ? warps - 1 - i : i);
            if (!run_warp(first, first->size_of_warp, backwards)) return out_of_bounds();
        }
    } while (release(threads, thread_count, WAITS_FOR_BLOCK));
    if (!have_all_returned()) return stuck();
    return is_beyond_clean(shared) ? nullptr : "a block wrote beyond its dynamic shared memory";
}

static const char *set_up(const word (&shape)[7]) {
    grid = {shape[0], shape[1], shape[2]}, block = {shape[3], shape[4], shape[5]};
    thread_count = block.x * block.y * block.z;
    if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535) return "no such grid";
    if (!thread_count || thread_count > MOST_THREADS || block.z > 64) return "no such block";
    if (shape[6] > MOST_SHARED) return "more shared memory than every card has";
    for (word i = 0; i < thread_count; i++) {
        threads[i].place = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
        threads[i].number = i;
        threads[i].size_of_warp = min<word>(WARP, thread_count - i / WARP * WARP);
    }
    return nullptr;
}

static const char *run_blocks(word shared) {
    for (word i = 0; i < grid.x * grid.y * grid.z; i++) {
        place_of_block = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
        if (const char *trouble = run_block(shared, i % 2)) return trouble;
    }
    return nullptr;
}

static const char *run(const word (&shape)[7]) {
    if (const char *trouble = set_up(shape)) return trouble;
    struct sigaction ours = {}, segment, bus; /* what others do about faults comes back afterwards */
    ours.sa_handler = fault, ours.sa_flags = SA_NODEFER;
    sigaction(SIGSEGV, &ours, &segment), sigaction(SIGBUS, &ours, &bus);
    const char *const trouble = run_blocks(shape[6]);
    sigaction(SIGSEGV, &segment, nullptr), sigaction(SIGBUS, &bus, nullptr);
    return trouble;
}

template <class Value> Value taken(const void *const *&next) { return *(const Value *)*next++; }

/* A launch as the driver takes it: the addresses of the arguments, and beside them their sizes, which a driver does not
 * know. Returns what went wrong, or null. */
template <class... Parameters>
const char *launch(void (*function)(Parameters...), const word (&shape)[7], const void *const *arguments,
                   const word *sizes, word count) {
    const word wanted[] = {sizeof(Parameters)...};
    if (count != sizeof...(Parameters)) return "the number of arguments is not that of the parameters";
    for (word i = 0; i < count; i++)
        if (sizes[i] != wanted[i]) {
            snprintf(message, sizeof message, "argument %u has %u bytes, its parameter %u", i, sizes[i],
                     wanted[i]);
            return message;
        }
    struct Call {
        Call(void (*function)(Parameters...), Parameters... values) { function(values...); }
    };
    auto call = [=] {
        const void *const *next = arguments;
        Call{function, taken<Parameters>(next)...}; /* in braces, the first one first */
    };
    kernel = [](const void *closure) { (*(const decltype(call) *)closure)(); };
    kernel_arguments = &call;
    return run(shape);
}

static word exchange(word value, word from) {
    Thread &me = *running;
    const word turn = me.turn++ % 2, lane = me.number % WARP;
    me.exchanged[turn] = value;
    wait(WAITS_FOR_WARP, "waits for the lanes of its warp");
    return from < me.size_of_warp ? (&me - lane + from)->exchanged[turn] : 0xffffffffu;
}

} // namespace card

#define VISIBLE __attribute__((visibility("default"))) /* all else is a library's own, whatever others are loaded */
#define KERNEL(name, parameters) KERNEL_IN_BLOCKS(card::MOST_THREADS, 1, name, parameters)
#define KERNEL_IN_BLOCKS(threads, blocks, name, parameters)                                                           \
    static void NAMED(name) parameters;                                                                               \
    extern "C" VISIBLE const char *NAMED(launch_##name)(const word (&shape)[7], const void *const *arguments,                 \
                                                const word *sizes, word count) {                                      \
        return shape[3] * shape[4] * shape[5] > threads                                                               \
                   ? "more threads than the kernel is made for"                                                       \
                   : card::launch(NAMED(name), shape, arguments, sizes, count);                                       \
    }                                                                                                                 \
    static void NAMED(name) parameters
#define SHARED(type, name, count)                                                                                     \
    struct name##_array {                                                                                             \
        type values[count];                                                                                           \
    };                                                                                                                \
    auto &name = card::array<name##_array>().values
#define DYNAMIC_SHARED(type, name) type *const name = (type *)card::dynamic.bytes

#define threadIdx (card::running->place)
#define blockIdx card::place_of_block
#define blockDim card::block
#define gridDim card::grid

#define IN_WORDS(line) #line
#define IN_LINE(line) "waits at __syncthreads in line " IN_WORDS(line)
#define __syncthreads() card::wait(card::WAITS_FOR_BLOCK, IN_LINE(__LINE__))
#define __syncwarp() card::exchange(0, 0)

INLINE void __threadfence() {}

template <class Number> Number atomicAdd(Number *to, Number what) {
    const Number before = *to;
    *to += what;
    return before;
}

INLINE float as_float(word bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
INLINE word as_word(float x) {
    word bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float lane_across(float x, int bits) {
    return as_float(card::exchange(as_word(x), card::running->number % card::WARP ^ (word)bits));
}
INLINE float lane_at(float x, int from) { return as_float(card::exchange(as_word(x), (word)from % card::WARP)); }

INLINE word masked(word bits, word mask, word turned) { return (bits & mask) ^ turned; }
INLINE uint4 read_once(const uint4 *from) { return *from; }

/* A half's exponent counts from 15, a float's from 127: 2^112 lies between, for its smallest numbers too. */
INLINE float from_half(half_t x) {
    const word sign = (word)(x.bits & 0x8000) << 16, rest = (word)(x.bits & 0x7fff) << 13;
    const bool finite = rest < 0x0f800000;
    return as_float(sign | (finite ? as_word(as_float(rest) * 0x1p112f) : rest | 0x7f800000));
}

INLINE half_t to_half(float x) {
    const word sign = as_word(x) >> 16 & 0x8000, rest = as_word(x) & 0x7fffffff;
    word half = (rest + 0xfff + (rest >> 13 & 1) - 0x38000000) >> 13;
    if (rest < 0x38800000) half = as_word(as_float(rest) + 0.5f) - 0x3f000000; /* multiples of 2^-24 */
    if (rest >= 0x477ff000) half = rest > 0x7f800000 ? 0x7fff : 0x7c00;
    return half_t{(unsigned short)(sign | half)};
}

INLINE float rsqrtf(float x) { return 1 / sqrtf(x); }
