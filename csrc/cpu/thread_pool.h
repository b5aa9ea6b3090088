// SPDX-License-Identifier: MIT
// A small pool of persistent workers for kernels. Knows ranges of integers, nothing of what they
// mean.
//
// The caller works too, so a pool of n threads has n - 1 workers. A worker that finds no work spins
// for a few microseconds, then blocks; a job never waits for a worker that has not begun to help.
// Which thread runs an item never shows in a result: items write disjoint outputs.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tokenspeed::cpu {

// Runs body(context, begin, end) over chunks that cover [0, count), each item exactly once, and
// returns when all are done. Calls from several threads take turns.
// REQUIRES: 0 <= count < 2^32, chunk >= 1. A body must not call parallel_range.
void parallel_range(int64_t count, int64_t chunk, void (*body)(void*, int64_t, int64_t),
                    void* context);

// As above with body(begin, end), any callable.
template <typename Body>
inline void parallel_for(int64_t count, int64_t chunk, Body&& body) {
    if (count <= chunk) {
        if (count > 0) body(int64_t{0}, count);
        return;
    }
    parallel_range(
        count, chunk,
        [](void* context, int64_t begin, int64_t end) {
            (*static_cast<Body*>(context))(begin, end);
        },
        const_cast<void*>(static_cast<const void*>(&body)));
}

// At least `bytes` of the calling thread's own memory, 64-byte aligned, contents undefined. `slot`
// 0 to 3 names independent areas; an area is valid until the thread asks for the same slot again.
void* scratch(int slot, size_t bytes);

// Physical cores that this process may use: its affinity mask, threads of a core counted once.
int physical_cores();

// Threads that work on a job, the caller included. The first use starts physical_cores() threads.
int num_threads();

// REQUIRES: count >= 1, and no job runs.
void set_num_threads(int count);

}  // namespace tokenspeed::cpu
